"""The real `regrow` command, warm (see `tests.warm`), within limits and with or without root's privileges."""

import ctypes
import os
import resource
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from regrow.trainer.process import die_with_parent
from tests.forking import Call, become_program, fork_programs
from tests.pool import context
from tests.warm import open_output

__all__ = ["Ended", "run_command"]

# A command that maps more than this beyond what it starts with is reading something that does not end.
_ROOM_BYTES = 8 << 30
# CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH and CAP_FOWNER: with them permissions mean nothing.
_DROPPED = (1, 2, 3)
_PR_CAPBSET_DROP = 24
_CAPABILITY_VERSION = 0x20080522
_TIMED_OUT = -1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a command ended.

    Attributes:
        code: its exit code, negative for a signal.
        output: what it wrote to both streams.
    """

    code: int
    output: str

    @property
    def timed_out(self) -> bool:
        """Whether it was killed for taking too long."""
        return self.code == _TIMED_OUT

    @property
    def last_line(self) -> str:
        """Of the output."""
        return self.output.rstrip("\n").rpartition("\n")[2]

    def problems(self, *codes: int) -> list[str]:
        """What is wrong whatever the command was asked: it hangs, shows a traceback, fails without one sentence.

        Args:
            codes: the right exit codes.
        """
        if self.timed_out:
            return ["it hangs"]
        found = []
        if self.code not in codes:
            found.append(f"exit code {self.code} instead of {' or '.join(map(str, codes))}")
        if "Traceback (most recent call last)" in self.output:
            found.append("a traceback")
        if self.code != 0 and not self.last_line.startswith("error: "):
            found.append("the last line is no error")
        return found


def run_command(
    arguments: Sequence[str],
    log: Path,
    *,
    cwd: Path,
    environ: dict[str, str] | None = None,
    timeout_s: float = 60.0,
    privileged: bool = True,
    prepare: Callable[[], None] | None = None,
) -> Ended:
    """Runs `regrow ARGUMENTS` to its end.

    Args:
        arguments: the command line.
        log: receives both streams.
        cwd: the working directory.
        environ: instead of this process' own.
        timeout_s: after which the command and all that it started are killed.
        privileged: false takes the capabilities away that let root pass over permissions.
        prepare: called in the child before the command starts; must be picklable.
    """
    environ = dict(os.environ) if environ is None else environ
    # The command has children of its own, which only those that are no daemons may have.
    child = context.Process(
        target=_command, args=(list(arguments), log, cwd, environ, privileged, prepare), daemon=False
    )
    child.start()
    child.join(timeout_s)
    timed_out = child.is_alive()
    if timed_out and child.pid is not None:
        os.killpg(child.pid, signal.SIGKILL)
        child.join()
    code = child.exitcode
    assert code is not None, "a child that was waited for has an exit code"
    child.close()
    return Ended(code=_TIMED_OUT if timed_out else code, output=log.read_text(errors="replace"))


def _command(
    arguments: list[str],
    log: Path,
    cwd: Path,
    environ: dict[str, str],
    privileged: bool,
    prepare: Callable[[], None] | None,
) -> None:
    """The child's part; does not return."""

    def limit() -> None:
        most = _mapped_bytes() + _ROOM_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        if not privileged:
            drop_capabilities()
        # Before the ranks could inherit what is prepared here, which interpreters would not.
        fork_programs()
        if prepare is not None:
            prepare()

    # The server that forked this process ends with the tests.
    die_with_parent(os.getppid())
    os.setsid()
    call = Call("regrow.launch.train", ["regrow", *arguments], cwd, environ)
    become_program(call, [os.open(os.devnull, os.O_RDONLY), *open_output(log)], prepare=limit)


def _mapped_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")


def drop_capabilities() -> None:
    """Makes permissions count for this process as for any user, root though it may be."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    # Effective, permitted and inheritable, twice 32 bits of each.
    sets = (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capget failed")
    for capability in _DROPPED:
        # Else the ranks' interpreters, being root's, would get them back. Nobody but root has them, or may do this.
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
        for i in range(3):
            sets[i] &= ~(1 << capability)
    if libc.capset(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capset failed")
