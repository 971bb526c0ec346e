"""The places of `{% generation %}` marks, and the templates that have them where no place can be told."""

from typing import Any

import pytest

from regrow.trainer.data.chat.conversation import Conversation
from regrow.trainer.data.chat.labels import encode_conversation
from regrow.trainer.data.chat.template import ChatTemplate
from regrow.trainer.data.config import LabelMode
from tests.unit.trainer.data.chat.conversations import SUNNY, USER
from tests.unit.trainer.data.conftest import Made

MESSAGES: list[dict[str, Any]] = [USER, SUNNY, {"role": "user", "content": "Sure?"}, {**SUNNY, "content": "Yes. 🌤️"}]
LOOP = "{{% for m in messages %}}{{% if m.role == 'assistant' %}}{0}{{% else %}}<{{{{ m.content }}}}>{{% endif %}}{{% endfor %}}"

# Each puts out the same text, "<…>It is sunny.</s>" for a question and an answer.
SOUND = {
    "plain": "{% generation %}{{ m.content }}</s>{% endgeneration %}",
    "trimmed": "{%- generation -%} {{ m.content }}</s> {%- endgeneration -%}",
    "with plus signs": "{%+ generation +%}{{ m.content }}</s>{%+ endgeneration +%}",
    "on lines": "\n  {% generation %}\n{{ m.content }}</s>\n  {%- endgeneration %}\n",
    "two": "{% generation %}{{ m.content[:3] }}{% endgeneration %}{% generation %}{{ m.content[3:] }}</s>{% endgeneration %}",
    "apart": "{% generation %}{{ m.content[:3] }}{% endgeneration %}{{ m.content[3:4] }}{% generation %}{{ m.content[4:] }}</s>{% endgeneration %}",
    "in conditions": "{% if m.content %}{% with x = m.content %}{% generation %}{{ x }}</s>{% endgeneration %}{% endwith %}{% endif %}",
    "with a loop inside": "{% generation %}{% for c in m.content %}{{ c }}{% endfor %}</s>{% endgeneration %}",
    "in a loop": "{% for c in m.content %}{% generation %}{{ c }}{% endgeneration %}{% endfor %}</s>",
    "with a macro inside": "{% macro f(x) %}{{ x }}{% endmacro %}{% generation %}{{ f(m.content) }}</s>{% endgeneration %}",
    "with a filter inside": "{% generation %}{% filter trim %}{{ m.content }}{% endfilter %}</s>{% endgeneration %}",
    "empty": "{% generation %}{% endgeneration %}{{ m.content }}</s>",
    "in a block": "{% block b scoped %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% endblock %}",
}
# transformers notes these at wrong places.
UNSOUND = {
    "in a macro": "{% macro f(x) %}{% generation %}{{ x }}</s>{% endgeneration %}{% endmacro %}{{ f(m.content) }}",
    "in a set block": "{% set x %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% endset %}{{ x }}",
    "in a filter block": "{% filter trim %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% endfilter %}",
    "in a mark": "{% generation %}{{ m.content[:2] }}{% generation %}{{ m.content[2:] }}</s>{% endgeneration %}{% endgeneration %}",
    "in a recursive loop": "{% for c in [m.content] recursive %}{% generation %}{{ c }}</s>{% endgeneration %}{% endfor %}",
    "in a call block": "{% macro f() %}{{ caller() }}{% endmacro %}{% call f() %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% endcall %}",
}
# Only seen when it is rendered: a block that is called.
CALLED = "{% if false %}{% block b %}{% generation %}x{% endgeneration %}{% endblock %}{% endif %}<>{{ 'ab' ~ self.b() }}</s>"


@pytest.mark.parametrize("case", SOUND)
def test_labels_are_those_of_transformers(made: dict[str, Made], case: str) -> None:
    own, source = made["zephyr"], LOOP.format(SOUND[case])
    expected = own.reference.apply_chat_template(MESSAGES, chat_template=source, return_assistant_tokens_mask=True)
    template = ChatTemplate(texts={"default": source})
    ids, counts = encode_conversation(Conversation(messages=MESSAGES), template, own.tokenizer, LabelMode.assistant)
    assert ids.tolist() == expected["input_ids"]
    assert counts.astype(int).tolist() == expected["assistant_masks"]
    rendered = template.render(Conversation(messages=MESSAGES))
    assert rendered.text.replace("\n", "").replace(" <", "<") == (
        "<What is the weather in Paris?>It is sunny.</s><Sure?>Yes. 🌤️</s>"
    )
    assert rendered.spans is not None
    assert counts.any() == any(start < stop for start, stop in rendered.spans)


@pytest.mark.parametrize("case", UNSOUND)
def test_marks_without_a_place_are_not_trusted(made: dict[str, Made], case: str) -> None:
    """The turns are found by rendering beginnings instead."""
    own, source = made["zephyr"], LOOP.format(UNSOUND[case])
    template = ChatTemplate(texts={"default": source})
    conversation = Conversation(messages=MESSAGES)
    rendered = template.render(conversation)
    assert rendered.text == own.reference.apply_chat_template(MESSAGES, chat_template=source, tokenize=False)
    assert rendered.spans is None
    ids, counts = encode_conversation(conversation, template, own.tokenizer, LabelMode.assistant)
    assert own.tokenizer.decode(ids[counts].tolist(), skip_special_tokens=False) == "It is sunny.</s>Yes. 🌤️</s>"


def test_marks_that_turn_out_to_have_no_place_are_not_trusted() -> None:
    rendered = ChatTemplate(texts={"default": CALLED}).render(Conversation(messages=[USER]))
    assert rendered.text == "<>abx</s>"
    assert rendered.spans is None


def test_marks_that_are_not_reached_are_no_labels(made: dict[str, Made]) -> None:
    own, source = made["zephyr"], LOOP.format("{% if false %}{% generation %}{% endgeneration %}{% endif %}x")
    template = ChatTemplate(texts={"default": source})
    ids, counts = encode_conversation(Conversation(messages=MESSAGES), template, own.tokenizer, LabelMode.assistant)
    assert len(ids) > 0
    assert not counts.any()


def test_the_last_turn_is_found_by_its_place(made: dict[str, Made]) -> None:
    own = made["zephyr"]
    for case in ("plain", "two", "apart", "trimmed"):
        template = ChatTemplate(texts={"default": LOOP.format(SOUND[case])})
        ids, counts = encode_conversation(Conversation(messages=MESSAGES), template, own.tokenizer, LabelMode.last)
        decoded = own.tokenizer.decode(ids[counts].tolist(), skip_special_tokens=False)
        assert decoded == ("Yes. 🌤️</s>" if case != "apart" else "Yes 🌤️</s>")
