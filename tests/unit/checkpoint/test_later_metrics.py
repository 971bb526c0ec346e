"""What is measured after a commit is kept with the step, counts in retention, and never makes one unreadable."""

from pathlib import Path

import pytest

from regrow.checkpoint.format.later_metrics import LATER_METRICS, add_later_metrics, read_later_metrics
from regrow.checkpoint.storage.opening import as_storage


def test_values_are_added_and_only_finite_ones(tmp_path: Path) -> None:
    step = as_storage(tmp_path)
    assert read_later_metrics(step) == {}
    add_later_metrics(step, {"eval/a/acc": 0.5, "eval/a/ppl": float("inf")})
    add_later_metrics(step, {"eval/b/acc": 0.25, "eval/a/acc": 1.0})
    assert read_later_metrics(step) == {"eval/a/acc": 1.0, "eval/b/acc": 0.25}


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'{"a": "x"}', b'{"a": null}', b"\xff", b"[" * 100000])
def test_what_is_damaged_says_nothing(tmp_path: Path, body: bytes) -> None:
    (tmp_path / LATER_METRICS).write_bytes(body)
    assert read_later_metrics(as_storage(tmp_path)) == {}
    add_later_metrics(as_storage(tmp_path), {"a": 1.0})
    assert read_later_metrics(as_storage(tmp_path)) == {"a": 1.0}


def test_a_folder_in_its_place_says_nothing(tmp_path: Path) -> None:
    (tmp_path / LATER_METRICS).mkdir()
    assert read_later_metrics(as_storage(tmp_path)) == {}
