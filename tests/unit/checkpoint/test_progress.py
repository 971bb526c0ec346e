"""What those who show it are told of saving, loading and verifying."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from regrow.checkpoint.config import AsyncMode
from regrow.checkpoint.format.manifest import Manifest
from regrow.checkpoint.format.stored_step import StoredStep
from regrow.checkpoint.inspect.maintenance import verify
from regrow.checkpoint.load.initial_load import LoadRules, load_from
from regrow.checkpoint.load.loading import load_step
from regrow.checkpoint.load.open_source import open_source
from regrow.checkpoint.save.progress import SaveProgress, SaveStage
from regrow.checkpoint.save.saver import SaverOptions, StepSaver
from regrow.checkpoint.storage.opening import as_storage

TENSORS = {"a": torch.arange(1 << 19, dtype=torch.float32), "b": torch.ones(300, 70), "c": torch.tensor(3)}
BYTES = sum(t.nbytes for t in TENSORS.values())


def save(folder: Path, mode: AsyncMode, progress: SaveProgress, files: int = 1) -> str | None:
    options = SaverOptions(files_per_rank=files)
    saver = StepSaver(folder, mode, torch.device("cpu"), None, options, progress)
    results = [*saver.save(TENSORS, Manifest(step=4, lineage="a")), *saver.wait()]
    saver.close()
    return results[0].error


@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("mode", list(AsyncMode), ids=lambda mode: str(mode.name))
def test_a_save_ends_with_all_of_its_bytes_written(tmp_path: Path, mode: AsyncMode, files: int) -> None:
    progress = SaveProgress()
    assert progress.stage is SaveStage.none
    assert save(tmp_path, mode, progress, files) is None
    assert (progress.stage, progress.step) == (SaveStage.saved, 4)
    on_disk = sum(f.stat().st_size for f in (tmp_path / "step-4").glob("*.distcp"))
    assert BYTES < progress.written_bytes == progress.total_bytes == on_disk


def test_a_save_that_fails_says_so(tmp_path: Path) -> None:
    progress = SaveProgress()
    assert save(tmp_path, AsyncMode.disabled, progress) is None
    (tmp_path / "other").touch()
    assert save(tmp_path / "other", AsyncMode.disabled, progress) is not None
    assert progress.stage is SaveStage.failed


def check(told: Sequence[tuple[int, int]], least: int) -> None:
    """Amounts grow, up to the whole."""
    amounts, totals = [done for done, _ in told], {total for _, total in told}
    assert amounts == sorted(amounts)
    (total,) = totals
    assert least <= amounts[-1] <= total


def test_loading_and_verifying_count_up_to_the_whole(tmp_path: Path) -> None:
    assert save(tmp_path, AsyncMode.disabled, SaveProgress()) is None
    step = tmp_path / "step-4"
    targets = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    told: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        told.append((done, total))

    load_step(StoredStep.open(as_storage(step)), targets, None, progress=progress)
    check(told, BYTES)
    assert told[-1][0] == told[-1][1]
    assert all(torch.equal(targets[name], TENSORS[name]) for name in TENSORS)
    told.clear()
    with open_source(step) as source:
        load_from(source, targets, LoadRules(), progress=progress)
    assert told[-1] == (BYTES, BYTES)
    check(told, BYTES)
    told.clear()
    assert not verify(as_storage(tmp_path), progress=progress)[0]["problems"]
    check(told, BYTES)
    told.clear()
    file = next(step.glob("*.distcp"))
    with file.open("r+b") as out:
        out.seek(file.stat().st_size // 2)
        out.write(b"\xff\x00\xff\x01")
    assert verify(as_storage(step), progress=progress)[0]["problems"]
    assert all(done <= total for done, total in told)
