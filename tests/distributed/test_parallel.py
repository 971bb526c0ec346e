"""Every layout trains the model of one rank: a table of layouts, made by these tests.

With REGROW_NUMERICS=FILE five steps are made, and the rows are also appended to a file, from which docs/parallelism.md
has its table.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from regrow.torch_compat import splits_backward
from tests.layouts import Observed, observe, relative
from tests.runs import train
from tests.support import TINY_MODEL, metrics, tiny

pytestmark = pytest.mark.slow

# Of the relative differences of losses, gradient norms and parameters in float32.
LIMITS = (5e-7, 1e-6, 1e-6)
STEPS = f"train.steps={5 if 'REGROW_NUMERICS' in os.environ else 2}"
# The learning rate and eps are fixed, and eps is large enough that Adam does not turn rounding into steps.
FIXED = [STEPS, "optimizer.lr=1e-3", "optimizer.eps=1e-3", "scheduler.warmup_steps=0", "data.global_batch_size=8",
         "data.micro_batch_size=2", "model.vocab_size=321", "model.n_layers=4"]  # fmt: skip
MOE = ["model=qwen3_moe_debug", *(o for o in TINY_MODEL if not o.startswith(("model.ffn", "model.vocab"))),
       "model.head_dim=8", "model.n_experts=4", "model.expert_ffn_dim=24"]  # fmt: skip

DENSE_LAYOUTS: dict[int, list[str]] = {
    2: ["dp_replicate=2", "dp_shard=2", "tp=2", "tp=2 sequence_parallel=false", "pp=2", "cp=2 cp_method=ulysses",
        "cp=2 cp_method=gather", "cp=2 cp_method=ring", "cp=2 cp_balance=false"],
    4: ["dp_shard=4", "cp=4", "pp=4", "dp_replicate=2 dp_shard=2", "dp_replicate=2 tp=2", "dp_replicate=2 pp=2",
        "dp_replicate=2 cp=2", "dp_shard=2 tp=2", "dp_shard=2 pp=2", "dp_shard=2 cp=2", "tp=2 pp=2", "tp=2 cp=2",
        "pp=2 cp=2", "tp=2 cp=2 cp_method=ring", "cp=4 cp_method=ring cp_balance=false", "tp=4",
        "tp=4 sequence_parallel=false"],
    8: ["pp=2 dp_shard=2 tp=2", "dp_shard=2 tp=2 cp=2", "dp_replicate=2 dp_shard=2 cp=2", "tp=2 pp=2 cp=2",
        "dp_shard=2 cp=4 cp_method=ring"],
}  # fmt: skip
MOE_LAYOUTS: dict[int, list[str]] = {
    2: ["dp_shard=2", "dp_shard=2 ep=2", "tp=2", "tp=2 ep=2", "tp=2 ep=2 sequence_parallel=false", "cp=2 ep=2",
        "pp=2"],
    4: ["dp_shard=4 ep=2", "dp_shard=4 ep=4", "dp_replicate=2 dp_shard=2 ep=2", "dp_shard=2 tp=2 ep=2",
        "dp_shard=2 tp=2 ep=4", "pp=2 dp_shard=2 ep=2", "dp_shard=2 cp=2 ep=2", "dp_shard=2 cp=2 ep=4"],
    8: ["pp=2 dp_shard=2 tp=2 ep=2", "tp=2 pp=2 cp=2 ep=4", "dp_shard=2 tp=2 cp=2 ep=2"],
}  # fmt: skip
ALL_SCHEDULES = ("one_f_one_b", "gpipe", "interleaved", "interleaved_zero_bubble", "zbv_zero_bubble")
SCHEDULES = ALL_SCHEDULES if splits_backward() else ALL_SCHEDULES[:3]


def degrees(layout: str) -> list[str]:
    """Overrides."""
    return [f"parallel.{degree}" for degree in layout.split()]


def base(corpus: Path, kind: str, *overrides: str) -> list[str]:
    """A dense model, or one with experts."""
    own = MOE if kind == "moe" else []
    return [*tiny(corpus), *own, *FIXED, *overrides] if not own else [*own, *_data(corpus), *FIXED, *overrides]


def _data(corpus: Path) -> list[str]:
    return [o for o in tiny(corpus) if not o.startswith("model.")]


def differences(seen: Observed, reference: Observed) -> tuple[float, float, float]:
    """The largest relative differences of losses, gradient norms and final parameters."""
    assert seen.first.keys() == reference.first.keys()
    for name, tensor in reference.first.items():
        assert torch.equal(seen.first[name], tensor), f"{name} starts differently"
    assert seen.ids == reference.ids
    for load, expected in zip(seen.loads, reference.loads, strict=True):
        assert load.keys() == expected.keys()
        assert all(torch.equal(load[n], expected[n]) for n in load), "routing differs"
    loss = max(relative(a, b) for a, b in zip(seen.losses, reference.losses, strict=True))
    norm = max(relative(a, b) for a, b in zip(seen.norms, reference.norms, strict=True))
    whole = {n: t.double() for n, t in reference.last.items() if bool(t.any())}
    parameters = max(float((seen.last[n].double() - t).norm() / t.norm()) for n, t in whole.items())
    return loss, norm, parameters


def compare(
    corpus: Path, folder: Path, world: int, kind: str, layouts: Sequence[str], limits: tuple[float, float, float],
    *overrides: str,
) -> None:  # fmt: skip
    """Runs the layouts beside one rank, and holds each difference against its limit."""
    settings = base(corpus, kind, *overrides)
    (reference,) = observe([settings], folder, 1)
    assert len(reference.losses) >= 2
    assert reference.losses[-1] != reference.losses[0]
    every = observe([[*settings, *degrees(layout)] for layout in layouts], folder, world)
    rows = []
    for layout, seen in zip(layouts, every, strict=True):
        found = differences(seen, reference)
        what = " ".join([kind, *overrides])
        rows.append(f"| {world} | {what} | {layout} | {found[0]:.1e} | {found[1]:.1e} | {found[2]:.1e} |\n")
        assert relative(seen.validation, reference.validation) <= limits[0], layout
        for norm, exact in zip(seen.norms, seen.exact_norms, strict=True):
            assert relative(norm, exact) <= 1e-12, f"{layout}: the norm is not that of the gradients"
        for value, limit, name in zip(found, limits, ("loss", "gradient norm", "parameters"), strict=True):
            assert value <= limit, f"{layout}: {name} differs by {value:.1e}"
    print("".join(rows))
    if "REGROW_NUMERICS" in os.environ:
        with Path(os.environ["REGROW_NUMERICS"]).open("a") as out:
            out.writelines(rows)


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_every_layout_trains_the_model_of_one_rank(corpus: Path, tmp_path: Path, kind: str, world: int) -> None:
    layouts = (DENSE_LAYOUTS if kind == "dense" else MOE_LAYOUTS)[world]
    compare(corpus, tmp_path, world, kind, layouts, LIMITS)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_dense_layouts_agree_to_rounding_in_float64(corpus: Path, tmp_path: Path, world: int) -> None:
    """Two steps: what is summed in another order shows in the first, and what the optimizer does in the second."""
    options = ["precision=fp64", "train.steps=2", "data.global_batch_size=4"]
    staged = [layout for layout in DENSE_LAYOUTS[world] if "pp=" in layout]
    others = [layout for layout in DENSE_LAYOUTS[world] if layout not in staged]
    # As few forward passes as gradient accumulation needs, and a pipeline.
    for layouts, micro in ((staged, 1), (others, 2)):
        more = f"data.micro_batch_size={micro}"
        compare(corpus, tmp_path / str(micro), world, "dense", layouts, (1e-12, 1e-12, 1e-12), *options, more)


def test_all_pipeline_schedules_with_and_without_sharding(corpus: Path, tmp_path: Path) -> None:
    plain = [f"pp=2 pp_schedule={s}" for s in SCHEDULES]
    small = "data.micro_batch_size=1"
    compare(corpus, tmp_path, 2, "dense", plain, LIMITS, small)
    sharded = [f"pp=2 dp_shard=2 pp_schedule={s}" for s in SCHEDULES]
    mixed = [f"pp=2 tp=2 pp_schedule={SCHEDULES[-1]}"]
    compare(corpus, tmp_path, 4, "dense", [*sharded, *mixed], LIMITS, small)


def test_bfloat16_stays_near(corpus: Path, tmp_path: Path) -> None:
    """Rounding to 8 bits at other places: losses within 5e-4, gradient norms within 5e-3, parameters within 1e-2."""
    layouts = ["dp_shard=4", "dp_shard=2 tp=2", "tp=2 cp=2", "pp=2 dp_shard=2", "cp=4", "cp=4 cp_method=ring"]
    compare(corpus, tmp_path, 4, "dense", layouts, (5e-4, 5e-3, 1e-2), "precision=bf16")


def test_tied_embeddings_documents_and_other_heads(corpus: Path, tmp_path: Path) -> None:
    """Qwen3's heads, an embedding at both ends of a pipeline, masks across ranks, and stages of other sizes."""
    overrides = ["model=qwen3_debug", "model.head_dim=8", "model.tied_embeddings=true", "data.document_mask=true"]
    layouts = ["pp=2 dp_shard=2", "pp=2 tp=2 pp_schedule=interleaved", "pp=4 pp_schedule=gpipe", "tp=2 cp=2", "cp=4",
               "dp_shard=2 cp=2 cp_method=gather", "cp=2 tp=2 cp_balance=false", "cp=4 cp_method=ring",
               "pp=2 cp=2 pp_layers=[1,3]", f"pp=2 dp_shard=2 pp_schedule={SCHEDULES[-2]}", "tp=4"]  # fmt: skip
    compare(corpus, tmp_path, 4, "dense", layouts, LIMITS, *overrides)


