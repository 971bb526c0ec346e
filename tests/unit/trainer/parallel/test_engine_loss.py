"""An engine's losses and gradients are the same from a model that takes the loss and from one that gives logits."""

import os
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from regrow.models.layers import Decoder
from regrow.models.llama3.model import Llama3
from regrow.torch_compat import splits_backward
from regrow.trainer.config import PipelineSchedule, PrecisionName
from regrow.trainer.parallel.context import ParallelContext, close_parallel, open_parallel
from regrow.trainer.parallel.layout import Layout
from tests.engines import WithLogits, llama_config, make_engine, micro_batches
from tests.pool import run_distributed

ONE = {"dp_replicate": 1, "dp_shard": 1, "tp": 1, "pp": 1, "cp": 1, "ep": 1}
LENGTH = 8
# Of a layout, its schedule, whether embeddings are tied, and z-loss.
Case = tuple[dict[str, int], PipelineSchedule, bool, float]
PLAIN = PipelineSchedule.one_f_one_b
CASES: dict[int, list[Case]] = {
    1: [({}, PLAIN, False, 0.0), ({}, PLAIN, True, 0.0), ({}, PLAIN, False, 0.1)],
    2: [({"tp": 2}, PLAIN, True, 0.1), ({"dp_shard": 2}, PLAIN, True, 0.0), ({"pp": 2}, PLAIN, True, 0.1),
        ({"pp": 2}, PipelineSchedule.gpipe, False, 0.0)],
    4: [({"tp": 4}, PLAIN, False, 0.0), ({"tp": 2, "pp": 2}, PLAIN, True, 0.1), ({"cp": 2, "tp": 2}, PLAIN, False, 0.1)],
}  # fmt: skip
if splits_backward():
    CASES[2].append(({"pp": 2}, PipelineSchedule.interleaved_zero_bubble, False, 0.1))


def step_of(kind: type[Decoder], context: ParallelContext, case: Case) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The summed loss, the loss without gradients, and this rank's gradients."""
    _, schedule, tied, z_loss = case
    config = llama_config(tied_embeddings=tied, n_layers=4)
    engine = make_engine(
        kind, config, context, LENGTH, schedule=schedule, precision=PrecisionName.fp64, z_loss=z_loss
    )
    batches = micro_batches(2, 2, LENGTH, config.vocab_size)
    validated = engine.losses(batches)
    trained = engine.forward_backward(batches, 30, lambda _: None)
    own = {n: p.grad for n, p in engine.model.named_parameters() if p.grad is not None}
    local = {n: g.to_local() if isinstance(g, DTensor) else g for n, g in own.items()}
    assert engine.last_logits(torch.tensor([[3, 1, 4]])).shape == (config.vocab_size,)
    return trained, validated, {n: g.detach().clone() for n, g in local.items()}


def differences(cases: Sequence[Case]) -> list[float]:
    """Of each case, the largest relative difference between the two models on this rank."""
    torch.set_num_threads(1)
    found = []
    for number, case in enumerate(cases):
        # Each has its own addresses in the store that all share.
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
        context = open_parallel(Layout(**ONE | case[0]), "cpu", 30.0)
        (loss, validated, grads), (expected, _, expected_grads) = (
            step_of(kind, context, case) for kind in (Llama3, WithLogits)
        )
        assert grads.keys() == expected_grads.keys()
        pairs = [(loss, expected), (validated, loss), *((grads[n], expected_grads[n]) for n in grads)]
        apart = [float((a - b).norm() / b.norm().clamp(min=1e-9)) for a, b in pairs]
        found.append(max(apart))
        close_parallel()
    return found


@pytest.mark.parametrize(
    "world", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_both_ways_to_the_loss_agree_in_float64(world: int) -> None:
    for found in run_distributed(differences, CASES[world], world_size=world):
        assert max(found) < 1e-12, found
