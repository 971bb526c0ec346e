"""What `regrow-new` refuses; what it writes is trained in tests/plugins."""

import subprocess
import sys
from pathlib import Path

import pytest

from regrow.launch.commands.new import write_project
from regrow.launch.config.errors import UserError


def test_it_writes_a_project_named_after_its_folder(tmp_path: Path) -> None:
    assert write_project(tmp_path / "my-lab") == "my_lab"
    files = {str(p.relative_to(tmp_path / "my-lab")) for p in (tmp_path / "my-lab").rglob("*") if p.is_file()}
    assert {"pyproject.toml", "README.md", "my_lab/__init__.py", "my_lab/conf/experiment/first.yaml"} <= files
    text = "".join(p.read_text() for p in (tmp_path / "my-lab").rglob("*") if p.is_file())
    assert "mylab" not in text
    assert "template" not in text
    assert 'packages = ["my_lab"]' in text
    assert '_target_: str = "my_lab.model.model.Geglu"' in text


@pytest.mark.parametrize(
    ("folder", "package", "sentence"),
    [
        ("full", None, "DIR must be a new or empty folder, but .*full is not; choose another one"),
        ("full/file", None, "DIR must be a new or empty folder"),
        ("full/file/x", None, "DIR must be a folder that can be written, but .* cannot .Not a directory."),
        ("2lab", None, "must be one that Python can import, but is '2lab'; add --package NAME"),
        ("lab", "class", "but is 'class'"),
        ("token", None, "must be free, but there is a module token already"),
        ("numpy", None, "must be free, but there is a module numpy already"),
    ],
)
def test_it_never_writes_over_anything(tmp_path: Path, folder: str, package: str | None, sentence: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    with pytest.raises(UserError, match=sentence):
        write_project(tmp_path / folder, package)
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["full", "full/file"]


def test_the_command_says_it_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    command = [sys.executable, "-P", "-m", "regrow.launch.commands.new", str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert (
        done.stderr == f"error: DIR must be a new or empty folder, but {tmp_path / 'x'} is not; choose another one\n"
    )
