"""Ranks for tests: fresh processes from a server that has torch loaded already."""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import random
import signal
import socket
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

__all__ = ["context", "run_distributed"]

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.distributed.pipelining",
     "torch._inductor.compile_fx", "networkx", "jinja2", "hydra", "regrow.launch.app", "regrow.launch.run.start",
     "regrow.trainer.hooks.checkpoint", "regrow.trainer.data.text", "regrow.trainer.parallel.engine", "regrow.trainer.schedules.base",
     "regrow.launch.run.ranks", "regrow.launch.run.signals", "regrow.launch.run.lost_record", "regrow.trainer.hooks.begin", "tests.attack.warm", "tests.forking", "tests.warm"]
)  # fmt: skip


def free_port() -> int:
    """A port on loopback that nobody listens on, below those that the system gives to connections by itself."""
    while True:
        with contextlib.closing(socket.socket()) as probe, contextlib.suppress(OSError):
            port = random.SystemRandom().randrange(12000, 32000)
            probe.bind(("127.0.0.1", port))
            return port


def _end_with(pid: int) -> None:
    """Ends this process when the tests' process ends, however that happens."""
    descriptor = os.pidfd_open(pid)

    def wait() -> None:
        import select

        select.select([descriptor], [], [])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _rank(
    body: Callable[..., Any],
    args: tuple[Any, ...],
    environ: dict[str, str],
    parent: int,
    answers: Connection,
    crash: str,
) -> None:
    # What was imported before is no garbage; looking for it there would copy all of it.
    gc.freeze()
    _end_with(parent)
    # Kept open as long as the process lives, since a crash writes into it.
    stack = Path(crash).open("w")  # noqa: SIM115
    faulthandler.enable(stack)
    os.environ.update(environ)
    try:
        answer = (True, body(*args))
    except BaseException:
        answer = (False, traceback.format_exc())
    answers.send_bytes(pickle.dumps(answer))
    answers.close()
    # Threads of asynchronous collectives can abort the interpreter's ordinary shutdown.
    os._exit(0)


def _stack(crash: Path) -> str:
    """Where each thread of a crashed process was."""
    text = crash.read_text() if crash.exists() else ""
    return f"\n{text}" if text else ""


def run_distributed(body: Callable[..., Any], *args: Any, world_size: int, timeout_s: float = 240.0) -> list[Any]:
    """Runs `body(*args)` on every rank, with torchrun's variables set; returns the ranks' results.

    Raises:
        AssertionError: with the tracebacks of the ranks that failed.
    """
    with tempfile.TemporaryDirectory() as crashes:
        return _run(body, args, world_size, timeout_s, [Path(crashes) / f"rank-{r}" for r in range(world_size)])


def _run(
    body: Callable[..., Any], args: tuple[Any, ...], world_size: int, timeout_s: float, crashes: Sequence[Path]
) -> list[Any]:
    port = str(free_port())
    processes, pipes = [], []
    for rank in range(world_size):
        environ = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }
        receiver, sender = context.Pipe(duplex=False)
        given = (body, args, environ, os.getpid(), sender, str(crashes[rank]))
        process = context.Process(target=_rank, args=given, daemon=True)
        process.start()
        sender.close()
        processes.append(process)
        pipes.append(receiver)
    results: list[Any] = []
    failures = []
    for rank, (process, pipe) in enumerate(zip(processes, pipes, strict=True)):
        try:
            ok, value = pickle.loads(pipe.recv_bytes()) if pipe.poll(timeout_s) else (False, "timed out")
        except EOFError:
            process.join(5.0)
            ok, value = False, f"died without an answer, exit code {process.exitcode}{_stack(crashes[rank])}"
        results.append(value)
        if not ok:
            failures.append(f"rank {rank}: {value}")
            timeout_s = 5.0
    for process in processes:
        process.join(5.0)
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
    assert not failures, "\n".join(failures)
    return results
