"""Which template and which special tokens a folder gives, as transformers finds them; and the date."""

import json
import os
import pickle
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from regrow.trainer.data.chat.conversation import Conversation
from regrow.trainer.data.chat.template import ChatTemplate
from regrow.trainer.data.chat.template_files import read_chat_template
from regrow.trainer.data.source import DataError
from tests.unit.trainer.data.chat.conversations import SUNNY, USER, WEATHER
from tests.unit.trainer.data.chat.families import change_config
from tests.unit.trainer.data.conftest import Made

MESSAGES: list[dict[str, Any]] = [USER, SUNNY]
TOOLS: list[dict[str, Any]] = [WEATHER]


@pytest.fixture
def folder(tmp_path: Path, made: dict[str, Made]) -> Path:
    """A tokenizer without a template."""
    shutil.copytree(made["tools"].folder, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").unlink()
    return tmp_path / "tokenizer"


def same_as_transformers(folder: Path, name: str | None = None) -> None:
    """Both render the same, with and without tools."""
    reference = AutoTokenizer.from_pretrained(folder)
    template = read_chat_template(folder, name=name)
    assert template.special_tokens == reference.special_tokens_map
    for tools in (None, [], TOOLS):
        expected = reference.apply_chat_template(MESSAGES, tools=tools, chat_template=name, tokenize=False)
        assert template.render(Conversation(messages=MESSAGES, tools=tools)).text == expected


def place(folder: Path, form: str, texts: dict[str, str]) -> None:
    """Puts templates into a folder in one of the forms."""
    if form == "text":
        change_config(folder, chat_template=texts["default"])
    elif form == "list":
        change_config(folder, chat_template=[{"name": n, "template": t} for n, t in texts.items()])
    elif form == "dict":
        change_config(folder, chat_template=texts)
    elif form == "jinja":
        (folder / "chat_template.jinja").write_text(texts["default"])
    else:
        (folder / "additional_chat_templates").mkdir()
        for name, text in texts.items():
            (folder / "additional_chat_templates" / f"{name}.jinja").write_text(text)


ONE = {"default": "one {{ messages[0].content }}"}
TWO = {"default": "two {{ messages[0].content }}", "tool_use": "tools {{ tools | tojson }}", "rag": "rag"}


@pytest.mark.parametrize(
    "forms",
    [
        [("text", ONE)],
        [("list", ONE)],
        [("list", TWO)],
        [("dict", TWO)],
        [("jinja", ONE)],
        [("more", TWO)],
        [("jinja", ONE), ("text", TWO)],
        [("jinja", ONE), ("list", TWO)],
        [("jinja", ONE), ("more", {"tool_use": "x {{ tools | length }}"})],
        [("jinja", ONE), ("more", TWO)],
        [("list", TWO), ("more", {"default": "only {{ messages | length }}"})],
    ],
)
def test_the_template_is_the_one_of_transformers(folder: Path, forms: list[tuple[str, dict[str, str]]]) -> None:
    for form, texts in forms:
        place(folder, form, texts)
    same_as_transformers(folder)


@pytest.mark.parametrize("form", ["list", "dict", "more"])
@pytest.mark.parametrize("name", ["rag", "tool_use", "default"])
def test_a_template_is_chosen_by_its_name(folder: Path, form: str, name: str) -> None:
    place(folder, form, TWO)
    same_as_transformers(folder, name)
    rag = {"rag": "only {{ messages[0].content }}"}
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    place(folder, form, rag)
    same_as_transformers(folder, "rag")


@pytest.mark.parametrize(
    ("texts", "name", "words"),
    [
        ({}, None, "data.tokenizer must have a chat template, but .* has no chat_template.jinja and none in its"),
        (
            {"rag": "x"},
            None,
            "data.template must be set where no chat template is the default one, .* use one of rag",
        ),
        (
            TWO,
            "tool",
            r"data.template must name a chat template of .* \(default, tool_use, rag\), but is tool; choose",
        ),
        ({"default": "{% for %}"}, None, "must have a sound chat template, but it cannot be compiled"),
        ({"default": "x", "tool_use": "{{ x | nothing }}"}, None, "No filter named 'nothing'"),
        ({"default": "{{ " + "(" * 5000}, None, "it cannot be compiled"),
        ({"default": "{% generation %}x"}, None, "Looking for endgeneration|endgeneration"),
    ],
)
def test_a_folder_without_the_template_is_refused(
    folder: Path, texts: dict[str, str], name: str | None, words: str
) -> None:
    place(folder, "list", texts)
    with pytest.raises(DataError, match=words) as e:
        read_chat_template(folder, name=name)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "value",
    [1, ["x"], [{"name": "default"}], [{"name": 1, "template": "x"}], {"default": None}, "x" * ((1 << 20) + 1)],
)
def test_templates_of_another_form_are_refused(folder: Path, value: object) -> None:
    change_config(folder, chat_template=value)
    with pytest.raises(DataError, match="^chat_template must be a text, or a list of names and texts, but in"):
        read_chat_template(folder)


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff", b'"x"', b"[" * 100_000])
def test_a_damaged_config_is_refused(folder: Path, body: bytes) -> None:
    (folder / "tokenizer_config.json").write_bytes(body)
    with pytest.raises(
        DataError, match=r"must have a sound tokenizer_config.json, but .* cannot be used: .+; mend it"
    ):
        read_chat_template(folder)


def test_templates_that_cannot_be_read_are_refused(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"a chat template must be UTF-8, but .*jinja is not \(byte 4: .*\); convert"):
        read_chat_template(folder)
    file.write_bytes(b"x" * ((1 << 20) + 1))
    with pytest.raises(DataError, match=r"must be files that can be read, but .*jinja cannot \(File too large"):
        read_chat_template(folder)
    file.unlink()
    file.mkdir()
    with pytest.raises(DataError, match=r"must be files that can be read, but .*jinja cannot \(Is a directory\)"):
        read_chat_template(folder)
    file.rmdir()
    os.mkfifo(file)
    with pytest.raises(DataError, match=r"must be files that can be read, but .*jinja cannot \(Not a regular file"):
        read_chat_template(folder)
    file.unlink()
    more = folder / "additional_chat_templates"
    more.mkdir()
    for i in range(65):
        (more / f"{i}.jinja").write_text("x")
    with pytest.raises(DataError, match="must have at most 64 chat templates, but .* has 65"):
        read_chat_template(folder)


def test_line_ends_of_files_are_made_one(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"a\r\n{% if true %}\r\nb\rc\r\n{% endif %}\r\n\n")
    same_as_transformers(folder)


ADDED = {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False, "rstrip": False}
SHOW = "{% for t in [bos_token, eos_token, pad_token, unk_token, call_token] %}[{{ t }}]{% endfor %}"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bos_token": None, "eos_token": "</s>"},
        {"bos_token": ADDED, "pad_token": {**ADDED, "content": "<pad>"}},
        {"add_bos_token": True, "add_eos_token": False},
        {"call_token": "<|other|>"},
        {"call_token": {**ADDED, "content": "<|other|>"}, "added_tokens_decoder": {}},
        {"extra_special_tokens": {"image_token": "<image>"}, "model_specific_special_tokens": {}},
    ],
)
def test_special_tokens_are_those_of_transformers(folder: Path, changes: dict[str, Any]) -> None:
    change_config(folder, chat_template=SHOW, **changes)
    same_as_transformers(folder)


