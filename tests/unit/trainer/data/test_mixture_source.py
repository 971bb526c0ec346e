"""A mixture over the starts of a run: what was read stays, whatever the config says later."""

import json
from typing import Any

import numpy as np
import pytest

from regrow.trainer.data.config import DataConfig, Packing, TextConfig, TooLong
from regrow.trainer.data.mixture_config import (
    MixtureConfig,
    OnExhausted,
    StageConfig,
    StdlibPart,
    TextPart,
    TokensPart,
)
from regrow.trainer.data.mixture_source import MixtureSource, continue_mixture
from regrow.trainer.data.source import DataError
from regrow.trainer.state import TrainState

WINDOWS = {"books": 100, "web": 1000}


def config(web: float = 0.8, books: float = 0.2, *, epochs: float | None = None, **more: Any) -> MixtureConfig:
    sources = {
        "web": TextPart(files=["w"], weight=web),
        "books": TextPart(files=["b"], weight=books, max_epochs=epochs),
    }
    return MixtureConfig(sources=dict(sources), seq_len=8, global_batch_size=10, micro_batch_size=5, **more)


def located(mixture: Any, count: int = 1000) -> list[tuple[str, int]]:
    sources, samples = mixture.locate(np.arange(count))
    return [(mixture.names[s], n) for s, n in zip(sources.tolist(), samples.tolist(), strict=True)]


def test_a_part_alone_has_the_mixtures_fields_where_it_has_none_of_its_own() -> None:
    shared = config(tokenizer="t", packing=Packing.best_fit, too_long=TooLong.cut, document_mask=True)
    part = TextPart(files=["a", "b"], field="body", where={"x": 1}, packing=Packing.concat)
    alone = part.alone(shared)
    assert isinstance(alone, TextConfig)
    assert (alone.files, alone.field, alone.where) == (["a", "b"], "body", {"x": 1})
    assert (alone.tokenizer, alone.seq_len, alone.too_long, alone.document_mask) == ("t", 8, TooLong.cut, True)
    assert alone.packing is Packing.concat
    assert TextPart(files=["a"]).alone(shared).packing is Packing.best_fit
    assert alone._target_ == TextConfig(seq_len=1, global_batch_size=1, micro_batch_size=1)._target_
    assert isinstance(StdlibPart().alone(shared), DataConfig)


def test_the_same_config_goes_on_and_another_one_begins_there() -> None:
    first, record = continue_mixture(config(), WINDOWS, steps=100, before=None, at_sample=0)
    # As a checkpoint keeps it.
    state = TrainState.from_json(json.loads(json.dumps(TrainState(samples_consumed=300, mixture=record).as_json())))
    assert state.mixture == record
    again, same = continue_mixture(config(), WINDOWS, steps=100, before=state.mixture, at_sample=300)
    assert (again, same) == (first, record)
    changed, second = continue_mixture(config(0.1, 0.9), WINDOWS, steps=100, before=state.mixture, at_sample=300)
    assert located(changed, 300) == located(first, 300)
    later = [name for name, _ in located(changed)[300:]]
    assert later.count("books") == 630
    # And once more: both changes stay.
    third, _ = continue_mixture(config(0.5, 0.5), WINDOWS, steps=100, before=second, at_sample=500)
    assert located(third, 500) == located(changed, 500)
    # Each source has gone on without a gap.
    numbers = [n for name, n in located(third) if name == "books"]
    assert numbers == list(range(len(numbers)))


def test_weights_that_change_before_the_first_sample_are_those_of_the_run() -> None:
    _, record = continue_mixture(config(), WINDOWS, steps=100, before=None, at_sample=0)
    other, _ = continue_mixture(config(0.1, 0.9), WINDOWS, steps=100, before=record, at_sample=0)
    assert other == continue_mixture(config(0.1, 0.9), WINDOWS, steps=100, before=None, at_sample=0)[0]


def test_limits_that_change_leave_what_was_read() -> None:
    with pytest.raises(DataError, match=r"data.sources.books.max_epochs must cover the run, but is 1.0: "):
        continue_mixture(config(epochs=1.0), WINDOWS, steps=100, before=None, at_sample=0)
    limited = config(epochs=1.0, on_exhausted=OnExhausted.reweight)
    first, record = continue_mixture(limited, WINDOWS, steps=100, before=None, at_sample=0)
    assert [name for name, _ in located(first)].count("books") == 100
    more = config(epochs=1.5, on_exhausted=OnExhausted.reweight)
    changed, _ = continue_mixture(more, WINDOWS, steps=100, before=record, at_sample=700)
    assert located(changed, 700) == located(first, 700)
    assert [name for name, _ in located(changed)].count("books") == 150


def test_stages_are_of_steps_or_tokens() -> None:
    staged = config(stages=[StageConfig(from_tokens=801, weights={"books": 1.0})])
    mixture, _ = continue_mixture(staged, WINDOWS, steps=100, before=None, at_sample=0)
    # The step after the 801st token begins with sample 110.
    assert {name for name, _ in located(mixture)[110:]} == {"books"}
    assert located(mixture)[100:110].count(("web", 80)) == 1


def test_token_stores_have_their_tokenizer() -> None:
    settings = config()
    settings.sources = {"a": TokensPart(path="x"), "b": TokensPart(path="y")}
    MixtureSource(settings).check()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"sources": {}}, "data.sources must name at least one source, but is empty"),
        ({"sources": {"a b": TextPart(files=["x"])}}, "data.sources must have names of letters, digits, - and _"),
        (
            {"sources": {"a": TextPart(files=["x"], weight=-1)}, "tokenizer": "t"},
            "data.sources.a.weight must be 0, or",
        ),
        ({"sources": {"a": TextPart(files=["x"])}}, "data.tokenizer must be set in a mixture, .* but is null"),
        (
            {"stages": [StageConfig(weights={"web": 1})], "tokenizer": "t"},
            r"data.stages\[0\] must have either from_step",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(changed: dict[str, Any], words: str) -> None:
    settings = config()
    for name, value in changed.items():
        setattr(settings, name, value)
    with pytest.raises(DataError, match=words):
        MixtureSource(settings).check()
