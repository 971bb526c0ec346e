"""`regrow-data mix` says what a run takes."""

import json
import random
from pathlib import Path

import pytest

from regrow.errors import ConfigError
from regrow.launch.commands.data_mix import mix_of, mix_text
from regrow.launch.commands.data_run import prepare_run_data
from regrow.launch.config.refusals import Refused
from regrow.launch.run.preflight_data import prepare_data
from tests.support import TINY_MODEL, typed_config
from tests.unit.launch.commands.data_stores import tokenizer_of, write_store

SHAPE = [
    *TINY_MODEL,
    "data.seq_len=16",
    "data.micro_batch_size=2",
    "data.global_batch_size=6",
    "data.validation_fraction=0.0",
]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a mixture of two stores."""
    folder = tmp_path_factory.mktemp("mixed")
    rng = random.Random(5)
    texts = {
        name: [" ".join(rng.choices(["tea", "for", "two", name], k=rng.randint(1, 30))) for _ in range(count)]
        for name, count in (("web", 90), ("code", 40))
    }
    tokenizer_of([*texts["web"], *texts["code"]], folder / "tokenizer.json")
    overrides = [*SHAPE, "data=mixture", f"data.tokenizer={folder / 'tokenizer.json'}"]
    for name, of_source in texts.items():
        store = write_store(folder / name, [of_source], folder / "tokenizer.json")
        overrides += [f"+data_source@data.sources.{name}=tokens", f"data.sources.{name}.path={store}"]
    return [*overrides, "data.sources.web.weight=0.7", "data.sources.code.weight=0.3"]


STAGES = ["data.stages=[{from_step:20,weights:{web:0.5,code:0.5}},{from_step:31,weights:{code:1}}]"]


@pytest.mark.parametrize(
    "more", [[], STAGES, [*STAGES, "data.sources.code.max_epochs=2.25", "data.on_exhausted=reweight"]]
)
def test_it_is_what_a_run_reads(mixture: list[str], more: list[str]) -> None:
    # Where code is used up, a stage of it alone could not be.
    steps = 31 if len(more) > 1 else 37
    config = typed_config([*mixture, *more, f"train.steps={steps}"])
    use = mix_of(config)
    run = prepare_run_data(config)
    ids = run.samples().ids(0, steps * 6)
    names = run.samples().names
    read = [names[s] for s in ids.sources]
    seen: dict[str, int] = {}
    for row in use.uses:
        of_stage = read[row.first_sample : row.last_sample]
        assert row.samples == of_stage.count(row.source)
        seen[row.source] = seen.get(row.source, 0) + row.samples
        assert row.tokens == row.samples * 16
        assert row.epochs == row.samples / len(run.windows[row.source])
        assert row.epochs_so_far == seen[row.source] / len(run.windows[row.source])
    assert use.totals() == {n: (read.count(n), read.count(n) / len(run.windows[n])) for n in use.totals()}
    assert sum(count for count, _ in use.totals().values()) == steps * 6
    found = use.as_json()
    assert json.loads(json.dumps(found)) == found
    assert found["tokens"] == sum(s["tokens"] for stage in found["stages"] for s in stage["sources"]) == steps * 96


def test_a_source_that_is_used_up_begins_a_stage(mixture: list[str]) -> None:
    limits = ["data.sources.code.max_epochs=1.5", "data.on_exhausted=reweight"]
    use = mix_of(typed_config([*mixture, *limits, "train.steps=60"]))
    samples, epochs = use.totals()["code"]
    assert epochs == pytest.approx(1.5, abs=1 / use.windows["code"])
    assert samples == int(1.5 * use.windows["code"])
    assert use.used_up == {1: ["code"]}
    assert [(row.stage, row.source, float(row.weight)) for row in use.uses] == [
        (0, "code", 0.3),
        (0, "web", 0.7),
        (1, "web", 1.0),
    ]
    text = mix_text(use)
    assert text[0] == "60 steps of 6 samples of 16 tokens: 5,760 tokens"
    assert text[1].split() == ["stage", "from", "step", "source", "weight", "samples", "tokens", "epochs", *("epochs", "so", "far")]  # fmt: skip
    assert text[2].split()[:5] == ["0", "0", "code", "0.3", f"{samples}"]
    first = next(row.first_sample for row in use.uses if row.stage == 1)
    assert text[-1] == f"used up at step {f'{first / 6:.2f}'.rstrip('0').rstrip('.')}, where stage 1 begins: code"


@pytest.mark.parametrize(
    "more",
    [
        ["data.sources.code.max_epochs=0.5"],
        ["data.sources.code.weight=-1"],
        ["data.stages=[{from_step:3,weights:{wbe:1}}]"],
        ["data.sources.code.path=/nowhere"],
        ["data.seq_len=2000", "model.max_seq_len=4096"],
    ],
)
def test_refusals_are_those_of_the_run(mixture: list[str], more: list[str]) -> None:
    config = typed_config([*mixture, *more, "train.steps=100"])
    with pytest.raises((ConfigError, FileNotFoundError)) as theirs:
        prepare_data(config, fresh=True)
    with pytest.raises(Refused) as ours:
        mix_of(config)
    assert str(ours.value) == str(theirs.value)


def test_one_source_is_a_mixture_of_one(mixture: list[str]) -> None:
    path = next(o.partition("=")[2] for o in mixture if o.startswith("data.sources.web.path="))
    use = mix_of(typed_config([*SHAPE, "data=tokens", f"data.path={path}", "train.steps=10"]))
    assert use.totals() == {"data": (60, 60 / use.windows["data"])}
    assert Path(path).is_dir()
    assert len(mix_text(use)) == 4
