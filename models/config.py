"""The fields that every language model has; a family adds its own in `models/<family>/config.py`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from omegaconf import MISSING

__all__ = ["ModelConfig"]


@dataclass(kw_only=True, slots=True)
class ModelConfig(ABC):
    """A language model's dimensions.

    Attributes:
        _target_: the class that is built from this config.
        name: the flavour, for instance `llama3_8b`; part of a run's default name.
        vocab_size: rows of the embedding, at least the tokenizer's size.
        max_seq_len: the longest sequence, in tokens, that the position encoding was made for.
    """

    _target_: str = MISSING
    name: str = MISSING
    vocab_size: int = MISSING
    max_seq_len: int = MISSING

    @abstractmethod
    def check(self) -> None:
        """Raises ValueError, in one sentence, where the dimensions contradict each other."""
