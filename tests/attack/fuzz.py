"""Hostile input, seeded: `python -m tests.attack.fuzz --count 2000 --seed 1`, or `--seconds 3600` for as long as wanted.

Each input is read by our own readers, in this process, under a guard: no code is run, no path outside is touched, at
most 256 MiB more than the input has are taken, it takes at most 10 s, and what comes of it is one sentence or a result.
"""

import argparse
import logging
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.attack import mutate_data, mutate_foreign, mutate_lease, mutate_step
from tests.attack.guard import Guard
from tests.attack.mutate_step import Case

__all__ = ["fuzz"]


def _cases(seed: int, folder: Path, witness: Path) -> Iterator[tuple[str, Case]]:
    """All kinds in turn, without end, with the kind's name."""
    for name in ("data", "foreign", "work/step", "work/data", "work/lease"):
        (folder / name).mkdir(parents=True)
    mutate_data.make_samples(folder / "data")
    mutate_foreign.make_inputs(folder / "foreign")

    def rng(kind: str) -> random.Random:
        return random.Random(f"{seed} {kind}")

    def leases() -> Iterator[Case]:
        for name, act in mutate_lease.mutations(rng("lease"), folder / "work/lease"):
            yield name, partial(_checked, act)

    kinds = {
        "step": mutate_step.mutations(rng("step"), folder / "work/step"),
        "foreign": mutate_foreign.mutations(rng("foreign"), folder / "foreign", folder / "work/foreign", witness),
        "data": mutate_data.mutations(rng("data"), folder / "data", folder / "work/data"),
        "lease": leases(),
    }
    while True:
        for kind, cases in kinds.items():
            yield kind, next(cases)


def _checked(act: Callable[[], None]) -> str:
    mutate_lease.check(act)
    return "ended in time"


def fuzz(folder: Path, seed: int, count: int, seconds: float) -> tuple[Counter[str], list[str]]:
    """Reads so many mutated inputs, or for so long.

    Args:
        folder: an existing one, for inputs.
        seed: decides everything.
        count: of inputs.
        seconds: after which it ends in any case.

    Returns:
        How many of each kind, and what went wrong.
    """
    witness, failures, done = folder / "witness", [], Counter[str]()
    guard, began = Guard(folder), time.monotonic()
    for kind, (name, act) in _cases(seed, folder, witness):
        if sum(done.values()) >= count or time.monotonic() - began > seconds:
            break
        done[kind] += 1
        try:
            with guard.watching(name):
                result = act()
            assert isinstance(result, str)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            last = traceback.extract_tb(error.__traceback__)[-1]
            failures.append(f"{kind} {name}: {type(error).__name__}: {error} ({last.filename}:{last.lineno})")
        if witness.exists():
            failures.append(f"{kind} {name}: code was run")
            witness.unlink()
    return done, failures


def main() -> int:
    """The command's entry."""
    parser = argparse.ArgumentParser(prog="python -m tests.attack.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=3600.0)
    arguments = parser.parse_args()
    # The guard lets nothing be written outside of the input's folder.
    sys.dont_write_bytecode = True
    # What readers warn of is part of what they make of an input, but thousands of lines of it help nobody.
    logging.disable(logging.CRITICAL)
    folder = Path(tempfile.mkdtemp(prefix="regrow-fuzz-"))
    began = time.monotonic()
    try:
        done, failures = fuzz(folder, arguments.seed, arguments.count, arguments.seconds)
    finally:
        shutil.rmtree(folder)
    for failure in failures:
        print(f"FAILED {failure}")
    counts = ", ".join(f"{n} {kind}" for kind, n in sorted(done.items()))
    print(f"{sum(done.values())} inputs ({counts}) in {time.monotonic() - began:.0f} s, {len(failures)} failures")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
