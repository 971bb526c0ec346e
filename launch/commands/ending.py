"""How the small commands end: with their exit code, and with one line where the input is bad."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import NoReturn

from regrow.launch.config.errors import EXPLAINED
from regrow.launch.exit_code import ExitCode

__all__ = ["SAYS_WHY", "end_with", "exit_code_of"]

# Errors whose message is a sentence for the user.
SAYS_WHY = (*EXPLAINED, OSError, subprocess.TimeoutExpired)


def end_with(work: Callable[[], int], *, as_json: bool = False) -> NoReturn:
    """Exits with what `work` gives; with `ExitCode.bad_input` and a line on stderr where an error explains itself.

    Args:
        work: the command; it prints to stdout.
        as_json: an error is printed to stdout too, as `{"error": …}`.
    """
    sys.exit(exit_code_of(work, as_json=as_json))


def exit_code_of(work: Callable[[], int], *, as_json: bool = False) -> int:
    """What `end_with` exits with.

    Args:
        work: the command; it prints to stdout.
        as_json: an error is printed to stdout too, as `{"error": …}`.
    """
    try:
        code = work()
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads the output (`head`) has seen enough; what is buffered must go somewhere at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except SAYS_WHY as error:
        if as_json:
            print(json.dumps({"error": str(error)}))
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.bad_input
    return code
