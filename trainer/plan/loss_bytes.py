"""Sizes of the loss: logits are there some rows at a time, how many depends on the device. Pure but for dtypes."""

from dataclasses import dataclass

import torch

from regrow.models.config import DecoderConfig
from regrow.trainer.parallel.layout import Layout
from regrow.trainer.parallel.output_loss import chunk_rows
from regrow.trainer.parallel.rules import Batch

__all__ = ["LossSizes", "loss_correction"]

# Elements of logits that are float32 at a time where no kernels are compiled; see trainer/loss.py.
_WIDE = {"cpu": 1 << 18, "cuda": 1 << 26}


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSizes:
    """Of one micro-batch on one rank.

    Attributes:
        rows: positions.
        vocabulary: tokens of the rank's part.
        dim: of hidden states.
    """

    rows: int
    vocabulary: int
    dim: int

    @staticmethod
    def of(model: DecoderConfig, layout: Layout, batch: Batch) -> "LossSizes":
        """The sizes under a layout; `rows` are those whose logits a rank computes."""
        rows = min(batch.micro_batch_size, -(-batch.global_batch_size // layout.data_ranks))
        return LossSizes(
            rows=rows * batch.seq_len // layout.cp,
            vocabulary=-(-model.vocab_size // layout.tp),
            dim=model.dim,
        )


def loss_correction(sizes: LossSizes, dtype: torch.dtype, device_type: str, *, compiled: bool) -> int:
    """Bytes that the loss takes on a device beyond a dry run's, which has a CPU's chunks and no block of rows.

    Args:
        sizes: of a micro-batch.
        dtype: of the computation.
        device_type: planned for.
        compiled: whether kernels go through the logits, on a GPU.
    """
    rows, vocabulary = sizes.rows, sizes.vocabulary
    here, there = (chunk_rows(rows, vocabulary, d) for d in ("cpu", device_type))
    more = (there - here) * vocabulary * dtype.itemsize
    if not (compiled and device_type == "cuda"):
        block = min(there, max(1, _WIDE[device_type] // max(1, vocabulary)))
        more += block * vocabulary * torch.promote_types(dtype, torch.float32).itemsize
    if device_type == "cuda" and dtype is torch.bfloat16:
        # A CPU's product of bfloat16 is a tensor of its own before it is added to the weight's gradient.
        more -= vocabulary * sizes.dim * dtype.itemsize
    return more
