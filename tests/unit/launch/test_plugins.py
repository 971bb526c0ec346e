"""Which packages of a user's own are named, where they are looked for, and what is said of those that cannot be used."""

import importlib
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore

from regrow.errors import ConfigError
from regrow.launch.config import plugins
from regrow.launch.config.package_configs import use_packages
from regrow.launch.config.plugins import UserPackages, active_packages, find_packages
from regrow.launch.config.resolve import resolve
from regrow.models import further
from regrow.models.hf import families
from regrow.trainer.hook import Hook

CONFIG = """
    from dataclasses import dataclass
    from typing import ClassVar
    from regrow.trainer.config import HookConfig

    @dataclass(kw_only=True, slots=True)
    class OwnConfig(HookConfig):
        SCHEMA: ClassVar = ("hook", "{schema}")
        _target_: str = "{package}.hooks.own.OwnHook"
        every: int = 3
"""
HOOK = """
    from regrow.trainer.hook import Hook

    class OwnHook(Hook):
        pass
"""


@pytest.fixture(autouse=True)
def no_packages() -> Iterator[None]:
    """This process names none before and after, and has not grown."""
    path, modules, before = list(sys.path), set(sys.modules), active_packages()
    families_before = list(further._MODULES)
    yield
    plugins._active, further._MODULES[:] = before, families_before
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith("own_"):
            del sys.modules[name]
    schemas = ConfigStore.instance().repo["hook"]
    for name in [n for n in schemas if n.startswith("own_")]:
        del schemas[name]


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(textwrap.dedent(text))


def project(root: Path, package: str, below: str = "", schema: str = "", **more: str) -> None:
    """A project whose package brings a hook."""
    schema = schema or f"{package}_schema"
    inside = f"{below}{package}"
    files = {
        "pyproject.toml": f'[tool.regrow]\npackages = ["{package}"]\n',
        f"{inside}/__init__.py": "",
        f"{inside}/hooks/config.py": CONFIG.format(package=package, schema=schema),
        f"{inside}/hooks/own.py": HOOK,
        f"{inside}/conf/hook/{package}.yaml": f"defaults: [{schema}, _self_]\n",
    }
    write(root, files | {f"{inside}/{name}": text for name, text in more.items()})


def test_nothing_is_named_where_nobody_names_any(tmp_path: Path) -> None:
    assert find_packages({}, tmp_path).names == ()
    write(tmp_path, {"pyproject.toml": "[project]\nname = 'x'\n"})
    assert find_packages({}, tmp_path).names == ()


def test_the_nearest_project_names_them_and_the_environment_goes_before(tmp_path: Path) -> None:
    write(tmp_path, {"pyproject.toml": '[tool.regrow]\npackages = ["own_a", "own_b.inner"]\n', "deep/er/x": ""})
    found = find_packages({}, tmp_path / "deep/er")
    assert (found.names, found.folder) == (("own_a", "own_b.inner"), str(tmp_path))
    assert find_packages({"REGROW_PACKAGES": ""}, tmp_path).names == ()
    given = {"REGROW_PACKAGES": "own_c, own_d", "REGROW_PACKAGES_PATH": "/elsewhere"}
    assert find_packages(given, tmp_path) == UserPackages(("own_c", "own_d"), "/elsewhere", "REGROW_PACKAGES")
    # What one process hands on is what the other finds, wherever it stands.
    handed = find_packages(found.environment(), Path("/"))
    assert (handed.names, handed.folder) == (found.names, found.folder)
    installed = find_packages(UserPackages(("own_e",), "", "entry points").environment(), tmp_path / "deep/er")
    assert (installed.names, installed.folder) == (("own_e",), ""), "another project here has no say"


def test_installed_distributions_name_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    write(
        site,
        {
            "own_lab-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: own_lab\nVersion: 1\n",
            "own_lab-1.dist-info/entry_points.txt": "[regrow.plugins]\nanything = own_lab\n",
        },
    )
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    assert find_packages({}, tmp_path).names == ("own_lab",)


@pytest.mark.parametrize("below", ["", "src/"])
def test_a_package_brings_schemas_yaml_targets_and_comes_last_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    package = f"own_lab{len(below)}"
    family = f"""
        from dataclasses import replace
        from regrow.models.llama3.hf import FAMILY as LLAMA3
        FAMILY = replace(LLAMA3, architecture="{package}")
    """
    project(tmp_path, package, below, **{"deep/hf.py": family, "other/hf.py": "", "token.py": "1 / 0"})
    monkeypatch.chdir(tmp_path)
    assert use_packages({}).names == (package,)
    assert sys.path[-2 if below else -1] == str(tmp_path)
    with initialize_config_module("regrow.conf", version_base="1.3"):
        hook = compose("config", overrides=[f"+hook@hooks.x={package}", "hooks.x.every=4"]).hooks.x
    assert hook.every == 4
    assert resolve(hook._target_, "hooks.x", Hook).__name__ == "OwnHook"
    assert package in [f.architecture for f in families()]
    # Named a second time, nothing is stored or appended again.
    path = list(sys.path)
    use_packages({})
    assert sys.path == path
    # A notebook loads a module again after an edit.
    importlib.reload(sys.modules[f"{package}.hooks.config"])
    use_packages({})
    plugins._active = UserPackages()
    with pytest.raises(
        ConfigError, match=rf'name it under \[tool.regrow\] in pyproject.toml \(packages = \["{package}"'
    ):
        resolve(hook._target_, "hooks.x", Hook)


