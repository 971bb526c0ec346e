"""`regrow`: one run, or a sweep."""

import os
import sys
import traceback

from regrow.launch.run.signals import Interrupted, StopFlag, write_note
from regrow.trainer.process import PARENT_VARIABLE, die_with_parent

__all__ = ["main"]

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_RESUMABLE = 0, 1, 2, 3


def main() -> None:
    """The command's entry. Exit codes: 0 done, 1 failed, 2 bad input, 3 stopped and resumable."""
    flag = StopFlag()
    flag.install()
    from regrow.trainer.places import ensure_home

    ensure_home()
    if PARENT_VARIABLE in os.environ:
        die_with_parent(int(os.environ.pop(PARENT_VARIABLE)))
    try:
        code = _run(sys.argv[1:], flag)
    except Interrupted as stop:
        print(f"stopped by {stop}; nothing was lost, give the same command again", file=sys.stderr)
        code = EXIT_RESUMABLE
    if code in (EXIT_FAILED, EXIT_BAD_INPUT):
        # srun's own exit code may be that of a rank that it killed because another one had ended.
        write_note("REFUSED" if code == EXIT_BAD_INPUT else "FAILED")
    sys.stdout.flush()
    sys.stderr.flush()
    # torch's threads can abort the interpreter's ordinary shutdown.
    os._exit(code)


def _run(arguments: list[str], flag: StopFlag) -> int:
    if "--version" in arguments:
        from regrow.launch.run.versions import own_version

        print(f"regrow {own_version()}")
        return EXIT_DONE
    from regrow.launch.app import Application
    from regrow.launch.config.errors import describe

    full_error = "HYDRA_FULL_ERROR" in os.environ
    # Hydra prints and exits by itself unless this is set; errors are ours to explain.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    app = Application(flag, full_error=full_error)
    try:
        app.run(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else EXIT_BAD_INPUT
    except Exception as error:
        sentence = describe(error)
        if sentence is None or full_error:
            traceback.print_exc()
        if sentence is None:
            return EXIT_FAILED
        print(f"error: {sentence}", file=sys.stderr)
        return EXIT_BAD_INPUT
    finally:
        if not full_error:
            os.environ.pop("HYDRA_FULL_ERROR", None)
    return app.exit_code()


if __name__ == "__main__":
    main()
