"""Tasks of lm-evaluation-harness whose data lies here: its YAML, as far as it needs no code and no network.

Templates are jinja2's, in its sandbox; what a task asks for beyond the keys below is refused by name.
"""

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from regrow.trainer.data.errors import shown
from regrow.trainer.evaluation.task import (
    Cloze,
    Generation,
    Item,
    MultipleChoice,
    Perplexity,
    Task,
    TaskError,
    check_regex,
    parse_record,
    read_lines,
)

__all__ = ["READERS", "read_harness_task"]

# Of the YAML, used and passed over.
_USED = {
    "task", "dataset_path", "dataset_kwargs", "test_split", "validation_split", "output_type", "doc_to_text",
    "doc_to_target", "doc_to_choice", "target_delimiter", "description", "generation_kwargs", "filter_list",
}  # fmt: skip
_PASSED_OVER = {
    "tag", "group", "task_alias", "dataset_name", "training_split", "fewshot_split", "fewshot_delimiter",
    "num_fewshot", "metric_list", "metadata", "should_decontaminate", "doc_to_decontamination_query", "repeats",
    "unsafe_code",
}  # fmt: skip
_KINDS = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")

_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


def read_harness_task(file: Path) -> Task:
    """Reads a task's YAML and its data.

    Raises:
        TaskError: it needs more than is here, or a record does not fit it.
    """
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        reason = shown(" ".join(str(error).split()))
        raise TaskError(
            f"a task must be YAML without code, but {file} is not ({reason}); run it by lm_eval itself"
        ) from None
    if not isinstance(settings, dict):
        raise TaskError(f"a task must be YAML with keys, but {file} has none; check it")
    unknown = sorted(map(str, settings.keys() - _USED - _PASSED_OVER))
    if unknown:
        raise TaskError(
            f"a task may ask for {', '.join(sorted(_USED))}, but {file} asks for {shown(', '.join(unknown))}; "
            "run it by lm_eval itself"
        )
    kind = settings.get("output_type", "generate_until")
    if kind not in _KINDS:
        raise TaskError(f"output_type must be one of {', '.join(_KINDS)}, but in {file} is {shown(repr(kind))}")
    items = [_item(kind, settings, record, where) for record, where in _records(file, settings)]
    if not items:
        raise TaskError(f"a task must have at least one record, but that of {file} has none; check dataset_kwargs")
    return Task(name=str(settings.get("task", file.stem)), items=tuple(items), source=str(file))


def _records(file: Path, settings: Mapping[str, Any]) -> list[tuple[dict[str, Any], str]]:
    kwargs = settings.get("dataset_kwargs") or {}
    found = kwargs.get("data_files") if isinstance(kwargs, dict) else None
    if settings.get("dataset_path") != "json" or not found:
        raise TaskError(
            f"dataset_path must be json, with dataset_kwargs.data_files, but in {file} is "
            f"{shown(repr(settings.get('dataset_path')))}; fetch its data and name the files"
        )
    split = settings.get("test_split") or settings.get("validation_split")
    if isinstance(found, dict):
        if split not in found:
            raise TaskError(
                f"dataset_kwargs.data_files must have the split that is asked for ({split}), but in {file} has "
                f"{shown(', '.join(map(str, found)))}; name it"
            )
        found = found[split]
    records: list[tuple[dict[str, Any], str]] = []
    for name in [found] if isinstance(found, str) else found:
        path = file.parent / str(name)
        data = path if path.is_file() else Path(str(name)).expanduser()
        if not data.is_file():
            raise TaskError(f"dataset_kwargs.data_files must be files that are here, but {name} of {file} is not")
        for number, line in enumerate(data.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                where = f"line {number} of {data}"
                records.append((parse_record(line, where), where))
    return records


def _item(kind: str, settings: Mapping[str, Any], record: dict[str, Any], where: str) -> Item:
    if kind == "loglikelihood_rolling":
        return Perplexity(text=_text(settings, "doc_to_target", record, where))
    query = str(settings.get("description") or "") + _text(settings, "doc_to_text", record, where)
    if kind == "multiple_choice":
        return _choice(settings, query, record, where)
    target = _text(settings, "doc_to_target", record, where)
    if kind == "loglikelihood":
        return Cloze(context=query, target=target)
    options = settings.get("generation_kwargs") or {}
    until, limit = options.get("until", ["\n\n"]), options.get("max_gen_toks", 256)
    stop = tuple([until] if isinstance(until, str) else until)
    regex = _regex(settings, where)
    return Generation(query=query, answers=(target,), regex=regex, stop=stop, max_tokens=int(limit))


def _regex(settings: Mapping[str, Any], where: str) -> str | None:
    """Of the first filter that looks for one."""
    for chain in settings.get("filter_list") or []:
        for step in chain.get("filter") or []:
            if step.get("function") == "regex":
                pattern = step.get("regex_pattern")
                check_regex(pattern, where)
                return str(pattern)
    return None


def _choice(settings: Mapping[str, Any], query: str, record: dict[str, Any], where: str) -> MultipleChoice:
    choices = _choices(settings, record, where)
    target: Any = _rendered(settings.get("doc_to_target"), record, where)
    if isinstance(target, str):
        target = choices.index(target) if target in choices else int(target) if target.strip().isdigit() else None
    if not isinstance(target, int) or not 0 <= target < len(choices):
        raise TaskError(
            f"doc_to_target must be the number of a choice or one of them, but of {where} is {shown(repr(target))}"
        )
    between = settings.get("target_delimiter", " ")
    return MultipleChoice(
        query=query,
        choices=tuple(f"{between}{choice}" for choice in choices),
        gold=target,
        lengths=tuple(max(1, len(choice)) for choice in choices),
    )


def _choices(settings: Mapping[str, Any], record: dict[str, Any], where: str) -> list[str]:
    given = settings.get("doc_to_choice")
    if isinstance(given, list):
        values: Any = [_rendered(value, record, where) for value in given]
    else:
        values = _rendered(given, record, where)
    if isinstance(values, str):
        try:
            values = ast.literal_eval(values)
        except (ValueError, SyntaxError):
            values = None
    if not isinstance(values, list) or len(values) < 2:
        raise TaskError(f"doc_to_choice must be at least two choices, but of {where} is {shown(repr(values))}")
    return [str(value) for value in values]


def _text(settings: Mapping[str, Any], name: str, record: dict[str, Any], where: str) -> str:
    value = _rendered(settings.get(name), record, where)
    if value is None or value == "":
        if name == "doc_to_text":
            return ""
        raise TaskError(f"{name} must give a text, but of {where} gives none; check the task")
    return str(value)


def _rendered(template: Any, record: dict[str, Any], where: str) -> Any:
    """A field's value where the template is its name; otherwise what the template makes of the record."""
    if not isinstance(template, str):
        return template
    if template in record:
        return record[template]
    try:
        return _ENVIRONMENT.from_string(template).render(**record)
    except TemplateError as error:
        raise TaskError(
            f"a task's template must fit its records, but {shown(repr(template))} does not fit {where} "
            f"({shown(str(error))}); mend it"
        ) from None


# Of tasks, by the endings of files.
READERS = {".jsonl": read_lines, ".yaml": read_harness_task, ".yml": read_harness_task}
