"""Where chat templates run: jinja2's sandbox with transformers' functions, bounded.

Templates come with models, so they are as little trusted as any file. The sandbox keeps them from Python's internals
and from changing what they get; there is no loader, so that they read no file; and `bounds` has every rendering end.
"""

import json
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateRuntimeError
from jinja2.ext import loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from regrow.trainer.data.chat.bounds import (
    bounded,
    charged,
    charged_for_output,
    charged_items,
    check_call,
    check_operator,
    current,
)
from regrow.trainer.data.chat.generation_marks import GenerationMarks
from regrow.trainer.data.source import DataError

__all__ = ["ChatEnvironment"]


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002  # in the order of transformers'
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """transformers' filter, which leaves HTML's characters as they are."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    state = current()
    if state is None or state.date is None:
        raise DataError(
            "data.template_date must be set for a chat template that asks for the date, but is null; set the day "
            "that conversations are to show, such as 2025-01-31"
        )
    return state.date.strftime(form)


def _refused_for_chance(*_: object, **__: object) -> None:
    raise TemplateRuntimeError("it asks for chance, so that each rendering would be another one")


class _TemplateDict:
    """`dict`, without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _TemplateNamespace(Namespace):
    """`namespace`, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *given = args
        values = dict(*given, **kwargs)
        for name in values:
            _check_public(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        Namespace.__setitem__(self, name, value)


def _check_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"it stores {name!r}, whose name begins with an underscore")


class _Charging(NodeTransformer):
    """Puts the charges into a template where no hook of the sandbox is."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_items")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_filtered(part, "_output") for part in node.nodes]
        return _filtered(node, "_charged")

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self.generic_visit(node)
        node.filter = _filtered(node.filter, "_charged")
        return node


def _filtered(node: nodes.Node | None, name: str) -> nodes.Filter:
    made = nodes.Filter(node, name, [], [], None, None)
    if node is not None:
        made.set_lineno(node.lineno)
    return made


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The environment of `apply_chat_template` (transformers 5), bounded. Its templates run within `rendering`."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationMarks, loopcontrols],
            finalize=charged_for_output,
        )
        self.filters.update(tojson=_tojson, random=_refused_for_chance)
        self.filters = {name: bounded(name, function) for name, function in self.filters.items()}
        self.filters.update(_items=charged_items, _charged=charged, _output=charged_for_output)
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
            dict=_TemplateDict(),
            namespace=_TemplateNamespace,
            lipsum=_refused_for_chance,
        )

    def charging(self, source: str) -> nodes.Template:
        """A template's text as it is to be compiled."""
        tree: nodes.Template = _Charging().visit(self.parse(source))
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        check_operator(operator, left, right)
        return charged(super().call_binop(context, operator, left, right))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        args = check_call(obj, args, kwargs)
        return charged(super().call(context, obj, *args, **kwargs))
