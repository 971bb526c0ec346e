"""Peak memory and time of a conversion, both ways, beside reading and writing the same bytes.

`python -m benchmarks.convert --gib 2 --rounds 3 FOLDER`: each conversion runs in a process of its own.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

__all__ = ["main", "measure", "prepare"]

_PIECE = 8 << 20


def prepare(folder: Path, layers: int, dim: int, vocab: int) -> Path:
    """A step with random weights, written as a stream."""
    from checkpoint.convert import convert
    from checkpoint.manifest import Manifest
    from checkpoint.outputs import plan_step
    from tests.interop.large import RandomModel

    source = RandomModel(layers=layers, dim=dim, vocab=vocab)
    manifest = Manifest(step=0, lineage="", kind="model", model=source.settings)
    convert(source, lambda infos, _work: plan_step(infos, manifest), folder / "step", identity={})
    return folder / "step"


def measure(arguments: list[str]) -> dict[str, float]:
    """Runs `regrow-ckpt` in a process of its own: seconds, and MiB above the interpreter with its imports."""
    command = [sys.executable, "-m", "benchmarks.convert", "--child", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _memory_mib(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(next(x for x in status.splitlines() if x.startswith(field)).split()[1]) / 1024


def _child(arguments: list[str]) -> None:
    import launch.checkpoint_command as command

    baseline = _memory_mib("VmRSS")
    # The peak so far, of importing, is forgotten.
    Path("/proc/self/clear_refs").write_text("5")
    sys.argv = ["regrow-ckpt", *arguments, "--json"]
    started = time.perf_counter()
    try:
        command.main()
    except SystemExit as stop:
        if stop.code:
            raise
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak_mib": _memory_mib("VmHWM") - baseline, "baseline_mib": baseline}))


def copy_seconds(files: list[Path], out: Path) -> float:
    """Reads files and writes their bytes to one, flushed: what a conversion cannot do without."""
    memory = bytearray(_PIECE)
    started = time.perf_counter()
    with out.open("wb", buffering=0) as target:
        for file in files:
            with file.open("rb", buffering=0) as source:
                while got := source.readinto(memory):
                    target.write(memoryview(memory)[:got])
        os.fsync(target.fileno())
    seconds = time.perf_counter() - started
    out.unlink()
    return seconds


def main() -> None:
    """See above."""
    if sys.argv[1:2] == ["--child"]:
        _child(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    work: Path = args.folder / "benchmark-convert"
    work.mkdir(parents=True)
    try:
        # A layer of 256 MiB, two matrices of 128 MiB at the ends.
        step = prepare(work, layers=max(1, round(args.gib * 4) - 1), dim=2048, vocab=16384)
        ways = {
            "to-hf": ["export", str(step), str(work / "hf")],
            "from-hf": ["import", str(work / "hf"), str(work / "b")],
        }
        ratios: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(args.rounds):
            for way, arguments in ways.items():
                shutil.rmtree(arguments[2], ignore_errors=True)
                source = [p for p in Path(arguments[1]).iterdir() if p.suffix in (".distcp", ".safetensors")]
                limit = copy_seconds(source, work / "copy")
                found = measure(arguments)
                ratios[way].append(found["seconds"] / limit)
                print(
                    f"{way}: {found['seconds']:.2f} s, {found['seconds'] / limit:.2f} × reading and writing "
                    f"({limit:.2f} s); peak {found['peak_mib']:.0f} MiB above {found['baseline_mib']:.0f}",
                    flush=True,
                )
        for way, values in ratios.items():
            print(f"{way}: median ratio {statistics.median(values):.2f}")
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
