"""Which layouts are refused, with which words; stages; pieces of sequences."""

import copy
import functools
import itertools
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow.launch.config.schema import Config
from regrow.launch.run.preflight import check_parallel
from regrow.models.config import DecoderConfig
from regrow.models.qwen3.config import Qwen3Config, Qwen3MoeConfig
from regrow.trainer.config import ContextMethod, ParallelConfig, PipelineSchedule, TrainConfig
from regrow.trainer.parallel.layout import Layout, resolve_layout
from regrow.trainer.parallel.rules import Batch, check_layout
from regrow.trainer.parallel.sequence_chunks import positions_of, sequence_chunks
from regrow.trainer.parallel.stages import plan_stages, split_layers, stages_per_rank
from tests.support import TINY_MODEL, typed_config

MOE = ["model=qwen3_moe_debug"]
ONES = {"dp_replicate": 1, "dp_shard": 1, "tp": 1, "pp": 1, "cp": 1, "ep": 1}


def problem_of(config: Config, device: str = "cpu") -> str | None:
    p = config.parallel
    try:
        layout = resolve_layout(p, p.dp_replicate * abs(p.dp_shard) * p.tp * p.pp * p.cp, ranks_are_given=False)
        check_parallel(config, layout, device)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.tp=3"], "parallel.tp must divide model.n_heads (4), but is 3; use 1, 2 or 4"),
        (["parallel.tp=2", "model.ffn_dim=65"], "parallel.tp must divide model.ffn_dim (65), but is 2"),
        (["parallel.tp=2", "data.seq_len=31"], "parallel.tp · parallel.cp must divide data.seq_len (31), which is split"),
        (["parallel.cp=2", "data.seq_len=30"], "data.seq_len must be a multiple of 4 with parallel.cp=2"),
        (["parallel.cp=4", "parallel.cp_method=ulysses"], "use parallel.cp_method=gather"),
        (["parallel.pp=4"], "parallel.pp · stages per rank must be at most model.n_layers (2), but is 4; use parallel.pp=2 or less"),
        (["parallel.pp=2", "data.global_batch_size=1"], "at least the number of stages (2) with parallel.pp_schedule=one_f_one_b, but are 1; raise data.global_batch_size to 8"),
        (["parallel.pp=2", "data.global_batch_size=4", "data.micro_batch_size=4"], "but are 1; use data.micro_batch_size=2"),
        (["parallel.pp=2", "parallel.pp_layers=[2,1]"], "parallel.pp_layers must hold 2 numbers of at least 1 that add up to model.n_layers (2)"),
        (["parallel.pp_layers=[2]"], "parallel.pp_layers must be empty with parallel.pp=1"),
        (["parallel.pp=2", "parallel.pp_stages_per_rank=2"], "must be 1 with parallel.pp_schedule=one_f_one_b, but is 2; use parallel.pp_schedule=interleaved"),
        (["parallel.pp=2", "model.n_layers=4", "parallel.pp_schedule=zbv_zero_bubble", "model.tied_embeddings=true"], "must put the two ends of tied embeddings on different ranks"),
        (["parallel.pp=2", "model.n_layers=4", "parallel.pp_schedule=zbv_zero_bubble", "train.activation_checkpoint=full"], "train.activation_checkpoint must be none"),
        (["parallel.pp=2", "model.n_layers=4", "parallel.pp_schedule=interleaved_zero_bubble", "train.compile=true"], "train.compile must be false"),
        (["parallel.ep=2"], "parallel.ep must be 1 for llama3_debug, which has no experts, but is 2; use 1"),
        (["parallel.async_tp=true"], "parallel.async_tp must be false without GPUs"),
        (["parallel.pp_output_weight=-1"], "parallel.pp_output_weight must be at least 0, but is -1; use 0"),
        ([*MOE, "parallel.ep=3", "parallel.dp_shard=3"], "parallel.ep must divide model.n_experts (8), but is 3; use 1, 2, 4 or 8"),
        ([*MOE, "parallel.ep=4", "parallel.dp_shard=2"], "parallel.ep must divide parallel.dp_shard · parallel.cp · parallel.tp (2), from which it borrows ranks, but is 4; use 1 or 2"),
        (["parallel.cp=0"], "parallel.cp must be at least 1, but is 0; use 1"),
        (["model.attention=varlen"], "model.attention must be auto or sdpa on a CPU, where varlen has no kernel, but is varlen; use"),
        (["model.attention=flex"], "on a CPU, where FlexAttention has no backward pass, but is flex; use model.attention=auto"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_in_a_sentence(overrides: list[str], words: str) -> None:
    tiny = [] if overrides[0] in MOE else TINY_MODEL
    assert words in str(problem_of(typed_config([*tiny, "data.micro_batch_size=4", "data.seq_len=32", *overrides])))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.attention=varlen"], "where the computation is not in bfloat16 (precision=fp32), but is varlen; use"),
        (["model.attention=flex", "precision=fp64"], "must be auto or sdpa with precision=fp64, but is flex; use"),
        (["model.attention=varlen", "precision=bf16", "model.dim=48"], "the width of a head (12) is not a multiple of 8"),
        (["model.attention=varlen", "precision=bf16", "model.dim=64"], None),
        (["model.attention=flex"], None),
    ],
)  # fmt: skip
def test_a_kernel_that_cannot_compute_it_is_refused_on_a_gpu(overrides: list[str], words: str | None) -> None:
    found = problem_of(typed_config([*TINY_MODEL, *overrides]), "cuda")
    assert found is None if words is None else words in str(found)


