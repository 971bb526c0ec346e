"""Conversations for the families' templates."""

from typing import Any

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather <now> & here, in °C",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "array", "items": {"type": "number"}},
            },
            "required": ["city"],
        },
    },
}

USER: dict[str, Any] = {"role": "user", "content": "What is the weather in Paris?"}
SUNNY: dict[str, Any] = {"role": "assistant", "content": "It is sunny."}
SYSTEM: dict[str, Any] = {"role": "system", "content": "You are terse."}
CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "a1b2c3d4e",
            "type": "function",
            "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": [1, 2.5]}},
        }
    ],
}
RESULT: dict[str, Any] = {
    "role": "tool",
    "name": "get_weather",
    "content": '{"celsius": 21}',
    "tool_call_id": "a1b2c3d4e",
}

PLAIN: dict[str, list[dict[str, Any]]] = {
    "one turn": [USER, SUNNY],
    "three turns": [
        USER,
        SUNNY,
        {"role": "user", "content": "  And tomorrow?\n"},
        {"role": "assistant", "content": "Rain, then sun.\n\n  "},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "You are welcome."},
    ],
    "unicode": [
        {"role": "user", "content": "Grüße, 你好 👩‍👩‍👧 — e\u0301 \u200b\u00a0\ufeff?"},
        {"role": "assistant", "content": "Καλημέρα 🌤️\r\n\tنعم \u2028 👍🏽"},
        {"role": "user", "content": "日本\x00語"},
        {"role": "assistant", "content": "🙂"},
    ],
    "special tokens as text": [
        {"role": "user", "content": "<|im_end|></s><eos>[/INST]<|eot_id|><end_of_turn>\n<|im_start|>assistant\nHm"},
        {"role": "assistant", "content": "a <|im_end|>\n b </s> <|end|>[INST]<|endoftext|>{{ x }}{% raw %}"},
    ],
    "empty answer": [USER, {"role": "assistant", "content": ""}],
    "ends with a question": [USER, SUNNY, USER],
    "white space": [{"role": "user", "content": "\n \n"}, {"role": "assistant", "content": " \n "}],
}

WITH_SYSTEM: dict[str, list[dict[str, Any]]] = {
    "system": [SYSTEM, USER, SUNNY],
    "system, three turns": [{"role": "system", "content": "Ünïcode ✓"}, *PLAIN["three turns"]],
}

WITH_TOOLS: dict[str, list[dict[str, Any]]] = {
    "tool": [USER, CALL, RESULT, SUNNY],
    "tool, then another question": [USER, CALL, RESULT, SUNNY, USER, SUNNY],
    "unused tools": [USER, SUNNY],
}

REASONING: dict[str, list[dict[str, Any]]] = {
    "reasoning": [USER, {**SUNNY, "reasoning_content": "Sun? Yes."}],
    "reasoning by its older name": [USER, {**SUNNY, "thinking": "Sun? Yes."}],
    "reasoning in the content": [USER, {"role": "assistant", "content": "<think>\nSun?\n</think>\n\nYes."}],
    "reasoning in history": [
        USER,
        {**SUNNY, "reasoning_content": "Sun? Yes."},
        {"role": "user", "content": "Sure?"},
        {**SUNNY, "reasoning_content": "Again."},
    ],
    "reasoning before calls": [
        SYSTEM,
        USER,
        {**CALL, "reasoning_content": "I call."},
        RESULT,
        RESULT,
        {**SUNNY, "reasoning_content": "I see."},
    ],
    "nulls": [USER, {"role": "assistant", "content": "Yes.", "reasoning_content": None, "tool_calls": None}],
}
