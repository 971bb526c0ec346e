"""`{% generation %}…{% endgeneration %}`: where in a rendered text a template says that the assistant speaks."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from jinja2 import nodes, pass_eval_context
from jinja2.environment import Environment
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Macro

__all__ = ["GenerationMarks", "Marked", "marks_of", "recording"]


@dataclass(slots=True)
class Marked:
    """A rendering under way.

    Attributes:
        length: characters that the template has put out so far.
        blocks: where a marked block begins, and its text.
    """

    length: int = 0
    blocks: list[tuple[int, str]] = field(default_factory=list)

    def spans(self, text: str) -> list[tuple[int, int]] | None:
        """The marked characters of the whole text as [start, stop), in order.

        None: one was put together before it was put out, so that its place is not known.
        """
        if any(text[start : start + len(body)] != body for start, body in self.blocks):
            return None
        return [(start, start + len(body)) for start, body in self.blocks]


_RECORD: ContextVar[Marked | None] = ContextVar("generation_marks", default=None)


@contextmanager
def recording(marked: Marked) -> Iterator[None]:
    """Has marked blocks that are rendered within noted in `marked`."""
    token = _RECORD.set(marked)
    try:
        yield
    finally:
        _RECORD.reset(token)


class GenerationMarks(Extension):
    """The tag. Renders its body as it is, in a scope of its own, and notes it."""

    tags = {"generation"}  # noqa: RUF012  # jinja's own declaration
    METHOD = "_marked"

    def parse(self, parser: Parser) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method(self.METHOD), [], [], body, lineno=line)

    @pass_eval_context
    def _marked(self, context: nodes.EvalContext, caller: Macro) -> str:
        body = str(caller())
        record = _RECORD.get()
        if record is not None:
            record.blocks.append((record.length, body))
        return body


def marks_of(environment: Environment, source: str) -> bool | None:
    """Whether a template has marks.

    Returns:
        None: it has, but one lies in a macro, a set block, a filter block, a recursive loop or another mark, whose
        text is put out later and elsewhere.
    """
    found = list(_marks(environment.parse(source), inside=False))
    if any(found):
        return None
    return bool(found)


def _marks(node: nodes.Node, *, inside: bool) -> Iterator[bool]:
    """For each mark, whether it lies in what is put together first."""
    if isinstance(node, nodes.CallBlock) and _is_mark(node):
        yield inside
    buffered = isinstance(node, nodes.Macro | nodes.CallBlock | nodes.FilterBlock | nodes.AssignBlock)
    inside = inside or buffered or (isinstance(node, nodes.For) and node.recursive)
    for child in node.iter_child_nodes():
        yield from _marks(child, inside=inside)


def _is_mark(node: nodes.CallBlock) -> bool:
    called = node.call.node
    return isinstance(called, nodes.ExtensionAttribute) and called.identifier == GenerationMarks.identifier
