"""Ranks continue with the newest step that all of them can read."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from regrow.checkpoint.errors import CheckpointError, DamagedStepError, StepNotFoundError
from regrow.checkpoint.load.agreement import load_agreed, storage_errors
from regrow.checkpoint.ranks import broadcast_value, gather_values, on_first_rank, rank_and_count
from regrow.checkpoint.storage.local import LocalStorage
from tests.pool import run_distributed

pytestmark = pytest.mark.slow


def newest(steps: set[int], damaged: Mapping[int, str]) -> int:
    left = steps - set(damaged)
    if not left:
        raise CheckpointError("no step is left")
    return max(left)


def read(step: int, bad: set[int]) -> str:
    if step in bad:
        raise DamagedStepError(f"step {step} is damaged")
    return f"step {step}"


@given(st.sets(st.integers(0, 20), min_size=1), st.sets(st.integers(0, 20)))
def test_the_newest_sound_step_is_loaded(steps: set[int], bad: set[int]) -> None:
    retries: list[None] = []

    def load() -> tuple[int, str, dict[int, str]]:
        found = load_agreed(
            lambda damaged: newest(steps, damaged),
            lambda step: read(step, bad),
            lambda step: step,
            None,
            lambda: retries.append(None),
        )
        return found.choice, found.result, found.damaged

    if steps <= bad:
        with pytest.raises(CheckpointError, match="no step is left"):
            load()
        return
    best = max(steps - bad)
    above = {s for s in steps if s > best}
    assert load() == (best, f"step {best}", {s: f"step {s} is damaged" for s in above})
    assert len(retries) == len(above)


def test_a_step_that_was_asked_for_is_not_replaced() -> None:
    with pytest.raises(DamagedStepError, match="step 3 is damaged"):
        load_agreed(lambda damaged: 3, lambda step: read(step, {3}), lambda step: None, None)


def test_what_a_storage_refuses_is_damage_only_where_the_disk_is_ours(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    with pytest.raises(DamagedStepError, match="cannot be read"), storage_errors(storage):
        storage.read("missing")
    storage.is_remote = True
    with pytest.raises(CheckpointError, match="check the storage and try again") as caught, storage_errors(storage):
        storage.read("missing")
    assert not isinstance(caught.value, DamagedStepError)


def _agree() -> tuple[object, ...]:
    """Rank 1 cannot read what rank 0 chooses first; errors and values travel."""
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    rank, count = rank_and_count(group)
    found = load_agreed(
        lambda damaged: newest({1, 2, 3}, damaged),
        lambda step: read(step, {3} if rank else set()),
        lambda s: s,
        group,
    )
    with pytest.raises(StepNotFoundError, match=r"step must be one of the steps in f \(1, 2\), but is 9"):
        on_first_rank(lambda: _raise(StepNotFoundError(9, [1, 2], "f", "step")), group, CheckpointError)
    answer = (found.choice, dict(found.damaged), broadcast_value(rank, group), gather_values(rank, group), count)
    dist.destroy_process_group()
    return answer


def _raise(error: Exception) -> None:
    raise error


def test_all_ranks_take_the_same_step_and_the_same_error() -> None:
    assert run_distributed(_agree, world_size=2) == [(2, {3: "step 3 is damaged"}, 0, [0, 1], 2)] * 2
