"""Batches on the device ahead of use; the copies themselves are tested in tests/gpu."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from regrow.models.documents import describe_documents
from regrow.trainer.data.feed import DeviceFeed, feed
from regrow.trainer.data.loader import Batches, MicroBatch, StepBatch
from regrow.trainer.data.samples import SampleIds
from regrow.trainer.device import is_accelerator

META = torch.device("meta")


class Listed(Batches):
    """Gives these, and raises those that are errors."""

    def __init__(self, items: Sequence[StepBatch | Exception]) -> None:
        self.items, self.taken, self.closed, self.waiting = list(items), 0, False, False

    def __next__(self) -> StepBatch:
        item = self.items[self.taken]
        self.taken += 1
        if isinstance(item, Exception):
            raise item
        return item

    def ready(self, timeout_s: float) -> bool:
        return not self.waiting and self.taken < len(self.items)

    def close(self) -> None:
        self.closed = True


def batch(number: int, *, documents: bool = True) -> StepBatch:
    rows = torch.full((2, 4), number)
    micro_batch = MicroBatch(tokens=rows, labels=rows + 1, documents=describe_documents(rows) if documents else None)
    ids = SampleIds(np.array([number, 9]), np.zeros(2, dtype=np.int64))
    return StepBatch(micro_batches=[micro_batch] * 2, ids=ids[0], global_ids=ids, labels=np.array([16]))


def test_a_cpu_uses_batches_where_they_are() -> None:
    batches = Listed([batch(1)])
    assert feed(batches, torch.device("cpu")) is batches
    assert not is_accelerator(torch.device("cpu"))
    assert is_accelerator(META)


def test_each_batch_is_on_the_device_and_the_next_is_copied_meanwhile() -> None:
    batches = Listed([batch(1), batch(2, documents=False), batch(3)])
    given = feed(batches, META)
    assert given.ready(0.0)
    assert batches.taken == 0
    first = next(given)
    assert batches.taken == 2
    assert [t.device for m in first.micro_batches for t in (m.tokens, m.labels)] == [META] * 4
    assert all(m.documents is not None and m.documents.starts.device == META for m in first.micro_batches)
    assert (first.ids.windows.tolist(), first.global_ids.windows.tolist()) == ([1], [1, 9])
    # What has not been read yet is not waited for.
    batches.waiting = True
    assert given.ready(0.0)
    assert next(given).ids.windows.tolist() == [2]
    assert batches.taken == 2
    assert not given.ready(0.0)
    third = next(given)
    assert third.ids.windows.tolist() == [3]
    given.close()
    assert batches.closed


def test_an_error_in_reading_ahead_comes_with_its_own_batch() -> None:
    given = DeviceFeed(Listed([batch(1), OSError("gone")]), META)
    assert next(given).ids.windows.tolist() == [1]
    assert given.ready(0.0)
    with pytest.raises(OSError, match="gone"):
        next(given)
