"""Dimensions of the model."""

from dataclasses import dataclass
from typing import ClassVar

from omegaconf import MISSING

from regrow.models.config import DecoderConfig, divisors

__all__ = ["GegluConfig"]


@dataclass(kw_only=True, slots=True)
class GegluConfig(DecoderConfig):
    """A decoder with GEGLU (Shazeer 2020, arXiv:2002.05202); a head's width is `dim / n_heads`.

    Attributes:
        ffn_dim: width of the feed-forward layer.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("model", "geglu_schema")

    _target_: str = "regrow.launch.template.mylab.model.model.Geglu"
    ffn_dim: int = MISSING

    def check(self) -> None:
        """Raises ValueError where the dimensions contradict each other."""
        if self.n_heads > 0 and self.dim % (2 * self.n_heads):
            raise ValueError(
                f"model.n_heads must divide half of model.dim ({self.dim // 2}), for RoPE turns pairs, but is "
                f"{self.n_heads}; use {divisors(self.dim // 2, around=self.n_heads)}"
            )
        self.check_dimensions("ffn_dim")
