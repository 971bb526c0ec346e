"""Packed windows: the tokens and labels of their documents, and a file that is believed only where it is whole."""

import logging
import os
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow.trainer.data.config import TooLong
from regrow.trainer.data.encoding import Encoded
from regrow.trainer.data.label_mask import ArrayMask, LabelMask
from regrow.trainer.data.packed_windows import PackedWindows, packed_once
from regrow.trainer.data.packing import Packed, pack
from regrow.trainer.data.source import DataError
from regrow.trainer.data.token_store import TOKENIZER, StoreDamagedError, TokenStore, write_index, write_shard
from regrow.trainer.data.tokenizer import tokenizer_hash
from regrow.trainer.data.windows import IGNORE, ConcatWindows

Int64s = npt.NDArray[np.int64]
END = 0
VOCABULARY = 60_000
TOKENIZER_BODY = b"{}"


def write_store(folder: Path, shards: list[list[list[int]]], hashes: list[int]) -> TokenStore:
    """A store of these documents."""
    remaining = iter(hashes)
    for number, documents in enumerate(shards):
        write_shard(folder, number, [Encoded(np.array(d), next(remaining)) for d in documents], np.dtype("<u2"))
    (folder / TOKENIZER).write_bytes(TOKENIZER_BODY)
    write_index(folder, len(shards), VOCABULARY, tokenizer_hash(TOKENIZER_BODY), END)
    return TokenStore(folder)


def numbered(lengths: list[int]) -> list[list[int]]:
    """Documents in which every token is another one, but for the last."""
    ids = iter(range(1, VOCABULARY))
    return [[*(next(ids) for _ in range(length - 1)), END] for length in lengths]


def spread(count: int) -> list[int]:
    """Hashes over all of their range."""
    return [(n * 0x9E3779B97F4A7C15) % 2**64 for n in range(count)]


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    """Two shards of documents up to several windows long."""
    documents = numbered([int(n) for n in np.random.default_rng(5).integers(1, 60, 120)])
    (tmp_path / "store").mkdir()
    return write_store(tmp_path / "store", [documents[:50], documents[50:]], spread(120))


def all_ids(store: TokenStore) -> Int64s:
    """The store's tokens, document after document."""
    ids = np.empty(store.index.tokens, dtype=np.int64)
    for start, length in zip(np.cumsum(store.lengths) - store.lengths, store.lengths, strict=True):
        store.read(int(start), ids[start : start + length])
    return ids


def read(windows: PackedWindows, window: int) -> tuple[list[int], list[int], list[int]]:
    """A window, into arrays that held something else before."""
    tokens, labels, documents = (np.full(windows.seq_len, -7, dtype=np.int64) for _ in range(3))
    windows.read(window, tokens, labels, documents)
    return tokens.tolist(), labels.tolist(), documents.tolist()


def pairs_of(windows: PackedWindows) -> Counter[tuple[int, int]]:
    """All (token, label) of all windows."""
    found: Counter[tuple[int, int]] = Counter()
    for window in range(len(windows)):
        tokens, labels, _ = read(windows, window)
        found.update((t, y) for t, y in zip(tokens, labels, strict=True) if y != IGNORE)
    return found


def pairs_in(documents: list[list[int]]) -> Counter[tuple[int, int]]:
    return Counter((t, y) for d in documents for t, y in pairwise(d))


def packed_training(store: TokenStore, seq_len: int, mask: LabelMask | None = None) -> PackedWindows:
    return PackedWindows(store, seq_len, 0.0, validation=False, too_long=TooLong.split, mask=mask)


def test_a_window_is_its_documents_one_after_another(tmp_path: Path) -> None:
    store = write_store(tmp_path, [[[11, 12, END], [21, 22, 23, 24, 25, 26, END]], [[31, END], [END]]], spread(4))
    windows = PackedWindows(store, 5, 0.0, validation=False, too_long=TooLong.split)
    assert len(windows) == 2
    assert read(windows, 0) == ([21, 22, 23, 24, 25], [22, 23, 24, 25, 26], [0, 0, 0, 0, 0])
    assert read(windows, 1) == ([11, 12, 26, 31, 0], [12, END, END, END, IGNORE], [0, 0, 1, 2, 3])
    windows = PackedWindows(store, 5, 0.0, validation=False, too_long=TooLong.drop)
    assert read(windows, 0) == ([11, 12, 31, 0, 0], [12, END, END, IGNORE, IGNORE], [0, 0, 1, 2, 2])