@pytest.mark.parametrize("decoder", [False, True])
def test_older_folders_name_them_in_a_file_of_their_own(folder: Path, decoder: bool) -> None:
    """It comes first, where the config does not list the added tokens."""
    changes = {"added_tokens_decoder": {"260": {"content": "<s>", "special": True}}} if decoder else {}
    change_config(folder, chat_template=SHOW, eos_token="<old>", **changes)
    named = {"bos_token": {k: v for k, v in ADDED.items() if k != "__type"}, "eos_token": "</s>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    same_as_transformers(folder)


def test_special_tokens_must_be_texts(folder: Path) -> None:
    change_config(folder, chat_template="x", eos_token=7)
    with pytest.raises(DataError, match=r"^eos_token of data.tokenizer must be a text, but in .* is 7; mend it"):
        read_chat_template(folder)


def test_the_date_is_the_one_that_is_set() -> None:
    texts = {"default": "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y, %H:%M') }}{% endif %}"}
    conversation = Conversation(messages=MESSAGES)
    template = ChatTemplate(texts=texts, date=datetime(2025, 1, 31))
    assert template.render(conversation).text == "31 Jan 2025, 00:00"
    with pytest.raises(DataError, match="^data.template_date must be set for a chat template that asks for the date"):
        ChatTemplate(texts=texts).render(conversation)
    asks_sometimes = {"default": "{% if not date %}{{ strftime_now('%Y') }}{% endif %}ok"}
    given = Conversation(messages=MESSAGES, variables={"date": "today"})
    assert ChatTemplate(texts=asks_sometimes).render(given).text == "ok"


def test_the_identity_is_of_everything_that_decides_the_text() -> None:
    base: dict[str, Any] = {"texts": ONE, "name": None, "special_tokens": {"eos_token": "</s>"}, "date": None}
    changes: list[dict[str, Any]] = [
        {},
        {"texts": TWO},
        {"name": "default"},
        {"special_tokens": {"eos_token": "<eos>"}},
        {"special_tokens": {"bos_token": "</s>"}},
        {"date": datetime(2025, 1, 31)},
        {"date": datetime(2025, 2, 1)},
    ]
    assert len({ChatTemplate(**{**base, **change}).identity() for change in changes}) == len(changes)
    assert ChatTemplate(**base).identity() == ChatTemplate(**base).identity()


def test_a_template_goes_to_another_process() -> None:
    template = ChatTemplate(texts=TWO, special_tokens={"eos_token": "</s>"}, date=datetime(2025, 1, 31))
    template.check()
    again: ChatTemplate = pickle.loads(pickle.dumps(template))
    assert again == template
    assert again.render(Conversation(messages=MESSAGES)).text == "two What is the weather in Paris?"
