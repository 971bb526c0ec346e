"""Engines of small models without a run around them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from regrow.models.layers import Decoder
from regrow.models.llama3.config import Llama3Config
from regrow.models.llama3.model import Llama3
from regrow.trainer.config import ParallelConfig, PipelineSchedule, PrecisionConfig, PrecisionName, TrainConfig
from regrow.trainer.data.loader import MicroBatch
from regrow.trainer.parallel.apply import initialise, parallelise
from regrow.trainer.parallel.context import ParallelContext
from regrow.trainer.parallel.engine import Engine

__all__ = ["WithLogits", "llama_config", "make_engine", "micro_batches", "peak_of"]


class WithLogits(Decoder):
    """Llama with a forward pass of its own, which is asked for its logits."""

    make_block, frequencies = Llama3.make_block, Llama3.frequencies
    layer_weights, plan = Llama3.layer_weights, Llama3.plan

    def forward(  # type: ignore[override]
        self, tokens: Tensor, mask: Any = None, positions: Any = None, valid: Any = None
    ) -> Tensor:
        return super().forward(tokens, mask, positions, valid)


def llama_config(**sizes: Any) -> Llama3Config:
    """A model of two layers; `sizes` as in the config."""
    small = {"dim": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 24, "vocab_size": 53}
    return Llama3Config(**{"name": "small", "max_seq_len": 512, **small, **sizes})


def make_engine(
    kind: type[Decoder],
    config: Llama3Config,
    context: ParallelContext,
    length: int,
    *,
    parallel: ParallelConfig | None = None,
    schedule: PipelineSchedule = PipelineSchedule.one_f_one_b,
    precision: PrecisionName = PrecisionName.fp32,
    z_loss: float = 0.0,
) -> Engine:
    """With its first weights, under the layout that `context` was opened with."""
    with torch.device("meta"):
        whole = kind(config)
    made = parallelise(
        whole,
        context,
        model_config=config,
        parallel=parallel or ParallelConfig(pp_schedule=schedule),
        train=TrainConfig(),
        precision=PrecisionConfig(name=precision),
        sequences=8,
    )
    initialise(made, context.device, 0, length)
    return Engine(made, context, model_config=config, schedule=schedule, precision=precision, z_loss=z_loss)


def micro_batches(count: int, rows: int, length: int, vocabulary: int) -> Sequence[MicroBatch]:
    """Random tokens, the same each time; some labels do not count."""
    torch.manual_seed(0)
    tokens = torch.randint(0, vocabulary, (count, rows, length + 1))
    labels = tokens[..., 1:].clone()
    labels[:, 0, ::3] = -100
    return [MicroBatch(tokens=t[:, :-1], labels=n, documents=None) for t, n in zip(tokens, labels, strict=True)]


def peak_of(body: Callable[[], Any]) -> int:
    """The most bytes that were live at a time, of what `body` allocates."""
    # torch 2.11 warns of lost cycles unless it is told to add them up.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        kept = body()
    del kept
    live = most = 0
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most
