"""Token ids as transformers gives them, and labels on what the model would have written."""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regrow.trainer.data.chat.conversation import Conversation, conversation_of
from regrow.trainer.data.chat.labels import REWRITTEN_TURN, encode_conversation
from regrow.trainer.data.chat.template import ChatTemplate
from regrow.trainer.data.config import LabelMode
from regrow.trainer.data.source import DataError
from tests.unit.trainer.data.chat.conversations import (
    CALL,
    PLAIN,
    REASONING,
    RESULT,
    SUNNY,
    SYSTEM,
    USER,
    WEATHER,
    WITH_SYSTEM,
    WITH_TOOLS,
)
from tests.unit.trainer.data.chat.families import FAMILIES
from tests.unit.trainer.data.conftest import Made

# What each family's template takes besides plain conversations.
GROUPS: dict[str, list[dict[str, list[dict[str, Any]]]]] = {
    "llama3": [PLAIN, WITH_SYSTEM, WITH_TOOLS, REASONING],
    "qwen3": [PLAIN, WITH_SYSTEM, WITH_TOOLS, REASONING],
    "chatml": [PLAIN, WITH_SYSTEM, WITH_TOOLS, REASONING],
    "mistral": [PLAIN, WITH_SYSTEM, WITH_TOOLS],
    "gemma": [PLAIN],
    "zephyr": [PLAIN, WITH_SYSTEM, WITH_TOOLS, REASONING],
    "tools": [PLAIN, WITH_SYSTEM, WITH_TOOLS],
    "marks": [PLAIN, WITH_SYSTEM, WITH_TOOLS, REASONING],
}
# So that transformers' clock is not asked.
DATE = {"date_string": "26 Jul 2024"}
THANKS: dict[str, Any] = {"role": "user", "content": "Thanks"}
JSON_CALL = '{"name": "get_weather", "arguments": {"city": "Zürich", "days": [1, 2.5]}'


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """transformers warns where a mask is asked of a template without marks."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


def conversations(family: str) -> Iterator[tuple[str, list[dict[str, Any]], list[dict[str, Any]] | None]]:
    for group in GROUPS[family]:
        for name, messages in group.items():
            yield name, messages, [WEATHER] if group is WITH_TOOLS else None


def labelled(made: Made, conversation: Conversation, mode: LabelMode = LabelMode.assistant) -> list[str]:
    """The texts of the runs of labels."""
    ids, counts = encode_conversation(conversation, made.template, made.tokenizer, mode)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], counts, [False]]).astype(np.int8)))
    return [
        made.tokenizer.decode(ids[start:stop].tolist(), skip_special_tokens=False)
        for start, stop in edges.reshape(-1, 2)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_transformers(made: dict[str, Made], family: str) -> None:
    own = made[family]
    count = 0
    for name, messages, tools in conversations(family):
        expected = own.reference.apply_chat_template(messages, tools=tools, **DATE)["input_ids"]
        conversation = conversation_of({"messages": messages, "tools": tools, "chat_template_kwargs": DATE})
        ids, counts = encode_conversation(conversation, own.template, own.tokenizer, LabelMode.all)
        assert ids.tolist() == expected, name
        assert ids.dtype == np.int64
        assert counts.dtype == np.bool_
        assert counts.all()
        count += 1
    assert count >= 7


@pytest.mark.parametrize("family", FAMILIES)
def test_the_generation_prompt_is_that_of_transformers(made: dict[str, Made], family: str) -> None:
    own = made[family]
    for name, messages, tools in conversations(family):
        expected = own.reference.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=True, **DATE
        )
        conversation = Conversation(messages=messages, tools=tools, variables={**DATE})
        assert own.template.render(conversation, add_generation_prompt=True).text == expected, name


@pytest.mark.parametrize("thinking", [True, False])
def test_variables_of_the_template_are_given_on(made: dict[str, Made], thinking: bool) -> None:
    own = made["qwen3"]
    for name, messages, _ in conversations("qwen3"):
        expected = own.reference.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        record = {"messages": messages, "chat_template_kwargs": {"enable_thinking": thinking}}
        assert own.template.render(conversation_of(record), add_generation_prompt=True).text == expected, name


def test_labels_of_marks_are_those_of_transformers(made: dict[str, Made]) -> None:
    own = made["marks"]
    for name, messages, tools in conversations("marks"):
        expected = own.reference.apply_chat_template(messages, tools=tools, return_assistant_tokens_mask=True)
        ids, counts = encode_conversation(
            conversation_of({"messages": messages, "tools": tools}), own.template, own.tokenizer, LabelMode.assistant
        )
        assert ids.tolist() == expected["input_ids"], name
        assert counts.astype(int).tolist() == expected["assistant_masks"], name


@pytest.mark.parametrize(
    ("family", "before", "trimmed", "after"),
    [
        ("llama3", "", True, "<|eot_id|>"),
        ("chatml", "", False, "<|im_end|>"),
        ("mistral", " ", True, "</s>"),
        ("gemma", "", True, "<end_of_turn>"),
        ("zephyr", "", False, "</s>"),
        ("tools", "", False, "<|end|>"),
        ("marks", "", False, "<|im_end|>"),
    ],
)
def test_labels_are_the_answers_and_the_ends_of_turns(
    made: dict[str, Made], family: str, before: str, trimmed: bool, after: str
) -> None:
    for name, messages in PLAIN.items():
        answers = [m["content"].strip() if trimmed else m["content"] for m in messages if m["role"] == "assistant"]
        expected = [before + answer + after for answer in answers]
        conversation = Conversation(messages=messages, variables={**DATE})
        assert labelled(made[family], conversation) == expected, name
        assert labelled(made[family], conversation, LabelMode.last) == expected[-1:], name


@pytest.mark.parametrize(
    ("family", "call"),
    [
        ("llama3", '{"name": "get_weather", "parameters": {"city": "Zürich", "days": [1, 2.5]}}<|eot_id|>'),
        ("mistral", f'[TOOL_CALLS] [{JSON_CALL}, "id": "a1b2c3d4e"}}]</s>'),
        ("tools", '<|call|>get_weather({"city":"Zürich","days":[1,2.5]})<|end|>'),
        ("marks", f"<tool_call>\n{JSON_CALL}}}\n</tool_call><|im_end|>"),
    ],
)
def test_calls_of_tools_are_labels_and_their_results_are_not(made: dict[str, Made], family: str, call: str) -> None:
    conversation = Conversation(messages=WITH_TOOLS["tool"], tools=[WEATHER], variables={**DATE})
    found = labelled(made[family], conversation)
    assert found[0] == call
    assert len(found) == 2
    assert found[1].strip().startswith("It is sunny.<" if family != "tools" else "It is sunny.<|end|>")


QWEN3_LABELS: list[tuple[list[dict[str, Any]], dict[str, Any], list[str], int]] = [
    # Without reasoning, the template writes an empty one into the last turn, and none into earlier ones.
    ([USER, SUNNY], {}, ["<think>\n\n</think>\n\nIt is sunny.<|im_end|>"], 0),
    ([USER, SUNNY], {"enable_thinking": False}, ["It is sunny.<|im_end|>"], 0),
    (PLAIN["three turns"], {}, ["<think>\n\n</think>\n\nYou are welcome.<|im_end|>"], 2),
    (PLAIN["three turns"], {"enable_thinking": False}, ["You are welcome.<|im_end|>"], 2),
    # Earlier reasoning is left out, so that what remains is not what the model wrote.
    (REASONING["reasoning in history"], {}, ["<think>\nAgain.\n</think>\n\nIt is sunny.<|im_end|>"], 1),
    # After the last question, all of it stays.
    (
        [USER, {**CALL, "reasoning_content": "I call."}, RESULT, {**SUNNY, "reasoning_content": "I see."}],
        {},
        [
            f"<think>\nI call.\n</think>\n\n<tool_call>\n{JSON_CALL}}}\n</tool_call><|im_end|>",
            "<think>\nI see.\n</think>\n\nIt is sunny.<|im_end|>",
        ],
        0,
    ),
    ([USER, CALL, RESULT, SUNNY], {}, ["<think>\n\n</think>\n\nIt is sunny.<|im_end|>"], 1),
]


@pytest.mark.parametrize(("messages", "variables", "expected", "left_out"), QWEN3_LABELS)
def test_turns_that_are_rendered_otherwise_later_have_no_labels(
    made: dict[str, Made],
    messages: list[dict[str, Any]],
    variables: dict[str, Any],
    expected: list[str],
    left_out: int,
) -> None:
    own, notes = made["qwen3"], list[str]()
    conversation = Conversation(messages=messages, variables=variables)
    encode_conversation(conversation, own.template, own.tokenizer, LabelMode.assistant, notes.append)
    assert labelled(own, conversation) == expected
    assert notes == [REWRITTEN_TURN] * left_out
    assert labelled(own, conversation, LabelMode.last) == expected[-1:]


@pytest.mark.parametrize(
    ("family", "messages"),
    [
        # Its last turn is history already.
        ("qwen3", PLAIN["ends with a question"]),
        # The system text is shown where the last message is a question, and left out of the whole.
        ("mistral", WITH_SYSTEM["system"]),
    ],
)
def test_conversations_without_a_sound_turn_are_refused(
    made: dict[str, Made], family: str, messages: list[dict[str, Any]]
) -> None:
    own = made[family]
    for mode in (LabelMode.assistant, LabelMode.last):
        with pytest.raises(
            DataError, match=r"must show which tokens are the assistant's, .*; use a template with"
        ) as e:
            encode_conversation(Conversation(messages=messages), own.template, own.tokenizer, mode)
        assert "is not how the whole conversation begins" in str(e.value)
    assert encode_conversation(Conversation(messages=messages), own.template, own.tokenizer, LabelMode.all)[1].all()


REFUSING = {
    "a prompt that is not what history shows": "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant: <think>{% endif %}",
    "the number of messages first": "{{ messages | length }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "the last message first": "{% for m in messages[::-1] %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "a beginning that raises": "{% if messages[-1].role != 'assistant' %}{{ raise_exception('No answer') }}{% endif %}{{ messages[-1].content }}",
    "a prompt longer than the turn": "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}It is sunny. And{% endif %}",
}


@pytest.mark.parametrize("case", REFUSING)
def test_templates_without_sound_turns_are_refused(made: dict[str, Made], case: str) -> None:
    template = ChatTemplate(texts={"default": REFUSING[case]})
    with pytest.raises(DataError, match="must show which tokens are the assistant's") as e:
        encode_conversation(
            Conversation(messages=[USER, SUNNY]), template, made["chatml"].tokenizer, LabelMode.assistant
        )
    assert "\n" not in str(e.value)
    assert ("No answer" in str(e.value)) == (case == "a beginning that raises")


def test_a_template_without_prompts_has_the_model_write_its_header(made: dict[str, Made]) -> None:
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    own = Made(made["chatml"].folder, None, ChatTemplate(texts={"default": source}), made["chatml"].tokenizer)
    # No special token ends the turn, so its white space does.
    assert labelled(own, Conversation(messages=[USER, SUNNY, USER])) == ["assistant: It is sunny.\n"]
    assert labelled(own, Conversation(messages=[SUNNY, USER, SUNNY])) == ["assistant: It is sunny.\n"] * 2


@pytest.mark.parametrize("family", ["chatml", "marks"])
def test_turns_of_the_prompt_and_of_no_weight_have_no_labels(made: dict[str, Made], family: str) -> None:
    own = made[family]
    first, second = "It is sunny.<|im_end|>", "Rain.<|im_end|>"
    rain = {"role": "assistant", "content": "Rain."}
    prompted = conversation_of({"prompt": [USER, SUNNY, THANKS], "completion": [rain]})
    assert labelled(own, prompted) == labelled(own, prompted, LabelMode.last) == [second]
    weighed = conversation_of({"messages": [USER, {**SUNNY, "weight": 0}, THANKS, {**rain, "weight": 1}]})
    assert labelled(own, weighed) == [second]
    weighed = conversation_of({"messages": [USER, SUNNY, THANKS, {**rain, "weight": 0}]})
    assert labelled(own, weighed) == [first]
    assert labelled(own, weighed, LabelMode.last) == []


@pytest.mark.parametrize("family", ["chatml", "marks", "gemma"])
def test_a_conversation_without_answers_has_no_labels(made: dict[str, Made], family: str) -> None:
    own = made[family]
    for mode in (LabelMode.assistant, LabelMode.last):
        ids, counts = encode_conversation(Conversation(messages=[USER]), own.template, own.tokenizer, mode)
        assert len(ids) > 0
        assert not counts.any()


@pytest.mark.parametrize(
    ("family", "messages", "words"),
    [
        ("gemma", [SYSTEM, USER, SUNNY], "System role not supported"),
        ("gemma", [SUNNY, USER], "Conversation roles must alternate user/assistant/user/assistant/..."),
        ("gemma", [USER, USER], "Conversation roles must alternate"),
        ("mistral", [USER, SUNNY, SUNNY], "conversation roles must alternate user/assistant/user/assistant/..."),
        ("mistral", [{"role": "critic", "content": "x"}], "roles must alternate"),
        ("mistral", [USER, {**CALL, "tool_calls": [{"function": {"name": "x"}}]}], "IDs should be alphanumeric"),
        (
            "llama3",
            [USER, {**CALL, "tool_calls": CALL["tool_calls"] * 2}],
            "only supports single tool-calls at once!",
        ),
        ("chatml", [{"role": "user"}], "'dict object' has no attribute 'content'"),
        (
            "chatml",
            [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
            'can only concatenate str (not "list")',
        ),
    ],
)
def test_a_template_that_raises_says_why(
    made: dict[str, Made], family: str, messages: list[dict[str, Any]], words: str
) -> None:
    own, conversation = made[family], Conversation(messages=messages, variables={**DATE})
    with pytest.raises(DataError, match=r"^the chat template does not take the conversation \(.+\); mend") as e:
        encode_conversation(conversation, own.template, own.tokenizer, LabelMode.assistant)
    assert words in str(e.value)
    assert "\n" not in str(e.value)


PIECES = sorted({token for family in FAMILIES.values() for token in (*family.special, *family.plain)})
TEXTS = st.lists(
    st.one_of(st.text(max_size=12), st.sampled_from([*PIECES, "\n", "\n\n", " ", "{{ x }}", "{% if %}", "\r\n"])),
    max_size=4,
).map("".join)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), TEXTS)
ARGUMENTS = st.dictionaries(TEXTS, st.one_of(SCALARS, st.lists(SCALARS, max_size=2)), max_size=3)
CALLS = ARGUMENTS.map(lambda a: [{"id": "123456789", "type": "function", "function": {"name": "f", "arguments": a}}])
OPTIONAL = {
    "tool_calls": CALLS,
    "reasoning_content": st.one_of(st.none(), TEXTS),
    "thinking": TEXTS,
    "name": st.one_of(st.none(), TEXTS),
}
MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": TEXTS}),
        st.fixed_dictionaries({"role": st.just("assistant"), "content": TEXTS}, optional=OPTIONAL),
    ),
    min_size=1,
    max_size=5,
)
SCHEMA = st.fixed_dictionaries(
    {"type": st.just("function"), "function": st.just(WEATHER["function"]), "x": ARGUMENTS}
)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=MESSAGES, tools=st.one_of(st.none(), st.lists(SCHEMA, max_size=2)))
def test_whatever_is_said(
    made: dict[str, Made], family: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> None:
    own = made[family]
    try:
        expected = own.reference.apply_chat_template(messages, tools=tools, return_assistant_tokens_mask=True, **DATE)
    except Exception:
        with pytest.raises(DataError, match=r"^the chat template does not take the conversation"):
            own.template.render(Conversation(messages=messages, tools=tools, variables={**DATE}))
        return
    conversation = conversation_of({"messages": messages, "tools": tools, "chat_template_kwargs": DATE})
    ids, _ = encode_conversation(conversation, own.template, own.tokenizer, LabelMode.all)
    assert ids.tolist() == expected["input_ids"]
    if family == "marks":
        counts = encode_conversation(conversation, own.template, own.tokenizer, LabelMode.assistant)[1]
        assert counts.astype(int).tolist() == expected["assistant_masks"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    question=TEXTS, more=st.lists(st.tuples(st.sampled_from(["user", "assistant"]), TEXTS), min_size=1, max_size=5)
)
def test_labels_are_the_tokens_that_share_a_character_with_a_turn(
    made: dict[str, Made], question: str, more: list[tuple[str, str]]
) -> None:
    # The template writes a system text before the first message, so an answer without a question has no prompt.
    own, turns = made["chatml"], [("user", question), *more]
    text, written = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", set[int]()
    for role, content in turns:
        text += f"<|im_start|>{role}\n"
        start = len(text)
        text += f"{content}<|im_end|>"
        if role == "assistant":
            written |= set(range(start, len(text)))
        text += "\n"
    messages: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in turns]
    ids, counts = encode_conversation(
        Conversation(messages=messages), own.template, own.tokenizer, LabelMode.assistant
    )
    encoding = own.tokenizer.encode(text, add_special_tokens=False)
    assert ids.tolist() == encoding.ids
    assert counts.tolist() == [bool(written & set(range(start, stop))) for start, stop in encoding.offsets]
