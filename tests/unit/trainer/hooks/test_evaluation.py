"""What cannot be asked is refused in one sentence, before anything starts."""

from pathlib import Path
from typing import Any

import pytest

from regrow.errors import ConfigError
from regrow.trainer.hooks.config import EvaluationConfig
from regrow.trainer.hooks.evaluation import EvaluationHook

LINES = '{"text": "one"}\n{"text": "two"}\n'


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"tasks": []}, "hooks.evaluation.tasks must name files of tasks, but names none"),
        ({"tasks": ["nowhere.jsonl"]}, "hooks.evaluation.tasks must name files that can be read, but nowhere.jsonl"),
        ({"tasks": ["FOLDER/a.txt"]}, "hooks.evaluation.tasks must name files that end in .jsonl, .yaml, .yml"),
        ({"tasks": ["FOLDER/empty"]}, "hooks.evaluation.tasks must name tasks or folders of them"),
        ({"every": -1}, "hooks.evaluation.every must be at least 0, but is -1; use 1000"),
        ({"few_shot": -1}, "hooks.evaluation.few_shot must be at least 0, but is -1; use 0"),
        ({"few_shot": 1}, "hooks.evaluation.few_shot must be 0 for perplexity, but is 1 for texts"),
        ({"at_tokens": [0]}, "hooks.evaluation.at_tokens must be above 0"),
    ],
)
def test_one_sentence_each(tmp_path: Path, fields: dict[str, Any], sentence: str) -> None:
    (tmp_path / "texts.jsonl").write_text(LINES)
    (tmp_path / "a.txt").write_text(LINES)
    (tmp_path / "empty").mkdir()
    given = {"tasks": [f"{tmp_path}/texts.jsonl"], **fields}
    given["tasks"] = [t.replace("FOLDER", str(tmp_path)) for t in given["tasks"]]
    with pytest.raises(ConfigError) as refused:
        EvaluationHook(EvaluationConfig(**given))
    assert str(refused.value).startswith(sentence)
    assert "\n" not in str(refused.value)
