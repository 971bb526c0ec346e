"""Going back, leaving parts out, starting from elsewhere: load options act once."""

from pathlib import Path

import pytest

from regrow.checkpoint.errors import CheckpointError, StepNotFoundError
from regrow.launch.config.errors import UserError
from tests.runs import train
from tests.support import curve, metrics, record, samples, stored_tensors, tiny

pytestmark = pytest.mark.slow


def base(corpus: Path, *more: str) -> list[str]:
    return tiny(
        corpus, "data.global_batch_size=8", "checkpoint.interval=5", "data.log_samples=true", "hooks=none",
        "scheduler.total_steps=40", *more,
    )  # fmt: skip


@pytest.fixture
def run20(corpus: Path, tmp_path: Path) -> Path:
    train([*base(corpus), "train.steps=20"], tmp_path / "run")
    return tmp_path / "run"


def lineages(run_dir: Path) -> int:
    return len(record(run_dir)["lineages"])


def test_load_step_goes_back_once_and_then_continues(corpus: Path, run20: Path) -> None:
    before = curve(run20)
    overrides = [*base(corpus), "checkpoint.load_step=10"]
    train([*overrides, "train.steps=15"], run20)
    assert curve(run20) == before[:15]
    assert (run20 / "checkpoint/step-15").exists()
    assert not (run20 / "checkpoint/step-20").exists()
    assert (run20 / "checkpoint/set-aside").exists()
    assert lineages(run20) == 2
    train([*overrides, "train.steps=20"], run20)
    assert lineages(run20) == 2
    assert curve(run20) == before
    assert [a["from_step"] for a in record(run20)["attempts"]] == [0, 10, 15]
    train([*overrides, "train.steps=20", "run.rewind=true"], run20)
    assert lineages(run20) == 3
    assert record(run20)["attempts"][-1]["from_step"] == 10
    assert curve(run20) == before
    kept = run20 / "lineages" / record(run20)["lineages"][0]["id"] / "metrics.jsonl"
    assert len(kept.read_text().splitlines()) == 20


def test_a_step_that_is_not_there_is_refused(corpus: Path, run20: Path) -> None:
    with pytest.raises(StepNotFoundError, match=r"\(5, 10, 15, 20\), but is 12"):
        train([*base(corpus), "train.steps=30", "checkpoint.load_step=12"], run20)
    assert lineages(run20) == 1
    assert len(metrics(run20)) == 20


def test_excluding_restarts_that_part_once(corpus: Path, run20: Path) -> None:
    undisturbed = [r["ids"] for r in samples(run20)]
    exclude = "checkpoint.exclude_from_loading=[optimizer,lr_scheduler,dataloader]"
    overrides = [*base(corpus), "checkpoint.load_step=10", exclude]
    train([*overrides, "train.steps=15"], run20)
    rows = metrics(run20)
    assert rows[10]["lr"] == pytest.approx(rows[0]["lr"])
    assert [r["ids"] for r in samples(run20)][10:15] == undisturbed[:5]
    steps = stored_tensors(run20 / "checkpoint/step-15")["optimizer.state.norm.weight.step"]
    assert float(steps) == 5.0
    # Given again, everything is loaded.
    train([*overrides, "train.steps=18"], run20)
    assert [r["ids"] for r in samples(run20)][15:18] == undisturbed[5:8]
    assert metrics(run20)[15]["lr"] == pytest.approx(1e-3)
    steps = stored_tensors(run20 / "checkpoint/step-18")["optimizer.state.norm.weight.step"]
    assert float(steps) == 8.0


