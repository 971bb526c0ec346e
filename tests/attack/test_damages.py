"""A seeded share of the damages that nobody forged; all of them run by `make attack`."""

from collections.abc import Iterator

import pytest

from tests.attack.base import make_base
from tests.attack.cases import Started, choose
from tests.attack.damages import STEPS, Damage, all_damages, run_damage

pytestmark = pytest.mark.slow

# So much of the table is more than a tenth of the 195 that it must have.
SEED, SHARE = 1, 0.07
CHOSEN = choose(all_damages(SEED), SHARE, SEED)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started[Damage]]:
    folder = tmp_path_factory.mktemp("damages")
    base = make_base(folder / "base", steps=STEPS[-1])
    cases = Started(CHOSEN, lambda case, place: run_damage(base, case, place), folder)
    yield cases
    cases.close()


@pytest.mark.parametrize("damage", CHOSEN, ids=lambda d: d.name)
def test_resume_goes_on_from_the_newest_sound_step(started: Started[Damage], damage: Damage) -> None:
    """And load_step refuses the damaged one in one sentence, without a change to the run."""
    assert started.problems(damage) == []


def test_the_table_holds_all_that_was_promised() -> None:
    damages = all_damages(SEED)
    assert len(damages) >= 195
    assert len({d.name for d in damages}) == len(damages)
    assert {d.kind for d in CHOSEN} == {d.kind for d in damages}
