"""The same run under different layouts, and across changes of layout."""

from pathlib import Path

import pytest
import torch

from regrow.trainer.jsonlines import read_rows
from tests.runs import first_weights, train
from tests.support import assert_same_tensors, curve, metrics, samples, stored_tensors, tiny

pytestmark = pytest.mark.slow

LAYOUTS: dict[int, list[list[str]]] = {
    1: [[]],
    2: [["parallel.dp_shard=2"], ["parallel.dp_replicate=2"]],
    4: [["parallel.dp_shard=4"], ["parallel.dp_replicate=2", "parallel.dp_shard=2"]],
}
ALL = [(world, degrees) for world, choices in LAYOUTS.items() for degrees in choices]


def test_first_weights_and_losses_are_those_of_one_rank(corpus: Path, tmp_path: Path) -> None:
    overrides = tiny(corpus, "train.steps=10", "data.global_batch_size=8", "hooks=none", "data.log_samples=true")
    reference: dict[str, torch.Tensor] = {}
    rows: list[dict[str, float]] = []
    for i, (world, degrees) in enumerate(ALL):
        weights = first_weights([*overrides, *degrees], tmp_path / f"w{i}", world)
        run_dir = tmp_path / f"r{i}"
        assert train([*overrides, *degrees], run_dir, world).kind == "finished"
        if not reference:
            reference, rows = weights, metrics(run_dir)
            continue
        assert weights.keys() == reference.keys()
        for name, tensor in weights.items():
            assert torch.equal(tensor, reference[name]), (degrees, name)
        for row, expected in zip(metrics(run_dir), rows, strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5), degrees
            assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5), degrees
        assert samples(run_dir) == samples(tmp_path / "r0")
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize("batch", [12, 7])
def test_ranks_come_and_go(corpus: Path, tmp_path: Path, batch: int) -> None:
    overrides = tiny(corpus, f"data.global_batch_size={batch}", "data.log_samples=true", "checkpoint.interval=5")
    train([*overrides, "train.steps=20", "scheduler.total_steps=20"], tmp_path / "whole")
    for steps, world in ((5, 2), (10, 1), (15, 3), (20, 2)):
        degrees = [f"parallel.dp_shard={world}"] if world > 1 else []
        changing = [*overrides, f"train.steps={steps}", "scheduler.total_steps=20", *degrees]
        assert train(changing, tmp_path / "changing", world).step == steps
    assert samples(tmp_path / "changing") == samples(tmp_path / "whole")
    assert [len(r["ids"]) for r in samples(tmp_path / "whole")] == [batch] * 20
    for row, expected in zip(metrics(tmp_path / "changing"), metrics(tmp_path / "whole"), strict=True):
        assert row["step"] == expected["step"]
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        if "val_loss" in row and "val_loss" in expected:
            assert row["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-4)


@pytest.mark.parametrize(("world", "degrees"), ALL[:4], ids=str)
def test_resuming_under_the_same_layout_is_bitwise(
    corpus: Path, tmp_path: Path, world: int, degrees: list[str]
) -> None:
    overrides = tiny(
        corpus, "data.global_batch_size=8", "scheduler.total_steps=12", "checkpoint.interval=6", *degrees
    )
    train([*overrides, "train.steps=12"], tmp_path / "whole", world)
    train([*overrides, "train.steps=6"], tmp_path / "cut", world)
    train([*overrides, "train.steps=12"], tmp_path / "cut", world)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert_same_tensors(tmp_path / "cut/checkpoint/step-12", tmp_path / "whole/checkpoint/step-12")


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_checkpoint_keeps_every_bit_through_another_layout(corpus: Path, tmp_path: Path, world: int) -> None:
    """Vocabulary 321 divides by none of them; embeddings are tied."""
    odd = ["model.vocab_size=321", "model.tied_embeddings=true", "data.global_batch_size=6", "hooks=none"]
    overrides = tiny(corpus, *odd, "optimizer.lr=0.0", "optimizer.weight_decay=0.0")
    train([*overrides, "train.steps=2", "parallel.dp_shard=2"], tmp_path / "a", 2)
    before = stored_tensors(tmp_path / "a/checkpoint/step-2")
    # A step with a learning rate of 0 moves no weight.
    train([*overrides, "train.steps=3", f"parallel.dp_shard={world}"], tmp_path / "a", world)
    after = stored_tensors(tmp_path / "a/checkpoint/step-3")
    assert before.keys() == after.keys()
    names = [n for n in before if not n.startswith(("optimizer.", "train_state."))]
    assert "tok_embeddings.weight" in names
    for name in names:
        assert torch.equal(before[name], after[name]), name


def test_tied_embeddings_train_as_one_under_every_layout(corpus: Path, tmp_path: Path) -> None:
    overrides = tiny(corpus, "model.tied_embeddings=true", "train.steps=6", "data.global_batch_size=8", "hooks=none")
    train(overrides, tmp_path / "one")
    train([*overrides, "parallel.dp_shard=2"], tmp_path / "two", 2)
    expected = [r["loss"] for r in metrics(tmp_path / "one")]
    assert [r["loss"] for r in metrics(tmp_path / "two")] == pytest.approx(expected, rel=1e-5)
    stored = [stored_tensors(tmp_path / n / "checkpoint/step-6") for n in ("one", "two")]
    assert stored[0].keys() == stored[1].keys()
    assert "output.weight" not in stored[0]


def test_options_change_no_number_much(corpus: Path, tmp_path: Path) -> None:
    base = tiny(corpus, "train.steps=4", "data.global_batch_size=8", "hooks=none", "checkpoint=disabled")
    train(base, tmp_path / "base")
    reference = [r["loss"] for r in metrics(tmp_path / "base")]
    choices = {
        "full": (["train.activation_checkpoint=full"], 1, 1e-6),
        "selective": (["train.activation_checkpoint=selective"], 1, 1e-6),
        "inductor": (["train.compile=true", "parallel.dp_shard=2"], 2, 1e-5),
        "compiled": (["train.compile=true", "train.compile_backend=aot_eager"], 1, 1e-5),
        "both": (["train.compile=true", "train.compile_backend=aot_eager", "train.activation_checkpoint=full",
                  "parallel.dp_shard=2"], 2, 1e-5),
        "micro": (["data.micro_batch_size=1"], 1, 1e-5),
        "bf16": (["precision=bf16"], 1, 5e-3),
        "bf16_sharded": (["precision=bf16", "parallel.dp_shard=2"], 2, 5e-3),
        "deterministic": (["train.deterministic=true"], 1, 1e-6),
    }  # fmt: skip
    for name, (overrides, world, tolerance) in choices.items():
        train([*base, *overrides], tmp_path / name, world)
        losses = [r["loss"] for r in metrics(tmp_path / name)]
        assert losses == pytest.approx(reference, rel=tolerance), name
    masked = tmp_path / "masked"
    train([*base, "data.document_mask=true"], masked)
    assert [r["loss"] for r in metrics(masked)] != pytest.approx(reference, rel=1e-4)


def test_a_loss_that_is_not_finite_stops_with_step_and_samples(corpus: Path, tmp_path: Path) -> None:
    overrides = tiny(corpus, "train.steps=30", "optimizer.lr=1e30", "scheduler.warmup_steps=0", "train.grad_clip=0")
    result = train(overrides, tmp_path / "nan")
    assert result.kind == "failed"
    assert f"the loss of step {result.step - 1} is nan; its sample ids were " in result.message or (
        "the loss of step" in result.message and "its sample ids were" in result.message
    )
    rows = list(read_rows(tmp_path / "nan" / "metrics.jsonl"))
    assert all(r["loss"] == r["loss"] for r in rows)
