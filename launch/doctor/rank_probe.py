"""Ranks that reduce something together: `python -m regrow.launch.doctor.rank_probe gloo|nccl RANKS`.

Exit code 0 when every rank has the sum; else the first problem is the last line on standard error.
"""

import datetime
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

__all__ = ["main"]

_TIMEOUT = datetime.timedelta(seconds=15)
_ELEMENTS = 1 << 20


def main() -> None:
    """Forks the ranks, waits for them, and prints the seconds of one reduction of 4 MiB."""
    backend, ranks = sys.argv[1], int(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        children = [_fork(backend, rank, ranks, Path(folder)) for rank in range(ranks)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        problems = sorted(Path(folder).glob("problem-*"), key=lambda p: p.stat().st_mtime_ns)
        if problems or any(codes):
            text = problems[0].read_text() if problems else f"a rank ended with exit code {max(codes, key=abs)}"
            sys.exit(text.strip().splitlines()[0])
        print((Path(folder) / "seconds").read_text(), flush=True)


def _fork(backend: str, rank: int, ranks: int, folder: Path) -> int:
    """Torch is imported already, and nothing of it has begun to run."""
    child = os.fork()
    if child:
        return child
    try:
        _reduce(backend, rank, ranks, folder)
    except BaseException as error:
        (folder / f"problem-{rank}").write_text(f"{type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)


def _reduce(backend: str, rank: int, ranks: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), ranks)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=_TIMEOUT)
    values = torch.full((_ELEMENTS,), float(rank + 1), device=device)
    dist.all_reduce(values)
    began = time.perf_counter()
    dist.all_reduce(values)
    # Reading a value waits for the device.
    expected = ranks * ranks * (ranks + 1) / 2
    if values[0].item() != expected:
        raise ArithmeticError(f"the sum over {ranks} ranks is {values[0].item()} and not {expected}")
    if rank == 0:
        (folder / "seconds").write_text(str(time.perf_counter() - began))
    dist.barrier()


if __name__ == "__main__":
    main()
