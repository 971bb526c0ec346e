"""Tasks as data: a JSONL file, whose lines say by their fields what is asked, or an lm-evaluation-harness YAML.

| kind | a line |
|---|---|
| multiple choice | `{"query": …, "choices": […], "gold": 0}` |
| cloze | `{"context": …, "target": …}`, or `{"cloze": …}`, whose last word is the target |
| perplexity | `{"text": …}` |
| generation | `{"query": …, "answer": …}`; also `regex`, `stop`, `max_tokens` |

Texts are joined as they are given: a choice or a target begins with its own space.
"""

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrow.errors import ConfigError
from regrow.trainer.data.errors import shown

__all__ = [
    "Cloze",
    "Generation",
    "Item",
    "MultipleChoice",
    "Perplexity",
    "Task",
    "TaskError",
    "check_regex",
    "find_tasks",
    "parse_record",
    "read_lines",
]

_SHOT_END = "\n\n"


class TaskError(ConfigError):
    """A task cannot be used; the message is the whole explanation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MultipleChoice:
    """Which of the choices is likeliest after the query.

    Attributes:
        query: what comes before.
        choices: as they follow it.
        gold: the right one's number.
        lengths: characters of each choice, by which likelihoods are normalised.
    """

    query: str
    choices: tuple[str, ...]
    gold: int
    lengths: tuple[int, ...]

    def shot(self) -> str:
        """The question with its answer, as an example."""
        return self.query + self.choices[self.gold]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cloze:
    """Whether the target is what the model would write, and how likely it is.

    Attributes:
        context: what comes before.
        target: as it follows.
    """

    context: str
    target: str

    def shot(self) -> str:
        """The text with its target, as an example."""
        return self.context + self.target


@dataclass(frozen=True, kw_only=True, slots=True)
class Perplexity:
    """How likely a whole text is.

    Attributes:
        text: the text.
    """

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """Whether what the model writes is the answer.

    Attributes:
        query: what comes before.
        answers: each of which is right.
        regex: whose first group, or whole match, is looked for in what was written; None takes all of it.
        stop: texts that end what is written.
        max_tokens: after which it ends too.
    """

    query: str
    answers: tuple[str, ...]
    regex: str | None = None
    stop: tuple[str, ...] = ("\n",)
    max_tokens: int = 64

    def shot(self) -> str:
        """The question with its answer, as an example."""
        return self.query + self.answers[0]


Item = MultipleChoice | Cloze | Perplexity | Generation


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What is asked.

    Attributes:
        name: of the file.
        items: all of one kind.
        source: where it was read.
    """

    name: str
    items: tuple[Item, ...]
    source: str

    def queries(self, shots: int, seed: int, option: str = "--few-shot") -> list[str]:
        """What stands before each item's own text: so many others with their answers, chosen by seed and place.

        Args:
            shots: others with their answers.
            seed: of their choice.
            option: that says how many, for messages.

        Raises:
            TaskError: there are not as many others, or the task has no examples.
        """
        if shots == 0:
            return [""] * len(self.items)
        if isinstance(self.items[0], Perplexity):
            raise TaskError(f"{option} must be 0 for perplexity, but is {shots} for {self.name}; leave it out")
        if shots >= len(self.items):
            raise TaskError(
                f"{option} must be below the number of a task's items, but is {shots} and {self.name} has "
                f"{len(self.items)}; use {len(self.items) - 1}"
            )
        examples = [item.shot() + _SHOT_END for item in self.items if not isinstance(item, Perplexity)]
        found = []
        for place in range(len(self.items)):
            others = [n for n in range(len(self.items)) if n != place]
            chosen = random.Random(f"{seed} {place}").sample(others, shots)
            found.append("".join(examples[n] for n in chosen))
        return found


def find_tasks(
    places: Sequence[str], readers: Mapping[str, Callable[[Path], Task]], option: str = "--tasks"
) -> list[Task]:
    """The tasks of files and folders, in the order of their names within a folder.

    Args:
        places: paths.
        readers: of each kind of file, by its ending.
        option: that names them, for messages.

    Raises:
        TaskError: there is no such file, one is no task, or two have the same name.
    """
    tasks: dict[str, Task] = {}
    for place in places:
        path = Path(place).expanduser()
        files = sorted(p for p in path.iterdir() if p.suffix in readers) if path.is_dir() else [path]
        if not files:
            raise TaskError(f"{option} must name tasks or folders of them, but {place} holds none; check it")
        for file in files:
            task = _read(file, readers, option)
            if task.name in tasks:
                raise TaskError(
                    f"tasks must have names of their own, but {file} and {tasks[task.name].source} are both "
                    f"{shown(task.name)}; rename one"
                )
            tasks[task.name] = task
    return list(tasks.values())


