"""The code blocks of a page, as a reader would run them: in order, in one folder, one Python session.

A comment in front of a fence, which readers do not see, says what is otherwise than that:

    <!-- not run: REASON -->    it needs Slurm, a GPU, an object store, the network, or a large model's weights
    <!-- file: PATH -->         the block is a file's content
    <!-- before: COMMAND -->    a shell command for what the page takes for granted
"""

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Block", "blocks_of", "read_blocks"]

SHELL, CONSOLE, PYTHON = ("bash", "sh"), ("console",), ("python",)
# What nobody runs: output, configs, pictures of folders.
SHOWN = ("", "text", "yaml", "toml", "json")
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[^\n`]*)$")
_DIRECTIVE = re.compile(r"^ *<!-- (?P<name>not run|file|before): (?P<value>.+?) -->$")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block.

    Attributes:
        language: behind the fence.
        code: its lines.
        line: of the page, at which the code begins.
        not_run: why it is not run; empty where it is.
        file: the file whose content it is; empty where it is none.
        before: shell commands that come first.
    """

    language: str
    code: str
    line: int
    not_run: str = ""
    file: str = ""
    before: tuple[str, ...] = ()

    @property
    def runs(self) -> bool:
        """Whether there is something to run or to write."""
        return not self.not_run and (bool(self.file) or self.language not in SHOWN)


def read_blocks(page: Path) -> list[Block]:
    """The blocks of a page; see `blocks_of`."""
    return blocks_of(page.read_text(), page.name)


def blocks_of(text: str, page: str) -> list[Block]:
    """The blocks of a Markdown text.

    Raises:
        ValueError: a fence is not closed, names a language that is not known, or a directive stands before no fence.
    """
    found: list[Block] = []
    directives: list[tuple[str, str]] = []
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        if match := _DIRECTIVE.match(line):
            directives.append((match["name"], match["value"]))
        elif match := _FENCE.match(line):
            found.append(_block(match, number, lines, directives, page))
            directives = []
        elif line.strip() and directives:
            raise ValueError(f"{page}:{number}: a directive must stand before a block")
    return found


def _block(
    fence: re.Match[str], number: int, lines: "enumerate[str] | object", directives: list[tuple[str, str]], page: str
) -> Block:
    language, indent = fence["language"].strip(), len(fence["indent"])
    if language not in (*SHELL, *CONSOLE, *PYTHON, *SHOWN):
        raise ValueError(f"{page}:{number}: {language!r} must be one of {(*SHELL, *CONSOLE, *PYTHON, *SHOWN)}")
    code: list[str] = []
    for _, line in lines:  # type: ignore[union-attr]
        if line.strip() == "```":
            break
        code.append(line[indent:])
    else:
        raise ValueError(f"{page}:{number}: the block is not closed")
    named = dict(directives)
    return Block(
        language=language,
        code="\n".join(code) + "\n",
        line=number + 1,
        not_run=named.get("not run", ""),
        file=named.get("file", ""),
        before=tuple(value for name, value in directives if name == "before"),
    )
