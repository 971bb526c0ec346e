"""A step is opened once: its manifest, and each rank's, is read once whatever is asked of it."""

from pathlib import Path

import pytest
import torch

from regrow.checkpoint import Checkpointer
from regrow.checkpoint.errors import DamagedStepError
from regrow.checkpoint.format.stored_step import StoredStep, chunks_by_name, infos_of
from regrow.checkpoint.load.loading import load_tensors
from regrow.checkpoint.load.open_source import StepSource
from regrow.checkpoint.run.catalog import Catalog, newest_lineages
from regrow.checkpoint.run.step_line import StepLine
from regrow.checkpoint.storage.local import LocalStorage
from tests.counting_storage import CountingStorage

TENSORS = {"w": torch.arange(12.0).view(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}


@pytest.fixture
def folder(tmp_path: Path) -> CountingStorage:
    with Checkpointer(tmp_path, "sync") as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, TENSORS, {"seen": step})
    return CountingStorage(LocalStorage(tmp_path))


def test_what_was_opened_is_not_read_again(folder: CountingStorage) -> None:
    step = StoredStep.open(folder.child("step-2"))
    assert (step.step, step.kind, step.resumable) == (2, "full", True)
    assert step.train_state == {"step": 2, "state": {"seen": 2}}
    infos = infos_of(chunks_by_name(step.url, step.items()))
    assert {n: (i.dtype, i.shape) for n, i in infos.items()} == {
        n: (t.dtype, tuple(t.shape)) for n, t in TENSORS.items()
    }
    loaded = {n: torch.zeros_like(t) for n, t in TENSORS.items()}
    load_tensors(step, loaded, None)
    with StepSource(step) as source:
        assert torch.equal(source.read("w", ((1, 3), (0, 4))), TENSORS["w"][1:])
    assert all(torch.equal(t, loaded[n]) for n, t in TENSORS.items())
    assert folder.reads["step-2/manifest.json"] == folder.reads["step-2/rank-0.json"] == 1


def test_a_start_reads_each_manifest_once(folder: CountingStorage) -> None:
    """Choosing the newest step and loading it."""
    catalog = Catalog(folder)
    line = StepLine(catalog)
    chosen = line.choose(None, {})
    assert chosen is not None
    assert chosen.step == 3
    load_tensors(chosen, {n: torch.zeros_like(t) for n, t in TENSORS.items()}, None)
    assert {n: c for n, c in folder.reads.items() if n.endswith("manifest.json")} == {
        f"step-{n}/manifest.json": 1 for n in (1, 2, 3)
    }


def test_a_folder_is_cleaned_up_by_the_scan_that_there_is(folder: CountingStorage) -> None:
    catalog = Catalog(folder)
    scan = catalog.scan()
    lineages = newest_lineages(scan.complete)
    assert catalog.clean_up(lineages, {3: "a test says so"}, scan) == ["set step 3 aside: a test says so"]
    assert sum(folder.reads.values()) == 3
    assert [s.step for s in catalog.entries(lineages)] == [1, 2]


def test_a_folder_without_a_manifest_is_no_step_of_ours(folder: CountingStorage) -> None:
    assert StoredStep.find(folder) is None
    with pytest.raises(FileNotFoundError):
        StoredStep.open(folder)


def test_a_ranks_manifest_that_names_another_file_is_damage(folder: CountingStorage) -> None:
    step = StoredStep.open(folder.child("step-1"))
    body = step.storage.read("rank-0.json")
    step.storage.write("rank-0.json", body.replace(b"__0_0.distcp", b"__0_1.distcp"))
    with pytest.raises(DamagedStepError, match=r"rank-0\.json does not match its hash"):
        step.items()