def test_windows_with_and_without_documents(corpus: Path, tmp_path: Path) -> None:
    """Across stages, ranks that share sequences, recomputation and compiled blocks."""
    window, documents = "model.window=12", "data.document_mask=true"
    layouts = ["pp=2 tp=2", "dp_shard=2 cp=2", "tp=2 cp=2 cp_method=gather", "cp=4 cp_method=ring"]
    compare(corpus, tmp_path, 4, "dense", layouts, LIMITS, window, documents)
    compare(corpus, tmp_path, 4, "dense", ["cp=4"], LIMITS, window)
    recomputed = "train.activation_checkpoint=selective"
    compare(corpus, tmp_path, 4, "dense", ["pp=2 cp=2 cp_method=gather"], LIMITS, window, documents, recomputed)
    options = ["train.compile=true", "train.compile_backend=aot_eager", "model.n_layers=2", window, documents]
    compare(corpus, tmp_path, 4, "dense", ["tp=2 cp=2", "pp=2 cp=2 cp_method=ring"], LIMITS, *options)


def test_ranks_share_key_and_value_heads(corpus: Path, tmp_path: Path) -> None:
    """Two ranks have three query heads each: those of one KV head, and half of those of another."""
    three = ["model.dim=48", "model.n_heads=6", "model.n_kv_heads=3", "data.micro_batch_size=1"]
    compare(corpus, tmp_path, 2, "dense", ["tp=2", "tp=2 sequence_parallel=false"], LIMITS, *three)
    mixed = ["dp_shard=2 tp=2", "tp=2 cp=2", "tp=2 cp=2 cp_method=ring", f"tp=2 pp=2 pp_schedule={SCHEDULES[-2]}"]
    compare(corpus, tmp_path, 4, "dense", mixed, LIMITS, *three)


