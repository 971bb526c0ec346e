"""Fixtures: a cache of their own, a small corpus."""

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from regrow.launch.config.run_name import register_resolver
from regrow.launch.config.schema import register_schemas

# One thread here and in every child: results then repeat, and ranks do not fight for cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Says what several processes (`pytest -n`) may share out: slow tests one by one, the others by file.

    There is one Slurm on a machine; its tests come first, because they mostly wait.
    """

    def order(item: pytest.Item) -> int:
        return 0 if "slurm" in item.keywords else 1 if "slow" in item.keywords else 2

    items.sort(key=order)
    for item in items:
        if order(item) == 0:
            item.add_marker(pytest.mark.xdist_group("slurm"))
        elif order(item) == 2:
            item.add_marker(pytest.mark.xdist_group(str(item.path)))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tokenised corpora of the tests never meet those of the user."""
    folder = tmp_path_factory.mktemp("cache")
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
