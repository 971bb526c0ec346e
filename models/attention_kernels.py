"""What a GPU takes for documents and windows, of size T and (T / 128)² rather than T²: segments, and blocks.

Segments go to the kernels for sequences of several lengths (torch.nn.attention.varlen, FlashAttention), blocks to
FlexAttention. Shapes are those of `attention.py`, and C queries of a chunk, N segments, Q and R blocks of queries and
keys.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from regrow.models.cpu import plain_attention
from regrow.models.documents import Documents
from regrow.torch_compat import varlen_attention

__all__ = ["Blocks", "Segments", "make_blocks", "segments_of", "segments_of_chunk"]

_BLOCK = 128


@functools.cache
def _compiled(device_type: str) -> Any:
    """FlexAttention by itself; on a CPU, where it is there to be checked, nothing is gained by compiling it."""
    return torch.compile(flex_attention, backend="eager" if device_type == "cpu" else "inductor")


class Segments(NamedTuple):
    """Queries and keys of the rows laid end to end, cut into segments; a segment's last query is its last key.

    Attributes:
        queries: int32 `(N + 1,)`, where segments begin and end among the queries.
        keys: likewise among the keys; every key is in a segment, whether or not a query sees it.
        most_queries: that a segment has, or more.
        most_keys: likewise.
    """

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int

    def attend(self, q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, window: int) -> Tensor:
        """See `Sight`."""
        q_QNH, k_SKH, v_SKH = (x.flatten(0, 1) for x in (q_BTNH, k_BSKH, v_BSKH))
        out = varlen_attention(
            q_QNH,
            k_SKH,
            v_SKH,
            self.queries,
            self.keys,
            self.most_queries,
            self.most_keys,
            # Positions before one's own; without a limit this is what the kernels know as causal.
            window_size=(window - 1 if window else -1, 0),
        )
        return out.view(q_BTNH.shape)


class Blocks(NamedTuple):
    """Which blocks of keys each block of queries sees, in whole or in part.

    Attributes:
        mask: FlexAttention's.
    """

    mask: BlockMask

    def attend(self, q_BTNH: Tensor, k_BSKH: Tensor, v_BSKH: Tensor, window: int) -> Tensor:
        """See `Sight`; the blocks have the window in them."""
        if q_BTNH.device.type == "meta":
            # FlexAttention knows no shapes without values; nothing is computed there.
            return plain_attention(q_BTNH, k_BSKH, v_BSKH, torch.empty((), dtype=torch.bool, device="meta"))
        # A block that is being compiled takes it in.
        flex = flex_attention if torch.compiler.is_compiling() else _compiled(q_BTNH.device.type)
        out_BNTH = flex(
            q_BTNH.transpose(1, 2),
            k_BSKH.transpose(1, 2),
            v_BSKH.transpose(1, 2),
            block_mask=self.mask,
            enable_gqa=q_BTNH.shape[2] != k_BSKH.shape[2],
        )
        out_BTNH: Tensor = out_BNTH.transpose(1, 2)
        return out_BTNH


def segments_of(documents: Documents) -> Segments:
    """A batch's documents."""
    return Segments(documents.boundaries, documents.boundaries, documents.most, documents.most)


def segments_of_chunk(documents: Documents, start: int, stop: int) -> Segments:
    """The documents as queries `start` to `stop` of each row see them, with keys 0 to `stop`.

    Documents that end before `start` are segments without queries, and what comes after `stop` is empty.
    """
    rows_N = documents.boundaries // documents.longest
    within_N = documents.boundaries - rows_N * documents.longest

    def cut(first: int) -> Tensor:
        return rows_N * (stop - first) + (within_N - first).clamp(0, stop - first)

    return Segments(cut(start), cut(0), min(documents.most, stop - start), min(documents.most, stop))


def make_blocks(first_BT: Tensor, last_T: Tensor, keys: int) -> Blocks:
    """Blocks for queries that see the keys `first` to `last`; of size (T / 128)², and made without waiting.

    Args:
        first_BT: int32 `(B, T)`.
        last_T: int32 `(T,)`.
        keys: how many there are.
    """
    queries, device = last_T.shape[0], first_BT.device
    begins_R = torch.arange(0, keys, _BLOCK, dtype=torch.int32, device=device)
    ends_R = begins_R + (_BLOCK - 1)
    # Blocks that are not whole at the end of the queries repeat the last of them.
    rows = torch.arange(-(-queries // _BLOCK) * _BLOCK, device=device).clamp(max=queries - 1)
    first_BQC, last_QC = (x[..., rows].view(*x.shape[:-1], -1, _BLOCK) for x in (first_BT, last_T))
    some_BQR = (begins_R <= last_QC.amax(-1)[:, None]) & (ends_R >= first_BQC.amin(-1)[..., None])
    whole_BQR = (begins_R >= first_BQC.amax(-1)[..., None]) & (ends_R <= last_QC.amin(-1)[:, None])
    # FlexAttention calls whole what lies within the sequences.
    inside_Q = torch.arange(_BLOCK, rows.shape[0] + 1, _BLOCK, device=device) <= queries
    whole_BQR &= (ends_R < keys) & inside_Q[:, None]

    def sees(b: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k >= first_BT[b, q]) & (k <= last_T[q])

    mask = BlockMask.from_kv_blocks(
        *_listed(some_BQR & ~whole_BQR),
        *_listed(whole_BQR),
        BLOCK_SIZE=_BLOCK,
        mask_mod=sees,
        seq_lengths=(queries, keys),
    )
    return Blocks(mask)


def _listed(chosen_BQR: Tensor) -> tuple[Tensor, Tensor]:
    """For each block of queries how many are chosen, and which, those first: `(B, 1, Q)` and `(B, 1, Q, R)`."""
    chosen_B1QR = chosen_BQR[:, None].to(torch.int32)
    which = chosen_B1QR.argsort(dim=-1, descending=True, stable=True)
    return chosen_B1QR.sum(-1, dtype=torch.int32), which.to(torch.int32)
