"""The slots of the one reduction a step."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from regrow.trainer.reduction import Slot, SlotKind, StepReduction, pack, unpack

CPU = torch.device("cpu")
VALUES = st.floats(-1e6, 1e6).map(float)


def slot(name: str, kind: SlotKind, value: float, *, on_device: bool) -> Slot:
    return Slot(name=name, kind=kind, read=lambda: torch.tensor(value, dtype=torch.float64) if on_device else value)


@given(st.data())
def test_each_slot_gets_what_all_ranks_have_together(data: st.DataObject) -> None:
    world = data.draw(st.integers(1, 5))
    shapes = data.draw(st.lists(st.tuples(st.sampled_from(SlotKind), st.booleans()), max_size=8))
    numbers = [data.draw(st.lists(VALUES, min_size=world, max_size=world)) for _ in shapes]
    # What is carried is the same on all ranks.
    numbers = [
        v if kind is not SlotKind.carry else [v[0]] * world for v, (kind, _) in zip(numbers, shapes, strict=True)
    ]
    ranks = [
        [slot(f"s{i}", kind, numbers[i][rank], on_device=device) for i, (kind, device) in enumerate(shapes)]
        for rank in range(world)
    ]
    packed = [pack(slots, rank, world, CPU) for rank, slots in enumerate(ranks)]
    total: Tensor = torch.stack([reduced for _, reduced, _ in packed]).sum(0)
    for order, _, carried in packed:
        unpack(order, torch.cat([total, carried]).tolist(), world)
    for slots in ranks:
        for i, found in enumerate(slots):
            all_ranks = numbers[i]
            wanted = {
                SlotKind.sum: math.fsum(all_ranks),
                SlotKind.max: max(all_ranks),
                SlotKind.carry: all_ranks[0],
            }
            assert found.value == pytest.approx(wanted[found.kind], rel=1e-12, abs=1e-6), (i, found.kind)


def test_the_first_tensor_is_the_first_element_whatever_is_registered() -> None:
    """The rounding of a sum over ranks may depend on its place."""
    loss = slot("loss", SlotKind.sum, 3.5, on_device=True)
    others = [
        slot(f"o{i}", kind, 7.0, on_device=device) for i, kind in enumerate(SlotKind) for device in (True, False)
    ]
    order, reduced, _ = pack([loss, *others], 1, 4, CPU)
    assert (order[0], float(reduced[0])) == (loss, 3.5)


def test_a_value_is_known_when_it_is_finished_and_not_before() -> None:
    reduction = StepReduction(0, 1, CPU, None)
    now = [1.0]
    seen = reduction.sum("seen", lambda: now[0], initial=-1.0, in_row=True)
    carried = reduction.carry("norm", lambda: torch.tensor(0.5))
    first = reduction.start()
    now[0] = 2.0
    second = reduction.start()
    assert seen.value == -1.0
    assert reduction.finish(first) == {"seen": 1.0}
    assert (seen.value, carried.value) == (1.0, 0.5)
    assert reduction.finish(second) == {"seen": 2.0}


def test_not_a_number_is_the_largest() -> None:
    found = slot("m", SlotKind.max, 1.0, on_device=False)
    unpack([found], [1.0, math.nan, 2.0], 3)
    assert math.isnan(found.value)


def test_slots_asked_for_at_once_need_not_be_registered() -> None:
    reduction = StepReduction(0, 1, CPU, None)
    ready = slot("ready", SlotKind.sum, 1.0, on_device=False)
    reduction.now(ready, on_cpu=True)
    assert ready.value == 1.0
    assert reduction.finish(reduction.start()) == {}


def test_a_name_is_registered_once_and_in_time() -> None:
    reduction = StepReduction(0, 1, CPU, None)
    reduction.sum("a", lambda: 0.0)
    with pytest.raises(ValueError, match="the slot a must be registered once"):
        reduction.carry("a", lambda: 0.0)
    reduction.complete()
    with pytest.raises(RuntimeError, match="the slot b must be registered in before_fit"):
        reduction.sum("b", lambda: 0.0)
