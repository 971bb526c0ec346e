"""Conversations as records hold them: OpenAI's `messages`, ShareGPT's `conversations`, prompt and completion."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from regrow.trainer.data.source import DataError, shown

__all__ = ["RECORD_FIELDS", "Conversation", "Json", "Message", "conversation_of"]

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None
Message: TypeAlias = dict[str, Json]

# What `conversation_of` looks at.
RECORD_FIELDS = (
    "messages",
    "conversations",
    "prompt",
    "completion",
    "system",
    "tools",
    "chat_template_kwargs",
)
# Of lists and objects in one another.
_DEPTH = 64
_TEMPLATE_OWN = frozenset(("add_generation_prompt", "documents", "messages", "tools"))
# Where an assistant's turn has something to say without content.
_INSTEAD_OF_CONTENT = ("tool_calls", "reasoning_content", "thinking", "reasoning", "function_call")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """A conversation as a template gets it.

    Attributes:
        messages: with `role`, `content` and whatever else templates look at (`tool_calls`, `reasoning_content`,
            `name`).
        tools: JSON schemas of the functions; None where the record names none.
        variables: further variables of the template, such as `enable_thinking`.
        uncounted: indices of messages that are context only: of a prompt, or with a weight of 0.
    """

    messages: list[Message]
    tools: list[dict[str, Json]] | None = None
    variables: dict[str, Json] = field(default_factory=dict)
    uncounted: frozenset[int] = frozenset()


def conversation_of(record: Mapping[str, object]) -> Conversation:
    """The conversation in a record.

    A null counts as a field that is not there. Of several forms `messages` is taken before `conversations`, and that
    before `prompt` and `completion`, as published data sets repeat the first question as `prompt`. With these, the
    turns of the prompt are context only.

    Args:
        record: with `messages`, `conversations`, or `prompt` and `completion`; perhaps `system` (text), `tools` (a
            list or its JSON text) and `chat_template_kwargs`.

    Raises:
        DataError: what is missing, or of another form, without the record's place.
    """
    given = {name: value for name, value in record.items() if value is not None}
    prompt: list[Message] = []
    if "messages" in given:
        messages = _messages(given["messages"], "messages")
    elif "conversations" in given:
        messages = _messages(given["conversations"], "conversations")
    elif "prompt" in given and "completion" in given:
        prompt = _part(given["prompt"], "prompt", "user")
        messages = prompt + _part(given["completion"], "completion", "assistant")
    else:
        names = ", ".join(map(shown, list(given)[:20])) or "nothing"
        raise DataError(
            f"a conversation must have messages, conversations, or prompt and completion, but the record has {names}"
            "; rename its fields or remove it"
        )
    system = _system(given.get("system"), messages)
    messages = system + messages
    context = set(range(len(system) + len(prompt))) if prompt else set()
    context |= {i for i, message in enumerate(messages) if not _weight(message, i)}
    return Conversation(
        messages=messages,
        tools=_tools(given.get("tools")),
        variables=_variables(given.get("chat_template_kwargs")),
        uncounted=frozenset(context),
    )


def _part(value: object, place: str, role: str) -> list[Message]:
    """A prompt or completion: text of one turn, or messages."""
    if isinstance(value, str):
        return [{"role": role, "content": _text(value, place)}]
    return _messages(value, place)


def _messages(value: object, place: str) -> list[Message]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise DataError(f"{place} must be a list of messages, but is {_kind(value)}; mend or remove the record")
    if not value:
        raise DataError(f"{place} must hold at least one message, but is empty; remove the record")
    return [_message(item, f"{place}[{i}]") for i, item in enumerate(value)]


def _message(value: object, place: str) -> Message:
    """One message, of either form, without its nulls."""
    found = _plain(value, place, 0)
    if not isinstance(found, dict):
        raise DataError(f"{place} must be an object with role and content, but is {_kind(value)}; mend it")
    message: Message = {name: found[name] for name in found if found[name] is not None}
    if "role" not in message and "from" in message:
        message = _from_sharegpt(message, place)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise DataError(f"{place}.role must be a name such as user, but is {_kind(role)}; mend or remove the record")
    _check_content(message, place)
    return message


def _from_sharegpt(message: Message, place: str) -> Message:
    speaker = message.pop("from")
    role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise DataError(
            f"{place}.from must be one of {', '.join(_SHAREGPT_ROLES)}, but is {shown(str(speaker))}; rename it"
        )
    value = message.pop("value", None)
    if not isinstance(value, str):
        raise DataError(f"{place}.value must be text, but is {_kind(value)}; mend or remove the record")
    if speaker == "function_call":
        return {"role": role, "content": "", "tool_calls": _tool_calls(value, f"{place}.value"), **message}
    return {"role": role, "content": value, **message}


def _tool_calls(text: str, place: str) -> Json:
    """The calls in ShareGPT's JSON text, as OpenAI's form has them."""
    found = _parsed(text, place)
    calls = found if isinstance(found, list) else [found]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise DataError(f"{place} must be a call with name and arguments, but is {shown(text)}; mend it")
    return [{"type": "function", "function": call} for call in calls]


def _check_content(message: Message, place: str) -> None:
    """Text, or parts that are text; nothing where there are calls or reasoning instead."""
    content = message.get("content")
    if isinstance(content, list):
        for i, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) and part.get("type") != "text" else _kind(part)
                raise DataError(f"{place}.content[{i}] must be text, but is {shown(str(kind))}; remove the record")
    elif content is None:
        if not any(name in message for name in _INSTEAD_OF_CONTENT):
            raise DataError(f"{place}.content must be text, but is null or missing; mend or remove the record")
    elif not isinstance(content, str):
        raise DataError(f"{place}.content must be text, but is {_kind(content)}; mend or remove the record")


def _weight(message: Message, index: int) -> bool:
    """Whether a turn may count, as OpenAI's `weight` says."""
    weight = message.get("weight", 1)
    if not isinstance(weight, int | float) or weight not in (0, 1):
        raise DataError(f"the weight of message {index} must be 0 or 1, but is {shown(str(weight))}; mend it")
    return bool(weight)


