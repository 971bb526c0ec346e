"""What is live at a time, without memory."""

import torch

from regrow.torch_compat import FakeTensorMode
from regrow.trainer.plan.live_bytes import Kind, LiveBytes


def test_views_keep_a_storage_and_what_is_dropped_is_gone() -> None:
    live = LiveBytes()
    with FakeTensorMode(), live:
        live.enter("a")
        whole = torch.empty(1000, dtype=torch.float32)
        part = whole[:10]
        del whole
        assert live.total == 4000
        live.enter("b")
        del part
        assert live.total == 0
        kept = torch.empty(10, dtype=torch.bfloat16)
        live.mark([kept], Kind.parameters)
    assert live.peaks["a"].size == 4000
    assert live.live[Kind.parameters] == 20


def test_what_autograd_keeps_is_live() -> None:
    live = LiveBytes()
    with FakeTensorMode(), live:
        x = torch.empty(100, 100, requires_grad=True)
        before = live.total
        y = (x.exp() * 2.0).sum()
        # The exponents; the product is gone.
        assert live.total - before == 40_000 + 4
        y.backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        assert live.total - before == 40_000 + 4


def test_resized_storages_are_followed() -> None:
    live = LiveBytes()
    with FakeTensorMode(), live, live.resizing():
        x = torch.empty(100, dtype=torch.float32)
        x.untyped_storage().resize_(0)
        assert live.total == 0
        x.untyped_storage().resize_(400)
        assert live.live[Kind.gathered] == 400
