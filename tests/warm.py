"""The real `regrow` command in a forked child of a warm process: about a second of the processor instead of five.

What a start itself does, such as what is on the path, is shown by `tests.support.start`, which starts an interpreter.
"""

import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from weakref import WeakSet, finalize

from regrow.trainer.process import die_with_parent
from tests.pool import context

__all__ = ["Command", "become_command", "kill_all", "regrow", "start"]

_started: "WeakSet[Command]" = WeakSet()


class Command:
    """What `subprocess.Popen` is for an interpreter, as far as tests use it.

    Args:
        arguments: of `regrow`.
        cwd: the working directory.
        environ: the whole environment.
    """

    def __init__(self, arguments: Sequence[str], cwd: Path, environ: dict[str, str]) -> None:
        descriptor, name = tempfile.mkstemp()
        os.close(descriptor)
        self._output = Path(name)
        finalize(self, self._output.unlink, missing_ok=True)
        # The command has children of its own, which only those that are no daemons may have.
        self._child = context.Process(target=_run, args=(list(arguments), self._output, cwd, environ), daemon=False)
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


def start(arguments: Sequence[str], cwd: Path, **environ: str) -> Command:
    """Starts `regrow` in a session of its own."""
    return Command(arguments, cwd, {**os.environ, **environ})


def kill_all() -> None:
    """Whatever still runs of what was started here, paused ones included."""
    for command in list(_started):
        command.kill()


def regrow(arguments: Sequence[str], cwd: Path, timeout_s: float = 120.0, **environ: str) -> tuple[int, str]:
    """Runs `regrow` to its end; returns exit code and output."""
    command = start(arguments, cwd, **environ)
    try:
        out, _ = command.communicate(timeout=timeout_s)
    finally:
        command.kill()
    assert command.returncode is not None
    return command.returncode, out


def become_command(arguments: Sequence[str], output: Path, cwd: Path, environ: dict[str, str]) -> None:
    """Makes this process, which was just forked, what a shell would have started; `regrow.launch.train.main` is next.

    Args:
        arguments: of `regrow`.
        output: receives both streams.
        cwd: the working directory.
        environ: the whole environment.
    """
    # What was imported before is no garbage; looking for it there would copy all of it.
    gc.freeze()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    # The server that forked this process ends with the tests.
    die_with_parent(os.getppid())
    sys.argv = ["regrow", *arguments]
    os.setsid()


def _run(arguments: list[str], output: Path, cwd: Path, environ: dict[str, str]) -> None:
    become_command(arguments, output, cwd, environ)
    from regrow.launch.train import main

    main()