@settings(max_examples=60, deadline=None)
@given(
    shards=st.lists(st.lists(st.integers(1, 40), max_size=12), max_size=3),
    seq_len=st.integers(1, 16),
    too_long=st.sampled_from(TooLong),
    seed=st.integers(0, 2**32 - 1),
)
def test_windows_hold_the_labels_that_the_rule_keeps(
    shards: list[list[int]], seq_len: int, too_long: TooLong, seed: int
) -> None:
    """Each token of these documents is another one: a label can be told, and so can its position's token."""
    lengths = [length for shard in shards for length in shard]
    documents, hashes = numbered(lengths), np.random.default_rng(seed).integers(0, 2**64, len(lengths), np.uint64)
    ends = np.cumsum([0, *(len(shard) for shard in shards)]).tolist()
    with tempfile.TemporaryDirectory() as folder:
        parts = [documents[a:b] for a, b in pairwise(ends)]
        store = write_store(Path(folder), parts, hashes.tolist())
        for validation in (False, True):
            windows = PackedWindows(store, seq_len, 0.5, validation=validation, too_long=too_long)
            chosen = [d for d, h in zip(documents, hashes.tolist(), strict=True) if (h < 2**63) == validation]
            if too_long is TooLong.drop:
                chosen = [d for d in chosen if len(d) <= seq_len + 1]
            if too_long is TooLong.cut:
                chosen = [d[: seq_len + 1] for d in chosen]
            assert pairs_of(windows) == pairs_in(chosen)


def test_pieces_are_told_apart_and_what_is_empty_is_one_of_its_own(store: TokenStore) -> None:
    windows = packed_training(store, 32)
    owner = np.repeat(np.arange(120), store.lengths)
    document_of = {int(i): int(d) for i, d in zip(all_ids(store), owner, strict=True) if i != END}
    for window in range(len(windows)):
        tokens, labels, documents = read(windows, window)
        filled = sum(label != IGNORE for label in labels)
        assert IGNORE not in labels[:filled]
        assert tokens[filled:] == [0] * (32 - filled)
        owners = [document_of[t] for t in tokens[:filled]]
        changes = np.diff(documents)
        assert documents[0] == 0
        assert set(changes.tolist()) <= {0, 1}
        assert (changes[: filled - 1] > 0).tolist() == [a != b for a, b in pairwise(owners)]
        assert filled == 32 or changes[filled - 1] == 1
        assert not changes[filled:].any()


def test_splits_are_those_of_other_windows(store: TokenStore) -> None:
    for validation in (False, True):
        windows, packed = (
            ConcatWindows(store, 1, 0.3, validation=validation),
            PackedWindows(store, 16, 0.3, validation=validation, too_long=TooLong.split),
        )
        ids, out = set(), np.empty((2, 1), dtype=np.int64)
        for window in range(len(windows)):
            windows.read(window, out[0], out[1], None)
            ids.update(out.flatten().tolist())
        assert ids >= {token for pair in pairs_of(packed) for token in pair}
        assert {token for pair in pairs_of(packed) for token in pair} >= ids - {END}


def test_a_mask_says_which_tokens_are_labels(store: TokenStore) -> None:
    total = store.index.tokens
    marks = np.random.default_rng(2).integers(0, 3, total).astype(np.uint8)
    plain, masked = packed_training(store, 24), packed_training(store, 24, ArrayMask(marks))
    ids = all_ids(store)
    # Ends of text are alike; the token before them tells which one is meant.
    wanted = {(int(a), int(b)) for a, b, m in zip(ids[:-1], ids[1:], marks[1:], strict=True) if m}
    kept = 0
    for window in range(len(plain)):
        (tokens, labels, documents), (t, y, d) = read(plain, window), read(masked, window)
        assert (t, d) == (tokens, documents)
        expected = [b if b != IGNORE and (a, b) in wanted else IGNORE for a, b in zip(tokens, labels, strict=True)]
        assert y == expected
        kept += sum(label != IGNORE for label in y)
    assert 0 < kept < plain.packed.tally.labels


def test_a_mask_of_another_store_is_refused(store: TokenStore) -> None:
    mask = ArrayMask(np.ones(store.index.tokens - 1, dtype=bool))
    with pytest.raises(DataError, match=f"each of its {store.index.tokens} tokens, but has {len(mask)}; make it"):
        packed_training(store, 24, mask)


def test_an_id_beyond_the_vocabulary_is_told(tmp_path: Path) -> None:
    store = write_store(tmp_path, [[[5, VOCABULARY + 1, END]]], [0])
    with pytest.raises(StoreDamagedError, match="ids below"):
        read(packed_training(store, 4), 0)


