"""The recipes of `conf/parallel` with the debug models, on the ranks that each asks for."""

import pytest

from regrow.launch.run.preflight import check_parallel
from regrow.trainer.parallel.layout import resolve_layout
from tests.support import REPO, typed_config

RECIPES = sorted(p.stem for p in (REPO / "conf/parallel").glob("*.yaml"))
WITH_EXPERTS = {"ep", "ep_fsdp"}


CASES = [
    (recipe, model)
    for recipe in RECIPES
    for model in ("llama3_debug", "qwen3_debug", "qwen3_moe_debug")
    if model == "qwen3_moe_debug" or recipe not in WITH_EXPERTS
]


@pytest.mark.parametrize(("recipe", "model"), CASES)
def test_every_recipe_runs_with_every_debug_model(recipe: str, model: str) -> None:
    config = typed_config([f"parallel={recipe}", f"model={model}"])
    p = config.parallel
    # `dp_shard=-1` takes two ranks for each of the others.
    ranks = p.dp_replicate * (2 if p.dp_shard == -1 else p.dp_shard) * p.tp * p.pp * p.cp
    check_parallel(config, resolve_layout(p, ranks, ranks_are_given=True), "cpu")


def test_the_default_model_is_the_one_meant() -> None:
    assert typed_config([]).model.name == "llama3_debug"
