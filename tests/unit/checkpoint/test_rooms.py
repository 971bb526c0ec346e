"""The folders of a package are layers: each imports only what lies below it."""

import ast
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.support import REPO

# From the bottom to the top; folders on one floor do not know each other.
FLOORS = {
    "checkpoint": [
        {"storage", "policy"},
        {"format"},
        {"sources"},
        {"run"},
        {"load"},
        {"save"},
        {"convert", "inspect"},
    ],
    "launch": [{"config"}, {"run"}, {"sweep", "doctor"}, {"commands"}, {"api"}],
}


def arrows(package: str) -> set[tuple[Path, str]]:
    """Which module imports from which room: a folder of the package, or a module beside the folders."""
    prefix, found = f"regrow.{package}.", set()
    for path in (REPO / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                module = f"{node.module}."
                names = [f"{module}{a.name}" for a in node.names] if module == prefix else [module]
            found |= {
                (path.relative_to(REPO / package), name.removeprefix(prefix).split(".")[0])
                for name in names
                if name.startswith(prefix)
            }
    return found


def room_of(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


@pytest.mark.parametrize("package", sorted(FLOORS))
def test_folders_import_only_from_the_floors_below(package: str) -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS[package]) for room in rooms}
    # A template of a user's project has no modules of ours.
    assert {p.parent.name for p in (REPO / package).glob("*/*.py")} - {"template"} == floor.keys()
    wrong = {
        f"{module} imports {target}"
        for module, target in arrows(package)
        if target in floor
        and room_of(module) in floor
        and target != room_of(module)
        and floor[target] >= floor[room_of(module)]
    }
    assert not wrong


@pytest.mark.parametrize("package", sorted(FLOORS))
def test_no_circle_runs_through_folders_and_the_modules_beside_them(package: str) -> None:
    graph: dict[str, set[str]] = defaultdict(set)
    for module, target in arrows(package):
        if target != room_of(module):
            graph[room_of(module)].add(target)
    # Raises CycleError, which names the rooms.
    assert list(TopologicalSorter(graph).static_order())


def test_names_of_files_are_spelled_once() -> None:
    """What the files of a step are called is known to one module each."""
    for name, owner in ((".metadata", "format/step_name.py"), ("manifest.json", "storage/base.py")):
        users = {
            str(path.relative_to(REPO / "checkpoint"))
            for path in (REPO / "checkpoint").rglob("*.py")
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and (node.value == name or node.value.endswith(f"/{name}"))
        }
        assert users == {owner}
