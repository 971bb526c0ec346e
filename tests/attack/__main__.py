"""The attack: `python -m tests.attack --seed N [--only PART] [--share 0.1] [--match TEXT]`.

Prints what went wrong as it goes and a table at the end; exit code 1 where anything did. Cases that failed leave
their folders behind.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.attack.cases import Report, summary

__all__ = ["main"]

# Each module has `attack(folder, seed, share, match) -> list[Report]`.
PARTS = {
    name: f"tests.attack.{name}"
    for name in ("damages", "errnos", "fuzz")
    if importlib.util.find_spec(f"tests.attack.{name}") is not None
}
Part = Callable[[Path, int, float, str], list[Report]]


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
    for name, module in PARTS.items():
        if args.only in (None, name):
            print(f"{name}:", flush=True)
            attack: Part = importlib.import_module(module).attack
            reports += attack(folder / name, args.seed, args.share, args.match)
    print(summary(reports))
    return 1 if not reports or any(r.problems for r in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
