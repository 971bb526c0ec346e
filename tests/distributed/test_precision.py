"""Runs with bfloat16 parameters and with products in 8 bits: killed, on other ranks, and against float32."""

from pathlib import Path

import pytest
import torch

from tests.runs import first_weights, train
from tests.support import assert_same_tensors, curve, metrics, record, stored_tensors, tiny

pytestmark = pytest.mark.slow

PRECISIONS = {
    "bf16_params": ["precision=bf16_params"],
    "fp8": ["precision=fp8", "precision.fp8_min_features=0"],
    "fp8 by rows": ["precision=fp8", "precision.fp8_min_features=0", "precision.fp8_recipe=rowwise"],
}
STORED = {"bf16_params": torch.bfloat16, "fp8": torch.float32, "fp8 by rows": torch.float32}


@pytest.mark.parametrize(
    ("precision", "world", "degrees"),
    [
        ("bf16_params", 1, []),
        ("bf16_params", 2, ["parallel.dp_shard=2"]),
        ("fp8", 2, ["parallel.dp_shard=2"]),
        ("fp8 by rows", 2, ["parallel.tp=2"]),
    ],
)
def test_a_run_that_was_cut_goes_on_bitwise(
    corpus: Path, tmp_path: Path, precision: str, world: int, degrees: list[str]
) -> None:
    overrides = tiny(
        corpus, *PRECISIONS[precision], *degrees, "data.global_batch_size=8", "data.micro_batch_size=2",
        "scheduler.total_steps=6", "checkpoint.interval=3", "hooks=none",
    )  # fmt: skip
    train([*overrides, "train.steps=6"], tmp_path / "whole", world)
    train([*overrides, "train.steps=3"], tmp_path / "cut", world)
    assert train([*overrides, "train.steps=6"], tmp_path / "cut", world).step == 6
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert_same_tensors(tmp_path / "cut/checkpoint/step-6", tmp_path / "whole/checkpoint/step-6")


@pytest.mark.parametrize("precision", ["bf16_params", "fp8"])
def test_a_run_goes_on_under_other_layouts(corpus: Path, tmp_path: Path, precision: str) -> None:
    """One rank, FSDP on two, tensor parallel on two, FSDP on three (whose shards are uneven): as one rank alone."""
    overrides = tiny(
        corpus, *PRECISIONS[precision], "data.global_batch_size=12", "scheduler.total_steps=8",
        "checkpoint.interval=2", "hooks=none",
    )  # fmt: skip
    train([*overrides, "train.steps=8"], tmp_path / "whole")
    chain = [(1, []), (2, ["parallel.dp_shard=2"]), (2, ["parallel.tp=2"]), (3, ["parallel.dp_shard=3"])]
    for number, (world, degrees) in enumerate(chain, 1):
        steps = 2 * number
        assert train([*overrides, f"train.steps={steps}", *degrees], tmp_path / "chain", world).step == steps
        stored = stored_tensors(tmp_path / f"chain/checkpoint/step-{steps}")
        kinds = {t.dtype for n, t in stored.items() if not n.startswith("train_state.") and not n.endswith(".step")}
        assert kinds == {STORED[precision]}
        assert all(type(t) is torch.Tensor for t in stored.values())
    for row, expected in zip(metrics(tmp_path / "chain"), metrics(tmp_path / "whole"), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=2e-3)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=3e-2)


def test_bfloat16_weights_start_as_the_others_rounded_and_round_alike_everywhere(
    corpus: Path, tmp_path: Path
) -> None:
    """Two ranks sum gradients in another order, which few of the rounded numbers show after three steps."""
    overrides = tiny(corpus, "data.global_batch_size=2", "data.micro_batch_size=1", "hooks=none", "train.steps=3")
    exact = first_weights(overrides, tmp_path / "exact", 1)
    for number, (world, degrees) in enumerate(((1, []), (2, ["parallel.dp_shard=2"]))):
        own = [*overrides, *PRECISIONS["bf16_params"], *degrees]
        found = first_weights(own, tmp_path / f"w{number}", world)
        assert all(torch.equal(t, exact[n].bfloat16()) for n, t in found.items())
        train(own, tmp_path / f"r{number}", world)
    one, two = (stored_tensors(tmp_path / f"r{n}/checkpoint/step-3") for n in range(2))
    same = sum(int((one[n] == two[n]).sum()) for n in exact)
    assert same > 0.9 * sum(t.numel() for t in exact.values())