# What a recipe's ranks are where `dp_shard=-1` stands for two.
RECIPES = {2: ["ddp", "fsdp", "tp", "pp", "cp"], 4: ["hsdp", "fsdp_tp", "pp_fsdp", "fsdp_cp"]}


def test_recipes_train_the_default_model(corpus: Path, tmp_path: Path) -> None:
    settings = [*_data(corpus), "train.steps=2", "data.global_batch_size=8", "data.micro_batch_size=2"]
    (reference,) = observe([[*settings, "parallel=single"]], tmp_path, 1)
    for world, recipes in RECIPES.items():
        for recipe, seen in zip(
            recipes, observe([[*settings, f"parallel={r}"] for r in recipes], tmp_path, world), strict=True
        ):
            for value, limit in zip(differences(seen, reference)[:2], LIMITS, strict=False):
                assert value <= limit, recipe


def test_batches_that_do_not_divide_and_the_auxiliary_loss(corpus: Path, tmp_path: Path) -> None:
    overrides = ["model.balance=auxiliary", "model.auxiliary_coefficient=0.1", "data.global_batch_size=7",
                 "data.micro_batch_size=2"]  # fmt: skip
    layouts = ["dp_shard=4 ep=2", "dp_shard=2 tp=2 ep=2", "tp=2 cp=2 ep=4", "dp_shard=2 cp=2", "pp=2 tp=2",
               "pp=2 dp_shard=2 ep=2 pp_schedule=gpipe", "dp_shard=2 tp=2 ep=2 sequence_parallel=false"]  # fmt: skip
    compare(corpus, tmp_path, 4, "moe", layouts, LIMITS, *overrides)