def test_what_ranks_are_told_brings_the_packages_with_it(tmp_path: Path) -> None:
    """In a process that starts anywhere, with objects of the package's classes behind it."""
    project(tmp_path, "own_told")
    code = """
        import pickle, sys
        with open(sys.argv[1], "rb") as file:
            packages, config = pickle.load(file)
        from regrow.launch.config.plugins import active_packages
        assert active_packages() == packages
        print(type(config).__module__, config.every)
    """
    plugins.load_packages(find_packages({}, tmp_path))
    config = plugins.import_of("own_told.hooks.config").OwnConfig(every=8)
    (tmp_path / "spec").write_bytes(pickle.dumps((active_packages(), config)))
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code), str(tmp_path / "spec")],
        cwd="/", env={**os.environ}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "own_told.hooks.config 8\n"


CASES: dict[str, tuple[dict[str, str], str]] = {
    "not there": (
        {"pyproject.toml": '[tool.regrow]\npackages = ["own_gone"]'},
        "must name packages that are there, but own_gone is not installed or in .* and its src; correct the name",
    ),
    "a part not there": (
        {"pyproject.toml": '[tool.regrow]\npackages = ["own_part.gone"]', "own_part/__init__.py": ""},
        "but own_part.gone is not installed",
    ),
    "import fails": (
        {"pyproject.toml": '[tool.regrow]\npackages = ["own_bad"]', "own_bad/__init__.py": "1 / 0"},
        r"importing own_bad fails \(ZeroDivisionError: division by zero\); correct it",
    ),
    "an import of its own fails": (
        {"pyproject.toml": '[tool.regrow]\npackages = ["own_needs"]', "own_needs/__init__.py": "import own_nowhere"},
        r"importing own_needs fails \(ModuleNotFoundError: No module named 'own_nowhere'\)",
    ),
    "a schema's import fails": (
        {
            "pyproject.toml": '[tool.regrow]\npackages = ["own_worse"]',
            "own_worse/__init__.py": "",
            "own_worse/a/my_config.py": "(",
        },
        r"importing own_worse.a.my_config fails \(SyntaxError: ",
    ),
    "a single file": (
        {"pyproject.toml": '[tool.regrow]\npackages = ["own_file"]', "own_file.py": ""},
        "must name packages, but own_file is the single file .*own_file.py; move it into a folder own_file",
    ),
    "broken TOML": (
        {"pyproject.toml": "[tool.regrow\n"},
        r"pyproject.toml must be a TOML file, but cannot be read \(Expected",
    ),
    "not a list": (
        {"pyproject.toml": '[tool.regrow]\npackages = "own_lab"'},
        "packages under .tool.regrow. in .* must be a list of names, but is 'own_lab'",
    ),
    "no name": (
        {"pyproject.toml": '[tool.regrow]\npackages = ["own-lab"]'},
        "must name packages as they are imported, other than Regrow's, but names 'own-lab'",
    ),
    "Regrow itself": (
        {"pyproject.toml": '[tool.regrow]\npackages = ["regrow.trainer"]'},
        "but names 'regrow.trainer'",
    ),
}


@pytest.mark.parametrize(("files", "sentence"), CASES.values(), ids=CASES)
def test_what_cannot_be_used_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], sentence: str
) -> None:
    write(tmp_path, files)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=sentence) as caught:
        use_packages({})
    assert "\n" not in str(caught.value)


def test_names_that_exist_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    project(tmp_path, "own_schema", schema="garbage_schema")
    with pytest.raises(
        ConfigError,
        match=r"hook/garbage_schema is that of regrow.trainer.hooks.config.GarbageConfig; choose another one",
    ):
        use_packages({})
    project(tmp_path, "own_yaml", **{"conf/model/llama3_debug.yaml": ""})
    with pytest.raises(
        ConfigError, match=r"conf/model/llama3_debug.yaml must have a name of its own, but .* has it too"
    ):
        use_packages({})
    project(tmp_path, "own_first")
    project(tmp_path, "own_second", schema="own_first_schema")
    with pytest.raises(ConfigError, match=r"is that of own_first.hooks.config.OwnConfig"):
        use_packages({"REGROW_PACKAGES": "own_first,own_second"})
