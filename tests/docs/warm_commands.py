"""The commands of an installation as small scripts that have a warm process fork them, streams and signals included.

A page has a dozen of them, each of which would take seconds of the processor to import what all import. The scripts
know nothing of Regrow: they hand over their arguments, environment, working directory and streams, pass signals on,
and end as the command does.
"""

import os
import pickle
import select
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from regrow.trainer.process import die_with_parent
from tests.forking import Call, become_program, fork_programs

__all__ = ["serve", "write_script"]

_CLIENT = """\
#!{python} -IS
import os, pickle, signal, socket, sys
there = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
there.connect({address!r})
told = pickle.dumps(({target!r}, sys.argv, os.getcwd(), dict(os.environ)))
socket.send_fds(there, [len(told).to_bytes(8, "little")], [0, 1, 2])
there.sendall(told)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda number, _: there.sendall(bytes([number])))
code = int.from_bytes(there.recv(4), "little", signed=True)
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


def write_script(path: Path, target: str, address: Path) -> None:
    """One command.

    Args:
        path: of the script.
        target: `module:function`, as in pyproject.toml.
        address: where `serve` listens.
    """
    path.write_text(_CLIENT.format(python=sys.executable, address=str(address), target=target))
    path.chmod(0o755)


def serve(address: Path, parent: int) -> None:
    """Forks what the scripts ask for, until the tests' process ends."""
    die_with_parent(os.getppid())
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(address))
    listener.listen(64)
    alive = os.pidfd_open(parent)
    while alive not in select.select([listener.fileno(), alive], [], [])[0]:
        script, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _accompany(script)
        script.close()
    os._exit(0)


def _accompany(script: socket.socket) -> None:
    """Runs one command, and stands between it and its script."""
    head, streams, _flags, _address = socket.recv_fds(script, 8, 3)
    size = int.from_bytes(head, "little")
    data = b""
    while len(data) < size:
        data += script.recv(size - len(data))
    target, argv, cwd, environ = pickle.loads(data)
    command = os.fork()
    if command == 0:
        _run(target, argv, cwd, environ, streams)
    for descriptor in streams:
        os.close(descriptor)
    ended = os.pidfd_open(command)
    while ended not in select.select([ended, script.fileno()], [], [])[0]:
        told = script.recv(1)
        os.kill(command, told[0] if told else signal.SIGKILL)
        if not told:
            break
    code = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
    script.sendall(code.to_bytes(4, "little", signed=True))
    os._exit(0)


def _run(target: str, argv: Sequence[str], cwd: str, environ: dict[str, str], streams: Sequence[int]) -> NoReturn:
    die_with_parent(os.getppid())
    module, _, function = target.partition(":")
    become_program(Call(module, argv, cwd, environ, function), streams, prepare=fork_programs)
