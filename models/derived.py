"""Tensors that checkpoints of the models here hold beside the weights, in whatever layout."""

import re

__all__ = ["is_derived"]

# Tables of positions of Hugging Face's, Meta's and torchtitan's models, and torchtitan's count of an expert's tokens.
_DERIVED = re.compile(r"rotary_emb\.inv_freq$|^rope\.freqs$|^freqs_cis$|\.tokens_per_expert(_E)?$")


def is_derived(name: str) -> bool:
    """Whether a stored tensor follows from the config, or counts something: a model does not load it."""
    return _DERIVED.search(name) is not None
