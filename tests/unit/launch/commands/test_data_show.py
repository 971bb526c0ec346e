"""The figures of `regrow-data show` are those of a count by hand."""

import json
import math
import random
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from regrow.launch.commands import data_show
from regrow.launch.commands.data_plot import plot_lengths
from regrow.launch.commands.data_show import LengthBin, count_store, figures_text
from regrow.trainer.data.source import DataError
from regrow.trainer.data.token_store import StoreDamagedError
from tests.unit.launch.commands.data_stores import tokenizer_of, write_store

RNG = random.Random(3)
WORDS = ["grün", "the", "cat", "sat", "on", "你好", "a", "mat", "\n\n"]
SHARDS = [
    [" ".join(RNG.choices(WORDS, k=RNG.choice([1, 3, 9, 40, 300]))) for _ in range(count)] for count in (31, 0, 1, 12)
]


def every_third(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    return np.equal(np.arange(len(ids)) % 3, 1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shown")
    tokenizer_of([text for texts in SHARDS for text in texts], folder / "tokenizer.json")
    return write_store(folder / "store", SHARDS, folder / "tokenizer.json", every_third)


def files(store: Path, name: str, dtype: str) -> npt.NDArray[np.int64]:
    return np.concatenate([np.fromfile(p, dtype).astype(np.int64) for p in sorted(store.glob(name))])


def test_everything_is_counted_exactly(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = count_store(store, 0.3)
    tokens = files(store, "shard-*.tokens", "<u2")
    rows = [np.load(p) for p in sorted(store.glob("shard-*.documents.npy"))]
    lengths = [int(n) for part in rows for n in part["tokens"]]
    hashes = [int(h) for part in rows for h in part["hash"]]
    texts = [text for texts in SHARDS for text in texts]
    held_out = [n for n, h in zip(lengths, hashes, strict=True) if h < 0.3 * 2**64]
    assert (figures.shards, figures.documents, figures.tokens) == (4, 44, len(tokens))
    assert figures.ids_used == len(set(tokens.tolist()))
    # A byte-level vocabulary keeps every byte, and the end of text is none.
    assert figures.text_bytes == sum(len(text.encode()) for text in texts)
    assert figures.bytes_per_token == figures.text_bytes / len(tokens)
    assert figures.labels == int(files(store, "shard-*.labels", "u1").sum())
    assert (figures.validation_documents, figures.validation_tokens) == (len(held_out), sum(held_out))
    assert 0 < len(held_out) < 44
    assert figures.length_mean == pytest.approx(sum(lengths) / 44)
    ordered = sorted(lengths)
    assert figures.length_quantiles == {
        f"{q:g}": ordered[max(0, math.ceil(q * 44) - 1)] for q in (0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1)
    }
    for b in figures.lengths:
        inside = [n for n in lengths if b.shortest <= n <= b.longest]
        assert (b.documents, b.tokens) == (len(inside), sum(inside))
    assert sum(b.documents for b in figures.lengths) == 44
    assert figures.fingerprint == json.loads((store / "index.json").read_text())["fingerprint"]
    # Read in small parts, it is the same.
    monkeypatch.setattr(data_show, "_CHUNK_TOKENS", 7)
    assert count_store(store, 0.3) == figures


def test_a_store_without_labels_and_notes_says_nothing_of_them(store: Path, tmp_path: Path) -> None:
    plain = write_store(tmp_path / "plain", [["one two"]], store / "tokenizer.json")
    figures = count_store(plain, 0.0)
    assert (figures.labels, figures.made_with, figures.validation_documents) == (None, {}, 0)
    assert "labels" not in "\n".join(figures_text(figures))


def test_the_lengths_are_bars(store: Path) -> None:
    figures = count_store(store, 0.05)
    bins = [LengthBin(shortest=1, longest=1, documents=1, tokens=1), LengthBin(shortest=2, longest=3, documents=0, tokens=0),
            LengthBin(shortest=4, longest=7, documents=80, tokens=400)]  # fmt: skip
    assert data_show._bars(bins) == [
        "1 to 1   1 documents   1.23 %  █",
        "2 to 3   0 documents   0.00 %",
        f"4 to 7  80 documents  98.77 %  {'█' * 40}",
    ]
    text = figures_text(figures)
    assert text[0].startswith("44 documents, ")
    assert text[-len(figures.lengths) :] == data_show._bars(figures.lengths)
    assert f"{figures.bytes_per_token:.3f} bytes per token" in text[1]


def test_lengths_at_powers_of_two_are_told_apart() -> None:
    lengths = np.array([1, 2, 3, 4, 7, 8, 2**31 - 1, 2**31])
    found = {b.shortest: b.documents for b in data_show._bins(lengths) if b.documents}
    assert found == {1: 1, 2: 2, 4: 2, 8: 1, 2**30: 1, 2**31: 1}


def test_what_decided_the_tokens_is_shown(store: Path, tmp_path: Path) -> None:
    made = write_store(tmp_path / "made", [["one two"]], store / "tokenizer.json")
    (made / "corpus.json").write_text(json.dumps({"data.field": "te\x1bxt"}))
    assert "made with data.field 'te\\x1bxt'" in figures_text(count_store(made, 0.05))
    (made / "corpus.json").write_text("[]")
    with pytest.raises(DataError, match=r"corpus\.json must be what tokenize wrote, but cannot be used"):
        count_store(made, 0.05)


def test_an_id_beyond_the_vocabulary_is_damage(store: Path, tmp_path: Path) -> None:
    broken = write_store(tmp_path / "broken", [["one two"]], store / "tokenizer.json")
    path = next(broken.glob("*.tokens"))
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(StoreDamagedError, match="must hold ids below 285, but holds 65535"):
        count_store(broken, 0.05)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, math.nan])
def test_a_fraction_that_is_none_is_refused(store: Path, fraction: float) -> None:
    with pytest.raises(DataError, match="--validation-fraction must be at least 0 and below 1, but is "):
        count_store(store, fraction)


def test_the_plot_is_a_picture(store: Path, tmp_path: Path) -> None:
    figures = count_store(store, 0.05)
    plot_lengths(figures, tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError, match=r"--plot must name a \.png, \.svg, \.pdf file, but is a\.gif; use a\.png"):
        plot_lengths(figures, Path("a.gif"))
    with pytest.raises(DataError, match=r"--plot must be a file that can be written, but .* cannot \(No such file"):
        plot_lengths(figures, tmp_path / "none" / "a.png")
