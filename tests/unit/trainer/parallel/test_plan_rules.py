"""Plans of one's own that cannot be followed are refused before ranks start."""

from typing import Any

import pytest
import torch

from regrow.errors import ConfigError
from regrow.models.llama3.model import Llama3
from regrow.models.plan import ShardingPlan, Style
from regrow.trainer.parallel.plan_rules import check_plan, planned_modules
from tests.engines import llama_config


def make(changed: ShardingPlan | None = None, *, alone: ShardingPlan | None = None, **sizes: int) -> Llama3:
    """A model whose plan is its own with changes, or another alone."""
    with torch.device("meta"):
        model = Llama3(llama_config(**sizes))
    plan = model.plan() | (changed or {}) if alone is None else alone
    model.plan = lambda: plan  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("name", ["wk", "wv"])
def test_heads_that_ranks_share_must_be_called_so(name: str) -> None:
    sizes: dict[str, Any] = {"n_heads": 6, "n_kv_heads": 3, "dim": 48}
    config = llama_config(**sizes)
    check_plan(make(**sizes), config, 2)
    check_plan(make({f"layers.*.attention.{name}": Style.colwise}, **sizes), config, 3)
    with pytest.raises(
        ConfigError, match=rf"give layers.0.attention.{name} Style.kv_heads with parallel.tp=2.*1 or 3"
    ):
        check_plan(make({f"layers.*.attention.{name}": Style.colwise}, **sizes), config, 2)


@pytest.mark.parametrize(
    ("matrix", "style", "words"),
    [
        ("w1", Style.colwise, r"output features of layers.0.feed_forward.w1 \(27\)"),
        ("w2", Style.rowwise, r"input features of layers.0.feed_forward.w2 \(27\)"),
    ],
)
def test_features_must_divide(matrix: str, style: Style, words: str) -> None:
    config = llama_config(ffn_dim=27)
    only = make(alone={f"layers.*.feed_forward.{matrix}": style}, ffn_dim=27)
    check_plan(only, config, 3)
    with pytest.raises(ConfigError, match=f"parallel.tp must divide the {words}, .* but is 2; use 1, 3, 9 or 27"):
        check_plan(only, config, 2)


def test_a_pattern_stands_for_one_layers_number() -> None:
    names = [name for name, _, style in planned_modules(make()) if style is Style.rowwise]
    assert names == [f"layers.{n}.{m}" for m in ("attention.wo", "feed_forward.w2") for n in range(2)]
