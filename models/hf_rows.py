"""Orders of rows in which Hugging Face's files hold a tensor."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

from torch import Tensor

__all__ = ["KeyTransform", "RopeHalves"]


class KeyTransform(ABC):
    """Another order of a tensor's rows, that can be read in parts.

    `regrow.checkpoint.sources.hf_mapping` calls it and says by a protocol of its own what it asks for: models and
    checkpoints do not import each other.
    """

    @abstractmethod
    def needed(self, rows: tuple[int, int], height: int) -> tuple[int, int]:
        """The rows, of `height`, that must be read at once to give the rows asked for: at least those."""

    @abstractmethod
    def forward(self, rows: Tensor, height: int) -> Tensor:
        """Rows as `needed` gives them, of a tensor of `height`, from the files' order to the model's."""

    @abstractmethod
    def inverse(self, rows: Tensor, height: int) -> Tensor:
        """The inverse of `forward`."""


@final
@dataclass(frozen=True, slots=True)
class RopeHalves(KeyTransform):
    """Rows of attention heads whose halves the files hold one after the other, and the model interleaved.

    Hugging Face rotates rows i and i + H/2 of a head of H rows together, Meta's code rows 2i and 2i + 1.

    Attributes:
        heads: how many the tensor has.
    """

    heads: int

    def needed(self, rows: tuple[int, int], height: int) -> tuple[int, int]:
        head_dim = height // self.heads
        return rows[0] // head_dim * head_dim, -(-rows[1] // head_dim) * head_dim

    def forward(self, rows: Tensor, height: int) -> Tensor:
        half = height // self.heads // 2
        return rows.reshape(-1, 2, half, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)

    def inverse(self, rows: Tensor, height: int) -> Tensor:
        half = height // self.heads // 2
        return rows.reshape(-1, half, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
