"""`model=from_hf`: any Hugging Face folder of a family that Regrow has, without choosing a variant."""

from dataclasses import dataclass
from typing import ClassVar

from omegaconf import MISSING

from regrow.models.config import ModelConfig

__all__ = ["FromHfConfig"]


@dataclass(kw_only=True, slots=True)
class FromHfConfig(ModelConfig):
    """Stands for the family's config until the folder's `config.json` has been read; the run stores that one.

    Attributes:
        path: the Hugging Face folder.
        load_weights: start from the folder's weights, unless another start is asked for.
        vocab_size: rows of the embedding; as in the folder where it is left out.
        max_seq_len: the longest sequence, in tokens; as in the folder where it is left out.
    """

    SCHEMA: ClassVar[tuple[str, str]] = ("model", "from_hf_schema")

    _target_: str = "regrow.models.hf.from_folder"
    path: str = MISSING
    load_weights: bool = True

    def check(self) -> None:
        """Nothing can be said before the folder is read."""
