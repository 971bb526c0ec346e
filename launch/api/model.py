"""`regrow.load_model`: a model and its tokenizer out of a run, a step or a Hugging Face folder, for a notebook."""

from pathlib import Path

import torch
from tokenizers import Tokenizer

from regrow.launch.commands.loaded_model import open_model
from regrow.models.base import LanguageModel

__all__ = ["load_model"]


def load_model(
    place: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    tokenizer: str | Path | None = None,
) -> tuple[LanguageModel, Tokenizer]:
    """A model in eval mode with its weights, and its tokenizer.

    Every byte of a step of Regrow's is verified against its manifest before it is used. A step that is being read is
    not removed by a run that is still training.

    Args:
        place: a run (its newest complete step), a step, a Hugging Face folder, or any other checkpoint that says
            which model it is of; a path or a URL.
        dtype: of the weights and of the computation; the stored weights' own without it.
        device: where the model will be.
        tokenizer: a `tokenizer.json` or a folder with one, where the checkpoint has none beside it.

    Returns:
        The model, called with token ids int64 `(batch, seq)` for logits `(batch, seq, vocab)`, and the tokenizer,
        with `encode(text).ids` and `decode(ids)`.

    Raises:
        ValueError: there is no such checkpoint, its model or its tokenizer cannot be found out, or a byte of it is
            not what was written.
    """
    loaded = open_model(place, dtype=dtype, device=device, tokenizer=tokenizer)
    return loaded.model, loaded.tokenizer