def test_a_torch_that_cannot_split_the_backward_pass_is_told() -> None:
    layout, model = Layout(**{**ONES, "pp": 2}), plain_model("model=qwen3_debug")
    batch = Batch(global_batch_size=16, micro_batch_size=2, seq_len=32)
    parallel = ParallelConfig(pp=2, pp_schedule=PipelineSchedule.interleaved_zero_bubble)
    check_layout(layout, parallel, model, batch, train=TrainConfig(), device_type="cpu")
    with pytest.raises(ValueError, match="two halves with torch before 2.13, but is interleaved_zero_bubble; use"):
        check_layout(layout, parallel, model, batch, train=TrainConfig(), device_type="cpu", splits_backward=False)


@functools.cache
def plain_model(choice: str) -> DecoderConfig:
    model = typed_config([choice]).model
    assert isinstance(model, DecoderConfig)
    return model


def decoder(
    moe: bool, heads: int, kv_heads: int, layers: int, ffn: int, experts: int, *, tied: bool
) -> DecoderConfig:
    model = copy.copy(plain_model(MOE[0] if moe else "model=qwen3_debug"))
    model.n_heads, model.n_kv_heads, model.n_layers, model.tied_embeddings = heads, kv_heads, layers, tied
    if isinstance(model, Qwen3MoeConfig):
        model.n_experts, model.experts_per_token = experts, 1
    elif isinstance(model, Qwen3Config):
        model.ffn_dim = ffn
    return model


def can_run(layout: Layout, p: ParallelConfig, model: DecoderConfig, batch: Batch) -> bool:
    """The rules once more, as one would say them."""
    moe = isinstance(model, Qwen3MoeConfig)
    heads = model.n_heads % layout.tp == 0
    ffn = layout.tp == 1 or moe or getattr(model, "ffn_dim", 0) % layout.tp == 0
    parts = layout.tp * layout.cp if layout.tp > 1 and (p.sequence_parallel or moe) else layout.cp
    even = batch.seq_len % parts == 0 and (layout.cp == 1 or batch.seq_len % (layout.tp * layout.cp) == 0)
    halves = layout.cp == 1 or not p.cp_balance or batch.seq_len % (2 * layout.cp) == 0
    ulysses = (
        layout.cp == 1
        or p.cp_method is not ContextMethod.ulysses
        or (
            model.n_heads // layout.tp % layout.cp == 0
            and model.n_kv_heads // math.gcd(model.n_kv_heads, layout.tp) % layout.cp == 0
        )
    )
    sharing = layout.dp_shard * layout.cp * layout.tp
    experts = layout.ep == 1 or (moe and sharing % layout.ep == 0 and getattr(model, "n_experts", 0) % layout.ep == 0)
    return heads and ffn and even and halves and ulysses and experts and pipeline_can_run(layout, p, model, batch)


