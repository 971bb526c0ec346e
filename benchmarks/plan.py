"""How far a plan's memory is from that of real runs: a table, in Markdown.

    python -m benchmarks.plan [--only TEXT]

Each run is a real one on this machine's CPU, on ranks of its own where it has several; its figure is the most bytes
that the profiler saw live in a step. The plan is made without running it.
"""

import argparse
import socket
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch.multiprocessing as multiprocessing

from benchmarks.gpu_runs import write_corpus
from benchmarks.plan_runs import RUNS, overrides_of, planned_peaks, rank_of, spec_of

__all__ = ["Comparison", "main", "summary"]

_MIB = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A run: bytes of its fullest rank.

    Attributes:
        name: of the run.
        planned: what the plan said.
        measured: what the profiler saw.
    """

    name: str
    planned: int
    measured: int

    @property
    def error(self) -> float:
        """Of the plan, as a part of what was measured."""
        return self.planned / self.measured - 1


def summary(rows: list[Comparison]) -> tuple[float, float]:
    """The median and the largest of the errors, without their signs."""
    errors = [abs(row.error) for row in rows]
    return statistics.median(errors), max(errors)


def compare(name: str, corpus: Path) -> Comparison:
    """Plans a run, and runs it."""
    overrides = overrides_of(name, corpus)
    planned = planned_peaks(overrides)
    with tempfile.TemporaryDirectory() as folder:
        measured = _measure(overrides, Path(folder))
    return Comparison(name=name, planned=max(planned), measured=measured)


def _measure(overrides: list[str], folder: Path) -> int:
    world_size = 2 if any(o.startswith("parallel.") for o in overrides) else 1
    spec = spec_of(overrides, folder, world_size)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(rank_of, (spec, world_size, port, results), nprocs=world_size)  # type: ignore[no-untyped-call]
        return int(max(results.values()))


def main() -> int:
    """Prints the table; 0 when the errors are within the limits that the docs state."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="runs whose names hold this")
    args = parser.parse_args()
    rows = []
    print("| run | planned | measured | error |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "text.jsonl")
        write_corpus(corpus, 200)
        for name in RUNS:
            if args.only in name:
                row = compare(name, corpus)
                rows.append(row)
                sizes = f"{row.planned / _MIB:.1f} MiB | {row.measured / _MIB:.1f} MiB"
                print(f"| {name} | {sizes} | {row.error:+.1%} |", flush=True)
    median, worst = summary(rows)
    print(f"\nmedian {median:.1%}, worst {worst:.1%}, of {len(rows)} runs")
    return 0 if median <= 0.03 and worst <= 0.08 else 1


if __name__ == "__main__":
    sys.exit(main())