def _read(file: Path, readers: Mapping[str, Callable[[Path], Task]], option: str) -> Task:
    reader = readers.get(file.suffix)
    if reader is None:
        endings = ", ".join(readers)
        raise TaskError(f"{option} must name files that end in {endings}, but {file} does not; rename or convert it")
    try:
        return reader(file)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TaskError(
            f"{option} must name files that can be read, but {file} cannot ({reason}); check it"
        ) from None


def read_lines(file: Path) -> Task:
    """Reads a JSONL file.

    Raises:
        TaskError: naming file, line, rule and remedy.
    """
    items: list[Item] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            items.append(_item(line, f"line {number} of {file}"))
            if type(items[-1]) is not type(items[0]):
                raise TaskError(
                    f"all lines of a task must be of one kind, but line {number} of {file} is not of that of the "
                    "first; move it to a file of its own"
                )
    if not items:
        raise TaskError(f"a task must have at least one line, but {file} has none; check it")
    return Task(name=file.stem, items=tuple(items), source=str(file))


def parse_record(line: str, where: str) -> dict[str, Any]:
    """A line's JSON object.

    Raises:
        TaskError: it is none.
    """
    rule = "a task must have a JSON object in each line"
    try:
        record = json.loads(line)
    except ValueError as error:
        raise TaskError(f"{rule}, but {where} is none ({error}); mend it") from None
    if not isinstance(record, dict):
        raise TaskError(f"{rule}, but {where} is {type(record).__name__}; mend it")
    return record


def _item(line: str, where: str) -> Item:
    record = parse_record(line, where)
    if "choices" in record:
        return _choice(record, where)
    if "answer" in record:
        return _generation(record, where)
    if "cloze" in record:
        text = _text(record, "cloze", where)
        context, space, word = text.rstrip().rpartition(" ")
        if not space:
            raise TaskError(f"cloze must have a last word after a space, but {where} has not; mend it")
        return Cloze(context=context, target=space + word)
    if "target" in record:
        return Cloze(context=_text(record, "context", where), target=_text(record, "target", where))
    if "text" in record:
        return Perplexity(text=_text(record, "text", where))
    raise TaskError(
        f"a task's line must have choices, answer, cloze, target or text, but {where} has only "
        f"{shown(', '.join(map(str, record)))}; see docs/evaluate.md"
    )


def _text(record: dict[str, Any], name: str, where: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value:
        raise TaskError(f"{name} must be a text, but in {where} is {shown(repr(value))}; mend it")
    return value


def _texts(record: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    value = record.get(name)
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not values or not all(isinstance(v, str) and v for v in values):
        raise TaskError(f"{name} must be a text or a list of texts, but in {where} is {shown(repr(value))}; mend it")
    return tuple(values)


def _choice(record: dict[str, Any], where: str) -> MultipleChoice:
    choices, gold = _texts(record, "choices", where), record.get("gold")
    if len(choices) < 2:
        raise TaskError(f"choices must be at least two, but {where} has {len(choices)}; add one")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise TaskError(
            f"gold must be the number of a choice, from 0 to {len(choices) - 1}, but in {where} is "
            f"{shown(repr(gold))}; mend it"
        )
    query = record.get("query", "")
    if not isinstance(query, str):
        raise TaskError(f"query must be a text, but in {where} is {shown(repr(query))}; mend it")
    return MultipleChoice(query=query, choices=choices, gold=gold, lengths=tuple(map(len, choices)))


def _generation(record: dict[str, Any], where: str) -> Generation:
    regex, limit = record.get("regex"), record.get("max_tokens", 64)
    if regex is not None:
        check_regex(regex, where)
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise TaskError(f"max_tokens must be at least 1, but in {where} is {shown(repr(limit))}; use 64")
    stop = _texts(record, "stop", where) if "stop" in record else ("\n",)
    answers = _texts(record, "answer", where)
    return Generation(query=_text(record, "query", where), answers=answers, regex=regex, stop=stop, max_tokens=limit)


def check_regex(regex: object, where: str) -> None:
    """Raises TaskError where it is no regular expression."""
    try:
        if not isinstance(regex, str):
            raise re.error("it is no text")
        re.compile(regex)
    except re.error as error:
        raise TaskError(f"regex must be a regular expression, but in {where} is none ({error}); mend it") from None
