"""What saving and loading cost, beside the machine's limits and beside stock PyTorch.

    python -m benchmarks.checkpoint --gib 0.25 --ranks 1 --rounds 7 --json out.json

Every rank has so many GiB of state. A round runs every measurement once, in turn, after changing all of the state;
the table gives medians of ratios taken within a round, the slowest rank's time counting. "memcpy" is torch's copy
into warm memory with the same number of threads, "direct" an O_DIRECT write and fsync of the same bytes from warm
memory (or from huge pages, as ours is), "cached read" a read of them from the page cache into warm memory, with one
thread and with as many as the load has.

"Lost" is the training time that a save costs: steps that change all of the state and compute, from the call until the
checkpoint is durable, beside the same number of steps without a save. Rounds whose steps without a save drift by more
than 20 % are not steady, and are left out unless fewer than three were steady. Each ratio is given by the clock and
of CPU seconds (all threads of the rank), with quartiles.
"""

import argparse
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from benchmarks.pairs import Seconds, Spread, clocks, counted, machine, ratios, seconds, since, write_rounds
from regrow.checkpoint.config import AsyncMode
from regrow.checkpoint.format.manifest import Manifest
from regrow.checkpoint.load.loading import load_tensors
from regrow.checkpoint.save.saver import SaverOptions, StepSaver
from regrow.checkpoint.storage.local import LocalStorage, write_all

__all__ = ["main", "make_state", "nbytes"]

Tensors = dict[str, torch.Tensor]

_DRIFT = 0.2


