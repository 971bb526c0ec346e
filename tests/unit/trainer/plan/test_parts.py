"""The parts of a plan that are arithmetic."""

import pytest

from regrow.errors import ConfigError
from regrow.models.llama3.config import Llama3Config
from regrow.trainer.config import ParallelConfig, PipelineSchedule
from regrow.trainer.parallel.layout import Layout
from regrow.trainer.plan.checkpoint_size import plan_checkpoint
from regrow.trainer.plan.fit import Cluster, candidates, read_cluster
from regrow.trainer.plan.mesh import axes_of, coordinates_of_rank
from regrow.trainer.plan.step_time import bubble


def test_axes_say_which_links_they_use() -> None:
    axes = {axis.name: axis for axis in axes_of(Layout(dp_shard=4, tp=4, pp=2), gpus_per_node=8)}
    assert (axes["tp"].links, axes["dp_shard"].links, axes["pp"].links) == ("NVLink", "network", "network")
    assert axes["dp_shard"].first_group == (0, 4, 8, 12)
    assert axes["pp"].first_group == (0, 16)


def test_coordinates_are_those_of_the_mesh() -> None:
    """Every rank has its own, and the innermost axis changes first."""
    layout = Layout(dp_replicate=2, dp_shard=2, tp=2, pp=2)
    seen = [tuple(coordinates_of_rank(layout, r).values()) for r in range(16)]
    assert len(set(seen)) == 16
    assert coordinates_of_rank(layout, 1) == {"pp": 0, "dp_replicate": 0, "dp_shard": 0, "tp": 1}
    assert coordinates_of_rank(layout, 8) == {"pp": 1, "dp_replicate": 0, "dp_shard": 0, "tp": 0}


def test_the_bubble_shrinks_with_stages_on_a_rank() -> None:
    layout = Layout(pp=4)
    plain = bubble(layout, ParallelConfig(pp=4), 8)
    interleaved = bubble(layout, ParallelConfig(pp=4, pp_schedule=PipelineSchedule.interleaved), 8)
    assert plain == pytest.approx(3 / 11)
    assert interleaved == pytest.approx(1.5 / 9.5)
    assert bubble(Layout(), ParallelConfig(), 8) == 0


def test_a_checkpoint_is_shared_by_its_writers() -> None:
    plan = plan_checkpoint(
        model_bytes=8 * 10**9,
        optimizer_bytes=16 * 10**9,
        writers=16,
        ranks_per_node=8,
        nodes=2,
        model_only=False,
        staged=True,
        every_steps=100,
        host_link_gbs=50.0,
        storage_gbs=2.0,
    )
    assert (plan.rank_bytes, plan.node_bytes) == (1_500_000_000, 12_000_000_000)
    assert plan.staging_s == pytest.approx(0.03)
    assert plan.write_s == pytest.approx(6.0)


@pytest.mark.parametrize("text", ["8x80", "0x8x80", "1x8xmuch", ""])
def test_a_cluster_is_three_numbers(text: str) -> None:
    with pytest.raises(ConfigError, match=r"plan\.fit must be NODESxGPUSxGIB"):
        read_cluster(text)


def test_candidates_use_every_gpu() -> None:
    model = Llama3Config(
        name="m", vocab_size=64, max_seq_len=64, dim=64, n_layers=8, n_heads=8, n_kv_heads=8, ffn_dim=64
    )
    found = list(candidates(model, read_cluster("2×8×80"), 64, 8192))
    assert {layout.world_size for layout in found} == {16}
    assert len(set(found)) == len(found)
    assert max(layout.tp for layout in found) == 8
    assert all(layout.cp == 1 for layout in found)
    assert any(layout.cp > 1 for layout in candidates(model, Cluster(nodes=2, gpus=8, gib=80), 64, 65536))
