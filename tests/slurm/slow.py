"""`regrow` whose steps take at least SLOW_STEP_S seconds each, for tests that must catch a run in the middle.

Training is the real one; a hook sleeps before each step. Started as a file, so that nothing is imported before the
command has installed its signal handlers.
"""

import os
import time
from typing import Any


def main() -> None:
    """The command."""
    from regrow.launch import train

    run = train._run

    def run_slowly(arguments: list[str], flag: Any) -> int:
        from regrow.launch.run import compose
        from regrow.launch.run.compose_hooks import compose_hooks
        from regrow.trainer.hook import Hook

        class Sleep(Hook):
            def step_start(self, trainer: Any) -> None:
                time.sleep(float(os.environ["SLOW_STEP_S"]))

        def with_sleep(*given: Any) -> list[Hook]:
            return [Sleep(), *compose_hooks(*given)]

        compose.compose_hooks = with_sleep  # type: ignore[attr-defined, assignment]
        return run(arguments, flag)

    # Replaced within the command, when its signal handlers stand.
    train._run = run_slowly
    train.main()


if __name__ == "__main__":
    main()
