"""Statistics by module: what the numbers are, the same under every layout, each step once after a kill."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from regrow.errors import ConfigError
from regrow.trainer.hooks.statistics import StatisticsHook
from regrow.trainer.hooks.statistics_config import StatisticsConfig
from regrow.trainer.jsonlines import read_rows
from regrow.trainer.measures import Measures
from tests.runs import train, train_until_killed
from tests.support import metrics, tiny


def test_what_is_measured() -> None:
    measures = Measures(["a", "b", "c"], torch.device("cpu"))
    measures.add("a", torch.tensor([3.0, 0.0, -4.0, 0.0]), counts=True)
    measures.add("a", torch.tensor([[12.0]]), counts=True)
    measures.add("a", torch.tensor([100.0]), counts=False)
    measures.add("b", torch.tensor([math.nan, math.inf, 2.0, -math.inf], dtype=torch.bfloat16), counts=True)
    measures.add("c", torch.empty(0), counts=True)
    measures.reduce(1)
    rows = measures.send().rows()
    assert rows == {
        "a": {"norm": 13.0, "rms": 13.0 / math.sqrt(5), "max": 12.0, "zeros": 0.4, "not_finite": 0},
        "b": {"norm": 2.0, "rms": 1.0, "max": 2.0, "zeros": 0.0, "not_finite": 3},
    }
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert measures.norm("a").item() == 13.0


def test_nothing_waits_for_the_device() -> None:
    """On meta there are no values that the host could wait for."""
    measures = Measures(["a"], torch.device("meta"))
    measures.add("a", torch.empty(5, 7, device="meta"), counts=True)
    measures.reduce(1)
    assert measures.norm("a").shape == ()


def test_bad_fields() -> None:
    with pytest.raises(ConfigError, match=r"hooks\.statistics\.every must be at least 1, but is 0"):
        StatisticsHook(StatisticsConfig(every=0))


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    return list(read_rows(run_dir / "statistics.jsonl"))


def assert_close(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for kind in left.keys() - {"step"}:
        assert left[kind].keys() == right[kind].keys(), kind
        for name, values in left[kind].items():
            for what, value in values.items():
                assert value == pytest.approx(right[kind][name][what], rel=1e-9, abs=1e-12), (kind, name, what)


@pytest.mark.slow
def test_every_layout_tells_the_same_and_a_kill_changes_nothing(corpus: Path, tmp_path: Path) -> None:
    overrides = tiny(
        corpus, "hooks=none", "precision=fp64", "data.global_batch_size=8", "data.micro_batch_size=2",
        "train.steps=4", "checkpoint.interval=2", "+hook@hooks.statistics=statistics", "hooks.statistics.every=2",
        "hooks.statistics.in_metrics=true",
    )  # fmt: skip
    train_until_killed(overrides, tmp_path / "one", 1, "after_step", 4)
    assert [r["step"] for r in rows_of(tmp_path / "one")][:2] == [1, 2]
    assert train(overrides, tmp_path / "one").kind == "finished"
    whole = rows_of(tmp_path / "one")
    assert [r["step"] for r in whole] == [1, 2, 4]
    for row in whole:
        assert list(row["gradient"]) == ["layers.0", "layers.1", "norm", "output", "tok_embeddings"]
        assert list(row["activation"]) == ["layers.0", "layers.1"]
    for row in metrics(tmp_path / "one"):
        told = {name for name in row if "_norm/" in name}
        assert len(told) == (12 if row["step"] in (1, 2, 4) else 0)
        if told:
            squares = sum(v**2 for name, v in row.items() if name.startswith("gradient_norm/"))
            assert math.sqrt(squares) == pytest.approx(row["grad_norm"], rel=1e-9)
    for name, degrees in {
        "fsdp_tp": ["parallel.dp_shard=2", "parallel.tp=2"],
        "pp_ddp": ["parallel.pp=2", "parallel.dp_replicate=2", "data.micro_batch_size=1"],
    }.items():
        given = [*overrides, *degrees, "checkpoint=disabled"]
        assert train(given, tmp_path / name, world_size=4).kind == "finished"
        found = rows_of(tmp_path / name)
        assert [r["step"] for r in found] == [1, 2, 4]
        for left, right in zip(found, whole, strict=True):
            assert_close(left, right)
