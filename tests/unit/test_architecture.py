"""Who may import whom, read from the sources."""

import ast
import functools
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.support import REPO

PACKAGES = ("models", "checkpoint", "trainer", "launch")
FORBIDDEN = {
    "models": {"checkpoint", "trainer", "launch"},
    "checkpoint": {"models", "trainer", "launch"},
    "trainer": {"launch"},
    "launch": set(),
}
STANDARD_FOR_CONFIGS = {"abc", "dataclasses", "enum", "typing", "omegaconf", "regrow"}


@functools.cache
def imports_of(path: Path) -> set[str]:
    """The full names of all modules that a file imports, at any depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found.add(node.module or "")
    return found


def room_of(module: str) -> str:
    """`regrow.trainer.loop` is of `trainer`; what is not ours, of its own top."""
    return (
        module.removeprefix("regrow.").split(".")[0] if module.startswith("regrow.") else f"({module.split('.')[0]})"
    )


def sources() -> dict[Path, set[str]]:
    return {p: imports_of(p) for package in PACKAGES for p in (REPO / package).rglob("*.py")}


def test_imports_go_one_way() -> None:
    wrong = defaultdict(set)
    for path, modules in sources().items():
        package = path.relative_to(REPO).parts[0]
        bad = {m for m in modules if room_of(m) in FORBIDDEN[package]}
        if bad:
            wrong[str(path)] = bad
    assert not wrong


def test_everything_is_imported_by_its_one_name() -> None:
    """The tests' runner has the root on its path, so `import trainer` would work and load the module a second time."""
    wrong = {}
    for top in (*PACKAGES, "conf", "src", "tests", "benchmarks"):
        for path in (REPO / top).rglob("*.py"):
            if bare := {m for m in imports_of(path) if m.split(".")[0] in (*PACKAGES, "conf")}:
                wrong[str(path)] = bare
    assert not wrong


def test_only_launch_imports_hydra() -> None:
    users = {
        p.relative_to(REPO).parts[0]
        for p, modules in sources().items()
        if any(m.startswith("hydra") for m in modules)
    }
    assert users == {"launch"}


@pytest.mark.parametrize("library", ["wandb", "tensorboard", "mlflow", "trackio"])
def test_a_logger_is_imported_in_one_place_and_late(library: str) -> None:
    users = {p for p, modules in sources().items() if any(m.split(".")[0] == library for m in modules)}
    assert users == {REPO / f"trainer/hooks/{library}.py"}
    for node in ast.parse((REPO / f"trainer/hooks/{library}.py").read_text()).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert library not in {name.split(".")[0] for name in names}


def test_config_modules_import_little() -> None:
    for path, modules in sources().items():
        if path.stem == "config" or path.stem.endswith("_config"):
            for module in modules:
                assert module.split(".")[0] in STANDARD_FOR_CONFIGS, f"{path} imports {module}"
                if module.startswith("regrow.") and module != "regrow.errors":
                    assert module.endswith("config"), f"{path} imports {module}"


# The modules that are imported before the signal handlers stand.
EARLY = (
    "launch/train.py", "launch/exit_code.py", "launch/run/signals.py", "launch/run/versions.py",
    "launch/run/worker.py", "launch/run/allocator.py", "launch/run/acknowledge.py", "trainer/places.py", "trainer/process.py",
    "src/regrow/__init__.py",
)  # fmt: skip


def test_signal_handlers_stand_before_anything_is_imported_that_takes_time() -> None:
    early = {f"regrow.{name.removesuffix('.py').replace('/', '.')}" for name in EARLY}
    for name in EARLY:
        for node in ast.parse((REPO / name).read_text()).body:
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                known = module in early or module.split(".")[0] in sys.stdlib_module_names
                assert known, f"{name} imports {module}"


# Where a function imports, and why no module can at its top; each has its reason in a comment above it.
LAZY = {
    ("launch/train.py", "_run"): "signal handlers stand first",
    ("launch/run/worker.py", "main"): "signal handlers stand first",
    ("launch/app.py", "_train"): "--help and refusals need no torch",
    ("launch/app.py", "_plan"): "as above",
    ("launch/app.py", "_launchers"): "most commands need no joblib",
    ("launch/sweep/local.py", "_gpus"): "only a sweep over GPUs that nothing names needs torch",
}


def functions_that_import(path: Path) -> set[str]:
    """The innermost functions that hold an import."""
    found: set[str] = set()

    def visit(node: ast.AST, function: str | None) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom) and function is not None:
                found.add(function)
            inner = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
            visit(child, inner)

    visit(ast.parse(path.read_text()), None)
    return found


def test_launch_imports_inside_functions_where_it_must() -> None:
    lazy = {
        (str(path.relative_to(REPO)), function)
        for path in (REPO / "launch").rglob("*.py")
        for function in functions_that_import(path)
    }
    assert lazy == set(LAZY)
    for path, _ in lazy:
        lines = (REPO / path).read_text().splitlines()
        for number, line in enumerate(lines):
            if line.startswith("    ") and line.lstrip().startswith(("from ", "import ")) and " import" in f" {line}":
                assert lines[number - 1].lstrip().startswith("#"), f"{path}:{number + 1} has no reason"


ROOMS = ("config", "run", "sweep", "commands", "api")


def test_the_rooms_of_launch_import_downwards() -> None:
    wrong = []
    for path, modules in sources().items():
        package, *rest = path.relative_to(REPO).parts
        if package == "launch" and rest[0] in ROOMS:
            above = ROOMS[ROOMS.index(rest[0]) + 1 :]
            wrong += [f"{path}: {m}" for m in modules if m.startswith(tuple(f"regrow.launch.{r}" for r in above))]
    assert not wrong


def private_names_of_torch(path: Path) -> set[str]:
    """Dotted names below `torch` with a part that begins with one underscore."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
    return {n for n in found if re.fullmatch(r"torch(\.\w+)*\._[a-zA-Z]\w*(\.\w+)*", n)}


def test_private_names_of_torch_are_in_one_module() -> None:
    """What a new version of torch may take away is read in `regrow.torch_compat` and `torch_imagined` alone."""
    assert not {str(p): names for p in sources() if (names := private_names_of_torch(p))}
    assert private_names_of_torch(REPO / "src/regrow/torch_compat.py")


def test_a_command_that_trains_nothing_does_not_wait_for_torch() -> None:
    """Help, refusals and submitting a sweep."""
    program = (
        "import sys, regrow.launch.app, regrow.launch.sweep.launchers; from regrow.launch.config.schema import "
        "register_schemas; register_schemas(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
