"""What attention is given of a batch's documents: chosen with the layout, made once a micro-batch, on the device."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regrow.models.attention import Mask, Sight, choose_kernel, dense_mask, first_seen
from regrow.models.attention_kernels import make_blocks, segments_of, segments_of_chunk
from regrow.models.base import LanguageModel
from regrow.models.config import AttentionKernel, DecoderConfig
from regrow.models.documents import Documents, whole_sequences
from regrow.models.layers import Attention
from regrow.trainer.config import ContextMethod
from regrow.trainer.parallel.sequence import ContextGroup, held_chunks

__all__ = ["AttentionPlan", "plan_attention", "prepare_documents"]

# The ranks that share sequences, and how attention sees all of a sequence.
SequenceMethod = tuple[ContextGroup, ContextMethod]


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionPlan:
    """How this rank's layers attend.

    Attributes:
        windows: of the layers, each once; 0 is none.
        kernel: what computes where there are documents or a window.
        sequence: the ranks that share sequences and their method, None without context parallelism.
        takes_documents: whether the model's layers take documents as they are, or a mask of seq × seq.
    """

    windows: tuple[int, ...]
    kernel: AttentionKernel
    sequence: SequenceMethod | None
    takes_documents: bool

    def mask(self, documents: Documents | None, tokens: Tensor) -> Mask:
        """What the model is given as `mask` for a micro-batch; None where attention is causal and no more.

        Args:
            documents: of the micro-batch, wherever they lie.
            tokens: int64 `(B, S)`, of whole sequences, on the device.
        """
        if documents is None:
            if not any(self.windows):
                return None
            rows, length = tokens.shape
            documents = whole_sequences(rows, length, tokens.device)
        documents = documents.to(tokens.device)
        if self.takes_documents:
            return prepare_documents(documents, self.windows, self.kernel, self.sequence)
        last_S = torch.arange(documents.longest, dtype=torch.int32, device=tokens.device)
        return dense_mask(documents.starts, last_S, documents.longest).allowed


def plan_attention(
    model: LanguageModel,
    config: DecoderConfig,
    dtype: torch.dtype,
    sequence: SequenceMethod | None,
    *,
    accelerator: bool,
) -> AttentionPlan:
    """Chooses for a model, of whose layers nothing has been changed yet.

    Args:
        model: this rank's layers or all.
        config: the model's.
        dtype: of queries, keys and values.
        sequence: see `AttentionPlan`.
        accelerator: whether a GPU computes, or its path is taken on the meta device.
    """
    layers = [m for m in model.modules() if isinstance(m, Attention)]
    # A layer of one's own, which computes with the mask, is given what it always was.
    own = not layers or any(type(m).forward is not Attention.forward for m in layers)
    return AttentionPlan(
        windows=tuple(sorted({m.window for m in layers})),
        kernel=choose_kernel(config.attention, dtype, config.head_width, accelerator=accelerator),
        sequence=sequence,
        takes_documents=not own or sequence is not None,
    )


def prepare_documents(
    documents: Documents,
    windows: Iterable[int],
    kernel: AttentionKernel,
    sequence: SequenceMethod | None,
) -> Documents:
    """Makes of a batch's documents what attention takes, on the device and without waiting for it.

    Args:
        documents: of whole sequences, on the device.
        windows: of the layers.
        kernel: that computes.
        sequence: the ranks that share sequences and their method, None without context parallelism.
    """
    made: dict[int, Any] = {}
    for window in sorted(set(windows)):
        first_BS = first_seen(documents.starts, window)
        if sequence is None or sequence[1] is ContextMethod.ulysses:
            made[window] = _sight(documents, first_BS, 0, documents.longest, kernel)
        elif sequence[1] is ContextMethod.ring:
            made[window] = first_BS
        else:
            chunks = held_chunks(sequence[0], documents.longest)
            made[window] = tuple(_sight(documents, first_BS, start, stop, kernel) for start, stop in chunks)
    return documents._replace(prepared=made)


def _sight(documents: Documents, first_BS: Tensor, start: int, stop: int, kernel: AttentionKernel) -> Sight:
    """What the positions from `start` to `stop` see of the keys up to `stop`."""
    if kernel is AttentionKernel.varlen:
        whole = (start, stop) == (0, documents.longest)
        return segments_of(documents) if whole else segments_of_chunk(documents, start, stop)
    last_T = torch.arange(start, stop, dtype=torch.int32, device=first_BS.device)
    make = make_blocks if kernel is AttentionKernel.flex else dense_mask
    return make(first_BS[:, start:stop], last_T, stop)
