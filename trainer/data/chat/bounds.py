"""What a rendering of a chat template may take.

Each rendering has a number of steps: an item of a loop, a call, an operator, a filter and an output are one each,
more where they are large (see `spend`). No text or list is longer than `_LONGEST`; what may grow by a factor is
estimated before it is made. Steps do not see how long a text is that is only looked at, so there is a limit on the
processor's time as well, far beyond what templates take. So a rendering ends, after half a minute at the worst, and
within a few GB.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2.exceptions import TemplateRuntimeError

__all__ = [
    "Rendering",
    "bounded",
    "charged",
    "charged_for_output",
    "charged_items",
    "check_call",
    "check_operator",
    "current",
    "rendering",
]

_STEPS = 1_000_000
_SECONDS = 20.0
# Characters; an item of a list counts as `_ITEM` of them.
_LONGEST = 1 << 25
_ITEM = 32
_SIZE_PER_STEP = 1024
# Of a width, a count or an indent that is given to a method or filter.
_LARGEST_ARGUMENT = 1 << 16
# Of texts given to filters that may take the square of their length, and of numbers written out.
_SHORT = 1 << 12
_INTEGER_BITS = 1 << 14
# A field of `%` or of `str.format`, and the numbers in it: widths and precisions.
_PERCENT_FIELD = re.compile(r"%(?:\([^)]*\))?([^a-zA-Z%]*)")
_FORMAT_FIELD = re.compile(r"\{[^{}:]*:?([^}]*)")
_NUMBER = re.compile(r"\d+")
# Filters and methods that put a whole list into a text or list; that go by a count or width; and that may be slow.
_WHOLE = frozenset(("join", "pprint", "replace", "string", "sum", "tojson", "xmlattr"))
_COUNTED = frozenset(("batch", "expandtabs", "indent", "slice", "translate", "wordwrap"))
_SLOW = frozenset(("int", "striptags", "urlize"))
_VIEWS: Any = (type({}.keys()), type({}.values()), type({}.items()))
# mypy takes what is one of several types for an `object`.
_LISTS: Any = (list, tuple, dict, range, set, frozenset, *_VIEWS)
_TEXT_OR_LISTS: Any = (str, *_LISTS)


@dataclass(slots=True)
class Rendering:
    """A rendering under way.

    Attributes:
        date: what `strftime_now` tells; None where none is set.
        source_length: of the template, characters.
        steps: that are left.
        deadline_s: of the thread's processor time.
    """

    date: datetime | None
    source_length: int
    steps: int = _STEPS
    deadline_s: float = field(default_factory=lambda: time.thread_time() + _SECONDS)


_RENDERING: ContextVar[Rendering | None] = ContextVar("chat_rendering", default=None)


@contextmanager
def rendering(state: Rendering) -> Iterator[None]:
    """Charges what templates do within to `state`."""
    token = _RENDERING.set(state)
    try:
        yield
    finally:
        _RENDERING.reset(token)


def current() -> Rendering | None:
    """The rendering under way; None while a template is compiled."""
    return _RENDERING.get()


def spend(size: int) -> None:
    """Charges one step, and one more for each `_SIZE_PER_STEP` characters of what was made."""
    if size > _LONGEST:
        raise TemplateRuntimeError(f"it makes a text of more than {_LONGEST} characters, or a list as large")
    state = _RENDERING.get()
    if state is None:
        return  # a constant, when the template is compiled
    state.steps -= 1 + size // _SIZE_PER_STEP
    if state.steps < 0:
        raise TemplateRuntimeError(f"it takes more than {_STEPS} steps")
    if time.thread_time() > state.deadline_s:
        raise TemplateRuntimeError(f"it takes more than {_SECONDS:g} s")


def _size(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    return _ITEM * len(value) if isinstance(value, _LISTS) else 0


def _weight(value: Any) -> int:
    """About the length of a value's text; stops counting where it is too long."""
    if not isinstance(value, _LISTS) or isinstance(value, range):
        return _size(value)
    total = 0
    for item in value.items() if isinstance(value, dict) else value:
        total += _ITEM + _weight(item)
        if total > _LONGEST:
            break
    return total


