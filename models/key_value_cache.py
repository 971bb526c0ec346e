"""Keys and values of the positions that were read, so that one more position costs one position's work.

Rows end together: one that is shorter than the longest begins later, behind padding that nothing sees.

Shapes: B rows, T new positions, S positions that there is room for, N query heads, K key/value heads, G = N / K,
H head width.
"""

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from regrow.models.config import DecoderConfig
from regrow.models.cpu import plain_attention

__all__ = ["KeyValueCache", "cache_bytes"]


def cache_bytes(config: DecoderConfig, rows: int, room: int, dtype: torch.dtype) -> int:
    """Bytes of a cache of a whole model: 2 · layers · B · S · K · H elements.

    Args:
        config: of the model.
        rows: B.
        room: S.
        dtype: of keys and values, which is that of the computation.
    """
    elements = 2 * config.n_layers * rows * room * config.n_kv_heads * config.head_width
    return elements * dtype.itemsize


@final
class KeyValueCache:
    """What a decoder hands on to its `Attention` layers as `mask`; each asks it once a forward pass, in their order.

    Args:
        padding_B: int64 `(B,)`, positions before each row's first.
        room: S.

    Attributes:
        length: positions that are held, padding among them.
        room: S.
    """

    def __init__(self, padding_B: Tensor, room: int) -> None:
        self.length, self.room = 0, room
        self._padding_B = padding_B
        self._counts_BS = self._counted()
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._layer = 0

    def _counted(self) -> Tensor | None:
        """Which positions are no padding, bool `(B, 1, 1, S)`; None: all of them."""
        if not bool(self._padding_B.any()):
            return None
        positions_S = torch.arange(self.room, device=self._padding_B.device)
        return (positions_S >= self._padding_B[:, None])[:, None, None]

    @property
    def held_bytes(self) -> int:
        """Of memory."""
        return sum(t.numel() * t.element_size() for t in (*self._keys, *self._values))

    def begin(self, new: int) -> None:
        """Says that the next forward pass reads `new` positions.

        Raises:
            ValueError: there is no room for them.
        """
        if self.length + new > self.room:
            raise ValueError(
                f"there must be room for all positions, but there is for {self.room}, and {self.length} are held "
                f"where {new} more are to be read; make the cache larger"
            )
        self.length += new
        self._layer = 0

    def attend(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, window: int) -> Tensor:
        """Attention of the new positions to themselves and to all before them, `(B, T, N, H)`.

        Args:
            q_BTNH: of the new positions.
            k_BTKH: of the new positions; they are kept.
            v_BTKH: likewise.
            window: keys that a position sees at most, itself among them; 0 is no limit.
        """
        b, t, n, h = q_BTNH.shape
        heads = k_BTKH.shape[2]
        if self._layer == len(self._keys):
            # Each head's positions lie one after another, as they are read.
            self._keys.append(k_BTKH.new_empty(b, heads, self.room, h))
            self._values.append(v_BTKH.new_empty(b, heads, self.room, h))
        keys_BKSH, values_BKSH = self._keys[self._layer], self._values[self._layer]
        self._layer += 1
        start, stop = self.length - t, self.length
        keys_BKSH[:, :, start:stop] = k_BTKH.transpose(1, 2)
        values_BKSH[:, :, start:stop] = v_BTKH.transpose(1, 2)
        if t > 1:
            keys_BSKH, values_BSKH = (x[:, :, :stop].transpose(1, 2) for x in (keys_BKSH, values_BKSH))
            return plain_attention(q_BTNH, keys_BSKH, values_BSKH, self._mask(start, stop, window))
        first = max(0, stop - window) if window else 0
        out_BKGH = F.scaled_dot_product_attention(
            # The query heads that share a key head are its queries, so that nothing is repeated.
            q_BTNH.reshape(b, heads, n // heads, h),
            keys_BKSH[:, :, first:stop],
            values_BKSH[:, :, first:stop],
            attn_mask=None if self._counts_BS is None else self._counts_BS[..., first:stop],
        )
        return out_BKGH.reshape(b, 1, n, h)

    def _mask(self, start: int, stop: int, window: int) -> Tensor | None:
        """What the positions `start` to `stop` see of those before `stop`, bool `(B or 1, 1, T, stop)`; None: all
        before them, and themselves.
        """
        if start == 0 and self._counts_BS is None and not 0 < window < stop:
            return None
        keys_S = torch.arange(stop, device=self._padding_B.device)
        queries_T1 = keys_S[start:, None]
        seen_TS = keys_S <= queries_T1
        if window:
            seen_TS &= queries_T1 - keys_S < window
        if self._counts_BS is None:
            return seen_TS[None, None]
        # Padding sees itself: a softmax over nothing would be no number, and spread.
        return (seen_TS & self._counts_BS[..., :stop]) | (keys_S == queries_T1)

    def keep(self, rows: Tensor) -> None:
        """Forgets all rows but these.

        Args:
            rows: int64, their numbers.
        """
        self._padding_B = self._padding_B[rows]
        self._counts_BS = self._counted()
        self._keys = [k[rows] for k in self._keys]
        self._values = [v[rows] for v in self._values]
