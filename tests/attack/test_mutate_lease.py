"""A seeded handful of what `make fuzz` does at length."""

import random
from itertools import islice
from pathlib import Path

import pytest

from tests.attack.mutate_lease import check, mutations


@pytest.mark.parametrize("seed", range(4))
def test_no_lease_and_no_lock_hangs_or_crashes(tmp_path: Path, seed: int) -> None:
    for name, case in islice(mutations(random.Random(seed), tmp_path), 25):
        try:
            check(case)
        except BaseException as error:
            error.add_note(f"seed {seed}, case {name}")
            raise