def test_another_model_or_corpus_is_refused_with_the_difference(corpus: Path, run20: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.n_layers is 3 where the run has 2"):
        train([*base(corpus), "train.steps=30", "model.n_layers=3"], run20)
    other = tmp_path / "other.jsonl"
    other.write_text(corpus.read_text().replace("a", "b"))
    with pytest.raises(UserError, match="must keep its data and tokenizer, but the corpus' fingerprint"):
        train([*base(other), "train.steps=30"], run20)
    assert len(metrics(run20)) == 20


def test_a_hyperparameter_changes_only_when_allowed(corpus: Path, run20: Path) -> None:
    changed = [*base(corpus), "train.steps=22", "optimizer.lr=5e-4"]
    with pytest.raises(UserError, match=r"add run.allow_change=\[optimizer.lr\]"):
        train(changed, run20)
    train([*changed, "run.allow_change=[optimizer.lr]"], run20)
    (change,) = record(run20)["changes"]
    assert (change["name"], change["from"], change["to"], change["after_step"]) == ("optimizer.lr", 0.001, 0.0005, 20)
    train([*base(corpus), "train.steps=24", "optimizer.lr=5e-4"], run20)
    assert len(metrics(run20)) == 24


def test_initial_load_takes_weights_from_another_run(corpus: Path, run20: Path, tmp_path: Path) -> None:
    weights = stored_tensors(run20 / "checkpoint/step-20")
    load = [f"checkpoint.initial_load_path={run20}", "optimizer.lr=0.0", "optimizer.weight_decay=0.0"]
    train([*base(corpus), "train.steps=1", *load], tmp_path / "model_only")
    tuned = stored_tensors(tmp_path / "model_only/checkpoint/step-1")
    assert (tuned["norm.weight"] == weights["norm.weight"]).all()
    assert float(tuned["optimizer.state.norm.weight.step"]) == 1.0
    whole = [*load, "checkpoint.initial_load_model_only=false"]
    train([*base(corpus), "train.steps=21", *whole], tmp_path / "whole", 1)
    assert float(stored_tensors(tmp_path / "whole/checkpoint/step-21")["optimizer.state.norm.weight.step"]) == 21.0
    with pytest.raises(CheckpointError, match="must be a checkpoint, or a folder with steps"):
        train([*base(corpus), f"checkpoint.initial_load_path={tmp_path}"], tmp_path / "none")


def test_another_shape_is_refused_by_name(corpus: Path, run20: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tok_embeddings.weight in .* has shape \(320, 32\)"):
        train([*base(corpus, "model.vocab_size=400"), f"checkpoint.initial_load_path={run20}"], tmp_path / "b")


def test_load_only_saves_nothing(corpus: Path, run20: Path) -> None:
    train([*base(corpus), "train.steps=23", "checkpoint.load_only=true"], run20)
    assert len(metrics(run20)) == 23
    assert not (run20 / "checkpoint/step-23").exists()


def test_resume_must_and_never(corpus: Path, run20: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="run.resume must not be 'must'"):
        train([*base(corpus), "train.steps=3", "run.resume=must"], tmp_path / "empty")
    train([*base(corpus), "train.steps=3", "run.resume=never"], run20)
    assert [r["step"] for r in metrics(run20)] == [1, 2, 3]
    assert lineages(run20) == 2


def test_a_damaged_newest_step_is_set_aside(corpus: Path, run20: Path) -> None:
    before = curve(run20)
    file = run20 / "checkpoint/step-20/__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-10])
    train([*base(corpus), "train.steps=20"], run20)
    assert record(run20)["attempts"][-1]["from_step"] == 15
    assert curve(run20)[:20] == before
    assert (run20 / "checkpoint/set-aside/damaged/step-20").exists()


def test_policies_and_retention_act_in_a_run(corpus: Path, tmp_path: Path) -> None:
    overrides = [
        *base(corpus), "checkpoint=debug", "train.steps=45", "checkpoint.keep_latest_k=2",
        "+retention_rule@checkpoint.retention_rules.every=every_n", "checkpoint.retention_rules.every.n=20",
        "+retention_rule@checkpoint.retention_rules.best=best",
        "+save_policy@checkpoint.save_policies.best=on_best",
        "+hook@hooks.validation=validation", "hooks.validation.every=7", "optimizer.lr=1e-2",
    ]  # fmt: skip
    train(overrides, tmp_path / "run")
    steps = sorted(int(p.name[5:]) for p in (tmp_path / "run/checkpoint").glob("step-*"))
    validated = {r["step"]: r["val_loss"] for r in metrics(tmp_path / "run") if "val_loss" in r}
    best = min(validated, key=lambda s: validated[s])
    assert {20, 40, 45, best} <= set(steps)
    assert 10 not in steps
    assert 1 in validated


def test_extending_does_not_bend_the_schedule(corpus: Path, tmp_path: Path) -> None:
    overrides = tiny(corpus, "data.global_batch_size=8", "scheduler=cosine", "scheduler.warmup_steps=2", "hooks=none")
    train([*overrides, "train.steps=10"], tmp_path / "run")
    before = [r["lr"] for r in metrics(tmp_path / "run")]
    train([*overrides, "train.steps=14", "run.extend=hold"], tmp_path / "run")
    after = [r["lr"] for r in metrics(tmp_path / "run")]
    assert after[:10] == before
    assert after[10:] == [pytest.approx(before[-1])] * 4


def test_a_save_that_is_due_during_another_is_left_out(corpus: Path, tmp_path: Path) -> None:
    """With `when_busy=skip` no step waits; all ranks leave out the same steps, and the last one is always saved."""
    arguments = tiny(
        corpus, "data.global_batch_size=8", "hooks=none", "checkpoint.interval=1", "checkpoint.keep_latest_k=0",
        "parallel.dp_shard=2", "train.steps=60",
    )  # fmt: skip
    train([*arguments, "checkpoint.when_busy=skip"], tmp_path / "skip", 2)
    train(arguments, tmp_path / "wait", 2)
    steps = {
        name: sorted(int(p.name[5:]) for p in (tmp_path / name / "checkpoint").glob("step-*"))
        for name in ("skip", "wait")
    }
    assert steps["wait"] == list(range(1, 61))
    assert steps["skip"][-1] == 60
    assert len(steps["skip"]) < 60
    assert (
        "is not saved: the save before it is still being written" in (tmp_path / "skip/logs/rank-0.log").read_text()
    )
    assert curve(tmp_path / "skip") == curve(tmp_path / "wait")