def test_shared_experts_and_groups_of_experts(corpus: Path, tmp_path: Path) -> None:
    """As DeepSeek-V3 routes: scores by themselves, groups first, and experts that see every token."""
    overrides = ["model.score_func=sigmoid", "model.n_shared_experts=2", "model.n_expert_groups=2",
                 "model.topk_groups=1", "model.route_scale=2.5", "model.n_layers=2"]  # fmt: skip
    layouts = ["tp=2", "tp=2 ep=2 sequence_parallel=false", "dp_shard=2 ep=2", "pp=2"]
    compare(corpus, tmp_path, 2, "moe", layouts, LIMITS, *overrides)


def test_a_large_vocabulary_and_wide_matrices(corpus: Path, tmp_path: Path) -> None:
    wide = ["model.vocab_size=32000", "model.dim=512", "model.n_layers=1", "model.ffn_dim=256", "data.seq_len=8",
            "model.tied_embeddings=true", "data.global_batch_size=2", "train.steps=2"]  # fmt: skip
    compare(corpus, tmp_path, 2, "dense", ["dp_shard=2", "tp=2"], LIMITS, *wide)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_recomputation_and_compilation_change_nothing(corpus: Path, tmp_path: Path, kind: str) -> None:
    layouts = ["dp_shard=2 tp=2", "pp=2 cp=2 cp_method=ring", "tp=2 cp=2", "pp=2 tp=2"]
    layouts += ["dp_shard=4 ep=2", "dp_shard=2 tp=2 ep=4"] if kind == "moe" else []
    # Each layer is compiled by itself, and two are as good as four.
    small = "model.n_layers=2"
    compare(corpus, tmp_path, 4, kind, layouts, LIMITS, small, "train.activation_checkpoint=full")
    compare(corpus, tmp_path, 4, kind, layouts[:2], LIMITS, small, "train.activation_checkpoint=selective")
    options = ["train.compile=true", "train.compile_backend=aot_eager"]
    sharing_heads = ["tp=4"] if kind == "dense" else []
    compare(corpus, tmp_path, 4, kind, [*layouts[:3], *sharing_heads], LIMITS, small, *options)


def test_blocks_with_experts_are_compiled_where_ranks_exchange_rows(corpus: Path, tmp_path: Path) -> None:
    """Each of their pieces is one whole graph, or compiling it fails."""
    settings = [*base(corpus, "moe", "model.n_layers=1", "train.steps=2", "parallel.dp_shard=2", "parallel.ep=2"),
                "hooks=none", "checkpoint=disabled"]  # fmt: skip
    compiled = ["train.compile=true", "train.compile_backend=aot_eager"]
    for name, more in (("eager", []), ("compiled", compiled)):
        assert train([*settings, *more], tmp_path / name, world_size=2).kind == "finished"
    for found, expected in zip(metrics(tmp_path / "compiled"), metrics(tmp_path / "eager"), strict=True):
        assert relative(found["loss"], expected["loss"]) <= LIMITS[0]
        assert relative(found["grad_norm"], expected["grad_norm"]) <= LIMITS[1]
        assert found["expert_load_max"] == expected["expert_load_max"]
