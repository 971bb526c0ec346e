"""What the benchmarks share: seconds by the clock and of CPUs, ratios taken within a round, what the machine is.

A benchmark that has measured ends with exit code 0, however busy the machine was, and says how steady it was; one
that could not ends with 1. With `--json` what was measured is written after every round.
"""

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from regrow.trainer.kernels import processor_name

__all__ = ["Seconds", "Spread", "clocks", "counted", "machine", "ratios", "seconds", "since", "write_rounds"]

T = TypeVar("T")

# Fewer steady rounds than these say less than all rounds do.
_FEWEST_STEADY = 3


class Seconds(NamedTuple):
    """By the clock, and of CPUs in this process' threads, which other users of the machine change less."""

    wall: float
    cpu: float


def clocks() -> Seconds:
    """Now."""
    return Seconds(time.perf_counter(), time.process_time())


def since(started: Seconds) -> Seconds:
    """From then to now."""
    now = clocks()
    return Seconds(now.wall - started.wall, now.cpu - started.cpu)


def seconds(action: Callable[[], object]) -> Seconds:
    """What a call takes."""
    started = clocks()
    action()
    return since(started)


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """The median of some rounds, and their quartiles."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        return cls(median=statistics.median(values), low=low, high=high, rounds=len(values))

    def __str__(self) -> str:
        digits = 2 if self.median >= 0.1 else 3
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} – {self.high:.{digits}f})"


def ratios(rounds: Sequence[Mapping[str, Seconds]], measured: str, base: str) -> dict[str, Spread]:
    """Of two things measured in the same rounds: by the clock (`wall`), and of CPU seconds (`cpu`) if any."""
    pairs = [(r[measured], r[base]) for r in rounds if measured in r and base in r]
    found = {"wall": [a.wall / b.wall for a, b in pairs], "cpu": [a.cpu / b.cpu for a, b in pairs if b.cpu > 0]}
    return {clock: Spread.of(values) for clock, values in found.items() if values}


def counted(rounds: Sequence[T], steady: Callable[[T], bool]) -> tuple[list[T], int]:
    """The rounds that count (the steady ones, or all where fewer than three were), and how many were steady."""
    found = [r for r in rounds if steady(r)]
    return (found if len(found) >= _FEWEST_STEADY else list(rounds)), len(found)


def machine() -> str:
    """One line: processor, cores, torch, threads, and how busy the machine is."""
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{processor_name()}, {cores} cores, {capability}, torch {torch.__version__}, load {load:.1f}"


def write_rounds(path: Path | None, value: Any) -> None:
    """Replaces the file by what was measured so far; nothing without a file."""
    if path is not None:
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(value, indent=1))
        temporary.rename(path)
