"""`regrow-data preview` shows the tokens that a run reads, and which of them are labels."""

import random
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer

from regrow.launch.commands.data_preview import Part, Preview, as_plain, as_text, preview, print_preview
from regrow.launch.commands.data_run import prepare_run_data
from regrow.launch.config.schema import Config
from regrow.trainer.data.source import DataError
from regrow.trainer.data.token_store import TokenStore
from regrow.trainer.data.tokenizer import load_tokenizer
from tests.support import TINY_MODEL, typed_config
from tests.unit.launch.commands.data_stores import tokenizer_of, write_store

RNG = random.Random(11)
TEXTS = [" ".join(RNG.choices(["tea", "for", "two,", "then", "off"], k=RNG.randint(1, 25))) + "." for _ in range(80)]
LENGTH = 24


def later_half(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    return np.greater_equal(np.arange(len(ids)), len(ids) // 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("previewed")
    tokenizer_of(TEXTS, folder / "tokenizer.json")
    write_store(folder / "plain", [TEXTS[:30], TEXTS[30:]], folder / "tokenizer.json")
    write_store(folder / "labelled", [TEXTS], folder / "tokenizer.json", later_half)
    return folder


def config_of(store: Path, *more: str) -> Config:
    shape = [
        f"data.seq_len={LENGTH}",
        "data.micro_batch_size=2",
        "data.validation_fraction=0.0",
        "data.global_batch_size=16",
        "train.steps=100",
    ]
    return typed_config(
        [*TINY_MODEL, "data=tokens", *shape, f"data.path={store}", f"data.cache={store.parent}", *more]
    )


def documents_of(store: Path) -> tuple[list[list[int]], Tokenizer]:
    opened = TokenStore(store)
    ids = np.concatenate([np.fromfile(p, opened.index.dtype) for p in sorted(store.glob("*.tokens"))])
    parts = np.split(ids, np.cumsum(opened.lengths)[:-1])
    return [part.tolist() for part in parts], load_tokenizer(opened.tokenizer_file)


def characters(parts: list[Part]) -> list[tuple[str, bool]]:
    return [(c, part.counts) for part in parts for c in part.text]


def spelled(tokenizer: Tokenizer, tokens: list[int], counted: list[bool]) -> list[tuple[str, bool]]:
    """Token by token: those of a text without accents are whole characters."""
    return [
        (c, on)
        for token, on in zip(tokens, counted, strict=True)
        for c in tokenizer.decode([token], skip_special_tokens=False)
    ]


def test_documents_end_to_end_are_shown_as_they_are_read(folder: Path) -> None:
    config = config_of(folder / "plain")
    documents, tokenizer = documents_of(folder / "plain")
    stream = [token for document in documents for token in document]
    begins = set(np.cumsum([len(d) for d in documents]).tolist())
    windows = prepare_run_data(config).samples().ids(5, 7).windows.tolist()
    shown = list(preview(config, first=5, count=7))
    assert len(shown) == 7
    for number, (window, sample) in enumerate(zip(windows, shown, strict=True)):
        start = window * LENGTH
        count = (len(stream) - 1) // LENGTH
        assert sample.head == (
            f"sample {5 + number}: source data, window {window} of {count}, 100 % filled, {LENGTH} labels"
        )
        expected = spelled(tokenizer, stream[start : start + LENGTH + 1], [False] + [True] * LENGTH)
        assert characters(sample.parts) == expected
        assert sum(part.begins == "document" for part in sample.parts) == len(
            begins & set(range(start + 1, start + LENGTH))
        )


@pytest.mark.parametrize("store", ["plain", "labelled"])
def test_packed_documents_are_shown_with_their_borders_and_labels(folder: Path, store: str) -> None:
    config = config_of(folder / store, "data.packing=best_fit")
    documents, tokenizer = documents_of(folder / store)
    run = prepare_run_data(config)
    packed = run.windows["data"].packed  # type: ignore[attr-defined]
    ids = run.samples().ids(0, 20)
    for window, sample in zip(ids.windows.tolist(), preview(config, first=0, count=20), strict=True):
        begin, end = packed.window_starts[window : window + 2]
        expected, heads, labels = [], [], 0
        for piece in range(begin, end):
            document, first = documents[packed.documents[piece]], int(packed.firsts[piece])
            tokens = document[first : first + packed.positions[piece] + 1]
            mask = [True] * len(document) if store == "plain" else later_half(np.array(document)).tolist()
            counted = [False, *mask[first + 1 : first + len(tokens)]]
            labels += sum(counted)
            if not counted[-1]:
                tokens, counted = tokens[:-1], counted[:-1]  # nothing asks for it, and nothing reads it
            expected += spelled(tokenizer, tokens, counted)
            heads.append("document" if first == 0 else f"document, from its token {first} on")
        assert characters(sample.parts) == expected
        assert [part.begins for part in sample.parts if part.begins] == heads
        filled = int(packed.positions[begin:end].sum())
        assert sample.head.endswith(f", {100 * filled / LENGTH:.4g} % filled, {labels} labels")


def test_the_source_of_each_sample_is_named(folder: Path) -> None:
    mixed = ["data=mixture", f"data.tokenizer={folder / 'tokenizer.json'}", "data.sources.a.weight=3"]
    for name, store in (("a", "plain"), ("b", "labelled")):
        mixed += [f"+data_source@data.sources.{name}=tokens", f"data.sources.{name}.path={folder / store}"]
    order = sorted(mixed, key=lambda o: not o.startswith(("data=", "+")))
    shape = [f"data.seq_len={LENGTH}", "data.micro_batch_size=2", "data.validation_fraction=0.0"]
    config = typed_config([*TINY_MODEL, *order, *shape])
    heads = [sample.head for sample in preview(config, first=0, count=8)]
    assert sum(": source a, " in head for head in heads) == 6
    assert sum(": source b, " in head for head in heads) == 2


def test_marks_are_words_without_a_terminal() -> None:
    parts = [
        Part("ask\n", counts=False, begins="document"),
        Part("answer", counts=True),
        Part("x", counts=True, begins="document"),
    ]
    assert as_plain(Preview(head="sample 0", parts=parts)) == (
        "=== sample 0\n[document]\n[no label: ask\n]answer\n[document]\nx"
    )
    text = as_text(Preview(head="sample 0", parts=parts))
    assert text.plain == "sample 0\n[document]\nask\nanswer\n[document]\nx"
    assert [(text.plain[s.start : s.end], s.style) for s in text.spans] == [
        ("sample 0\n", "bold"),
        ("[document]\n", "bold cyan"),
        ("ask\n", "dim"),
        ("\n[document]\n", "bold cyan"),
    ]


def test_a_corpus_cannot_speak_to_the_terminal(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_store(
        tmp_path / "evil", [["\x1b[31mred\x07 \u202egrün\u200d 你\u3000好\t" * 9]], folder / "tokenizer.json"
    )
    print_preview(config_of(store, "data.seq_len=64"), first=0, count=1)
    out = capsys.readouterr().out
    assert "\\x1b[31mred\\x07 \\u202egrün\u200d 你\u3000好\t" in out
    assert not {"\x1b", "\x07", "\u202e"} & set(out)


def test_a_terminal_has_colours(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(folder / "labelled", "data.packing=best_fit")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    print_preview(config, first=0, count=2)
    out = capsys.readouterr().out
    assert "\x1b[2m" in out
    assert "[no label" not in out
    monkeypatch.setenv("NO_COLOR", "1")
    print_preview(config, first=0, count=2)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[no label: " in out


def test_a_character_whose_bytes_are_of_two_kinds_is_still_shown(folder: Path, tmp_path: Path) -> None:
    store = write_store(tmp_path / "split", [["你" * 40]], folder / "tokenizer.json")
    sample = next(preview(config_of(store), first=0, count=1))
    assert "你" * (LENGTH // 3 - 1) in "".join(part.text for part in sample.parts)


@pytest.mark.parametrize(
    ("first", "count", "sentence"),
    [
        (0, 0, "--count must be at least 1, but is 0; use 3"),
        (-1, 1, "--first must be from 0 to 1599, the last sample of train.steps=100, but is -1; use another one"),
        (1600, 1, "--first must be from 0 to 1599, the last sample of train.steps=100, but is 1600; use another one"),
    ],
)
def test_samples_that_are_none_are_refused(folder: Path, first: int, count: int, sentence: str) -> None:
    with pytest.raises(DataError) as refused:
        list(preview(config_of(folder / "plain"), first=first, count=count))
    assert str(refused.value).startswith(sentence)
    assert len(list(preview(config_of(folder / "plain"), first=1599, count=5))) == 1
