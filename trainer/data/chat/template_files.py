"""The files of a tokenizer's folder that have chat templates and special tokens, taken in transformers' order."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from regrow.checkpoint.documents import DocumentError, convert_document, is_file_name, parse_json
from regrow.checkpoint.files import read_regular
from regrow.trainer.data.chat.template import ChatTemplate
from regrow.trainer.data.source import DataError, shown

__all__ = ["read_chat_template"]

_TOKENIZER_CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS_MAP = "special_tokens_map.json"
_TEMPLATE = "chat_template.jinja"
_MORE_TEMPLATES = "additional_chat_templates"
_CONFIG_BYTES = 16 << 20
# The longest published ones have 40 kB.
_TEMPLATE_BYTES = 1 << 20
_MOST_TEMPLATES = 64
_STANDARD_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_Text = Annotated[str, Meta(max_length=_TEMPLATE_BYTES)]
_Name = Annotated[str, Meta(min_length=1, max_length=255)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _NamedTemplate:
    name: _Name
    template: _Text


@dataclass(frozen=True, kw_only=True, slots=True)
class _ConfigTemplates:
    """What is looked at in `tokenizer_config.json` for templates."""

    chat_template: (
        _Text
        | Annotated[list[_NamedTemplate], Meta(max_length=_MOST_TEMPLATES)]
        | Annotated[dict[_Name, _Text], Meta(max_length=_MOST_TEMPLATES)]
        | None
    ) = None


def read_chat_template(folder: Path, *, name: str | None = None, date: datetime | None = None) -> ChatTemplate:
    """The chat templates and special tokens of a tokenizer.

    `chat_template.jinja` and `additional_chat_templates/*.jinja` are taken, where there are any, instead of those in
    `tokenizer_config.json`. Special tokens are those of `tokenizer_config.json`; where that has no
    `added_tokens_decoder`, as older ones do not, `special_tokens_map.json` comes before it.

    Args:
        folder: of the tokenizer.
        name: of the template; None chooses as transformers does, see `ChatTemplate`.
        date: what templates get that ask for the date.

    Raises:
        DataError: there is no template, none of that name, or a file cannot be used.
    """
    config = _read_json(folder / _TOKENIZER_CONFIG)
    texts = _template_files(folder) or _templates_in(config, folder / _TOKENIZER_CONFIG)
    if not texts:
        raise DataError(
            f"data.tokenizer must have a chat template, but {folder} has no {_TEMPLATE} and none in its "
            f"{_TOKENIZER_CONFIG}; put one there"
        )
    if name is None and "default" not in texts:
        raise DataError(
            f"data.template must be set where no chat template is the default one, but is null; use one of "
            f"{', '.join(map(shown, texts))}"
        )
    template = ChatTemplate(texts=texts, name=name, special_tokens=_special_tokens(folder, config), date=date)
    template.check()
    return template


def _template_files(folder: Path) -> dict[str, str]:
    texts: dict[str, str] = {}
    single = folder / _TEMPLATE
    if single.exists():
        texts["default"] = _read_text(single)
    more = sorted((folder / _MORE_TEMPLATES).glob("*.jinja"))
    if len(more) > _MOST_TEMPLATES:
        raise DataError(
            f"data.tokenizer must have at most {_MOST_TEMPLATES} chat templates, but {folder} has {len(more)}; "
            "remove what is not needed"
        )
    for file in more:
        if is_file_name(file.name):
            texts[file.name.removesuffix(".jinja")] = _read_text(file)
    return texts


def _templates_in(config: Mapping[str, Any], file: Path) -> dict[str, str]:
    found = config.get("chat_template")
    try:
        templates = convert_document({"chat_template": found}, _ConfigTemplates).chat_template
    except DocumentError as error:
        raise DataError(
            f"chat_template must be a text, or a list of names and texts, but in {file} is not: {shown(str(error))}; "
            "mend it"
        ) from None
    if isinstance(templates, str):
        return {"default": templates}
    if isinstance(templates, list):
        return {named.name: named.template for named in templates}
    return templates or {}


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that have names, of a model's own too; nulls are left out."""
    given = dict(config)
    if "added_tokens_decoder" not in config:
        given.update(_read_json(folder / _SPECIAL_TOKENS_MAP))
    named = {name: given[name] for name in given if name.endswith("_token") and name not in _STANDARD_TOKENS}
    # Switches such as `add_bos_token` end like names of tokens.
    named = {name: value for name, value in named.items() if not isinstance(value, bool)}
    for own in ("model_specific_special_tokens", "extra_special_tokens"):
        if isinstance(given.get(own), dict):
            named.update(given[own])
    named.update({name: given[name] for name in _STANDARD_TOKENS if name in given})
    tokens: dict[str, str] = {}
    for name, value in named.items():
        token = value.get("content") if isinstance(value, dict) else value
        if token is None and value is None:
            continue
        if not isinstance(token, str):
            if name in _STANDARD_TOKENS:
                raise DataError(
                    f"{name} of data.tokenizer must be a text, but in {folder} is {shown(repr(value))}; mend it"
                )
            continue
        tokens[name] = token
    return tokens


def _read_json(file: Path) -> dict[str, Any]:
    """A file's object; empty where there is no such file."""
    if not file.exists():
        return {}
    try:
        return convert_document(parse_json(_read(file, _CONFIG_BYTES).removeprefix(b"\xef\xbb\xbf")), dict[str, Any])
    except DocumentError as error:
        raise DataError(
            f"data.tokenizer must have a sound {file.name}, but {file} cannot be used: {shown(str(error))}; mend it"
        ) from None


def _read_text(file: Path) -> str:
    try:
        # Python's own reading of text, by which transformers reads it, makes one line end of each kind.
        return _read(file, _TEMPLATE_BYTES).decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"a chat template must be UTF-8, but {file} is not (byte {error.start + 1}: {error.reason}); convert it"
        ) from None


def _read(file: Path, limit: int) -> bytes:
    try:
        return read_regular(file, limit)
    except OSError as error:
        raise DataError(
            f"data.tokenizer must be files that can be read, but {file} cannot ({error.strerror or error}); check it"
        ) from error
