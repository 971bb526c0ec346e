"""Tokenizers as they are found: what their last user switched on, ids with gaps, ends of text, damage."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from regrow.trainer.data.source import DataError
from regrow.trainer.data.token_store import token_dtype
from regrow.trainer.data.tokenizer import (
    END_OF_TEXT,
    end_of_text_id,
    load_tokenizer,
    read_tokenizer_files,
    renumbered_tokens,
    stored_options,
    train_bpe,
    vocabulary_size,
)

TEXTS = [" ".join(["alpha beta gamma delta"] * n) for n in range(1, 9)]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A sound `tokenizer.json`."""
    file = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe(TEXTS, 280, file)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def placed(folder: Path, document: dict[str, Any], **changes: Any) -> Path:
    """The document with other fields, as a file; those of the model begin with `model_`."""
    model = {k.removeprefix("model_"): v for k, v in changes.items() if k.startswith("model_")}
    top = {k: v for k, v in changes.items() if not k.startswith("model_")}
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps({**document, **top, "model": {**document["model"], **model}}))
    return folder / "tokenizer.json"


def added(content: str, token: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": content, **flags, "special": True}


PADDING = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": END_OF_TEXT}
STORED: dict[str, dict[str, Any]] = {
    "padding to the longest": {"padding": {"strategy": "BatchLongest", **PADDING}},
    "padding to a length": {"padding": {"strategy": {"Fixed": 512}, **PADDING}},
    "padding to a multiple": {"padding": {"strategy": "BatchLongest", **PADDING, "pad_to_multiple_of": 64}},
    "truncation": {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}},
    "truncation from the left": {
        "truncation": {"direction": "Left", "max_length": 4, "strategy": "LongestFirst", "stride": 2}
    },
    "dropout": {"model_dropout": 0.5},
}


@pytest.mark.parametrize("case", STORED)
def test_what_its_last_user_switched_on_is_not_applied(tmp_path: Path, document: dict[str, Any], case: str) -> None:
    plain = Tokenizer.from_str(json.dumps(document))
    file = placed(tmp_path, document, **STORED[case])
    ids = [e.ids for e in load_tokenizer(file).encode_batch(TEXTS, add_special_tokens=False)]
    assert ids == [plain.encode(t, add_special_tokens=False).ids for t in TEXTS]
    assert stored_options(file.read_bytes()) == [case.split()[0]]
    assert stored_options(json.dumps(document).encode()) == []


@pytest.mark.parametrize(("largest", "dtype"), [(70_000, "<u4"), (65_536, "<u4"), (65_535, "<u2"), (1000, "<u2")])
def test_the_largest_id_counts(tmp_path: Path, document: dict[str, Any], largest: int, dtype: str) -> None:
    tokens = [*document["added_tokens"], added("<|sep|>", largest)]
    vocab = {**document["model"]["vocab"], "<|sep|>": largest}
    tokenizer = load_tokenizer(placed(tmp_path, document, added_tokens=tokens, model_vocab=vocab))
    assert tokenizer.encode("<|sep|>").ids == [largest]
    assert tokenizer.get_vocab_size() < 300
    assert vocabulary_size(tokenizer) == largest + 1
    assert token_dtype(vocabulary_size(tokenizer)).str == dtype


def test_added_tokens_that_get_other_ids_are_named(tmp_path: Path, document: dict[str, Any]) -> None:
    file = placed(tmp_path, document, added_tokens=[*document["added_tokens"], added("<|sep|>", 70_000)])
    tokenizer = load_tokenizer(file)
    given = tokenizer.token_to_id("<|sep|>")
    assert given is not None
    assert renumbered_tokens(tokenizer, file.read_bytes()) == [f"<|sep|> (id 70000) is {given}"]
    assert vocabulary_size(tokenizer) == given + 1


@pytest.mark.parametrize(
    ("config", "option", "wanted"),
    [
        (None, None, END_OF_TEXT),
        ({"eos_token": "a"}, None, "a"),
        ({"eos_token": {"content": "b", "lstrip": False}, "more": [1]}, None, "b"),
        ({"eos_token": None}, None, END_OF_TEXT),
        ({}, None, END_OF_TEXT),
        ({"eos_token": "a"}, "c", "c"),
    ],
)
def test_the_end_of_text_is_the_one_that_is_named(
    tmp_path: Path, document: dict[str, Any], config: dict[str, Any] | None, option: str | None, wanted: str
) -> None:
    file = placed(tmp_path, document)
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(config).encode())
    tokenizer = load_tokenizer(file)
    assert tokenizer.id_to_token(end_of_text_id(tokenizer, file, option)) == wanted


def test_an_end_of_text_that_is_no_token_is_said(
    tmp_path: Path, document: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    file = placed(tmp_path, document)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    with caplog.at_level(logging.WARNING):
        assert end_of_text_id(load_tokenizer(file), file, None) == 0
    assert "'<|im_end|>', which is no token of" in caplog.text
    with pytest.raises(DataError, match=r"none of <\|im_end\|> is one; set data.eos_token"):
        end_of_text_id(load_tokenizer(file), file, "<|im_end|>")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b"null",
        b"\xff\xfe\x00",
        b"[" * 1_000_000,
        b'{"version":"1.0","model":' * 100_000,
        b'{"version": "9.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}',
        b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
        b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 99999999999999999999}, "merges": []}}',
        b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}}',
    ],
    ids=lambda b: str(b[:40]),
)
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, body: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(body)
    with pytest.raises(
        DataError, match=r"data.tokenizer must be a Hugging Face tokenizer.json, but .* is not"
    ) as caught:
        load_tokenizer(tmp_path / "tokenizer.json")
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b'{"eos_token": 5}', b'{"eos_token": {"id": 1}}', b'{"eos_token": ["a"]}', b"[" * 200_000, b"\xff"],
    ids=lambda b: str(b[:30]),
)
def test_a_damaged_tokenizer_config_is_named(tmp_path: Path, document: dict[str, Any], body: bytes) -> None:
    file = placed(tmp_path, document)
    (tmp_path / "tokenizer_config.json").write_bytes(body)
    with pytest.raises(DataError, match=r"sound tokenizer_config.json, but .*tokenizer_config.json cannot be used"):
        read_tokenizer_files(file, None)
    assert read_tokenizer_files(file, "a").ends == ("a",)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_only_regular_files_of_an_expected_size_are_read(tmp_path: Path, document: dict[str, Any], name: str) -> None:
    file = placed(tmp_path, document)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="Not a regular file"):
        read_tokenizer_files(file, None)
    (tmp_path / name).unlink()
    with (tmp_path / name).open("wb") as out:
        out.truncate(1 << 40)  # a hole
    with pytest.raises(DataError, match="File too large"):
        read_tokenizer_files(file, None)
