"""What a training step holds at its peak: without the logits, far less than with them."""

import re
from pathlib import Path

import pytest
import torch

from regrow.models.layers import Decoder
from regrow.models.llama3.model import Llama3
from regrow.trainer.config import AdamWConfig
from regrow.trainer.optimizer import AdamW
from regrow.trainer.parallel.context import close_parallel, open_parallel
from regrow.trainer.parallel.layout import Layout
from tests.engines import WithLogits, llama_config, make_engine, micro_batches, peak_of
from tests.pool import run_distributed

VOCABULARY, ROWS, LENGTH = 32_000, 8, 512


def resident(field: str) -> int:
    """`VmRSS` or `VmHWM` in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


def measure(kind: type[Decoder]) -> tuple[int, int, int, float]:
    """Bytes that are there before a step, that the step adds at its peak, that its process grows by; and the loss."""
    torch.set_num_threads(1)
    context = open_parallel(Layout(dp_replicate=1, dp_shard=1, tp=1, pp=1, cp=1, ep=1), "cpu", 30.0)
    config = llama_config(vocab_size=VOCABULARY, dim=192, n_heads=6, n_kv_heads=3, ffn_dim=512)
    engine = make_engine(kind, config, context, LENGTH)
    optimizer = AdamW(AdamWConfig(lr=1e-3), engine.model)
    batches = micro_batches(1, ROWS, LENGTH, VOCABULARY)
    losses = []

    def step() -> None:
        losses.append(float(engine.forward_backward(batches, ROWS * LENGTH, lambda _: None)))
        optimizer.step(1e-3, torch.ones(()), torch.zeros(()))
        optimizer.zero_grad()

    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step()
    grown = resident("VmHWM") - before
    peak = peak_of(step)
    held = 3 * sum(p.numel() * 4 for p in engine.model.parameters())
    close_parallel()
    return held, peak, grown, losses[-1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_step_takes_a_third_of_what_it_takes_with_the_logits() -> None:
    (plain,), (ours,) = (run_distributed(measure, kind, world_size=1, timeout_s=280) for kind in (WithLogits, Llama3))
    print("held, allocated at the peak, grown by, loss:", plain, ours)
    assert ours[1] * 3 < plain[1]
    assert (ours[0] + ours[1]) * 3 < plain[0] + plain[1]
    assert ours[2] * 2 < plain[2]
    assert ours[3] == pytest.approx(plain[3], rel=1e-6)
