"""The default corpus: the running Python's own standard library, as English and as code."""

import ast
import itertools
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import final

from regrow.trainer.data.cache import cache_folder, content_digest
from regrow.trainer.data.source import CorpusPart, CorpusSource, DataError, digest

__all__ = ["StdlibSource"]

_UNITS = 8
_LEFT_OUT = {
    "test",
    "tests",
    "idlelib",
    "site-packages",
    "lib2to3",
    "turtledemo",
    "__pycache__",
    "pydoc_data",
}
_TOPICS = "pydoc_data.topics"


@final
class StdlibSource(CorpusSource):
    """Documents: each help topic of `pydoc_data.topics`, each module's docstrings, each module's source."""

    def check(self) -> None:
        """Nothing can be wrong with it: it is where Python is."""

    def key(self) -> dict[str, str]:
        remembered: Path | None = None
        with suppress(DataError):
            remembered = cache_folder(self.config) / "corpora"
        modules = _modules()
        content = content_digest(modules, remembered)
        return {"the text": digest("stdlib", sys.version, str(_UNITS), content, *(p.name for p in modules))}

    def units(self) -> list[CorpusPart]:
        count = len(_modules())
        bounds = [i * count // _UNITS for i in range(_UNITS + 1)]
        return [
            CorpusPart(_TOPICS),
            *(CorpusPart("modules", a, b) for a, b in itertools.pairwise(bounds)),
        ]

    def read(self, unit: CorpusPart) -> Iterator[str]:
        if unit.path == _TOPICS:
            yield from (text for _, text in sorted(topics.items()))
            return
        for path in _modules()[unit.start : unit.stop]:
            source = path.read_text(encoding="utf-8", errors="replace")
            prose = "\n\n".join(_docstrings(source))
            if len(prose) > 200:
                yield prose
            if source.strip():
                yield source


@cache
def _modules() -> tuple[Path, ...]:
    """The standard library's sources, in order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    return tuple(sorted(p for p in root.rglob("*.py") if not _LEFT_OUT & set(p.relative_to(root).parts)))


def _docstrings(source: str) -> Iterator[str]:
    """Each docstring of a module, its own first."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text
