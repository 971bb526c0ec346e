"""Reading the JSON documents of a run: parsed by a schema with bounds before anything that they say is acted on.

A schema is a dataclass or NamedTuple whose fields bear msgspec's constraints. Fields that a later version added are
passed over; a field that is missing, of another type or out of its bounds makes the whole document unreadable.
"""

import json
import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

__all__ = [
    "LONGEST_FLAT_NAME",
    "Count",
    "DocumentError",
    "FileName",
    "FlatName",
    "Token",
    "convert_document",
    "is_file_name",
    "is_flat_name",
    "parse_json",
    "read_document",
]

T = TypeVar("T")

# A number of bytes, items, steps or ranks.
Count = Annotated[int, Meta(ge=0, le=2**62)]
# The name of a file or folder that must stay in its folder: no separator, not `.` or `..`.
_FILE_NAME = r"^(?!\.\.?\Z)[^/\\\x00]{1,255}\Z"
FileName = Annotated[str, Meta(min_length=1, max_length=255, pattern=_FILE_NAME)]
# What ends up in a folder's name: letters, digits and hyphens.
Token = Annotated[str, Meta(max_length=64, pattern=r"^[A-Za-z0-9_-]*\Z")]
# A tensor's name.
LONGEST_FLAT_NAME = 4096
FlatName = Annotated[str, Meta(min_length=1, max_length=LONGEST_FLAT_NAME)]


def is_file_name(text: str) -> bool:
    """Whether a text from a file of another program names a file beside it: no path, and on one line."""
    return re.match(_FILE_NAME, text) is not None and text.isprintable()


def is_flat_name(text: str) -> bool:
    """Whether a text from a file of another program can be a tensor's name: of one line, and not too long."""
    return 0 < len(text) <= LONGEST_FLAT_NAME and text.isprintable()


class DocumentError(ValueError):
    """A document is not what its schema says; the message gives the reason, without the document's name."""


def parse_json(body: bytes) -> Any:
    """The value of a JSON document.

    Raises:
        DocumentError: it is not JSON: cut short, not UTF-8, nested too deeply, a number of too many digits.
    """
    try:
        return json.loads(body)
    except RecursionError:
        raise DocumentError("it is nested too deeply") from None
    except UnicodeDecodeError:
        raise DocumentError("it is not UTF-8") from None
    except ValueError as error:
        raise DocumentError(f"it is not JSON: {error}") from None


def convert_document(value: Any, schema: type[T]) -> T:
    """A parsed value as the schema's type.

    Raises:
        DocumentError: it does not fit.
    """
    try:
        return msgspec.convert(value, schema)
    except RecursionError:
        raise DocumentError("it is nested too deeply") from None
    except msgspec.ValidationError as error:
        raise DocumentError(_lower(str(error))) from None
    except (ValueError, TypeError) as error:
        # A check in the schema's own __post_init__ arrives as it is.
        raise DocumentError(str(error)) from None


def read_document(body: bytes, schema: type[T]) -> T:
    """A JSON document as the schema's type.

    Raises:
        DocumentError: it is no JSON, or does not fit.
    """
    return convert_document(parse_json(body), schema)


def _lower(text: str) -> str:
    return f"{text[:1].lower()}{text[1:]}"
