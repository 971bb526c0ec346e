"""Runs on mixtures: cut and continued on other ranks, with other weights, packed; every sample stays what it was."""

import json
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from regrow.launch.config.errors import UserError
from regrow.launch.config.refusals import Refused
from tests.runs import train, train_until_killed
from tests.support import ONE_THREAD, TINY_MODEL, curve, metrics, record, samples

pytestmark = pytest.mark.slow

WEIGHTS = {"web": Fraction(7, 10), "code": Fraction(2, 10), "books": Fraction(1, 10)}
LATER = {"web": Fraction(1, 10), "code": Fraction(1, 10), "books": Fraction(8, 10)}
STEPS, STAGE = 14, 7


@pytest.fixture(scope="module")
def sources(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for three sources, and the tokenizer that they share."""
    folder = tmp_path_factory.mktemp("sources")
    lines = corpus.read_text().splitlines()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    overrides = ["data=mixture", f"data.tokenizer={folder / 'tokenizer.json'}"]
    for at, (name, weight) in enumerate(WEIGHTS.items()):
        (folder / f"{name}.jsonl").write_text("\n".join(lines[at::3]) + "\n")
        overrides += [
            f"+data_source@data.sources.{name}=text",
            f"data.sources.{name}.files=[{folder / f'{name}.jsonl'}]",
            f"data.sources.{name}.weight={float(weight)}",
        ]
    return overrides


def run_on(sources: Sequence[str], *more: str) -> list[str]:
    return [
        *TINY_MODEL, *ONE_THREAD, *sources, "data.seq_len=32", "data.micro_batch_size=3", "data.log_samples=true",
        "checkpoint.interval=1", "hooks=none", f"scheduler.total_steps={STEPS}", *more,
    ]  # fmt: skip


def counted(rows: Sequence[dict[str, Any]], weights: dict[str, Fraction]) -> None:
    """After each of these steps, which begin a stage, every source is within one sample of its weight."""
    total, found = 0, Counter[str]()
    for row in rows:
        found.update(row["sources"])
        total += len(row["sources"])
        for name, weight in weights.items():
            assert abs(found[name] - total * weight) < 1


@pytest.mark.parametrize("size", [12, 7])
def test_killed_six_times_on_any_number_of_ranks(sources: list[str], tmp_path: Path, size: int) -> None:
    """Between steps, and between the writing of a checkpoint and its commit."""
    stages = f"data.stages=[{{from_step: {STAGE}, weights: {{web: 0.1, code: 0.1, books: 0.8}}}}]"
    settings = run_on(sources, f"data.global_batch_size={size}", stages)
    train([*settings, f"train.steps={STEPS}"], tmp_path / "whole")
    for cut, ranks in enumerate((2, 1, 3, 2, 1, 3), 1):
        layout = ["parallel.dp_shard=-1"] if ranks > 1 else []
        event = "after_step" if cut % 2 else "before_commit"
        train_until_killed([*settings, f"train.steps={STEPS}", *layout], tmp_path / "cut", ranks, event, 2 * cut)
        assert len(samples(tmp_path / "cut")) >= 2 * cut
    end = train([*settings, f"train.steps={STEPS}", "parallel.dp_shard=-1"], tmp_path / "cut", 2)
    assert (end.kind, end.step) == ("finished", STEPS)
    starts = [attempt["from_step"] for attempt in record(tmp_path / "cut")["attempts"]]
    assert len(starts) == 7
    assert all(2 * cut - 2 <= start < 2 * cut + 1 for cut, start in enumerate(starts[1:], 1)), starts
    whole, cut_rows = samples(tmp_path / "whole"), samples(tmp_path / "cut")
    assert cut_rows == whole
    counted(whole[:STAGE], WEIGHTS)
    counted(whole[STAGE:], LATER)
    for row, expected in zip(metrics(tmp_path / "cut"), metrics(tmp_path / "whole"), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        of_sources = {name for name in expected if name.startswith(("loss/", "tokens/", "epochs/"))}
        assert {n for n in row if n.startswith(("loss/", "tokens/", "epochs/"))} == of_sources
        assert all(row[n] == pytest.approx(expected[n], rel=1e-4) for n in of_sources)
    last = metrics(tmp_path / "whole")[-1]
    read = Counter(name for row in whole for name in row["sources"])
    assert {name: last[f"tokens/{name}"] for name in WEIGHTS} == {name: 32 * read[name] for name in WEIGHTS}


def test_the_loss_is_that_of_its_sources(sources: list[str], tmp_path: Path) -> None:
    """On ranks of a pipeline, which share sequences too: the mean of the sources' losses by their labels."""
    settings = run_on(sources, "data.global_batch_size=12", "train.steps=2", "checkpoint=disabled")
    layouts = {"one": (1, []), "two": (4, ["parallel.pp=2", "parallel.cp=2", "data.micro_batch_size=1"])}
    for name, (world, layout) in layouts.items():
        train([*settings, *layout], tmp_path / name, world)
        for row, read in zip(metrics(tmp_path / name), samples(tmp_path / name), strict=True):
            share = Counter(read["sources"])
            mean = sum(row[f"loss/{n}"] * share[n] for n in share) / len(read["sources"])
            assert row["loss"] == pytest.approx(mean, rel=1e-12)
    for row, expected in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert row["loss/web"] == pytest.approx(expected["loss/web"], rel=1e-5)


def test_other_weights_from_a_step_on(sources: list[str], tmp_path: Path) -> None:
    """Earlier samples stay; back at an earlier step, the weights are again what they were."""
    run = tmp_path / "run"
    settings = run_on(sources, "data.global_batch_size=10", "checkpoint.keep_latest_k=0")
    train([*settings, "train.steps=8"], tmp_path / "whole")
    train([*settings, "train.steps=4"], run)
    changed = [*settings, "data.sources.web.weight=0.1", "data.sources.books.weight=0.7", "train.steps=8"]
    with pytest.raises(UserError, match=r"allow_change=\[data.sources.books.weight,data.sources.web.weight\]"):
        train(changed, run)
    assert train([*changed, "run.allow_change=[data.sources]"], run).step == 8
    whole, after = samples(tmp_path / "whole"), samples(run)
    assert after[:4] == whole[:4]
    counted(after[4:], {"web": Fraction(1, 10), "code": Fraction(2, 10), "books": Fraction(7, 10)})
    # Each source goes on with the windows that come next.
    per_source = [i for row in after for i, s in zip(row["ids"], row["sources"], strict=True) if s == "books"]
    assert len(set(per_source)) == len(per_source)
    assert (
        train([*settings, "train.steps=8", "checkpoint.load_step=2", "run.allow_change=[data.sources]"], run).step
        == 8
    )
    assert samples(run) == whole
    assert curve(run) == curve(tmp_path / "whole")


def test_a_source_that_is_used_up(sources: list[str], tmp_path: Path) -> None:
    """Refused beforehand with the arithmetic, or left out from there on, as before when the run is cut there."""
    settings = run_on(sources, "data.global_batch_size=12", "data.sources.books.max_epochs=0.01")
    with pytest.raises(Refused, match=r"data.sources.books.max_epochs must cover the run"):
        train([*settings, "train.steps=14"], tmp_path / "refused")
    reweighted = [*settings, "data.on_exhausted=reweight"]
    train([*reweighted, "train.steps=14"], tmp_path / "whole")
    for steps in (5, 9, 14):
        train([*reweighted, f"train.steps={steps}"], tmp_path / "cut")
    assert samples(tmp_path / "cut") == samples(tmp_path / "whole")
    books = [sum(s == "books" for s in row["sources"]) for row in samples(tmp_path / "whole")]
    assert books[0] > 0
    assert sum(books[-3:]) == 0


def test_packed_documents_are_killed_and_continued(sources: list[str], tmp_path: Path) -> None:
    """With positions and validation sets of their own. And their loss is that of the same run on other ranks: it is
    divided by the labels of all of them.
    """
    settings = run_on(
        sources, "data.global_batch_size=6", "data.packing=best_fit", "data.seq_len=96",
        "data.sources.code.packing=concat", "train.z_loss=1e-4", "data.reset_positions=true",
        "data.document_mask=true", "+data_source@data.validation_sets.held=text",
        f"data.validation_sets.held.files={next(o for o in sources if '.books.files=' in o).partition('=')[2]}",
        "+hook@hooks.validation=validation", "hooks.validation.every=2", "hooks.validation.max_batches=2",
    )  # fmt: skip
    sharded = [*settings, "parallel.dp_shard=2"]
    train([*sharded, "train.steps=6"], tmp_path / "whole", 2)
    for event, step in (("before_commit", 2), ("after_step", 3), ("after_step", 5)):
        train_until_killed([*sharded, "train.steps=6"], tmp_path / "cut", 2, event, step)
    train([*sharded, "train.steps=6"], tmp_path / "cut", 2)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    measured = ("loss/", "val_loss", "bits_per_byte", "val_bits_per_byte")
    rows = [
        [{n: v for n, v in r.items() if n.startswith(measured)} for r in metrics(tmp_path / n)]
        for n in ("cut", "whole")
    ]
    assert rows[0] == rows[1]
    assert {"val_loss", "val_loss/held", "bits_per_byte"} <= rows[0][1].keys(), rows[0][1]
    assert samples(tmp_path / "cut") == samples(tmp_path / "whole")
    for name, (world, layout) in {"one": (1, []), "tp": (2, ["parallel.tp=2"]), "pp": (2, ["parallel.pp=2"])}.items():
        train([*settings, "train.steps=3", *layout], tmp_path / name, world)
        for row, expected in zip(metrics(tmp_path / name), metrics(tmp_path / "whole"), strict=False):
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
            assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
