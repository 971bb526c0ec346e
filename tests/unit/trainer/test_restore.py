"""What a resume reads: a step is opened once on each rank."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from regrow.checkpoint.files import SMALL_FILE_BYTES
from regrow.checkpoint.storage.local import LocalStorage
from tests import runs
from tests.support import tiny

_train_rank = runs._train_rank
_read = LocalStorage.read


def _count_reads(spec: Any) -> Any:
    """Trains as ever, and notes which manifests this rank's process has read."""
    reads: Counter[str] = Counter()

    def read(storage: LocalStorage, name: str, limit: int = SMALL_FILE_BYTES) -> bytes:
        if name == "manifest.json":
            reads[storage.path.name] += 1
        return _read(storage, name, limit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStorage, "read", read)
        outcome = _train_rank(spec)
        rank = os.environ["RANK"]
    (spec.run_dir / f"reads-{rank}.json").write_text(json.dumps(reads))
    return outcome


@pytest.mark.slow
def test_a_resume_reads_each_manifest_once(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = tiny(
        corpus, "checkpoint=sync", "checkpoint.interval=2", "parallel.dp_shard=2", "scheduler.total_steps=9"
    )
    assert runs.train([*overrides, "train.steps=4"], tmp_path / "run", world_size=2).step == 4
    monkeypatch.setattr(runs, "_train_rank", _count_reads)
    # The report of a run tells what lies on the disk, and reads that anew.
    resumed = [*overrides, "train.steps=5", "checkpoint.load_only=true", "~hooks.report"]
    assert runs.train(resumed, tmp_path / "run", world_size=2).step == 5
    reads = [json.loads((tmp_path / f"run/reads-{rank}.json").read_text()) for rank in range(2)]
    assert reads == [{"step-2": 1, "step-4": 1}, {"step-4": 1}]
