"""Positions read in any pieces give what they give read at once, in memory that was computed beforehand."""

from collections.abc import Sequence

import pytest
import torch

from regrow.launch.run.build import build_model
from regrow.models.base import LanguageModel
from regrow.models.config import DecoderConfig
from regrow.models.key_value_cache import KeyValueCache, cache_bytes
from tests.support import TINY_MODEL, typed_config

ROWS, LENGTH = 3, 20


def model_of(*overrides: str) -> tuple[LanguageModel, DecoderConfig]:
    """A tiny model with random weights, in float64."""
    config = typed_config([*TINY_MODEL, *overrides])
    model = build_model(config).double()
    model.init_buffers(torch.device("cpu"), 64)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    assert isinstance(config.model, DecoderConfig)
    return model.eval(), config.model


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("pieces", [[20], [1] * 20, [7, 1, 1, 8, 3], [19, 1]])
@torch.no_grad()
def test_pieces_give_what_the_whole_gives(pieces: Sequence[int], window: int) -> None:
    model, _ = model_of(f"model.window={window}")
    ids = torch.randint(0, 320, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    whole = model(ids)
    padding = torch.tensor([0, 4, 11])
    cache, found = KeyValueCache(padding, LENGTH), []
    shifted = torch.stack(
        [torch.cat([ids.new_zeros(int(p)), row[: LENGTH - int(p)]]) for p, row in zip(padding, ids, strict=True)]
    )
    positions = (torch.arange(LENGTH) - padding[:, None]).clamp(min=0)
    start = 0
    for size in pieces:
        cache.begin(size)
        part = slice(start, start + size)
        found.append(model(shifted[:, part], mask=cache, positions=positions[:, part]))
        start += size
    logits = torch.cat(found, 1)
    for row, before in enumerate(padding.tolist()):
        torch.testing.assert_close(logits[row, before:], whole[row, : LENGTH - before], rtol=1e-10, atol=1e-12)
    assert not logits.isnan().any()
    with pytest.raises(ValueError, match="there is for 20, and 20 are held where 1 more"):
        cache.begin(1)


@torch.no_grad()
def test_memory_is_as_computed_and_rows_can_be_left_out() -> None:
    model, config = model_of()
    ids = torch.randint(0, 320, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    cache = KeyValueCache(torch.zeros(ROWS, dtype=torch.int64), LENGTH + 1)
    cache.begin(LENGTH)
    model(ids, mask=cache)
    assert cache.held_bytes == cache_bytes(config, ROWS, LENGTH + 1, torch.float64)
    cache.keep(torch.tensor([2, 0]))
    assert cache.held_bytes == cache_bytes(config, 2, LENGTH + 1, torch.float64)
    cache.begin(1)
    after = model(ids[[2, 0], :1], mask=cache, positions=torch.full((2, 1), LENGTH))
    longer = model(torch.cat([ids[[2, 0]], ids[[2, 0], :1]], 1))
    torch.testing.assert_close(after[:, -1], longer[:, -1], rtol=1e-10, atol=1e-12)