def pipeline_can_run(layout: Layout, p: ParallelConfig, model: DecoderConfig, batch: Batch) -> bool:
    if layout.pp == 1:
        return True
    stages = layout.pp * stages_per_rank(p)
    count = batch.micro_batches(layout.data_ranks)
    rounds = {
        PipelineSchedule.gpipe: True,
        PipelineSchedule.one_f_one_b: count >= stages,
        PipelineSchedule.zbv_zero_bubble: count >= stages and not model.tied_embeddings,
    }.get(p.pp_schedule, count >= layout.pp and count % max(1, count // layout.pp) == 0)
    return stages <= model.n_layers and rounds


@settings(max_examples=400, deadline=None)
@given(
    degrees=st.fixed_dictionaries({name: st.sampled_from([1, 1, 2, 3, 4]) for name in ONES}),
    heads=st.sampled_from([(4, 2), (6, 3), (8, 8), (4, 1), (12, 6)]),
    layers=st.integers(1, 9),
    ffn=st.integers(60, 66),
    experts=st.integers(1, 8),
    seq_len=st.integers(8, 64),
    rows=st.integers(1, 24),
    micro=st.integers(1, 4),
    schedule=st.sampled_from(list(PipelineSchedule)),
    method=st.sampled_from(list(ContextMethod)),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
)
def test_exactly_what_cannot_run_is_refused(
    degrees: dict[str, int], heads: tuple[int, int], layers: int, ffn: int, experts: int, seq_len: int, rows: int,
    micro: int, schedule: PipelineSchedule, method: ContextMethod, flags: tuple[bool, bool, bool, bool],
) -> None:  # fmt: skip
    moe, tied, sequence, balance = flags
    parallel = ParallelConfig(pp_schedule=schedule, cp_method=method, sequence_parallel=sequence, cp_balance=balance)
    for name, degree in degrees.items():
        setattr(parallel, name, degree)
    layout, batch = Layout(**degrees), Batch(global_batch_size=rows, micro_batch_size=micro, seq_len=seq_len)
    model = decoder(moe, *heads, layers, ffn, experts, tied=tied)
    refusal = None
    try:
        check_layout(layout, parallel, model, batch, train=TrainConfig(), device_type="cpu")
    except ValueError as error:
        refusal = str(error)
    assert (refusal is None) == can_run(layout, parallel, model, batch), refusal
    if refusal is not None:
        assert re.fullmatch(r"[^\n]+ must [^\n]+, but (is|are) [^\n]+; (use|raise|leave) [^\n]+", refusal)


@given(layers=st.integers(1, 130), stages=st.integers(1, 32), first=st.integers(0, 3), last=st.integers(0, 3))
def test_layers_are_spread_evenly(layers: int, stages: int, first: int, last: int) -> None:
    if layers < stages:
        return
    sizes = split_layers(layers, stages, input_weight=first, output_weight=last)
    assert sum(sizes) == layers
    assert min(sizes) >= 1
    weights = [*sizes]
    weights[0] += first
    weights[-1] += last
    able = [w for w, s in zip(weights, sizes, strict=True) if s > 1]
    assert not able or max(able) - min(weights) <= 1


@pytest.mark.parametrize("schedule", list(PipelineSchedule))
def test_every_layer_is_on_one_rank(schedule: PipelineSchedule) -> None:
    parallel = ParallelConfig(pp=4, pp_schedule=schedule)
    plans = [plan_stages(parallel, 4, 19, rank) for rank in range(4)]
    owned = [n for plan in plans for stage in plan.mine for n in plan.layers[stage]]
    assert sorted(owned) == list(range(19))
    if schedule is PipelineSchedule.zbv_zero_bubble:
        assert [plan.mine for plan in plans] == [(0, 7), (1, 6), (2, 5), (3, 4)]


def test_given_layers_are_taken() -> None:
    assert plan_stages(ParallelConfig(pp=2, pp_layers=[1, 3]), 2, 4, 1).layers == ((0,), (1, 2, 3))


@given(ranks=st.integers(1, 8), size=st.integers(1, 5), balance=st.booleans())
def test_ranks_share_a_sequence_evenly(ranks: int, size: int, balance: bool) -> None:
    length = 2 * ranks * size
    held = [positions_of(r, ranks, length, balance=balance).tolist() for r in range(ranks)]
    assert sorted(itertools.chain(*held)) == list(range(length))
    assert {len(h) for h in held} == {length // ranks}
    if balance:
        # Causal attention costs a position as many keys as come before it: each rank the same.
        assert len({sum(h) for h in held}) == 1
    assert all(len(sequence_chunks(r, ranks, balance=balance)) == (2 if balance else 1) for r in range(ranks))
