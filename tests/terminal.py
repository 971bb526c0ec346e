"""The real command on a pseudo-terminal, in a forked child of a warm process, and what somebody in front of it sees."""

import fcntl
import os
import pty
import select
import struct
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pyte

from regrow.launch.train import main as train
from regrow.trainer.process import die_with_parent
from tests.forking import Call, become_program, fork_programs
from tests.pool import context

__all__ = ["Session", "on_terminal"]

_ROWS = 30


class Session:
    """A command whose controlling terminal is one of ours, drawn by an emulator.

    Args:
        child: the command, which was just started.
        descriptor: our end of the terminal.
        columns: of the terminal.
    """

    def __init__(self, child: BaseProcess, descriptor: int, columns: int) -> None:
        self.child, self._descriptor = child, descriptor
        self.screen = pyte.HistoryScreen(columns, _ROWS, history=2000)
        self._stream = pyte.ByteStream(self.screen)
        self.received = b""

    def resize(self, columns: int) -> None:
        """As somebody who drags the window's corner; the kernel tells the command."""
        set_size(self._descriptor, columns)
        self.screen.resize(_ROWS, columns)

    def press_ctrl_c(self) -> float:
        """Has the terminal send SIGINT to the command and its ranks; returns when."""
        os.write(self._descriptor, b"\x03")
        return time.monotonic()

    def read(self, timeout_s: float = 0.05) -> bool:
        """Draws what has come; false once the command has ended and nothing is left."""
        if not select.select([self._descriptor], [], [], timeout_s)[0]:
            return self.child.exitcode is None
        try:
            data = os.read(self._descriptor, 1 << 16)
        except OSError:  # nobody has the other end open any more
            return False
        self.received += data
        self._stream.feed(data)
        return bool(data)

    def wait_for(self, seen: Callable[[str], bool], timeout_s: float = 60.0) -> float:
        """Until what can be seen is so; returns when it was."""
        deadline = time.monotonic() + timeout_s
        while not seen(self.text()):
            assert self.read(), f"it has ended:\n{self.text()}"
            assert time.monotonic() < deadline, f"never seen:\n{self.text()}"
        return time.monotonic()

    def end(self, timeout_s: float = 60.0) -> int:
        """Draws all that comes to the command's end; returns its exit code."""
        deadline = time.monotonic() + timeout_s
        while self.read():
            assert time.monotonic() < deadline, f"does not end:\n{self.text()}"
        self.child.join(timeout_s)
        assert self.child.exitcode is not None
        return self.child.exitcode

    def visible(self) -> str:
        """The screen."""
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def text(self) -> str:
        """The screen, and what is found by scrolling up."""
        above = ["".join(row[at].data for at in range(max(row, default=0) + 1)) for row in self.screen.history.top]
        return "\n".join(line.rstrip() for line in [*above, *self.screen.display]).rstrip()


def set_size(descriptor: int, columns: int) -> None:
    """Of a terminal."""
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, columns, 0, 0))


@contextmanager
def on_terminal(
    arguments: Sequence[str], cwd: Path, *, main: Callable[[], None] = train, columns: int = 100, **environ: str
) -> Iterator[Session]:
    """A command on a terminal; what is left of it at the end is killed.

    Args:
        arguments: of the command.
        cwd: the working directory.
        main: of the command, a function of a module.
        columns: of the terminal.
        environ: beside this process' own variables.
    """
    descriptor, other = pty.openpty()
    set_size(descriptor, columns)
    inherited = {n: v for n, v in os.environ.items() if n not in ("NO_COLOR", "FORCE_COLOR")}
    given = {**inherited, "TERM": "xterm-256color", **environ}
    child = context.Process(target=_run, args=(main, list(arguments), os.ttyname(other), cwd, given), daemon=False)
    child.start()
    try:
        session = Session(child, descriptor, columns)
        # Ours stays open until the child has the terminal, which would be at its end without anybody.
        session.wait_for(lambda _text: _leads(child.pid))
        os.close(other)
        yield session
    finally:
        if child.exitcode is None:
            assert child.pid is not None
            os.killpg(child.pid, 9)
        child.join()
        os.close(descriptor)


def _leads(pid: int | None) -> bool:
    """Whether a process has a terminal (its foreground group is known)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[5] == str(pid)


def _run(main: Callable[[], None], arguments: list[str], terminal: str, cwd: Path, environ: dict[str, str]) -> None:
    # The server that forked this process ends with the tests.
    die_with_parent(os.getppid())
    os.setsid()
    descriptor = os.open(terminal, os.O_RDWR)
    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)
    call = Call(main.__module__, ["regrow", *arguments], cwd, environ, main.__name__)
    become_program(call, [descriptor] * 3, prepare=fork_programs)
