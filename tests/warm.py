"""The real `regrow` command in a forked child of a warm process: about a second of the processor instead of five.

Its ranks are forks too (`tests.forking`). What a start itself does, such as what is on the path, is shown by
`tests.support.start`, which starts interpreters.
"""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from weakref import WeakSet, finalize

from regrow.trainer.process import die_with_parent
from tests.forking import Call, become_program, fork_programs
from tests.pool import context

__all__ = ["Command", "kill_all", "open_output", "regrow", "start"]

_started: "WeakSet[Command]" = WeakSet()


class Command:
    """What `subprocess.Popen` is for an interpreter, as far as tests use it.

    Args:
        call: the program.
    """

    def __init__(self, call: Call) -> None:
        descriptor, name = tempfile.mkstemp()
        os.close(descriptor)
        self._output = Path(name)
        finalize(self, self._output.unlink, missing_ok=True)
        # The command has children of its own, which only those that are no daemons may have.
        self._child = context.Process(target=_run, args=(call, self._output), daemon=False)
        self._child.start()
        assert self._child.pid is not None
        self.pid: int = self._child.pid
        _started.add(self)
        deadline = time.monotonic() + 30.0
        while self.poll() is None and _group(self.pid) != self.pid:
            assert time.monotonic() < deadline, "the child does not come up"
            time.sleep(0.001)

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._child.exitcode

    def poll(self) -> int | None:
        """See `returncode`."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended; subprocess.TimeoutExpired when it does not."""
        if not wait([self._child.sentinel], timeout):
            raise subprocess.TimeoutExpired("regrow", timeout or 0.0)
        self._child.join()
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """What it wrote to both streams, once it has ended; subprocess.TimeoutExpired when it does not."""
        self.wait(timeout)
        return self._output.read_text(errors="replace"), None

    def send_signal(self, number: int) -> None:
        """To the command alone."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """With SIGKILL, what it started included."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


def start(arguments: Sequence[str], cwd: Path, module: str = "regrow.launch.train", **environ: str) -> Command:
    """Starts a command, `regrow` if nothing else is said, in a session of its own."""
    return Command(Call(module, [module, *arguments], cwd, {**os.environ, **environ}))


def kill_all() -> None:
    """Whatever still runs of what was started here, paused ones included."""
    for command in list(_started):
        command.kill()


def regrow(
    arguments: Sequence[str],
    cwd: Path,
    timeout_s: float = 120.0,
    module: str = "regrow.launch.train",
    **environ: str,
) -> tuple[int, str]:
    """Runs a command, `regrow` if nothing else is said, to its end; returns exit code and output."""
    command = start(arguments, cwd, module, **environ)
    try:
        out, _ = command.communicate(timeout=timeout_s)
    finally:
        command.kill()
    assert command.returncode is not None
    return command.returncode, out


def _run(call: Call, output: Path) -> None:
    # The server that forked this process ends with the tests.
    die_with_parent(os.getppid())
    os.setsid()
    become_program(call, [os.open(os.devnull, os.O_RDONLY), *open_output(output)], prepare=fork_programs)


def open_output(path: Path) -> tuple[int, int]:
    """Descriptors of a file that receives a program's output and errors."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    return descriptor, descriptor
