"""What saving and loading cost, beside the machine's limits and beside stock PyTorch.

    python -m benchmarks.checkpoint --gib 0.25 --rounds 7 --json out.json

One rank. Every round runs every measurement once, in turn, after changing all of the state; the table gives medians
of ratios taken within a round. "memcpy" is torch's copy into warm memory with the same number of threads, "direct" an
O_DIRECT write and fsync of the same bytes from warm memory, "cached read" a read of them from the page cache into
warm memory.
"""

import argparse
import json
import mmap
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from checkpoint.config import AsyncMode
from checkpoint.loading import load_tensors
from checkpoint.manifest import Manifest
from checkpoint.saver import StepSaver
from checkpoint.storage.local import write_all

Tensors = dict[str, torch.Tensor]


def make_state(gib: float) -> Tensors:
    """About 300 float32 tensors; the largest a sixteenth of the whole."""
    elements = int(gib * 2**28)
    sizes = [elements // 16] * 4
    sizes += [(elements - sum(sizes)) // 296] * 296
    return {f"layers.{i}.weight": torch.randn(n // 64, 64) for i, n in enumerate(sizes)}


def nbytes(state: Tensors) -> int:
    """Bytes of all tensors."""
    return sum(t.numel() * t.element_size() for t in state.values())


def seconds(action: Callable[[], object]) -> float:
    """Wall time of a call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


class Limits:
    """What the machine can do with so many bytes."""

    def __init__(self, state: Tensors, folder: Path) -> None:
        self.copies = {n: torch.empty_like(t).fill_(1.0) for n, t in state.items()}
        self.size = -(-nbytes(state) // mmap.PAGESIZE) * mmap.PAGESIZE
        self.memory = mmap.mmap(-1, self.size)
        torch.frombuffer(self.memory, dtype=torch.uint8).fill_(1)
        self.file = folder / "limit"

    def memcpy(self, state: Tensors) -> None:
        for name, tensor in state.items():
            self.copies[name].copy_(tensor)

    def direct(self) -> None:
        descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_DIRECT | os.O_TRUNC)
        view = memoryview(self.memory)
        for start in range(0, self.size, 8 << 20):
            write_all(descriptor, view[start : start + (8 << 20)], start)
        os.fsync(descriptor)
        os.close(descriptor)

    def cached_read(self, file: Path) -> None:
        descriptor = os.open(file, os.O_RDONLY)
        view, done = memoryview(self.memory), 0
        while done < self.size and (got := os.preadv(descriptor, [view[done : done + (8 << 20)]], done)):
            done += got
        os.close(descriptor)


def warm_cache(folder: Path) -> None:
    """Brings a checkpoint's files into the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.read_bytes()


def fsync_all(path: Path) -> None:
    """Flushes a file and its folder."""
    for target in (path, path.parent):
        descriptor = os.open(target, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


class Bench:
    """All measurements over one state."""

    def __init__(self, gib: float, folder: Path) -> None:
        self.folder = folder
        self.state = make_state(gib)
        self.limits = Limits(self.state, folder)
        self.group = dist.new_group(backend="gloo")
        self.savers = {m.name: StepSaver(folder / m.name, m, torch.device("cpu"), self.group) for m in AsyncMode}
        self.step = 0
        self.target = {n: torch.zeros_like(t) for n, t in self.state.items()}
        for name in self.savers:
            (folder / name).mkdir()
            self.save(name)  # plans and warms the image

    def save(self, mode: str) -> float:
        """Time that the call blocks; the write behind it has ended when this returns."""
        self.step += 1
        saver = self.savers[mode]
        blocked = seconds(lambda: saver.begin(self.state, Manifest(step=self.step, lineage="a")))
        saver.wait_staged()
        saver.wait()
        return blocked

    def newest(self, mode: str) -> Path:
        return max((self.folder / mode).glob("step-*"), key=lambda p: int(p.name[5:]))

    def round(self) -> dict[str, float]:
        """One measurement of each kind."""
        for tensor in self.state.values():
            tensor.add_(1e-3)
        times = {"memcpy": seconds(lambda: self.limits.memcpy(self.state)), "direct": seconds(self.limits.direct)}
        for mode in self.savers:
            times[mode] = self.save(mode)
        times |= self._peers()
        ours = self.newest("disabled")
        warm_cache(ours)
        times["cached read"] = seconds(lambda: self.limits.cached_read(ours / "__0_0.distcp"))
        times["load"] = seconds(lambda: load_tensors(ours, self.target, self.group))
        assert all(torch.equal(t, self.target[n]) for n, t in self.state.items())
        times["dcp.load"] = seconds(lambda: dcp.load(self.target, checkpoint_id=ours, process_group=self.group))
        for mode in self.savers:
            for old in sorted((self.folder / mode).glob("step-*"))[:-1]:
                shutil.rmtree(old)
        return times

    def _peers(self) -> dict[str, float]:
        out = self.folder / "peer"
        times = {}
        for name, action in {
            "dcp.save": lambda: dcp.save(dict(self.state), checkpoint_id=out / "dcp", process_group=self.group),
            "torch.save": lambda: torch.save(self.state, out / "torch.pt"),
            "safetensors": lambda: safetensors.torch.save_file(self.state, out / "s.safetensors"),
        }.items():
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            times[name] = seconds(action)
            if name != "dcp.save":
                times[name] += seconds(lambda: fsync_all(next(out.iterdir())))
        return times


RATIOS = {
    "save, durable and hashed (disabled)": ("disabled", "direct"),
    "dcp.save": ("dcp.save", "direct"),
    "torch.save + fsync": ("torch.save", "direct"),
    "safetensors + fsync": ("safetensors", "direct"),
    "call blocks, async": ("async", "memcpy"),
    "call blocks, async_with_pinned_mem": ("async_with_pinned_mem", "memcpy"),
    "load, verified": ("load", "cached read"),
    "dcp.load": ("dcp.load", "cached read"),
}


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Median seconds, and median ratios within a round."""
    return {
        "seconds": {name: statistics.median(r[name] for r in rounds) for name in rounds[0]},
        "ratios": {
            f"{name} / {base}": statistics.median(r[measured] / r[base] for r in rounds)
            for name, (measured, base) in RATIOS.items()
        },
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=0.25, help="size of the state")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="torch's")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: a temporary one")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        bench = Bench(args.gib, Path(folder))
        bench.round()
        result = summary([bench.round() for _ in range(args.rounds)])
    print(f"{args.gib} GiB, 1 rank, {args.threads} threads, {args.rounds} rounds; medians")
    for name, value in result["seconds"].items():
        print(f"  {name:<28} {value * 1e3:10.1f} ms")
    for name, value in result["ratios"].items():
        print(f"  {name:<52} {value:8.3f} x")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    os._exit(0)


if __name__ == "__main__":
    main()
