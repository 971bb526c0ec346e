"""How a command ends, for whoever started it. Standard library only."""

from collections.abc import Iterable
from enum import IntEnum

__all__ = ["ExitCode", "gravest"]


class ExitCode(IntEnum):
    """The exit codes of `regrow`; the batch script of a Slurm job reads and gives the same.

    Attributes:
        done: finished, or nothing was left to do.
        failed: an error that is no user's.
        bad_input: refused; the same command would be refused again.
        resumable: stopped as asked; the same command goes on.
    """

    done = 0
    failed = 1
    bad_input = 2
    resumable = 3


_GRAVITY = (ExitCode.failed, ExitCode.bad_input, ExitCode.resumable, ExitCode.done)


def gravest(codes: Iterable[int]) -> ExitCode:
    """That of several runs together: failed, else bad input, else resumable, else done, as where there is none.

    Raises:
        ValueError: a number that is none of them.
    """
    return min((ExitCode(code) for code in codes), key=_GRAVITY.index, default=ExitCode.done)
