"""The pages as a site, and what they say of sentences that the code writes."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import REPO

_QUOTED = re.compile(r"\*\*`([^`]+)`\*\*")


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """A page that no table of contents has, a link to nowhere and a heading that is linked to and gone are warnings."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(tmp_path)]
    built = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = {p.stem for p in (REPO / "docs").glob("*.md")} | {"index"}
    assert {p.stem for p in tmp_path.glob("*.html")} >= pages


def sentences() -> str:
    """The texts of all string literals, those that stand side by side joined, and what is put into them left out."""
    found = []
    for package in ("launch", "trainer", "checkpoint", "models"):
        for path in (REPO / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    found.append("".join(str(v.value) for v in node.values if isinstance(v, ast.Constant)))
    return "\n".join(found)


def test_the_sentences_of_troubleshooting_are_those_of_the_code() -> None:
    """So that a search for what stands on the screen finds them."""
    quoted = _QUOTED.findall((REPO / "docs/troubleshooting.md").read_text())
    assert len(quoted) > 15
    code = sentences()
    # A signal's name is put in when it is known.
    missing = [q for q in quoted if q not in code and q != "died (signal SIGKILL)"]
    assert not missing
