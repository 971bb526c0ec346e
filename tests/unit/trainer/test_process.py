"""What processes do before torch is imported."""

import gc

import pytest

from regrow.trainer.process import importing


@pytest.mark.parametrize("on", [True, False])
def test_garbage_is_looked_for_again_after_imports_but_not_in_what_they_made(on: bool) -> None:
    was_on, frozen = gc.isenabled(), gc.get_freeze_count()
    (gc.enable if on else gc.disable)()
    try:
        with importing():
            assert not gc.isenabled()
            kept: list[list[int]] = [[] for _ in range(100)]
        assert gc.isenabled() is on
        assert gc.get_freeze_count() > frozen
        assert len(kept) == 100
    finally:
        gc.unfreeze()
        (gc.enable if was_on else gc.disable)()
