"""Peak memory and time of a conversion, both ways, beside reading and writing the same bytes.

`python -m benchmarks.convert --gib 2 --rounds 3 FOLDER`: each conversion runs in a process of its own.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.pairs import Seconds, clocks, machine, ratios, since

__all__ = ["main", "measure", "prepare"]

_PIECE = 8 << 20


def prepare(folder: Path, layers: int, dim: int, vocab: int) -> Path:
    """A step with random weights, written as a stream."""
    from regrow.checkpoint.convert.conversion_plan import plan_step
    from regrow.checkpoint.convert.convert import convert
    from regrow.checkpoint.format.manifest import Manifest
    from tests.interop.large import RandomModel

    source = RandomModel(layers=layers, dim=dim, vocab=vocab)
    manifest = Manifest(step=0, lineage="", kind="model", model=source.settings)
    convert(source, lambda infos, _work: plan_step(infos, manifest), folder / "step", identity={})
    return folder / "step"


def measure(arguments: list[str]) -> dict[str, float]:
    """Runs `regrow-ckpt` in a process of its own: seconds, and MiB above the interpreter with its imports."""
    command = [sys.executable, "-m", "benchmarks.convert", "--child", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _memory_mib(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(next(x for x in status.splitlines() if x.startswith(field)).split()[1]) / 1024


def _child(arguments: list[str]) -> None:
    import regrow.launch.commands.checkpoint as command

    baseline = _memory_mib("VmRSS")
    # The peak so far, of importing, is forgotten.
    Path("/proc/self/clear_refs").write_text("5")
    sys.argv = ["regrow-ckpt", *arguments, "--json"]
    started = clocks()
    try:
        command.main()
    except SystemExit as stop:
        if stop.code:
            raise
    taken = since(started)
    found = {"seconds": taken.wall, "cpu_seconds": taken.cpu}
    print(json.dumps({**found, "peak_mib": _memory_mib("VmHWM") - baseline, "baseline_mib": baseline}))


def copy_seconds(files: list[Path], out: Path) -> Seconds:
    """Reads files and writes their bytes to one, flushed: what a conversion cannot do without."""
    memory = bytearray(_PIECE)
    started = clocks()
    with out.open("wb", buffering=0) as target:
        for file in files:
            with file.open("rb", buffering=0) as source:
                while got := source.readinto(memory):
                    target.write(memoryview(memory)[:got])
        os.fsync(target.fileno())
    taken = since(started)
    out.unlink()
    return taken


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
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        work = Path(folder)
        # A layer of 256 MiB, two matrices of 128 MiB at the ends.
        step = prepare(work, layers=max(1, round(args.gib * 4) - 1), dim=2048, vocab=16384)
        ways = {
            "to-hf": ["export", str(step), str(work / "hf")],
            "from-hf": ["import", str(work / "hf"), str(work / "b")],
        }
        rounds: dict[str, list[dict[str, Seconds]]] = {way: [] for way in ways}
        for _ in range(args.rounds):
            for way, arguments in ways.items():
                shutil.rmtree(arguments[2], ignore_errors=True)
                source = [p for p in Path(arguments[1]).iterdir() if p.suffix in (".distcp", ".safetensors")]
                limit = copy_seconds(source, work / "copy")
                found = measure(arguments)
                ours = Seconds(found["seconds"], found["cpu_seconds"])
                rounds[way].append({"conversion": ours, "copy": limit})
                print(
                    f"{way}: {found['seconds']:.2f} s, {ours.wall / limit.wall:.2f} × reading and writing "
                    f"({limit.wall:.2f} s); peak {found['peak_mib']:.0f} MiB above {found['baseline_mib']:.0f}",
                    flush=True,
                )
        print(machine())
        for way, each in rounds.items():
            found_ratios = ratios(each, "conversion", "copy")
            print(f"{way}: median ratio (quartiles) {found_ratios['wall']}, CPU {found_ratios['cpu']}")


if __name__ == "__main__":
    main()