def check_call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Charges a call, which may put out as much as the template is long; refuses a method whose result is large.

    Returns:
        The arguments, with lists instead of iterators where their length counts.
    """
    state = _RENDERING.get()
    spend(0 if state is None else state.source_length)
    owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
    if isinstance(owner, str | bytes | int) or owner is int:
        name = getattr(function, "__name__", "")
        args = _listed(name, args)
        _check_growth(name, owner, (*args, *kwargs.values()))
    return args


def _listed(name: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    if name not in ("join", "sum"):
        return values
    return tuple(list(value) if isinstance(value, Iterator) else value for value in values)


def charged(value: Any) -> Any:
    """A value that was made."""
    spend(_size(value))
    return value


def charged_for_output(value: Any) -> Any:
    """A value that becomes text."""
    spend(_weight(value))
    return value


def charged_items(values: Iterable[Any]) -> Iterator[Any]:
    """The items of a loop; each may put out as much as the template is long."""
    state = _RENDERING.get()
    length = 0 if state is None else state.source_length
    for item in values:
        spend(length)
        yield item


def check_operator(operator: str, left: Any, right: Any) -> None:
    """Refuses what would be large before it is made."""
    if operator == "%" and isinstance(left, str | bytes):
        _check_fields(_PERCENT_FIELD, left, _weight(right))
    elif operator == "*":
        for value, times in ((left, right), (right, left)):
            if isinstance(times, int):
                spend(_size(value) * max(times, 0))
        if isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() + right.bit_length())
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * abs(right))


def _check_bits(bits: int) -> None:
    if bits > _INTEGER_BITS:
        raise TemplateRuntimeError(f"it makes a number of more than {_INTEGER_BITS} bits")


def _check_fields(form: re.Pattern[str], text: str | bytes, largest: int) -> None:
    """Charges what a text with fields becomes.

    Args:
        form: of a field.
        text: with the fields.
        largest: the length of the largest value, which each field may show.
    """
    length = 0
    for found in form.finditer(text if isinstance(text, str) else text.decode("latin-1")):
        numbers = _NUMBER.findall(found[1])
        if "*" in found[1] or "{" in found[1] or any(len(number) > 4 for number in numbers):
            raise TemplateRuntimeError("it formats to a width that is computed or has more than four digits")
        length += largest + sum(map(int, numbers))
    spend(length)


def _check_growth(name: str, value: Any, args: tuple[Any, ...]) -> None:
    """Refuses a method or filter whose result would be large, or long in the making."""
    for argument in args:
        if isinstance(argument, int) and abs(argument) > _LARGEST_ARGUMENT:
            raise TemplateRuntimeError(f"it gives {name} a number of more than {_LARGEST_ARGUMENT}")
    if name == "from_bytes" or (name in _SLOW and _size(value) > _SHORT):
        raise TemplateRuntimeError(f"it gives {name} a text of more than {_SHORT} characters")
    if name in _WHOLE and not isinstance(value, str | bytes):
        spend(_weight(value))
    if name in ("format", "format_map") and isinstance(value, str):
        largest = max(map(_weight, args), default=0)
        _check_fields(_FORMAT_FIELD, value, largest)
        _check_fields(_PERCENT_FIELD, value, largest)
    elif name in ("join", "replace", "tojson") or name in _COUNTED:
        spend(_grown(name, value, args))


def _grown(name: str, value: Any, args: tuple[Any, ...]) -> int:
    """At most about how much is made."""
    length, largest = _size(value), max(map(_weight, args), default=0)
    width = max((abs(a) for a in args if isinstance(a, int)), default=0)
    if name == "replace":
        return (_occurrences(value, args[0]) + 1) * _size(args[1]) if len(args) > 1 else 0
    if name == "join":
        # A method's text stands between the items; a filter's argument does.
        between, items = (value, args[0]) if isinstance(value, str | bytes) and args else ((*args, "")[0], value)
        return _size(between) * (len(items) if isinstance(items, _TEXT_OR_LISTS) else 0) + _weight(items)
    if name == "tojson":
        return _weight(value) * width
    return max(length, 1) * max(width, largest)


def _occurrences(text: Any, part: Any) -> int:
    same = any(isinstance(text, kind) and isinstance(part, kind) for kind in (str, bytes))
    return text.count(part) if same else 0


def bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is charged for."""
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)  # with what jinja2 notes on it
    def charging(*args: Any, **kwargs: Any) -> Any:
        own = _listed(name, args[skipped:])
        _check_growth(name, own[0] if own else None, (*own[1:], *kwargs.values()))
        return charged(function(*args[:skipped], *own, **kwargs))

    return charging
