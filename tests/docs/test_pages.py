"""What README and docs show is run as it stands there."""

import os
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.docs.blocks import blocks_of, read_blocks
from tests.docs.warm_commands import serve, write_script
from tests.pool import context
from tests.support import REPO, wait_until

PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]
# Their programs are killed in the middle and run again, by tests of their own.
ELSEWHERE = {"other-trainers.md": "test_other_trainers.py"}
RUN = [p for p in PAGES if p.name not in ELSEWHERE and any(b.runs for b in read_blocks(p))]


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the commands that an installation has, of these sources."""
    folder = tmp_path_factory.mktemp("bin")
    # A socket's name is short, so not below pytest's folder.
    with tempfile.TemporaryDirectory(prefix="regrow-docs-") as short:
        address = Path(short) / "commands"
        server = context.Process(target=serve, args=(address, os.getpid()), daemon=False)
        server.start()
        wait_until(address.exists)
        scripts = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["scripts"]
        for name, target in scripts.items():
            write_script(folder / name, target, address)
        python = folder / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} -P "$@"\n')
        python.chmod(0o755)
        yield folder
        server.kill()
        server.join()


@pytest.mark.docs
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", RUN, ids=lambda p: p.name)
def test_the_blocks_of_a_page_run(page: Path, commands: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(REPO / "src"), str(REPO)])
    environ = os.environ | {"PYTHONPATH": path, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"}
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "tests.docs.session", str(page)],
        cwd=tmp_path,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as session:
        try:
            out, _ = session.communicate(timeout=850)
        finally:
            # With the commands that it has started.
            with suppress(ProcessLookupError):
                os.killpg(session.pid, signal.SIGKILL)
    assert session.returncode == 0, out


def test_every_block_that_is_not_run_has_its_reason() -> None:
    for page in PAGES:
        for block in read_blocks(page):
            assert not block.not_run or len(block.not_run.split()) > 2, f"{page}:{block.line}"
    assert "README.md" in {p.name for p in RUN}
    for name, test in ELSEWHERE.items():
        assert (REPO / "tests/docs" / test).is_file() or not (REPO / "docs" / name).exists()


def test_blocks_and_directives() -> None:
    text = "\n".join(
        ["a", "", "<!-- before: mkdir x -->", "<!-- file: x/y.py -->", "```python", "z = 1", "```", "",
         "1. b", "", "   ```bash", "   c \\", "     d", "   ```", "<!-- not run: it needs a GPU -->", "```bash", "e", "```"]
    )  # fmt: skip
    first, second, third = blocks_of(text, "page")
    assert (first.before, first.file, first.code, first.line) == (("mkdir x",), "x/y.py", "z = 1\n", 6)
    assert (second.code, second.runs) == ("c \\\n  d\n", True)
    assert (third.runs, third.not_run) == (False, "it needs a GPU")


@pytest.mark.parametrize("text", ["```bash\na", "```ruby\na\n```", "<!-- not run: x -->\ntext\n```\n```"])
def test_what_would_go_unseen_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="page:"):
        blocks_of(text, "page")
