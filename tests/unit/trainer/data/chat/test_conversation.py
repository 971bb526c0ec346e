"""Records of every form as one conversation; or a sentence that says what is wrong with them."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow.trainer.data.chat.conversation import Conversation, conversation_of
from regrow.trainer.data.source import DataError
from tests.unit.trainer.data.chat.conversations import CALL, RESULT, SUNNY, SYSTEM, USER, WEATHER

ASKED: list[dict[str, Any]] = [USER, SUNNY]
SHAREGPT = [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": SUNNY["content"]}]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": ASKED},
        {"messages": tuple(ASKED)},
        {"messages": [{**USER, "name": None}, {**SUNNY, "tool_calls": None, "reasoning_content": None}]},
        {"messages": ASKED, "prompt": USER["content"], "conversations": [], "tools": None, "system": ""},
        {"messages": ASKED, "chat_template_kwargs": None},
        {"conversations": SHAREGPT},
        {"conversations": ASKED},
        {"conversations": SHAREGPT, "messages": None},
    ],
)
def test_forms_of_the_same_conversation(record: dict[str, Any]) -> None:
    assert conversation_of(record) == Conversation(messages=ASKED)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": USER["content"], "completion": SUNNY["content"]},
        {"prompt": [USER], "completion": [SUNNY]},
        {"prompt": [USER], "completion": SUNNY["content"]},
        {"prompt": USER["content"], "completion": [SUNNY]},
    ],
)
def test_a_prompt_is_context_only(record: dict[str, Any]) -> None:
    assert conversation_of(record) == Conversation(messages=ASKED, uncounted=frozenset([0]))
    told = conversation_of({**record, "system": SYSTEM["content"]})
    assert told == Conversation(messages=[SYSTEM, *ASKED], uncounted=frozenset([0, 1]))


def test_all_of_a_prompt_is_context() -> None:
    record = {"prompt": [SYSTEM, *ASKED, USER], "completion": [SUNNY, USER, SUNNY]}
    assert conversation_of(record).uncounted == frozenset(range(4))


def test_speakers_of_sharegpt() -> None:
    call: dict[str, Any] = {"name": "get_weather", "arguments": {"city": "Paris"}}
    record = {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "u", "weight": 0},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "o"},
            {"from": "function_call", "value": json.dumps([call, call])},
            {"from": "tool", "value": "t"},
            {"from": "gpt", "value": "a", "weight": 1.0},
        ]
    }
    function: dict[str, Any] = {"type": "function", "function": call}
    assert conversation_of(record) == Conversation(
        messages=[
            {"role": "system", "content": "s"},
            {"role": "user", "content": "u", "weight": 0},
            {"role": "assistant", "content": "", "tool_calls": [function]},
            {"role": "tool", "content": "o"},
            {"role": "assistant", "content": "", "tool_calls": [function, function]},
            {"role": "tool", "content": "t"},
            {"role": "assistant", "content": "a", "weight": 1.0},
        ],
        uncounted=frozenset([1]),
    )


def test_system_text_stands_first() -> None:
    assert conversation_of({"conversations": SHAREGPT, "system": "You are terse."}).messages == [SYSTEM, *ASKED]
    record = {"messages": [USER, {**SUNNY, "weight": 0}], "system": "You are terse."}
    assert conversation_of(record).uncounted == frozenset([2])


@pytest.mark.parametrize("tools", [[WEATHER], (WEATHER,), json.dumps([WEATHER])])
def test_tools_as_a_list_or_its_text(tools: object) -> None:
    assert conversation_of({"messages": ASKED, "tools": tools}).tools == [WEATHER]


def test_no_tools_and_none_are_not_the_same() -> None:
    """transformers chooses another template for an empty list."""
    assert conversation_of({"messages": ASKED, "tools": []}).tools == []
    assert conversation_of({"messages": ASKED, "tools": "[]"}).tools == []
    assert conversation_of({"messages": ASKED, "tools": "null"}).tools is None


def test_what_templates_look_at_is_kept() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "Ann"},
        {key: value for key, value in CALL.items() if key != "content"},
        RESULT,
        {"role": "assistant", "reasoning_content": "Hm"},
    ]
    record = {"messages": messages, "chat_template_kwargs": {"enable_thinking": False, "date": None, "n": [1, {}]}}
    assert conversation_of(record) == Conversation(
        messages=messages, variables={"enable_thinking": False, "n": [1, {}]}
    )


def test_values_are_of_plain_types_and_copies() -> None:
    """A template could call the methods of others, some of which write files."""

    class Text(str):
        pass

    record = {"messages": [{"role": Text("user"), "content": Text("x"), "n": np.float64(2.5), "b": True, "i": 7}]}
    found = conversation_of(record).messages[0]
    assert [type(v) for v in found.values()] == [str, str, float, bool, int]
    assert found == {"role": "user", "content": "x", "n": 2.5, "b": True, "i": 7}
    assert found is not record["messages"][0]


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


USERS = [USER]
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "but the record has nothing; rename"),
    "other fields": ({"text": "x", "id": 1}, "but the record has text, id; rename its fields or remove it"),
    "null": ({"messages": None}, "must have messages, conversations, or prompt and completion"),
    "a prompt alone": ({"prompt": "x"}, "but the record has prompt;"),
    "a null completion": ({"prompt": "x", "completion": None}, "but the record has prompt;"),
    "text": ({"messages": "x"}, "messages must be a list of messages, but is text;"),
    "an object": ({"messages": {"role": "user"}}, "messages must be a list of messages, but is an object;"),
    "empty": ({"messages": []}, "messages must hold at least one message, but is empty;"),
    "an empty prompt": ({"prompt": [], "completion": "x"}, "prompt must hold at least one message, but is empty;"),
    "a number": ({"conversations": 3}, "conversations must be a list of messages, but is a number;"),
    "no message": ({"messages": [USER, "x"]}, "messages[1] must be an object with role and content, but is text;"),
    "a null message": ({"messages": [None]}, "messages[0] must be an object with role and content, but is null or"),
    "no role": ({"messages": [{"content": "x"}]}, "messages[0].role must be a name such as user, but is null or mis"),
    "a null role": ({"messages": [{"role": None, "content": "x"}]}, "messages[0].role must be a name such as user"),
    "an empty role": ({"messages": [{"role": "", "content": "x"}]}, "user, but is empty;"),
    "a number as role": ({"messages": [{"role": 1, "content": "x"}]}, "user, but is a number;"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content must be text, but is null or missing;"),
    "null content": (
        {"messages": [USER, {**SUNNY, "content": None}]},
        "messages[1].content must be text, but is null",
    ),
    "a number as content": (
        {"messages": [{"role": "user", "content": 1.5}]},
        "content must be text, but is a number;",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}]},
        "messages[0].content[1] must be text, but is image_url;",
    ),
    "a part without text": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "content[0] must be text",
    ),
    "a text as part": ({"messages": [{"role": "user", "content": ["x"]}]}, "content[0] must be text, but is text"),
    "an unknown speaker": ({"conversations": [{"from": "alien", "value": "x"}]}, "[0].from must be one of human, us"),
    "a null speaker": ({"conversations": [{"from": None, "value": "x"}]}, "conversations[0].role must be a name"),
    "no value": (
        {"conversations": [{"from": "gpt"}]},
        "conversations[0].value must be text, but is null or missing;",
    ),
    "a list as value": ({"conversations": [{"from": "gpt", "value": []}]}, "[0].value must be text, but is a list;"),
    "a call that is no JSON": ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, "value must be JSON"),
    "a call without name": (
        {"conversations": [{"from": "function_call", "value": "{}"}]},
        "call with name and argum",
    ),
    "two system texts": (
        {"messages": [SYSTEM, USER], "system": "x"},
        "system must be given once, but the first mess",
    ),
    "a number as system": ({"messages": USERS, "system": 1}, "system must be text, but is a number;"),
    "tools that are no JSON": ({"messages": USERS, "tools": "[{"}, "tools must be JSON, but is not (Expecting"),
    "tools that are deep JSON": (
        {"messages": USERS, "tools": "[" * 99_999},
        "tools must be JSON, but is not (maximum",
    ),
    "an object as tools": ({"messages": USERS, "tools": {}}, "tools must be a list of schemas, but is an object;"),
    "a text as tool": ({"messages": USERS, "tools": ["f"]}, "tools[0] must be a JSON schema, but is text;"),
    "a list as variables": ({"messages": USERS, "chat_template_kwargs": [1]}, "must be an object, but is a list;"),
    "messages as variable": (
        {"messages": USERS, "chat_template_kwargs": {"messages": []}},
        "chat_template_kwargs must leave add_generation_prompt, documents, messages, tools to the conversation",
    ),
    "a weight": ({"messages": [{**SUNNY, "weight": 0.5}]}, "the weight of message 0 must be 0 or 1, but is 0.5;"),
    "a text as weight": (
        {"messages": [{**SUNNY, "weight": "0"}]},
        "the weight of message 0 must be 0 or 1, but is 0;",
    ),
    "half a pair": (
        {"messages": [{"role": "user", "content": "ab\ud800"}]},
        "messages[0].content must be Unicode tex",
    ),
    "half a pair as name": ({"messages": [{**USER, "\ud800": 1}]}, "a field's name in messages[0] must be Unicode"),
    "half a pair in a prompt": ({"prompt": "\udc00", "completion": "x"}, "prompt must be Unicode text, but has half"),
    "half a pair in a schema": (
        {"messages": USERS, "tools": '[{"a": "\\ud800"}]'},
        "tools[0].a must be Unicode text",
    ),
    "bytes": (
        {"messages": [{"role": "user", "content": b"x"}]},
        "messages[0].content must be text, a number, a list",
    ),
    "an array": (
        {"messages": [{**USER, "x": np.zeros(2)}]},
        "messages[0].x must be text, a number, a list or an obj",
    ),
    "a number as name": (
        {"messages": [{**USER, 1: 2}]},
        "the fields of messages[0] must have names, but one is a nu",
    ),
    "deep": ({"messages": [{**USER, "x": nested(99)}]}, "must be nested at most 64 deep, but is deeper;"),
    "very deep": ({"messages": [{**USER, "x": nested(100_000)}]}, "must be nested at most 64 deep, but is deeper;"),
}


@pytest.mark.parametrize("case", BAD)
def test_other_records_are_refused_in_a_sentence(case: str) -> None:
    record, words = BAD[case]
    with pytest.raises(DataError) as e:
        conversation_of(record)
    assert words in str(e.value)
    assert str(e.value).isprintable()
    assert len(str(e.value)) < 600


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "type", "text", "weight", "tool_calls", "x"]),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=12,
)
FIELDS = ["messages", "conversations", "prompt", "completion", "system", "tools", "chat_template_kwargs"]


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_any_record_is_a_conversation_or_refused(record: dict[str, Any]) -> None:
    try:
        found = conversation_of(record)
    except DataError as error:
        assert str(error).isprintable()
        return
    assert found.messages
    assert all(isinstance(m["role"], str) for m in found.messages)
    json.dumps([found.messages, found.tools, found.variables])
