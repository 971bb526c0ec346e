"""The training loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.data.loader import IGNORE

__all__ = ["attention_mask", "summed_cross_entropy"]


def summed_cross_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over the labels that count; computed in float32 or better."""
    wide = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORE, reduction="sum")


def attention_mask(documents_BT: Tensor) -> Tensor:
    """Causal attention within documents: bool `(batch, 1, seq, seq)`, true where allowed."""
    same_BTS = documents_BT[:, :, None] == documents_BT[:, None, :]
    return same_BTS.tril()[:, None]
