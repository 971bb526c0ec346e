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
    from regrow.launch.run import worker

    hooks = worker._hooks

    def with_sleep(*arguments: Any) -> list[Any]:
        from regrow.trainer.hook import Hook

        class Sleep(Hook):
            def step_start(self, trainer: Any) -> None:
                time.sleep(float(os.environ["SLOW_STEP_S"]))

        return [Sleep(), *hooks(*arguments)]

    worker._hooks = with_sleep  # type: ignore[assignment]
    train.main()


if __name__ == "__main__":
    main()