def make_state(gib: float, rank: int = 0) -> Tensors:
    """About 300 float32 tensors, names unlike those of other ranks; the largest a sixteenth of the whole."""
    elements = int(gib * 2**28)
    sizes = [elements // 16] * 4
    sizes += [(elements - sum(sizes)) // 296] * 296
    return {f"rank{rank}.layers.{i}.weight": torch.randn(n // 64, 64) for i, n in enumerate(sizes)}


def nbytes(state: Tensors) -> int:
    """Bytes of all tensors."""
    return sum(t.numel() * t.element_size() for t in state.values())


class Limits:
    """What the machine can do with so many bytes."""

    def __init__(self, state: Tensors, folder: Path) -> None:
        self.copies = {n: torch.empty_like(t).fill_(1.0) for n, t in state.items()}
        self.size = -(-nbytes(state) // mmap.PAGESIZE) * mmap.PAGESIZE
        self.memory = mmap.mmap(-1, self.size)
        torch.frombuffer(self.memory, dtype=torch.uint8).fill_(1)
        self.file = folder / f"limit-{os.getpid()}"

    def memcpy(self, state: Tensors) -> None:
        for name, tensor in state.items():
            self.copies[name].copy_(tensor)

    def direct(self, memory: memoryview | None = None) -> None:
        descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_DIRECT | os.O_TRUNC)
        view = memory if memory is not None else memoryview(self.memory)
        for start in range(0, len(view), 8 << 20):
            write_all(descriptor, view[start : start + (8 << 20)], start)
        os.fsync(descriptor)
        os.close(descriptor)

    def cached_read(self, file: Path, threads: int) -> None:
        descriptor = os.open(file, os.O_RDONLY)
        view = memoryview(self.memory)

        def read(start: int) -> None:
            done, stop = start, min(start + (8 << 20), self.size)
            while done < stop and (got := os.preadv(descriptor, [view[done:stop]], done)):
                done += got

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, range(0, self.size, 8 << 20)))
        os.close(descriptor)


def warm_cache(folder: Path) -> None:
    """Brings a checkpoint's files into the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as data:
                while data.read(8 << 20):
                    pass


def fsync_tree(folder: Path) -> None:
    """Flushes all files and folders."""
    for target in (*folder.rglob("*"), folder):
        descriptor = os.open(target, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


class Training:
    """Steps that compute and then change every tensor, as an optimizer does."""

    def __init__(self, state: Tensors, compute: int) -> None:
        self.state = state
        self.compute = compute
        self.matrix = torch.randn(1024, 1024)
        self.gradients = {n: torch.full_like(t, 1e-3) for n, t in state.items()}

    def step(self, before_update: Callable[[], None] = lambda: None) -> Seconds:
        """One step; `before_update` runs where the optimizer would start."""
        started = clocks()
        for _ in range(self.compute):
            self.matrix = torch.tanh(self.matrix @ self.matrix * 1e-3)
        before_update()
        for name, tensor in self.state.items():
            tensor.add_(self.gradients[name], alpha=-1e-3)
        return since(started)


class Bench:
    """All measurements over one rank's state."""

    def __init__(self, gib: float, folder: Path, files: int, compute: int) -> None:
        self.folder, self.rank, self.ranks = folder, dist.get_rank(), dist.get_world_size()
        self.state = make_state(gib, self.rank)
        self.limits = Limits(self.state, folder)
        self.training = Training(self.state, compute)
        group = dist.new_group(backend="gloo")
        assert group is not None
        self.group = group
        options = SaverOptions(files_per_rank=files)
        self.savers = {m.name: StepSaver(folder / m.name, m, torch.device("cpu"), group, options) for m in AsyncMode}
        # Each rank's tensors are its own: nobody else holds them.
        self.owner_ranks = {name: [self.rank] for name in self.state}
        self.step = 0
        self.readers = min(LocalStorage.streams, max(1, len(os.sched_getaffinity(0)) // self.ranks))
        # Reused, so that their memory is warm, as ours is.
        self.stagers = {kind: _stager(kind) for kind in AsyncCheckpointerType}
        self.target = {n: torch.zeros_like(t) for n, t in self.state.items()}
        for name in self.savers:
            self.save(name)  # plans and warms the image

    def barrier(self) -> None:
        dist.barrier(self.group)

    def timed(self, action: Callable[[], object]) -> Seconds:
        """The slowest rank's time, all starting together."""
        self.barrier()
        return self.slowest(seconds(action))

    def slowest(self, mine: Seconds) -> Seconds:
        """Of all ranks, by each clock."""
        both = torch.tensor(mine, dtype=torch.float64)
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self.group)
        return Seconds(*both.tolist())

    def begin(self, mode: str) -> None:
        self.step += 1
        self.savers[mode].save(self.state, Manifest(step=self.step, lineage="a"), self.owner_ranks)

    def save(self, mode: str) -> Seconds:
        """Time that the call blocks; the write behind it has ended when this returns."""
        blocked = self.timed(lambda: self.begin(mode))
        self.savers[mode].wait_staged()
        self.finish(mode)
        return blocked

    def finish(self, mode: str) -> None:
        for result in self.savers[mode].wait():
            assert result.error is None, result.error

    def newest(self, mode: str) -> Path:
        steps = [p for p in (self.folder / mode).glob("step-*") if "." not in p.name]
        return max(steps, key=lambda p: int(p.name[5:]))

    def round(self, peers: bool) -> dict[str, Seconds]:
        """One measurement of each kind."""
        self.training.step()
        times = {
            "memcpy": self.timed(lambda: self.limits.memcpy(self.state)),
            "direct": self.timed(self.limits.direct),
            "direct, huge pages": self.timed(lambda: self.limits.direct(self._huge())),
        }
        for mode in self.savers:
            times[mode] = self.save(mode)
        times |= self._loads()
        times |= self._lost(peers)
        if peers:
            times |= self._peers()
        self.barrier()
        if self.rank == 0:
            for mode in self.savers:
                for old in (self.folder / mode).glob("step-*"):
                    if old != self.newest(mode):
                        shutil.rmtree(old)
        self.barrier()
        return times

    def _huge(self) -> memoryview:
        """As many bytes in huge pages: an image that a save has left behind."""
        image = self.savers["async"]._image
        assert image is not None
        return image.file(0)

    def _loads(self) -> dict[str, Seconds]:
        ours = self.newest("disabled")
        warm_cache(ours)
        file = ours / f"__{self.rank}_0.distcp"
        times = {
            "cached read": self.timed(lambda: self.limits.cached_read(file, 1)),
            "cached read, threads": self.timed(lambda: self.limits.cached_read(file, self.readers)),
            "load": self.timed(lambda: load_tensors(ours, self.target, self.group)),
        }
        stored = load_tensors(ours, self.target, self.group)
        assert stored >= nbytes(self.state)
        times["dcp.load"] = self.timed(
            lambda: dcp.load(dict(self.target), checkpoint_id=ours, process_group=self.group)
        )
        return times

    def _lost(self, peers: bool) -> dict[str, Seconds]:
        """Training time that each way of saving costs, and the drift of the steps beside it."""
        lost: dict[str, Seconds] = {}
        ways: dict[str, Callable[[], tuple[Callable[[], None], Callable[[], bool]]]] = {
            "lost, async": lambda: self._ours("async"),
            "lost, async_with_pinned_mem": lambda: self._ours("async_with_pinned_mem"),
            "lost, disabled": lambda: self._ours("disabled"),
            "lost, a write alone": self._write_alone,
        }
        if peers:
            ways["lost, dcp.async_save (thread)"] = lambda: self._dcp_async(AsyncCheckpointerType.THREAD)
            ways["lost, dcp.async_save (process)"] = lambda: self._dcp_async(AsyncCheckpointerType.PROCESS)
        before = [self.training.step() for _ in range(4)]
        drift = 0.0
        for name, start in ways.items():
            steps, spent, begun = 0, 0.0, clocks()
            self.barrier()
            started = clocks()
            gate, done = start()
            spent += since(started).wall
            while steps < 2 or not done():
                spent += self.training.step(gate).wall
                steps += 1
            cpu = since(begun).cpu
            after = [self.training.step() for _ in range(4)]
            base, base_cpu = (statistics.median(s[i] for s in [*before, *after]) for i in (0, 1))
            change = statistics.median(s.wall for s in after) / statistics.median(s.wall for s in before)
            drift = max(drift, abs(change - 1))
            lost[name] = Seconds(max(spent - steps * base, 1e-9), max(cpu - steps * base_cpu, 1e-9))
            before = after
        worst = {name: self.slowest(value) for name, value in lost.items()}
        return {**worst, "drift": self.slowest(Seconds(drift, 0.0))}

    def _write_alone(self) -> tuple[Callable[[], None], Callable[[], bool]]:
        """The least that a save beside training can cost when it copies and hashes nothing."""
        thread = threading.Thread(target=self.limits.direct, args=(self._huge(),))
        thread.start()
        return lambda: None, lambda: not thread.is_alive()

    def _ours(self, mode: str) -> tuple[Callable[[], None], Callable[[], bool]]:
        self.begin(mode)
        saver = self.savers[mode]

        def done() -> bool:
            if saver.is_busy:
                return False
            self.finish(mode)
            return True

        return saver.wait_staged, done

    def _dcp_async(self, kind: AsyncCheckpointerType) -> tuple[Callable[[], None], Callable[[], bool]]:
        out = self.folder / "peer-async"
        if self.rank == 0:
            shutil.rmtree(out, ignore_errors=True)
        self.barrier()
        future: Any = dcp.async_save(
            dict(self.state),
            checkpoint_id=out,
            process_group=self.group,
            async_checkpointer_type=kind,
            async_stager=self.stagers[kind],
        )
        return lambda: None, lambda: bool(future.done())

    def _peers(self) -> dict[str, Seconds]:
        out = self.folder / "peer"
        own = out / f"rank{self.rank}"
        times: dict[str, Seconds] = {}
        for name, action in {
            "dcp.save": lambda: dcp.save(dict(self.state), checkpoint_id=out / "dcp", process_group=self.group),
            "torch.save": lambda: torch.save(self.state, own / "torch.pt"),
            "safetensors": lambda: safetensors.torch.save_file(self.state, own / "s.safetensors"),
            "torch_checkpointing": lambda: _torch_checkpointing(self.state, own / "tc"),
        }.items():
            self.barrier()
            if self.rank == 0:
                shutil.rmtree(out, ignore_errors=True)
            self.barrier()
            own.mkdir(parents=True)
            times[name] = self.timed(action)
            if name != "dcp.save":
                flushed = self.timed(lambda: fsync_tree(own))
                times[name] = Seconds(times[name].wall + flushed.wall, times[name].cpu + flushed.cpu)
        return times


def _torch_checkpointing(state: Tensors, folder: Path) -> None:
    """PyPI's torch_checkpointing, synchronously."""
    from torch_checkpointing import CheckpointManager
    from torch_checkpointing.config import SyncCheckpointSaverConfig
    from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

    manager = CheckpointManager.Config(
        save=SyncCheckpointSaverConfig(), storage_config=LocalFileSystemStorageConfig(use_direct_io=False)
    ).build()
    manager.save(str(folder), {"state": state})
    manager.close()


def _stager(kind: AsyncCheckpointerType) -> DefaultStager:
    shared = kind is AsyncCheckpointerType.PROCESS
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=shared,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
    )


RATIOS = {
    "save, durable and hashed (disabled)": ("disabled", "direct"),
    "the same, of huge pages": ("disabled", "direct, huge pages"),
    "dcp.save": ("dcp.save", "direct"),
    "torch.save + fsync": ("torch.save", "direct"),
    "safetensors + fsync": ("safetensors", "direct"),
    "torch_checkpointing": ("torch_checkpointing", "direct"),
    "call blocks, async": ("async", "memcpy"),
    "call blocks, async_with_pinned_mem": ("async_with_pinned_mem", "memcpy"),
    "lost, async": ("lost, async", "memcpy"),
    "lost, async_with_pinned_mem": ("lost, async_with_pinned_mem", "memcpy"),
    "lost, disabled": ("lost, disabled", "memcpy"),
    "lost, a write alone": ("lost, a write alone", "memcpy"),
    "lost, dcp.async_save (thread)": ("lost, dcp.async_save (thread)", "memcpy"),
    "lost, dcp.async_save (process)": ("lost, dcp.async_save (process)", "memcpy"),
    "load, verified / one thread": ("load", "cached read"),
    "load, verified / as many threads": ("load", "cached read, threads"),
    "dcp.load": ("dcp.load", "cached read"),
}


def is_steady(measured: Mapping[str, Seconds]) -> bool:
    """Whether the steps beside the saves took as long at the end of a round as at its beginning."""
    return measured["drift"].wall <= _DRIFT


def summary(rounds: Sequence[Mapping[str, Seconds]]) -> dict[str, Any]:
    """Median seconds and ratios of the rounds that count, by the clock and of CPUs."""
    used, steady = counted(rounds, is_steady)
    there = {name: pair for name, pair in RATIOS.items() if pair[0] in used[0]}
    both = {f"{name} / {base}": ratios(used, measured, base) for name, (measured, base) in there.items()}
    return {
        "rounds": len(rounds),
        "steady": steady,
        "counted": len(used),
        "seconds": {
            name: {clock: statistics.median(r[name][i] for r in used) for i, clock in enumerate(("wall", "cpu"))}
            for name in used[0]
            if name != "drift"
        },
        "ratios": {name: {clock: asdict(spread) for clock, spread in found.items()} for name, found in both.items()},
    }


def show(result: Mapping[str, Any], gib: float, args: argparse.Namespace) -> None:
    """The table."""
    print(result["machine"])
    print(f"{gib} GiB a rank, {args.ranks} ranks, {args.threads} threads a rank", end="; ")
    print(f"{result['rounds']} rounds, {result['steady']} steady, {result['counted']} count; medians (quartiles)")
    print(f"  {'':<50} {'by the clock':>16} {'CPU':>14}")
    for name, value in result["seconds"].items():
        print(f"  {name:<50} {value['wall'] * 1e3:13.1f} ms {value['cpu'] * 1e3:11.1f} ms")
    for name, by_clock in result["ratios"].items():
        cells = [str(Spread(**by_clock[c])) if c in by_clock else "" for c in ("wall", "cpu")]
        print(f"  {name:<62} {cells[0]:<24} CPU {cells[1]}")


def run_rank(rank: int, args: argparse.Namespace, folder: str) -> None:
    """One rank of the benchmark."""
    torch.set_num_threads(args.threads)
    os.environ["LOCAL_WORLD_SIZE"] = str(args.ranks)
    store = dist.FileStore(f"{folder}/store", args.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=args.ranks)
    bench = Bench(args.gib, Path(folder), args.files, args.compute)
    bench.round(peers=args.peers)
    rounds, begun = [], machine()
    result: dict[str, Any] = {}
    for _ in range(args.rounds):
        rounds.append(bench.round(peers=args.peers))
        if rank == 0:
            result = {"machine": begun, "gib": args.gib, "ranks": args.ranks, "threads": args.threads}
            result |= summary(rounds)
            write_rounds(args.json, {**result, "each": rounds})
    if rank == 0:
        show(result, args.gib, args)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=0.25, help="size of a rank's state")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="torch's, of each rank")
    parser.add_argument("--compute", type=int, default=2, help="products of 1024 x 1024 matrices in a training step")
    parser.add_argument("--files", type=int, default=1, help="files that a rank writes at once")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="leave out what is not ours")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: a temporary one")
    parser.add_argument("--json", type=Path, help="also written there, after every round")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        start: Any = mp.start_processes
        start(run_rank, args=(args, folder), nprocs=args.ranks, start_method="spawn")


if __name__ == "__main__":
    main()
