"""How long a resumed run takes to its first step, split into its parts.

    python -m benchmarks.resume --rounds 5 [model=llama3_1b data=… any other overrides]

Trains two steps, which are saved, and then continues by one step as often as asked, each time in a fresh process; the
parts are those that the run itself logs.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

_LINE = re.compile(r"first step ([\d.]+) s after the start: (.*)")


def run(overrides: list[str], folder: Path) -> dict[str, float]:
    """One command; the parts of its start."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "regrow.launch.train",
        "hooks=none",
        f"run.root={folder}",
        "run.name=r",
        *overrides,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = _LINE.search(done.stderr)
    if found is None:
        raise SystemExit(done.stderr)
    pairs = (part.rsplit(" ", 1) for part in found.group(2).split(", "))
    return {"in all": float(found.group(1)), **{name: float(seconds) for name, seconds in pairs}}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        fresh = run([*overrides, "train.steps=2"], Path(folder))
        rounds = [run([*overrides, f"train.steps={3 + n}"], Path(folder)) for n in range(args.rounds)]
    print(f"{'part':<28}{'fresh':>10}{'resumed':>10}  (s; median of {args.rounds})")
    for name in rounds[0]:
        print(f"{name:<28}{fresh.get(name, 0.0):>10.2f}{statistics.median(r[name] for r in rounds):>10.2f}")


if __name__ == "__main__":
    main()
