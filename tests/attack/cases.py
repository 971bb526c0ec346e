"""What the parts of the attack share: named cases of several kinds, a seeded choice of them, and their summary."""

import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

__all__ = ["WORKERS", "Case", "Report", "Started", "choose", "run_cases", "summary"]


# Commands at a time.
WORKERS = min(2, os.cpu_count() or 1)


class Case(Protocol):
    """Something that is done to a run, and what must hold afterwards."""

    @property
    def kind(self) -> str:
        """What it stands for."""

    @property
    def name(self) -> str:
        """Its own, for people and for `--match`; unique within its part."""


C = TypeVar("C", bound=Case)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What came of one case.

    Attributes:
        kind: of the case.
        name: of the case.
        problems: empty where all held.
    """

    kind: str
    name: str
    problems: list[str]


def choose(cases: Sequence[C], share: float, seed: int) -> list[C]:
    """A share of the cases, at least one of each kind; the same for the same seed, in the order of the table."""
    shuffled = list(cases)
    random.Random(seed).shuffle(shuffled)
    wanted, kinds = math.ceil(share * len(shuffled)), set[str]()
    first = [c for c in shuffled if c.kind not in kinds and not kinds.add(c.kind)]  # type: ignore[func-returns-value]
    chosen = {c.name for c in first}
    for case in shuffled:
        if len(chosen) >= wanted:
            break
        chosen.add(case.name)
    return [c for c in cases if c.name in chosen]


def run_cases(cases: Iterable[C], run: Callable[[C, Path], list[str]], folder: Path) -> list[Report]:
    """Runs each case in a folder of its own, which goes where nothing was wrong; says what was as it goes."""

    def report(numbered: tuple[int, C]) -> Report:
        n, case = numbered
        problems = run(case, folder / str(n))
        for problem in problems:
            print(f"{case.name}: {problem} (in {folder / str(n)})", flush=True)
        return Report(kind=case.kind, name=case.name, problems=problems)

    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(report, enumerate(cases)))


class Started(Generic[C]):
    """Cases that run side by side while a test waits for each of them in turn.

    Args:
        cases: to run.
        run: does it in a folder; returns what was wrong.
        folder: receives a folder for each case.
    """

    def __init__(self, cases: Iterable[C], run: Callable[[C, Path], list[str]], folder: Path) -> None:
        self._pool = ThreadPoolExecutor(WORKERS)
        self._answers = {c.name: self._pool.submit(run, c, folder / str(n)) for n, c in enumerate(cases)}

    def problems(self, case: C) -> list[str]:
        """What was wrong; waits for it."""
        return self._answers[case.name].result()

    def close(self) -> None:
        """Starts none that has not been started."""
        self._pool.shutdown(cancel_futures=True)


def summary(reports: Sequence[Report]) -> str:
    """A table: kind, cases, failures."""
    cases = Counter(r.kind for r in reports)
    failed = Counter(r.kind for r in reports if r.problems)
    rows = [("kind", "cases", "failures"), *((k, str(cases[k]), str(failed[k])) for k in sorted(cases))]
    rows.append(("all", str(len(reports)), str(sum(failed.values()))))
    width = max(len(r[0]) for r in rows)
    return "\n".join(f"{kind:<{width}}  {n:>6}  {bad:>8}" for kind, n, bad in rows)