def test_float32_and_bfloat16_parameters_are_converted_into_a_new_run_alone(corpus: Path, tmp_path: Path) -> None:
    overrides = tiny(corpus, "data.global_batch_size=4", "hooks=none", "scheduler.total_steps=4")
    ways = {"fp32": ["precision=fp32"], "bf16_params": ["precision=bf16_params"]}
    for name, own in ways.items():
        train([*overrides, *own, "train.steps=2"], tmp_path / name)
    for name, other in (("fp32", "bf16_params"), ("bf16_params", "fp32")):
        changed = [*overrides, *ways[other], "train.steps=4", "run.allow_change=[precision.name]"]
        result = train(changed, tmp_path / name)
        assert result.kind == "refused"
        assert "go on in the precision that it was saved with, or start a new run from it with " in result.message
        start = f"checkpoint.initial_load_path={tmp_path / name / 'checkpoint/step-2'}"
        moments = "checkpoint.initial_load_model_only=false"
        assert train([*overrides, *ways[other], start, moments, "train.steps=4"], tmp_path / f"{name}-on").step == 4
        rows = metrics(tmp_path / f"{name}-on")
        assert [r["step"] for r in rows] == [3, 4]
    # With moments of float32 and of bfloat16 the same run goes on, within what the formats differ by.
    again = [*overrides, *ways["fp32"], "train.steps=4"]
    assert train(again, tmp_path / "fp32").step == 4
    expected = metrics(tmp_path / "fp32")[2:]
    assert [r["loss"] for r in metrics(tmp_path / "fp32-on")] == pytest.approx(
        [r["loss"] for r in expected], rel=5e-3
    )
    # A seed checkpoint has the run's own type.
    seeded = [*overrides, *ways["bf16_params"]]
    train([*seeded, "checkpoint=seed", "train.steps=2"], tmp_path / "seeded")
    assert train([*seeded, "train.steps=2"], tmp_path / "seeded").step == 2
    assert record(tmp_path / "seeded")["attempts"]


def test_experts_stay_in_bfloat16_and_ranks_share_them(corpus: Path, tmp_path: Path) -> None:
    model = ["model=qwen3_moe_debug", "model.vocab_size=320", "model.dim=32", "model.n_layers=2"]
    overrides = [
        o for o in tiny(corpus, "data.global_batch_size=4", "hooks=none", "train.steps=3") if "model." not in o
    ]
    own = [*model, *overrides, *PRECISIONS["fp8"]]
    train(own, tmp_path / "one")
    train([*own, "parallel.dp_shard=2", "parallel.ep=2"], tmp_path / "two", 2)
    losses = [[r["loss"] for r in metrics(tmp_path / n)] for n in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=3e-3)


def test_compiled_and_recomputed_8_bits_stay_what_they_are(corpus: Path, tmp_path: Path) -> None:
    overrides = tiny(corpus, "data.global_batch_size=8", "hooks=none", "train.steps=3", "checkpoint=disabled")
    ways = {
        "compiled": ["train.compile=true", "train.compile_backend=aot_eager", "parallel.dp_shard=2"],
        "recomputed": ["train.activation_checkpoint=selective", "parallel.dp_shard=2"],
        "all recomputed": ["train.activation_checkpoint=full", "parallel.pp=2"],
    }
    train([*overrides, *PRECISIONS["fp8"]], tmp_path / "plain")
    expected = [r["loss"] for r in metrics(tmp_path / "plain")]
    for way, own in ways.items():
        train([*overrides, *PRECISIONS["fp8"], *own], tmp_path / way, 2)
        assert [r["loss"] for r in metrics(tmp_path / way)] == pytest.approx(expected, rel=2e-3), way


def test_three_hundred_steps_end_where_float32_ends(corpus: Path, tmp_path: Path) -> None:
    """The validation loss: bfloat16 parameters within 1 %, 8 bits in every linear layer within 2 %."""
    overrides = tiny(
        corpus, "train.steps=300", "data.global_batch_size=4", "hooks=default", "hooks.sample.enabled=false",
        "hooks.validation.every=300", "hooks.validation.max_batches=0", "checkpoint=disabled", "scheduler.warmup_steps=20",
        "optimizer.lr=3e-3",
    )  # fmt: skip
    found = {}
    for name in ("fp32", "bf16_params", "fp8"):
        train([*overrides, *PRECISIONS.get(name, [f"precision={name}"])], tmp_path / name, timeout_s=400.0)
        found[name] = metrics(tmp_path / name)
    final = {name: rows[-1]["val_loss"] for name, rows in found.items()}
    assert final["fp32"] < 0.9 * found["fp32"][0]["val_loss"]
    assert final["bf16_params"] == pytest.approx(final["fp32"], rel=0.01)
    assert final["fp8"] == pytest.approx(final["fp32"], rel=0.02)
