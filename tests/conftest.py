"""Fixtures: a cache of their own, a small corpus."""

import importlib.util
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from regrow.launch.config.run_name import register_resolver
from regrow.launch.config.schema import register_schemas

# One thread here and in every child: results then repeat, and ranks do not fight for cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Hundreds of processes are started, each of which would compile the sources again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Machines with GPUs need not have it: what runs there does without.
if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import settings

    # Several processes share the cores, so that a clock says nothing of an example.
    settings.register_profile("shared cores", deadline=None)
    settings.load_profile("shared cores")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several processes share tests out, one has Slurm's first, another those with many ranks of the pool, and
    whatever else there is follows, the longest of that first.
    """

    def place(item: pytest.Item) -> int:
        if "slurm" in item.keywords:
            return 0
        return 1 if "/distributed/" in item.nodeid else 2 if "slow" in item.keywords else 3

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """How several processes (`pytest -n`) share the tests out; see `tests/sharing.py`."""
    # Where tests run in one process, and on GPU machines, there need be no xdist.
    from tests.sharing import Sharing

    return Sharing(config, log)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tokenised corpora of the tests never meet those of the user; processes that share the tests out share them."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "cache"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("WANDB_SILENT", "true")
        yield folder


@pytest.fixture(scope="session", autouse=True)
def one_name() -> Iterator[None]:
    """Nothing is loaded a second time under the name of a folder at the repository's top."""
    yield
    assert not {"conf", "trainer", "models", "checkpoint", "launch"} & set(sys.modules)


@pytest.fixture(scope="session", autouse=True)
def schemas() -> None:
    """Hydra knows our groups."""
    register_resolver()
    register_schemas()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of about 200 kB, the same each time."""
    rng = random.Random(7)
    words = ["".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randint(2, 7))) for _ in range(400)]
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    with path.open("w") as out:
        for _ in range(600):
            text = " ".join(rng.choices(words, k=rng.randint(20, 80)))
            out.write(f'{{"text": "{text}."}}\n')
    return path
