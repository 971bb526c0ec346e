"""What a run reads: the token store of each of its sources."""

from collections.abc import Mapping
from pathlib import Path
from typing import final

from regrow.trainer.data.source import DataError, digest
from regrow.trainer.data.token_store import TokenStore

__all__ = ["Corpus"]


@final
class Corpus:
    """The opened stores of all sources, which share a tokenizer.

    Attributes:
        stores: by the source's name, which is empty where there is one source and no mixture.
        fingerprint: of every document's length and content, and the tokenizer.

    Args:
        folders: the stores, by name.

    Raises:
        FileNotFoundError, StoreDamagedError, DataError: see `TokenStore`; or the tokenizers differ.
    """

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.stores = {name: TokenStore(folder) for name, folder in folders.items()}
        first, *others = self.stores.items()
        for name, store in others:
            for what in ("tokenizer_hash", "end_of_text"):
                made, wanted = getattr(store.index, what), getattr(first[1].index, what)
                if made != wanted:
                    raise DataError(
                        f"data.sources must be tokenised alike, but {name} has {what} {made} and {first[0]} "
                        f"{wanted}; tokenize them with the same data.tokenizer and data.eos_token"
                    )
        fingerprints = {name: store.index.fingerprint for name, store in self.stores.items()}
        self.fingerprint = (
            fingerprints[""]
            if list(fingerprints) == [""]
            else digest("mixture", *(part for pair in sorted(fingerprints.items()) for part in pair))
        )

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer that made the ids."""
        return next(iter(self.stores.values())).tokenizer_file

    @property
    def vocab_size(self) -> int:
        """One more than the tokenizer's largest id."""
        return max(store.index.vocab_size for store in self.stores.values())