def test_the_fill_rate_and_what_was_lost_are_logged(store: TokenStore, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        windows = PackedWindows(store, 32, 0.0, validation=False, too_long=TooLong.cut)
    counts = windows.packed.tally
    assert f"120 documents fill {100 * windows.packed.fill_rate:.2f} % of {len(windows)} windows" in caplog.text
    assert f"{counts.cut} cut, 0 split, {counts.tokens_lost} tokens lost" in caplog.text


LENGTHS = np.random.default_rng(9).integers(1, 90, 400)


def packed_in(folder: Path, documents: str = "these", too_long: TooLong = TooLong.split) -> Packed:
    return packed_once(LENGTHS, 32, too_long, folder, documents)


def assert_same(one: Packed, other: Packed) -> None:
    for name in ("documents", "firsts", "positions", "window_starts"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert (one.capacity, one.tally, one.fill_rate) == (other.capacity, other.tally, other.fill_rate)


def was_found(packed: Packed) -> bool:
    """Whether it was read from a file, which is mapped for reading alone."""
    return not packed.documents.flags.writeable


@pytest.mark.parametrize("too_long", TooLong)
def test_a_packing_is_made_once(tmp_path: Path, too_long: TooLong) -> None:
    folder = tmp_path / "not yet" / "there"
    made, found = packed_in(folder, too_long=too_long), packed_in(folder, too_long=too_long)
    assert (was_found(made), was_found(found)) == (False, True)
    assert_same(found, made)
    assert_same(found, pack(LENGTHS, 32, too_long))
    assert [p.suffix for p in folder.iterdir()] == [".packed"]


def test_an_empty_packing_is_kept_too(tmp_path: Path) -> None:
    ones = np.ones(3, dtype=np.int64)
    made, found = (packed_once(ones, 32, TooLong.cut, tmp_path, "of one token") for _ in range(2))
    assert (was_found(made), was_found(found)) == (False, True)
    assert (len(found), found.tally.dropped) == (0, 3)


def test_each_packing_has_its_own_file(tmp_path: Path, store: TokenStore) -> None:
    def found(seq_len: int = 16, fraction: float = 0.3, *, validation: bool = False, rule: str = "split") -> bool:
        windows = PackedWindows(
            store, seq_len, fraction, validation=validation, too_long=TooLong(rule), cache=tmp_path / "c"
        )
        return was_found(windows.packed)

    for time in (0, 1):
        answers = [found(), found(17), found(fraction=0.4), found(validation=True), found(rule="cut")]
        assert answers == [time == 1] * 5
    assert len(list((tmp_path / "c").iterdir())) == 5


def test_windows_read_from_a_file_are_the_same(tmp_path: Path, store: TokenStore) -> None:
    made, found = (
        PackedWindows(store, 16, 0.3, validation=False, too_long=TooLong.split, cache=tmp_path / "c")
        for _ in range(2)
    )
    assert was_found(found.packed)
    assert [read(made, n) for n in range(len(made))] == [read(found, n) for n in range(len(found))]


def damage(path: Path, how: str, offset: int) -> None:
    body = bytearray(path.read_bytes())
    if how == "flip":
        body[offset % len(body)] ^= 1 << offset % 8
    elif how == "cut":
        del body[offset % len(body) :]
    else:
        body += bytes(1 + offset % 64)
    path.write_bytes(body)


@settings(max_examples=40, deadline=None)
@given(how=st.sampled_from(["flip", "cut", "longer"]), offset=st.integers(0, 1 << 20))
def test_a_damaged_file_is_made_again(how: str, offset: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        made = packed_in(Path(name))
        (path,) = Path(name).iterdir()
        whole = path.read_bytes()
        damage(path, how, offset)
        assert_same(packed_in(Path(name)), made)
        assert path.read_bytes() == whole
        assert list(Path(name).iterdir()) == [path]


def test_damage_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    packed_in(tmp_path)
    (path,) = tmp_path.iterdir()
    damage(path, "flip", 100)
    assert not caplog.text
    packed_in(tmp_path)
    assert f"{path} is damaged; the documents are packed again" in caplog.text


def test_the_file_of_another_packing_is_not_believed(tmp_path: Path) -> None:
    """Its bytes are whole, and would even fit."""
    packed_in(tmp_path, "these")
    (these,) = tmp_path.iterdir()
    packed_in(tmp_path, "those")
    (those,) = set(tmp_path.iterdir()) - {these}
    those.write_bytes(these.read_bytes())
    assert not was_found(packed_in(tmp_path, "those"))
    assert was_found(packed_in(tmp_path, "these"))


def test_pieces_outside_of_their_documents_are_not_believed(tmp_path: Path) -> None:
    """A checksum that is right says no more than that nothing was damaged."""
    packed_in(tmp_path)
    other = packed_once(LENGTHS[::-1].copy(), 32, TooLong.split, tmp_path, "these")
    assert not was_found(other)
    assert other.fits(LENGTHS[::-1])
    assert len(list(tmp_path.iterdir())) == 1


def test_what_is_no_file_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A named pipe would keep the reader waiting; a folder cannot be replaced either, so the packing is not kept."""
    made = packed_in(tmp_path)
    (path,) = tmp_path.iterdir()
    path.unlink()
    os.mkfifo(path)
    assert_same(packed_in(tmp_path), made)
    assert path.is_file()
    path.unlink()
    path.mkdir()
    assert_same(packed_in(tmp_path), made)
    assert f"{path} cannot be written" in caplog.text
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_costs_nothing_but_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert_same(packed_in(tmp_path / "file"), pack(LENGTHS, 32, TooLong.split))
    assert "cannot be written" in caplog.text