def _system(value: object, messages: list[Message]) -> list[Message]:
    """The turn of a record's `system`; an empty text is none."""
    if value is None or value == "":
        return []
    if not isinstance(value, str):
        raise DataError(f"system must be text, but is {_kind(value)}; mend or remove the record")
    if messages[0]["role"] == "system":
        raise DataError("system must be given once, but the first message is one too; remove one of them")
    return [{"role": "system", "content": _text(value, "system")}]


def _tools(value: object) -> list[dict[str, Json]] | None:
    if value is None:
        return None
    found = _parsed(value, "tools") if isinstance(value, str) else _plain(value, "tools", 0)
    if found is None:
        return None
    if not isinstance(found, list):
        raise DataError(f"tools must be a list of schemas, but is {_kind(found)}; mend or remove the record")
    tools: list[dict[str, Json]] = []
    for i, tool in enumerate(found):
        if not isinstance(tool, dict):
            raise DataError(f"tools[{i}] must be a JSON schema, but is {_kind(tool)}; mend or remove the record")
        tools.append(tool)
    return tools


def _variables(value: object) -> dict[str, Json]:
    if value is None:
        return {}
    found = _plain(value, "chat_template_kwargs", 0)
    if not isinstance(found, dict):
        raise DataError(f"chat_template_kwargs must be an object, but is {_kind(found)}; mend or remove the record")
    for name in found:
        if name in _TEMPLATE_OWN:
            raise DataError(
                f"chat_template_kwargs must leave {', '.join(sorted(_TEMPLATE_OWN))} to the conversation, but has "
                f"{name}; remove it"
            )
    return {name: found[name] for name in found if found[name] is not None}


def _parsed(text: str, place: str) -> Json:
    try:
        return _plain(json.loads(text), place, 0)
    except (RecursionError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{place} must be JSON, but is not ({shown(str(error))}); mend or remove the record"
        ) from None


def _plain(value: object, place: str, depth: int) -> Json:
    """A copy made of JSON's types alone, so that a template meets nothing else."""
    if depth > _DEPTH:
        raise DataError(f"{shown(place)} must be nested at most {_DEPTH} deep, but is deeper; remove the record")
    if isinstance(value, str):
        return _text(value, place)
    if value is None or isinstance(value, bool):
        return value
    # Subclasses (numpy's float64) have methods that a template must not reach.
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_key(k, place): _plain(v, f"{place}.{shown(str(k))}", depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{place}[{i}]", depth + 1) for i, item in enumerate(value)]
    raise DataError(
        f"{shown(place)} must be text, a number, a list or an object, but is {_kind(value)}; mend the record"
    )


def _key(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"the fields of {shown(place)} must have names, but one is {_kind(value)}; mend the record")
    return _text(value, f"a field's name in {place}")


def _text(value: str, place: str) -> str:
    """A text that can be tokenised."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{shown(place)} must be Unicode text, but has half a surrogate pair at character {error.start}; mend "
            "the record"
        ) from None
    return str.__str__(value)


def _kind(value: object) -> str:
    """What a value is, in words."""
    if value is None:
        return "null or missing"
    names = {
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    if isinstance(value, str) and not value:
        return "empty"
    return names.get(type(value), type(value).__name__)
