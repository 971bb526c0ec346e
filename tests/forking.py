"""Our own programs as forks of a warm process, where a process would start an interpreter for them.

A rank, or a run of a sweep here, takes five seconds of the processor to import what this process has imported already.
Its command line, streams, environment, parent and end are those of a program that was started.
"""

import ctypes
import gc
import importlib
import inspect
import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, process, resource_tracker
from pathlib import Path
from typing import Any, NoReturn

from regrow.trainer.process import die_with_parent

__all__ = ["Call", "become_program", "fork_programs"]

# From linux/prctl.h.
_PR_SET_CHILD_SUBREAPER = 36
# Of a request: the environment is the most of it.
_LARGEST = 1 << 20
_MOST_FILES = 4096
# What is started again and again; others are started as they are.
_PROGRAMS = (
    "regrow.launch.run.worker",
    "regrow.launch.train",
    "regrow.launch.commands.evaluate",
    "regrow.launch.commands.generate",
)
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
# How long the fork may take, on a machine that does much else.
_FORKED_S = 60.0
_start_program = subprocess.Popen._execute_child  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Program:
    """What is to be started; its three streams travel beside it."""

    command: Sequence[str]
    module: str
    cwd: str
    environ: Mapping[str, str]
    leads_session: bool


def fork_programs() -> None:
    """From now on `subprocess.Popen` forks what `python -P … -m regrow.…` names, in this process.

    To be called while it has one thread, no handlers of signals and no children.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LARGEST)
    # What is forked below for us becomes our child when the one between us ends.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    command = os.getpid()
    if os.fork() == 0:
        ours.close()
        _serve(theirs, command)
    theirs.close()
    ours.settimeout(_FORKED_S)

    def execute_child(self: Any, *args: Any, **more: Any) -> None:
        given = inspect.signature(_start_program).bind(self, *args, **more).arguments
        module = _own_module(given["args"])
        if os.getpid() != command or module is None or given["pass_fds"] or given["preexec_fn"] is not None:
            _start_program(self, *args, **more)
            return
        environ = os.environ if given["env"] is None else given["env"]
        program = _Program(
            list(given["args"]),
            module,
            os.fspath(given["cwd"] or Path.cwd()),
            dict(environ),
            given["start_new_session"],
        )
        streams = [
            given[name] if given[name] != -1 else number
            for number, name in enumerate(("p2cread", "c2pwrite", "errwrite"))
        ]
        socket.send_fds(ours, [pickle.dumps(program)], streams)
        self.pid = int(ours.recv(32))
        self._child_created = True
        self._close_pipe_fds(
            *(given[n] for n in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite"))
        )

    vars(subprocess)["Popen"]._execute_child = execute_child


def _own_module(command: Any) -> str | None:
    """The module that a command line starts, where it is ours and nothing else is asked of the interpreter."""
    if isinstance(command, str | bytes | os.PathLike):
        return None
    words = [os.fspath(word) for word in command]
    flags = words[1 : words.index("-m")] if "-m" in words else ["-c"]
    if words[0] != sys.executable or not set(flags) <= {"-P", "-u"}:
        return None
    module = words[len(flags) + 2]
    return module if module in _PROGRAMS else None


def _serve(requests: socket.socket, command: int) -> None:
    """Forks what the command asks for, until that ends."""
    die_with_parent(command)
    for number in _STOPS:
        # They are for the command, whose group this process is in.
        signal.signal(number, signal.SIG_IGN)
    while True:
        data, streams, _flags, _address = socket.recv_fds(requests, _LARGEST, 3)
        if not data:
            os._exit(0)
        between = os.fork()
        if between == 0:
            if os.fork() == 0:
                _become(pickle.loads(data), streams, requests, command)
            os._exit(0)
        os.waitpid(between, 0)
        for descriptor in streams:
            os.close(descriptor)


def _become(program: _Program, streams: Sequence[int], requests: socket.socket, command: int) -> None:
    """This process, just forked, is the program from here on; does not return."""
    while os.getppid() != command:
        os.sched_yield()
    if program.leads_session:
        os.setsid()
    _set_command_line(program.command)
    requests.send(str(os.getpid()).encode())
    at = program.command.index("-m")
    become_program(
        Call(program.module, program.command[at + 1 :], program.cwd, program.environ), streams,
        unbuffered="-u" in program.command[:at],
    )  # fmt: skip


@dataclass(frozen=True)
class Call:
    """A program as an interpreter is given it.

    Attributes:
        module: which holds it.
        argv: `sys.argv`.
        cwd: the working directory.
        environ: the whole environment.
        function: of the module, without arguments; what it returns is the exit code.
    """

    module: str
    argv: Sequence[str]
    cwd: str | Path
    environ: Mapping[str, str]
    function: str = "main"


def become_program(
    call: Call, streams: Sequence[int], *, prepare: Callable[[], None] = lambda: None, unbuffered: bool = False
) -> NoReturn:
    """Makes this process, which was just forked, what an interpreter would be that was started for a program.

    Args:
        call: the program.
        streams: descriptors of its input, output and errors; all others are closed.
        prepare: called last before the program is.
        unbuffered: as `python -u` is.
    """
    code = 1
    try:
        # What was imported before is no garbage; looking for it there would copy all of it.
        gc.freeze()
        for number in _STOPS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for stream, descriptor in enumerate([os.dup(descriptor) for descriptor in streams]):
            os.dup2(descriptor, stream)
        os.closerange(3, _MOST_FILES)
        _forget_pool()
        _open_streams(unbuffered=unbuffered)
        sys.argv = list(call.argv)
        os.environ.clear()
        os.environ.update(call.environ)
        os.chdir(call.cwd)
        given = call.environ.get("PYTHONPATH", "").split(os.pathsep)
        sys.path[:0] = [folder for folder in given if folder and folder not in sys.path]
        prepare()
        code = vars(importlib.import_module(call.module))[call.function]() or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _open_streams(*, unbuffered: bool) -> None:
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = os.fdopen(number, "w" if number else "r", closefd=False)
        is_errors = name == "stderr"
        stream.reconfigure(line_buffering=is_errors or stream.isatty(), write_through=is_errors or unbuffered)
        setattr(sys, name, stream)


def _forget_pool() -> None:
    """The servers of multiprocessing that this process' ancestors had are none of the program's."""
    tracker: Any = vars(resource_tracker)["_resource_tracker"]
    tracker._fd = tracker._pid = None
    server: Any = vars(forkserver)["_forkserver"]
    server._forkserver_address = server._forkserver_alive_fd = server._forkserver_pid = None
    vars(process)["_parent_process"] = None


def _set_command_line(command: Sequence[str]) -> None:
    """What `ps` shows of this process, as far as there was room for what it was started by."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    # arg_start and arg_end, the 48th and 49th of proc(5); the first two are before the bracket.
    start, end = int(fields[45]), int(fields[46])
    words = "\0".join(command).encode()[: end - start - 1]
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, words, len(words))
