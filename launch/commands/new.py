"""`regrow-new DIR`: writes a project of one's own that runs at once."""

import argparse
import importlib.util
import keyword
import os
import re
import sys
from pathlib import Path

import regrow.launch.template
from regrow.launch.config.errors import UserError
from regrow.launch.exit_code import ExitCode
from regrow.launch.run.versions import own_version

__all__ = ["main", "write_project"]

_MODULE, _NAME = "regrow.launch.template.mylab", "mylab"


def main() -> None:
    """The command's entry; exit code 2 for bad input."""
    parser = argparse.ArgumentParser(prog="regrow-new", description=__doc__)
    parser.add_argument("--version", action="version", version=f"regrow {own_version()}")
    parser.add_argument("folder", metavar="DIR", type=Path, help="a new or empty folder, which names the package")
    parser.add_argument("--package", help="another name for the package")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    try:
        name = write_project(folder, arguments.package)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(ExitCode.bad_input)
    print(f"wrote {folder} with the package {name}; now: cd {folder} && regrow experiment=first")


def write_project(folder: Path, package: str | None = None) -> str:
    """Writes the project.

    Args:
        folder: new or empty.
        package: the package's name; None takes the folder's.

    Returns:
        The package's name.

    Raises:
        UserError: the folder holds something or cannot be written, or the name cannot be a package's.
    """
    name = package if package is not None else re.sub(r"\W", "_", folder.absolute().name, flags=re.ASCII)
    _check_name(name)
    try:
        if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"DIR must be a new or empty folder, but {folder} is not; choose another one")
        for path, text in _files(name).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
    except OSError as error:
        raise UserError(
            f"DIR must be a folder that can be written, but {error.filename or folder} cannot "
            f"({error.strerror or error}); choose another one"
        ) from error
    return name


def _check_name(name: str) -> None:
    remedy = "add --package NAME"
    if not (name.isascii() and name.isidentifier()) or keyword.iskeyword(name):
        raise UserError(f"the package's name must be one that Python can import, but is {name!r}; {remedy}")
    # A bare folder of that name in the working directory is the one that is to be filled.
    spec = importlib.util.find_spec(name)
    if name in sys.stdlib_module_names or (spec is not None and spec.origin is not None):
        raise UserError(f"the package's name must be free, but there is a module {name} already; {remedy}")


def _files(name: str) -> dict[Path, str]:
    """Paths within the project and what stands there."""
    (root,) = map(Path, regrow.launch.template.__path__)
    found = {}
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        if path.is_file() and "__pycache__" not in inside.parts and str(inside) != "__init__.py":
            renamed = Path(*(name if part == _NAME else part for part in inside.parts))
            found[renamed] = path.read_text().replace(_MODULE, name).replace(_NAME, name)
    return found


if __name__ == "__main__":
    main()
