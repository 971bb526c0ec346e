"""Which layouts can run which models: arithmetic on plain numbers, each refusal a sentence with a remedy."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from regrow.errors import ConfigError
from regrow.models.config import WIDEST_SEGMENT_HEAD, AttentionKernel, DecoderConfig, ModelConfig
from regrow.trainer.config import (
    ActivationCheckpoint,
    ContextMethod,
    ParallelConfig,
    PipelineSchedule,
    PrecisionName,
    TrainConfig,
)
from regrow.trainer.parallel.heads import kv_heads_per_rank
from regrow.trainer.parallel.layout import Layout, divisors_of
from regrow.trainer.parallel.memory_rules import memory_problems
from regrow.trainer.parallel.stages import SPLIT_BACKWARD, stages_per_rank

__all__ = ["Batch", "check_attention", "check_layout"]

_IN_ROUNDS = (PipelineSchedule.interleaved, PipelineSchedule.interleaved_zero_bubble)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Numbers of the data.

    Attributes:
        global_batch_size: sequences of a step.
        micro_batch_size: rows of a forward pass.
        seq_len: tokens of a sequence.
    """

    global_batch_size: int
    micro_batch_size: int
    seq_len: int

    def micro_batches(self, data_ranks: int) -> int:
        """Forward passes of a rank in a step."""
        rows = -(-self.global_batch_size // data_ranks)
        return -(-rows // min(self.micro_batch_size, rows))


def check_layout(
    layout: Layout,
    parallel: ParallelConfig,
    model: ModelConfig,
    batch: Batch,
    *,
    train: TrainConfig,
    device_type: str,
    splits_backward: bool = True,
) -> None:
    """Whether the model can be trained like this.

    Args:
        layout: the degrees.
        parallel: their options.
        model: its dimensions.
        batch: of the data.
        train: activation checkpointing and compilation.
        device_type: `cpu` or `cuda`.
        splits_backward: whether torch runs a backward pass in two halves through autograd functions of one's own.

    Raises:
        ConfigError: naming field, rule, value and remedy.
    """
    if not isinstance(model, DecoderConfig):
        raise ConfigError(f"model must be a decoder of models/layers.py, but is {model.name}; use llama3_debug")
    problems = (
        *_tensor(layout, parallel, model, batch, train, device_type),
        *_context(layout, parallel, model, batch),
        *_pipeline(layout, parallel, model, batch, train, splits_backward=splits_backward),
        *_experts(layout, model),
        *memory_problems(layout, parallel, train),
    )
    for problem in problems:
        raise ConfigError(problem)


def check_attention(model: ModelConfig, precision: PrecisionName, device_type: str) -> None:
    """Whether the chosen kernel can train on this device in this precision.

    Args:
        model: its dimensions.
        precision: of the computation.
        device_type: `cpu` or `cuda`.

    Raises:
        ConfigError: naming field, rule, value and remedy.
    """
    chosen = model.attention if isinstance(model, DecoderConfig) else AttentionKernel.auto
    if device_type == "cpu" and chosen in (AttentionKernel.flex, AttentionKernel.varlen):
        lacks = "FlexAttention has no backward pass" if chosen is AttentionKernel.flex else "varlen has no kernel"
        raise ConfigError(
            f"model.attention must be auto or sdpa on a CPU, where {lacks}, but is {chosen.name}; use "
            "model.attention=auto"
        )
    if chosen is AttentionKernel.varlen and precision in (PrecisionName.fp32, PrecisionName.fp64):
        raise ConfigError(
            "model.attention must be auto, flex or sdpa where the computation is not in bfloat16 "
            f"(precision={precision.name}), but is varlen; use model.attention=auto"
        )
    if chosen is AttentionKernel.flex and precision is PrecisionName.fp64:
        raise ConfigError(
            "model.attention must be auto or sdpa with precision=fp64, but is flex; use model.attention=auto"
        )
    if chosen is AttentionKernel.varlen and isinstance(model, DecoderConfig):
        width = model.head_width
        if width % 8 or width > WIDEST_SEGMENT_HEAD:
            raise ConfigError(
                f"model.attention must be auto, flex or sdpa where the width of a head ({width}) is not a multiple "
                f"of 8 up to {WIDEST_SEGMENT_HEAD}, but is varlen; use model.attention=auto"
            )


def _divides(name: str, value: int, number: int, what: str) -> Iterator[str]:
    if number % value:
        yield f"parallel.{name} must divide {what} ({number}), but is {value}; use {divisors_of(number)}"


def _tensor(
    layout: Layout, parallel: ParallelConfig, model: DecoderConfig, batch: Batch, train: TrainConfig, device: str
) -> Iterator[str]:
    if parallel.async_tp and (device != "cuda" or train.compile is not True or not parallel.sequence_parallel):
        yield (
            "parallel.async_tp must be false without GPUs, train.compile and parallel.sequence_parallel, but is "
            "true; use parallel.async_tp=false"
        )
    if layout.tp == 1:
        return
    yield from _divides("tp", layout.tp, model.n_heads, "model.n_heads")
    width = "model.n_shared_experts · model.expert_ffn_dim" if model.n_experts else "model.ffn_dim"
    yield from _divides("tp", layout.tp, model.ffn_dim, width)
    if model.vocab_size < layout.tp:
        yield f"parallel.tp must be at most model.vocab_size ({model.vocab_size}), but is {layout.tp}; use 1"
    if (parallel.sequence_parallel or model.n_experts) and batch.seq_len % (layout.tp * layout.cp):
        yield (
            f"parallel.tp · parallel.cp must divide data.seq_len ({batch.seq_len}), which is split over their ranks, "
            f"but is {layout.tp * layout.cp}; use data.seq_len={_next(batch.seq_len, layout.tp * layout.cp)}"
        )


def _next(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _context(layout: Layout, parallel: ParallelConfig, model: DecoderConfig, batch: Batch) -> Iterator[str]:
    if layout.cp == 1:
        return
    chunks = 2 if parallel.cp_balance else 1
    multiple = math.lcm(chunks * layout.cp, layout.cp * layout.tp)
    if batch.seq_len % multiple:
        yield (
            f"data.seq_len must be a multiple of {multiple} with parallel.cp={layout.cp}, whose ranks hold {chunks} "
            f"chunk(s) each, but is {batch.seq_len}; use {_next(batch.seq_len, multiple)}"
        )
    heads, kv_heads = model.n_heads // layout.tp, kv_heads_per_rank(model.n_kv_heads, layout.tp)
    if parallel.cp_method is ContextMethod.ulysses and (heads % layout.cp or kv_heads % layout.cp):
        yield (
            f"parallel.cp must divide the heads of a rank ({heads} and {kv_heads} for keys) with "
            f"parallel.cp_method=ulysses, but is {layout.cp}; use parallel.cp_method=gather"
        )


def _pipeline(
    layout: Layout,
    parallel: ParallelConfig,
    model: DecoderConfig,
    batch: Batch,
    train: TrainConfig,
    *,
    splits_backward: bool,
) -> Iterator[str]:
    for name in ("pp_stages_per_rank", "pp_input_weight", "pp_output_weight"):
        if getattr(parallel, name) < 0:
            yield f"parallel.{name} must be at least 0, but is {getattr(parallel, name)}; use 0"
    if layout.pp == 1:
        if parallel.pp_layers:
            yield f"parallel.pp_layers must be empty with parallel.pp=1, but is {parallel.pp_layers}; leave it out"
        return
    kind, per_rank = parallel.pp_schedule, stages_per_rank(parallel)
    single = kind in (PipelineSchedule.one_f_one_b, PipelineSchedule.gpipe)
    if single and per_rank != 1:
        yield (
            f"parallel.pp_stages_per_rank must be 1 with parallel.pp_schedule={kind.name}, but is {per_rank}; "
            "use parallel.pp_schedule=interleaved"
        )
    if kind is PipelineSchedule.zbv_zero_bubble and per_rank != 2:
        yield f"parallel.pp_stages_per_rank must be 2 with parallel.pp_schedule={kind.name}, but is {per_rank}; use 2"
    stages = layout.pp * per_rank
    if model.n_layers < stages:
        yield (
            f"parallel.pp · stages per rank must be at most model.n_layers ({model.n_layers}), but is {stages}; "
            f"use parallel.pp={max(1, model.n_layers // per_rank)} or less"
        )
    yield from _layers_of_stages(parallel, model, stages)
    count = batch.micro_batches(layout.data_ranks)
    yield from _micro_batches(layout, kind, stages, count, batch)
    if model.tied_embeddings and kind is PipelineSchedule.zbv_zero_bubble:
        yield (
            "parallel.pp_schedule must put the two ends of tied embeddings on different ranks, but is "
            "zbv_zero_bubble; use parallel.pp_schedule=interleaved_zero_bubble"
        )
    if kind in SPLIT_BACKWARD:
        yield from _split_backward(kind, train, splits_backward=splits_backward)


def _split_backward(kind: PipelineSchedule, train: TrainConfig, *, splits_backward: bool) -> Iterator[str]:
    """What a schedule asks for whose backward pass runs in two halves."""
    if not splits_backward:
        yield (
            "parallel.pp_schedule must not run the backward pass in two halves with torch before 2.13, but is "
            f"{kind.name}; use parallel.pp_schedule=interleaved"
        )
    if train.activation_checkpoint is not ActivationCheckpoint.none:
        yield (
            f"train.activation_checkpoint must be none with parallel.pp_schedule={kind.name}, whose backward "
            f"pass runs in two halves, but is {train.activation_checkpoint.name}; "
            "use parallel.pp_schedule=interleaved"
        )
    if train.compile is True:
        yield (
            f"train.compile must be false with parallel.pp_schedule={kind.name}, whose backward pass runs in two "
            "halves, but is true; use parallel.pp_schedule=interleaved"
        )


def _layers_of_stages(parallel: ParallelConfig, model: DecoderConfig, stages: int) -> Iterator[str]:
    given = parallel.pp_layers
    if given and (len(given) != stages or sum(given) != model.n_layers or min(given) < 1):
        yield (
            f"parallel.pp_layers must hold {stages} numbers of at least 1 that add up to model.n_layers "
            f"({model.n_layers}), but is {list(given)}; leave it out to spread the layers evenly"
        )


def _micro_batches(layout: Layout, kind: PipelineSchedule, stages: int, count: int, batch: Batch) -> Iterator[str]:
    if _schedulable(kind, count, stages, layout.pp):
        return
    rows = -(-batch.global_batch_size // layout.data_ranks)
    sizes = [n for n in range(1, rows + 1) if _schedulable(kind, -(-rows // n), stages, layout.pp)]
    remedy = (
        f"use data.micro_batch_size={max(sizes, key=lambda n: (rows % n == 0, n))}"
        if sizes
        else f"raise data.global_batch_size to {stages * layout.data_ranks * batch.micro_batch_size}"
    )
    rule = f"at least the number of stages ({stages})"
    if kind in _IN_ROUNDS:
        rule = f"at least parallel.pp ({layout.pp}) and divide into equal rounds of about as many"
    yield (
        f"the micro-batches of a step on each rank must be {rule} with parallel.pp_schedule={kind.name}, but are "
        f"{count}; {remedy}"
    )


def _schedulable(kind: PipelineSchedule, count: int, stages: int, pp: int) -> bool:
    """What the schedules of torch.distributed.pipelining ask of the number of micro-batches."""
    if kind in _IN_ROUNDS:
        return count >= pp and count % (count // pp) == 0
    return kind is PipelineSchedule.gpipe or count >= stages


def _experts(layout: Layout, model: DecoderConfig) -> Iterator[str]:
    if not model.n_experts:
        if layout.ep > 1:
            yield f"parallel.ep must be 1 for {model.name}, which has no experts, but is {layout.ep}; use 1"
        return
    sharing = layout.dp_shard * layout.cp * layout.tp
    yield from _divides("ep", layout.ep, model.n_experts, "model.n_experts")
    if sharing % layout.ep:
        yield (
            f"parallel.ep must divide parallel.dp_shard · parallel.cp · parallel.tp ({sharing}), from which it "
            f"borrows ranks, but is {layout.ep}; use {divisors_of(sharing)}"
        )
