"""What is wrong with data, in one sentence, and words for it."""

import hashlib

from regrow.errors import ConfigError

__all__ = ["DataError", "digest", "shown"]


class DataError(ConfigError):
    """A corpus, tokenizer or token store cannot be used; the message is the whole explanation."""


def shown(text: str) -> str:
    """A text that was read, as a sentence may hold it: on one line, printable and short."""
    quoted = text if text.isprintable() else repr(text)
    return quoted if len(quoted) <= 200 else f"{quoted[:200]}…"


def digest(*parts: str) -> str:
    """A short name for a combination of strings."""
    return hashlib.blake2b("\0".join(parts).encode(errors="surrogatepass"), digest_size=8).hexdigest()
