"""The recipes of `conf/parallel` on the ranks that each asks for."""

import pytest

from regrow.launch.run.preflight import check_parallel
from regrow.trainer.parallel.layout import resolve_layout
from tests.support import REPO, typed_config

pytestmark = pytest.mark.slow

RECIPES = sorted(p.stem for p in (REPO / "conf/parallel").glob("*.yaml"))
WITH_EXPERTS = {"ep", "ep_fsdp"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs_with_the_default_model(recipe: str) -> None:
    config = typed_config([f"parallel={recipe}", *(["model=qwen3_moe_debug"] if recipe in WITH_EXPERTS else [])])
    p = config.parallel
    # `dp_shard=-1` takes two ranks for each of the others.
    ranks = p.dp_replicate * (2 if p.dp_shard == -1 else p.dp_shard) * p.tp * p.pp * p.cp
    check_parallel(config, resolve_layout(p, ranks, ranks_are_given=True), "cpu")
