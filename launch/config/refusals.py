"""From an error to a refusal: what a user caused becomes one sentence, anything else stays the error that it is."""

from collections.abc import Iterator
from contextlib import contextmanager

from regrow.launch.config.errors import UserError, describe

__all__ = ["Refused", "refusing"]


class Refused(UserError):
    """Bad input found before training."""


@contextmanager
def refusing() -> Iterator[None]:
    """Turns what a user can cause before training into the sentence for it.

    Raises:
        Refused: for what `describe` has a sentence for, and for what the operating system refuses. Any other error,
            a ValueError too, is a bug and left alone.
    """
    try:
        yield
    except OSError as error:
        raise Refused(describe(error) or _sentence_of(error)) from error
    except Exception as error:
        sentence = describe(error)
        if sentence is None:
            raise
        raise Refused(sentence) from error


def _sentence_of(error: OSError) -> str:
    """Without a number: of an operating system's own error, the path and the reason."""
    if error.errno is None:
        return str(error)  # a sentence of ours
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or type(error).__name__}; check that it is there and may be used"
