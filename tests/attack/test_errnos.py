"""A seeded share of the injected error codes; all of them run by `make attack`."""

from collections.abc import Iterator

import pytest

from tests.attack.base import make_base
from tests.attack.cases import Started, choose
from tests.attack.errnos import BASE_STEP, KEEP_TWO, Injection, all_injections, run_injection

pytestmark = pytest.mark.slow

# A twentieth of the table is more than a tenth of the 60 that it must have.
SEED, SHARE = 1, 0.05
CHOSEN = choose(all_injections(SEED), SHARE, SEED)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started[Injection]]:
    folder = tmp_path_factory.mktemp("errnos")
    base = make_base(folder / "base", steps=BASE_STEP, more=KEEP_TWO)
    cases = Started(CHOSEN, lambda case, place: run_injection(base, case, place), folder)
    yield cases
    cases.close()


@pytest.mark.parametrize("injection", CHOSEN, ids=lambda i: i.name)
def test_an_error_code_loses_nothing(started: Started[Injection], injection: Injection) -> None:
    """The exit code says what is on the disk, in one sentence; the next start finishes and leaves nothing behind."""
    assert started.problems(injection) == []


def test_the_table_holds_all_that_was_promised() -> None:
    injections = all_injections(SEED)
    assert len(injections) >= 60
    assert len({i.name for i in injections}) == len(injections)
    assert {i.fault.code for i in CHOSEN} == {"EIO", "ENOSPC", "ESTALE", "EDQUOT"}
