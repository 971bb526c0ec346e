"""One state through many layouts: whatever ranks read and write it, every tensor stays what it was, bit for bit."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import regrow.launch.run.compose
from regrow.checkpoint.config import AsyncMode
from regrow.checkpoint.format.manifest import Manifest
from regrow.checkpoint.load.loading import load_tensors
from regrow.checkpoint.save.saver import StepSaver
from regrow.launch.config.schema import Config
from regrow.launch.run.build import build_model
from regrow.launch.run.compose import compose_trainer
from regrow.launch.run.rank_spec import RankSpec
from regrow.launch.run.signals import StopFlag
from regrow.launch.run.start import open_spec
from regrow.models.base import LanguageModel
from regrow.trainer.named_tensors import model_tensors, optimizer_tensors
from regrow.trainer.parallel.context import close_parallel, open_parallel
from tests.pool import run_distributed
from tests.runs import spec_of
from tests.support import stored_tensors, tiny

pytestmark = pytest.mark.slow

FROZEN = ("layers.0.attention.wq.weight", "layers.1.ffn_norm.weight")
CHAIN: list[tuple[int, list[str]]] = [
    (2, ["parallel.dp_shard=2"]),
    (3, ["parallel.dp_shard=3"]),
    (4, ["parallel.dp_replicate=2", "parallel.dp_shard=2"]),
    (4, ["parallel.dp_shard=4"]),
    (2, ["parallel.dp_replicate=2"]),
    (4, ["parallel.dp_shard=2", "parallel.tp=2"]),
    (4, ["parallel.dp_shard=2", "parallel.pp=2"]),
    (1, []),
]


def _freeze(config: Config) -> LanguageModel:
    model = _build(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in FROZEN)
    return model


_build = build_model


def _pass_on(spec: RankSpec, source: Path | None, target: Path) -> int:
    """Trains two steps, or loads a step, and saves what is there; returns the optimizer's tensors."""
    regrow.launch.run.compose.build_model = _freeze  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    context = open_parallel(spec.layout, "cpu", 30.0)
    trainer = compose_trainer(spec, context, StopFlag(), 1)
    tensors = model_tensors(trainer.model) | optimizer_tensors(trainer.optimizer)
    if source is None:
        trainer.fit()
    else:
        load_tensors(source, tensors, context.cpu_group)
    saver = StepSaver(target, AsyncMode["async"], context.device, context.cpu_group)
    owner_ranks = trainer.engine.owner_ranks(list(tensors))
    results = [*saver.save(tensors, Manifest(step=1, lineage="a"), owner_ranks), *saver.wait()]
    assert [r.error for r in results] == [None]
    saver.close()
    dist.barrier()
    close_parallel()
    return len(optimizer_tensors(trainer.optimizer))


@pytest.mark.parametrize("tied", [True, False], ids=["tied embeddings", "an odd vocabulary"])
def test_every_layout_passes_the_state_on_unchanged(corpus: Path, tmp_path: Path, tied: bool) -> None:
    more = ["model.tied_embeddings=true"] if tied else ["model.vocab_size=323"]
    overrides = [*tiny(corpus, "train.steps=2", "data.global_batch_size=12", "hooks=none"), "checkpoint.enable=false"]
    if not tied:
        overrides = [o for o in overrides if not o.startswith("model.vocab_size")]
    source: Path | None = None
    first: dict[str, torch.Tensor] = {}
    for number, (world, degrees) in enumerate([(1, []), *CHAIN]):
        run_dir, target = tmp_path / f"run{number}", tmp_path / f"c{number}"
        run_dir.mkdir()
        spec = spec_of([*overrides, *more, *degrees], run_dir, world)
        spec = dataclasses.replace(spec, record=open_spec(spec).record)
        run_distributed(_pass_on, spec, source, target, world_size=world)
        source = target / "step-1"
        if number == 0:
            first = stored_tensors(source)
            assert not [n for n in first if n.startswith("optimizer") and any(f in n for f in FROZEN)]
            assert any(n.endswith("exp_avg") for n in first)
            assert ("output.weight" in first) is not tied
            continue
        found = stored_tensors(source)
        assert found.keys() == first.keys(), degrees
        for name, tensor in first.items():
            assert torch.equal(found[name], tensor), (degrees, name)
