"""How much resident memory a save or a load takes beside the state.

    python -m benchmarks.memory disabled|async|async_with_pinned_mem|load|growth-MODE --mib 256

One measurement a process, since memory that was once touched may be used again unseen. Prints JSON: the state's bytes
and the peak above what was resident before (for `growth-`, what 100 saves hold more than 10 do).
"""

import argparse
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.checkpoint import make_state, nbytes
from regrow.checkpoint.config import AsyncMode
from regrow.checkpoint.format.manifest import Manifest
from regrow.checkpoint.load.loading import load_tensors
from regrow.checkpoint.save.saver import StepSaver


def resident(field: str) -> int:
    """`VmRSS` or `VmHWM` in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def reset_peak() -> int:
    """Forgets the peak; returns what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


class Measurement:
    """One state, and what is done with it.

    Args:
        mib: of the state.
        folder: for checkpoints.
    """

    def __init__(self, mib: float, folder: Path) -> None:
        self.state = make_state(mib / 1024)
        self.folder = folder
        group = dist.new_group(backend="gloo")
        assert group is not None
        self.group = group
        self.step = 0
        # The first of everything: threads, frames, code.
        self.save(self.saver("disabled"), {"warm": torch.zeros(1 << 20)})

    def saver(self, mode: str) -> StepSaver:
        return StepSaver(self.folder, AsyncMode[mode], torch.device("cpu"), self.group)

    def save(self, saver: StepSaver, tensors: dict[str, torch.Tensor]) -> Path:
        self.step += 1
        (result,) = [*saver.save(tensors, Manifest(step=self.step, lineage="a")), *saver.wait()]
        assert result.url is not None, result.error
        return Path(result.url)

    def peak_of_save(self, mode: str) -> int:
        saver = self.saver(mode)
        before = reset_peak()
        self.save(saver, self.state)
        return resident("VmHWM") - before

    def peak_of_load(self) -> int:
        path = self.save(self.saver("disabled"), self.state)
        before = reset_peak()
        load_tensors(path, self.state, self.group)
        return resident("VmHWM") - before

    def growth(self, mode: str) -> int:
        saver, after = self.saver(mode), []
        for _ in range(100):
            shutil.rmtree(self.save(saver, self.state))
            after.append(resident("VmRSS"))
        return after[-1] - after[9]


def main() -> None:
    """Prints one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what")
    parser.add_argument("--mib", type=float, default=256)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    growing = args.what.startswith("growth-")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        run = Measurement(args.mib / 16 if growing else args.mib, Path(folder))
        found = {"state_bytes": nbytes(run.state)}
        if growing:
            found["growth_bytes"] = run.growth(args.what.removeprefix("growth-"))
        elif args.what == "load":
            found["peak_bytes"] = run.peak_of_load()
        else:
            found["peak_bytes"] = run.peak_of_save(args.what)
    print(json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
