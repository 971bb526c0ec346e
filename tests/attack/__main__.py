"""The attack: `python -m tests.attack --seed N [--only PART] [--share 0.1] [--match TEXT]`.

Prints what went wrong as it goes and a table at the end; exit code 1 where anything did. Cases that failed leave
their folders behind.
"""

import argparse
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.attack import damages, errnos
from tests.attack.cases import Report, summary
from tests.attack.fuzz import fuzz

__all__ = ["main"]

# Of the fuzzing at share 1, and after which it ends in any case.
_INPUTS, _FUZZ_S = 2000, 3600.0


def _fuzz(folder: Path, seed: int, share: float, match: str) -> list[Report]:
    """Hostile documents of all kinds; `match` does not apply to what has no table."""
    folder.mkdir(parents=True)
    done, failures = fuzz(folder, seed, math.ceil(_INPUTS * share), _FUZZ_S)
    reports = []
    for kind, count in done.items():
        failed = [f for f in failures if f.startswith(f"{kind} ")]
        print("\n".join(failed), end="\n" if failed else "")
        reports += [Report(kind=f"documents: {kind}", name=f, problems=[f]) for f in failed]
        reports += [Report(kind=f"documents: {kind}", name="", problems=[])] * (count - len(failed))
    return reports


PARTS: dict[str, Callable[[Path, int, float, str], list[Report]]] = {
    "damages": damages.attack,
    "errnos": errnos.attack,
    "fuzz": _fuzz,
}


def main() -> int:
    """The command's entry."""
    parser = argparse.ArgumentParser(prog="python -m tests.attack", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of every random choice")
    parser.add_argument("--only", choices=sorted(PARTS), help="one part")
    parser.add_argument("--share", type=float, default=1.0, help="of the cases, at least one of each kind")
    parser.add_argument("--match", default="", help="only cases with this text in their name or kind")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = Path(tempfile.mkdtemp(prefix="regrow-attack-"))
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    reports: list[Report] = []
    for name, attack in PARTS.items():
        if args.only in (None, name):
            print(f"{name}:", flush=True)
            reports += attack(folder / name, args.seed, args.share, args.match)
    print(summary(reports))
    failed = not reports or any(r.problems for r in reports)
    if not failed:
        shutil.rmtree(folder)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
