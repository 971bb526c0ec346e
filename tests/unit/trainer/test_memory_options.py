"""Recomputation by a budget, resharding, and what `auto` compiles: what is chosen, what is refused, what it changes."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regrow.launch.config.schema import Config
from regrow.launch.run.allocator import use_expandable_segments
from regrow.launch.run.preflight import check_parallel
from regrow.models.llama3.model import Llama3
from regrow.trainer.config import ActivationCheckpoint, ParallelConfig, PipelineSchedule, PrecisionName, TrainConfig
from regrow.trainer.parallel.layout import resolve_layout
from regrow.trainer.parallel.memory_rules import chosen_blocks, compiles, reshard_choice
from regrow.trainer.parallel.recompute import apply_budget
from tests.pool import run_distributed
from tests.runs import spec_of, train
from tests.support import TINY_MODEL, curve, metrics, tiny, typed_config


@given(count=st.integers(0, 130), budget=st.floats(0, 1))
def test_the_budget_is_the_share_of_blocks_that_are_kept(count: int, budget: float) -> None:
    chosen = chosen_blocks(count, budget)
    assert chosen == sorted(set(chosen))
    assert abs(len(chosen) - (1 - budget) * count) < 1
    assert all(0 <= i < count for i in chosen)
    # Spread evenly: of any stretch as many as of any other of its length, give or take one.
    for width in (1, count // 3, count // 2):
        inside = [sum(start <= i < start + width for i in chosen) for start in range(count - width + 1)]
        assert max(inside) - min(inside) <= 1 if inside else True


def test_the_ends_of_the_budget_are_none_and_all() -> None:
    assert chosen_blocks(10, 1.0) == []
    assert chosen_blocks(10, 0.0) == list(range(10))
    assert [len(chosen_blocks(10, b / 10)) for b in range(11)] == list(range(10, -1, -1))


@pytest.mark.parametrize(
    ("given_", "device", "pp", "schedule", "precision", "compiler", "expected"),
    [
        (True, "cpu", 1, "one_f_one_b", "fp32", False, True),
        (False, "cuda", 1, "one_f_one_b", "bf16", True, False),
        ("auto", "cpu", 1, "one_f_one_b", "fp32", True, False),
        ("auto", "cuda", 1, "one_f_one_b", "bf16", True, True),
        ("auto", "cuda", 1, "one_f_one_b", "bf16", False, False),
        ("auto", "cuda", 1, "one_f_one_b", "fp64", True, False),
        ("auto", "cuda", 2, "interleaved", "bf16", True, True),
        ("auto", "cuda", 2, "interleaved_zero_bubble", "bf16", True, False),
        ("auto", "cuda", 2, "zbv_zero_bubble", "bf16", True, False),
        ("auto", "cuda", 1, "zbv_zero_bubble", "bf16", True, True),
    ],
)
def test_auto_compiles_on_gpus_what_can_be_compiled(
    given_: bool | str, device: str, pp: int, schedule: str, precision: str, compiler: bool, expected: bool
) -> None:
    parallel = ParallelConfig(pp=pp, pp_schedule=PipelineSchedule[schedule])
    train_config = TrainConfig(compile=given_)
    assert compiles(train_config, parallel, PrecisionName[precision], device, can_compile=compiler) is expected


def test_ranks_are_told_true_or_false(corpus: Path, tmp_path: Path) -> None:
    for word, expected in (("auto", False), ("true", True), ("false", False)):
        spec = spec_of(tiny(corpus, f"train.compile={word}"), tmp_path / word, 1)
        assert spec.config.train.compile is expected
        assert spec.config_dict["train"]["compile"] == (word if word == "auto" else expected)


@pytest.mark.parametrize(
    ("option", "pp", "ranks", "expected"),
    [
        ("auto", 1, 8, None),
        ("auto", 2, 8, False),
        (True, 1, 8, True),
        (False, 1, 8, False),
        (2, 1, 8, 2),
        (1, 1, 8, False),
        (8, 1, 8, True),
        (4, 1, 2, True),
    ],
)
def test_what_fsdp_is_told(option: bool | int | str, pp: int, ranks: int, expected: bool | int | None) -> None:
    found = reshard_choice(ParallelConfig(reshard_after_forward=option), pp, ranks)
    assert (found, type(found)) == (expected, type(expected))


def problem_of(config: Config) -> str | None:
    p = config.parallel
    try:
        ranks = p.dp_replicate * p.dp_shard * p.tp * p.pp * p.cp
        check_parallel(config, resolve_layout(p, ranks, ranks_are_given=False), "cpu")
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.compile=maybe"], "train.compile must be auto, true or false, but is maybe; use auto"),
        (["train.activation_memory_budget=1.5"], "train.activation_memory_budget must be within 0 and 1, but is 1.5; use 0.5"),
        (["parallel.reshard_after_forward=never"], "parallel.reshard_after_forward must be auto, true, false or a number of ranks, but is never"),
        (["parallel.dp_shard=4", "parallel.reshard_after_forward=3"], "parallel.reshard_after_forward must divide the ranks that share parameters, dp_shard · cp (4), but is 3; use auto or 1, 2 or 4"),
        (["parallel.pp=2", "parallel.reshard_after_forward=2"], "parallel.reshard_after_forward must be auto, true or false with parallel.pp above 1"),
        (["parallel.pp=2", "model.n_layers=4", "parallel.pp_schedule=zbv_zero_bubble", "parallel.reshard_after_forward=true"], "parallel.reshard_after_forward must not be true with parallel.pp_schedule=zbv_zero_bubble"),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_refused_in_a_sentence(overrides: list[str], words: str) -> None:
    config = typed_config([*TINY_MODEL, "data.micro_batch_size=4", "data.seq_len=32", *overrides])
    assert words in str(problem_of(config))


def test_compile_auto_is_accepted_with_every_schedule() -> None:
    for schedule in PipelineSchedule:
        overrides = [
            "parallel.pp=2",
            "model.n_layers=4",
            "data.micro_batch_size=2",
            f"parallel.pp_schedule={schedule.name}",
        ]
        assert problem_of(typed_config([*TINY_MODEL, "data.seq_len=32", *overrides])) is None, schedule


def test_segments_expand_unless_the_user_has_said_how_the_allocator_works() -> None:
    environ: dict[str, str] = {}
    use_expandable_segments(environ)
    assert environ == dict.fromkeys(("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"), "expandable_segments:True")
    for name in environ:
        own = {name: "max_split_size_mb:64"}
        use_expandable_segments(own)
        assert own == {name: "max_split_size_mb:64"}


def saved_bytes(budget: float | None, *, compiled: bool) -> int:
    """Bytes that autograd keeps for the backward pass of a model of four blocks."""
    sizes = [
        "model.dim=32",
        "model.n_layers=4",
        "model.n_heads=4",
        "model.n_kv_heads=2",
        "model.ffn_dim=64",
        "model.vocab_size=320",
    ]
    torch.manual_seed(0)
    model = Llama3(typed_config(sizes).model)  # type: ignore[arg-type]
    model.init_buffers(torch.device("cpu"), 64)
    options = TrainConfig(compile=compiled)
    if budget is not None:
        options = TrainConfig(
            compile=compiled, activation_checkpoint=ActivationCheckpoint.budget, activation_memory_budget=budget
        )
    apply_budget(model, options)
    if compiled:
        for block in model.blocks():
            block.forward = torch.compile(block.forward, backend="aot_eager_decomp_partition", fullgraph=True)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(torch.arange(64).reshape(1, 64)).sum()
    loss.backward()
    return sum(kept.values())


def test_less_is_kept_the_smaller_the_budget_is() -> None:
    whole = saved_bytes(None, compiled=False)
    assert saved_bytes(1.0, compiled=False) == whole
    found = [saved_bytes(b, compiled=False) for b in (0.75, 0.5, 0.25, 0.0)]
    assert sorted({whole, *found}, reverse=True) == [whole, *found]


@pytest.mark.slow
def test_a_compiled_block_keeps_what_the_budget_allows() -> None:
    whole, little = run_distributed(_compiled_bytes, world_size=1, timeout_s=250.0)[0]
    assert little < whole


def _compiled_bytes() -> list[int]:
    found = []
    for budget in (None, 0.2):
        torch.compiler.reset()
        found.append(saved_bytes(budget, compiled=True))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "choices",
    [
        # (options, ranks, largest relative difference)
        (["train.activation_checkpoint=budget", "train.activation_memory_budget=0.5"], 1, 0.0),
        (["train.activation_checkpoint=budget", "train.activation_memory_budget=0.5", "train.compile=true",
          "train.compile_backend=aot_eager_decomp_partition"], 1, 1e-6),
        (["parallel.reshard_after_forward=false"], 2, 0.0),
        (["parallel.reshard_after_forward=true"], 2, 0.0),
    ],
    ids=["budget", "compiled", "kept", "resharded"],
)  # fmt: skip
def test_options_of_memory_change_no_loss(
    corpus: Path, tmp_path: Path, choices: tuple[list[str], int, float]
) -> None:
    options, world, tolerance = choices
    degrees = [f"parallel.dp_shard={world}"] if world > 1 else []
    base = tiny(corpus, "train.steps=4", "data.global_batch_size=8", "hooks=none", "checkpoint=disabled", *degrees)
    train(base, tmp_path / "base", world)
    train([*base, *options], tmp_path / "other", world)
    if tolerance == 0.0:
        assert curve(tmp_path / "other") == curve(tmp_path / "base")
        return
    for row, expected in zip(metrics(tmp_path / "other"), metrics(tmp_path / "base"), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=tolerance)


@pytest.mark.slow
def test_parameters_are_shared_among_some_ranks_meanwhile(corpus: Path, tmp_path: Path) -> None:
    """Two of four ranks; and a pipeline whose stages give up what they gathered."""
    base = tiny(corpus, "train.steps=3", "data.global_batch_size=8", "hooks=none", "checkpoint=disabled")
    for name, degrees, option in (
        ("some", ["parallel.dp_shard=4"], "2"),
        ("stages", ["parallel.dp_shard=2", "parallel.pp=2", "data.micro_batch_size=1"], "true"),
    ):
        train([*base, *degrees], tmp_path / f"{name}-auto", 4)
        train([*base, *degrees, f"parallel.reshard_after_forward={option}"], tmp_path / name, 4)
        assert curve(tmp_path / name) == curve(tmp_path / f"{name}-auto")
