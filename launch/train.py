"""`regrow`: one run, or a sweep; or one of the small commands that begin with a word of their own."""

import importlib
import os
import sys
from collections.abc import Callable

from regrow.launch.exit_code import ExitCode
from regrow.launch.run.acknowledge import Acknowledger, speaks_for_all
from regrow.launch.run.allocator import use_expandable_segments
from regrow.launch.run.signals import Interrupted, StopFlag, write_note
from regrow.launch.run.versions import own_version
from regrow.trainer.places import ensure_home
from regrow.trainer.process import PARENT_VARIABLE, die_with_parent, importing

__all__ = ["COMMANDS", "main"]

# `regrow WORD …`: the module's `main` is given what follows the word, and returns the exit code.
COMMANDS = {
    "doctor": "regrow.launch.commands.doctor",
    "explain": "regrow.launch.commands.explain",
}


def main() -> None:
    """The command's entry. Exit codes: 0 done, 1 failed, 2 bad input, 3 stopped and resumable."""
    flag = StopFlag()
    flag.install()
    if speaks_for_all():
        Acknowledger(flag).start()
    ensure_home()
    use_expandable_segments(os.environ)
    if PARENT_VARIABLE in os.environ:
        die_with_parent(int(os.environ.pop(PARENT_VARIABLE)))
    try:
        code = _run(sys.argv[1:], flag)
    except Interrupted as stop:
        print(f"stopped by {stop}; nothing was lost, give the same command again", file=sys.stderr)
        code = ExitCode.resumable
    if code in (ExitCode.failed, ExitCode.bad_input):
        # srun's own exit code may be that of a rank that it killed because another one had ended.
        write_note("REFUSED" if code == ExitCode.bad_input else "FAILED")
    sys.stdout.flush()
    sys.stderr.flush()
    # torch's threads can abort the interpreter's ordinary shutdown.
    os._exit(code)


def _run(arguments: list[str], flag: StopFlag) -> int:
    if "--version" in arguments:
        print(f"regrow {own_version()}")
        return ExitCode.done
    if arguments and arguments[0] in COMMANDS:
        command: Callable[[list[str]], int] = importlib.import_module(COMMANDS[arguments[0]]).main
        return command(arguments[1:])
    if {"--help", "-h"} & set(arguments):
        help_text: Callable[[dict[str, str]], str] = importlib.import_module("regrow.launch.commands.help").help_text
        print(help_text(COMMANDS), end="")
        return ExitCode.done
    with importing():
        # The handlers stand before Hydra and torch are imported, which takes seconds in which a signal may come.
        from regrow.launch.app import run_command

    return run_command(arguments, flag)


if __name__ == "__main__":
    main()
