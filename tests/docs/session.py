"""Runs the blocks of one page, in this process and in the working directory; see `tests.docs.blocks`.

`python -P -m tests.docs.session PAGE`; exit code 1 at the first block that fails, which is printed.
"""

import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.docs.blocks import CONSOLE, PYTHON, Block, read_blocks

__all__ = ["run_page"]


class BlockError(Exception):
    """A block does not do what its page says."""


def run_page(page: Path) -> None:
    """Runs all blocks of a page.

    Raises:
        BlockError: one fails.
    """
    session: dict[str, Any] = {"__name__": "__main__"}
    for block in read_blocks(page):
        for command in block.before:
            _run_shell(command, page, block.line)
        if not block.runs:
            continue
        if block.file:
            Path(block.file).parent.mkdir(parents=True, exist_ok=True)
            Path(block.file).write_text(block.code)
        elif block.language in PYTHON:
            _run_python(block, page, session)
        elif block.language in CONSOLE:
            _run_console(block, page)
        else:
            _run_shell(block.code, page, block.line)


def _run_python(block: Block, page: Path, session: dict[str, Any]) -> None:
    # A traceback then names the page's own lines.
    code = "\n" * (block.line - 1) + block.code
    try:
        exec(compile(code, str(page), "exec"), session)
    except Exception as error:
        traceback.print_exc()
        raise BlockError(f"{page}:{block.line}: {error}") from error


def _run_shell(commands: str, page: Path, line: int) -> str:
    print(f"--- {page.name}:{line}\n{commands}", flush=True)
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", commands], stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    if done.returncode != 0:
        raise BlockError(f"{page}:{line}: exit code {done.returncode} of\n{commands}")
    return done.stdout


def _run_console(block: Block, page: Path) -> None:
    """Lines behind `$` are run; the others, but for those with an ellipsis, must be in what that prints."""
    lines = block.code.splitlines()
    out = _run_shell("\n".join(line[2:] for line in lines if line.startswith(("$ ", "> "))), page, block.line)
    for line in lines:
        if not line.startswith(("$ ", "> ")) and "…" not in line and line.strip() not in out:
            raise BlockError(f"{page}:{block.line}: {line.strip()!r} is not printed")


if __name__ == "__main__":
    try:
        run_page(Path(sys.argv[1]))
    except BlockError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
