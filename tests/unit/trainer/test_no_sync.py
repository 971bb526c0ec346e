"""The host never waits for the device within a step: each way of training, and each way to break it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from regrow.models.layers import RMSNorm
from regrow.trainer.loop import Trainer
from tests.no_sync import HostSyncError, meta_trainer, one_step
from tests.support import TINY_MODEL, tiny

pytestmark = pytest.mark.slow

SMALL = ["data.global_batch_size=8", "data.micro_batch_size=2", "train.grad_clip=1.0", "precision=bf16"]
MOE = ["model=qwen3_moe_debug", *(o for o in TINY_MODEL if not o.startswith("model.ffn")), "model.head_dim=8",
       "model.n_experts=4", "model.expert_ffn_dim=24"]  # fmt: skip
DEEPSEEK = ["model.score_func=sigmoid", "model.n_shared_experts=1", "model.n_expert_groups=2",
            "model.balance=auxiliary"]  # fmt: skip
DOCUMENTS, FULL, SELECTIVE = (
    "data.document_mask=true", "train.activation_checkpoint=full", "train.activation_checkpoint=selective"
)  # fmt: skip

# Ranks, kind, options, and how often sizes may be exchanged in a layer and micro-batch.
STEPS: list[tuple[int, str, list[str], int]] = [
    (1, "dense", [], 0),
    (1, "dense", ["precision=fp32", DOCUMENTS], 0),
    (1, "dense", [DOCUMENTS, FULL], 0),
    (1, "dense", [SELECTIVE], 0),
    (2, "dense", ["parallel.dp_shard=2", DOCUMENTS], 0),
    (1, "moe", [], 0),
    (1, "moe", [DOCUMENTS, FULL], 0),
    (1, "moe", [SELECTIVE, *DEEPSEEK], 0),
    (2, "moe", ["parallel.dp_shard=2", DOCUMENTS], 0),
    (2, "moe", ["parallel.dp_shard=2", "parallel.ep=2"], 1),
    (2, "moe", ["parallel.dp_shard=2", "parallel.ep=2", DOCUMENTS, FULL], 2),
    (2, "moe", ["parallel.dp_shard=2", "parallel.ep=2", SELECTIVE, *DEEPSEEK], 1),
]


def settings(corpus: Path, kind: str, *options: str) -> list[str]:
    data = [o for o in tiny(corpus) if not o.startswith("model.") or kind == "dense"]
    return [*([] if kind == "dense" else MOE), *data, *SMALL, *options]


@pytest.mark.parametrize(("ranks", "kind", "options", "exchanges"), STEPS, ids=lambda v: str(v)[:60])
def test_the_host_waits_for_nothing(
    corpus: Path, tmp_path: Path, ranks: int, kind: str, options: list[str], exchanges: int
) -> None:
    with meta_trainer(settings(corpus, kind, *options), tmp_path, ranks) as (trainer, allowed):
        one_step(trainer)
        layers, micro_batches = len(trainer.model.blocks()), 8 // ranks // 2
        assert len(allowed) == exchanges * layers * micro_batches


PLANTED: dict[str, Any] = {
    "item": lambda x: x * x.sum().item(),
    "bool index": lambda x: x + x[x > 0].sum(),
    "assigned bool index": lambda x: x.index_put((x > 0,), x.new_zeros(())),
    "bincount": lambda x: x + torch.bincount(x.flatten().to(torch.int64)).sum(),
    "nonzero": lambda x: x + x.nonzero().sum(),
    "cpu": lambda x: x + x.cpu().sum(),
    "copied to the host": lambda x: x + torch.empty(x.shape, dtype=x.dtype).copy_(x).sum(),
    "unknown repeats": lambda x: x + x.repeat_interleave(x.new_ones(x.shape[0], dtype=torch.int64), 0).sum(),
    "equal": lambda x: x * torch.equal(x, x),
    "item in the backward pass": lambda x: _with_hook(x, lambda grad: grad * grad.sum().item()),
}


def _with_hook(x: Tensor, hook: Callable[[Tensor], Tensor]) -> Tensor:
    x.register_hook(hook)  # type: ignore[no-untyped-call]
    return x


@pytest.fixture(scope="module")
def dense(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    """Shared: a step that fails leaves no mark on values that are not there."""
    with meta_trainer(settings(corpus, "dense", "model.n_layers=1"), tmp_path_factory.mktemp("dense"), 1) as (
        trainer,
        _,
    ):
        yield trainer


@pytest.mark.parametrize("planted", PLANTED)
def test_whatever_makes_it_wait_is_found(dense: Trainer, monkeypatch: pytest.MonkeyPatch, planted: str) -> None:
    forward = RMSNorm.forward

    def waiting(self: RMSNorm, x: Tensor) -> Tensor:
        out: Tensor = PLANTED[planted](forward(self, x))
        return out

    monkeypatch.setattr(RMSNorm, "forward", waiting)
    with pytest.raises(HostSyncError):
        one_step(dense)
    monkeypatch.undo()
    one_step(dense)
