"""Thousands of ranks without machines: meshes, validation, stages and shards by arithmetic."""

import math
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from regrow.checkpoint.format.layout import local_box, make_plan
from regrow.launch.config.schema import Config
from regrow.launch.run.build import build_model
from regrow.launch.run.preflight import check_config, check_parallel
from regrow.models.config import DecoderConfig
from regrow.trainer.parallel.apply import parallelise
from regrow.trainer.parallel.context import ParallelContext
from regrow.trainer.parallel.layout import Layout, resolve_layout
from regrow.trainer.parallel.mesh import make_meshes
from tests.pool import run_distributed
from tests.support import typed_config

pytestmark = pytest.mark.slow

RUNS = {
    1024: ["model=llama3_70b", "parallel.dp_shard=16", "parallel.tp=8", "parallel.pp=4", "parallel.cp=2",
           "parallel.pp_schedule=interleaved", "data.global_batch_size=256", "data.seq_len=8192"],
    16384: ["model=llama3_405b", "parallel.dp_replicate=2", "parallel.dp_shard=64", "parallel.tp=8",
            "parallel.pp=16", "data.global_batch_size=2048", "data.seq_len=8192"],
    4096: ["model=qwen3_moe_235b_a22b", "parallel.dp_shard=128", "parallel.tp=4", "parallel.pp=8", "parallel.ep=64",
           "data.global_batch_size=1024", "data.seq_len=8192"],
}  # fmt: skip


def resolved(world: int) -> tuple[Config, Layout]:
    config = typed_config([*RUNS[world], "data.micro_batch_size=1"])
    check_config(config)
    layout = resolve_layout(config.parallel, world, ranks_are_given=True)
    check_parallel(config, layout, "cuda")
    return config, layout


def shapes_of_rank(world: int, rank: int) -> tuple[dict[str, tuple[tuple[int, ...], tuple[int, ...]]], int, float]:
    """Each parameter's box on a rank of a fake world, the bytes it would save, and the seconds that took."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    config, layout = resolved(world)
    started = time.perf_counter()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    world_group = dist.group.WORLD
    assert world_group is not None
    context = ParallelContext(
        layout=layout,
        meshes=make_meshes(layout, "cpu"),
        device=torch.device("cpu"),
        cpu_group=world_group,
        rank=rank,
    )
    assert isinstance(config.model, DecoderConfig)
    with torch.device("meta"):
        whole = build_model(config)
    parallel = parallelise(
        whole,
        context,
        model_config=config.model,
        parallel=config.parallel,
        train=config.train,
        precision=config.precision,
        sequences=config.data.global_batch_size,
    )
    boxes = {}
    for name, parameter in parallel.model.named_parameters():
        assert isinstance(parameter, DTensor)
        boxes[name] = local_box(parameter.shape, parameter.device_mesh, parameter.placements)
        assert boxes[name][0] == tuple(parameter.to_local().shape), name
    plan = make_plan(dict(parallel.model.named_parameters()), rank, world)
    seconds = time.perf_counter() - started
    dist.destroy_process_group()
    return boxes, sum(item.data_bytes for item in plan.items), seconds


def test_sixteen_thousand_ranks_of_405b() -> None:
    """dp_replicate 2 × dp_shard 64 × tp 8 × pp 16; rank order is pp, replicas, shards, tensor parts."""
    ((boxes, _, seconds),) = run_distributed(shapes_of_rank, 16384, 16384 - 1, world_size=1)
    assert seconds < 60
    layers = sorted({int(n.split(".")[1]) for n in boxes if n.startswith("layers.")})
    assert layers == list(range(126 - len(layers), 126))
    assert len(layers) in (7, 8)
    last = layers[-1]
    # Rows are cut by tensor parallelism first, then by FSDP: this rank has the end of each.
    assert boxes[f"layers.{last}.attention.wq.weight"] == ((16384 // 512, 16384), (16384 - 32, 0))
    assert boxes[f"layers.{last}.feed_forward.w2.weight"] == ((256, 53248 // 8), (16384 - 256, 53248 - 6656))
    assert boxes["output.weight"][0] == (math.ceil(128256 / 8 / 64), 16384) or boxes["output.weight"][0][0] < 251
    assert "tok_embeddings.weight" not in boxes


def test_a_thousand_ranks_hold_every_layer_once() -> None:
    """The first and last rank of each place in the pipeline: layers and their bytes."""
    seen: list[int] = []
    for stage in range(4):
        ((boxes, saved, seconds),) = run_distributed(shapes_of_rank, 1024, stage * 256, world_size=1)
        assert seconds < 60
        seen += sorted({int(n.split(".")[1]) for n in boxes if n.startswith("layers.")})
        # Within a stage 256 ranks share the weights (cp ranks are shards, too), so a rank writes about a 256th.
        stored = sum(math.prod(shape) for shape, _ in boxes.values()) * 4
        assert 0.95 * stored <= saved <= stored
    assert sorted(seen) == list(range(80))


def test_experts_of_235b_are_spread_over_4096_ranks() -> None:
    ((boxes, _, seconds),) = run_distributed(shapes_of_rank, 4096, 1, world_size=1)
    assert seconds < 60
    # 128 experts over 64 ranks make 2 a rank; 8 ranks share them, so each matrix is cut in 8.
    shape, offset = boxes["layers.0.moe.experts.w1"]
    assert shape == (2, 1536 // 8, 4096)
    assert offset == (2, 0, 0)
