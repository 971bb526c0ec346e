"""The records of a file in LevelDB's log format, in which W&B writes what it has not sent.

https://github.com/google/leveldb/blob/main/doc/log_format.md, behind a head of seven bytes.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

from regrow.checkpoint.files import open_regular

__all__ = ["read_log_records"]

_FILE_HEAD, _BLOCK = 7, 32768
# Checksum, length, kind.
_HEAD = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
# No record that is one of ours is longer.
_LIMIT_BYTES = 64 << 20


def read_log_records(path: Path) -> Iterator[bytes]:
    """The records up to the first that a kill cut short.

    Raises:
        OSError: the file cannot be read, or is not a regular file.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        position, whole = len(file.read(_FILE_HEAD)), b""
        while True:
            left = _BLOCK - position % _BLOCK
            if left < _HEAD.size:
                position += len(file.read(left))
                continue
            head = file.read(_HEAD.size)
            if len(head) < _HEAD.size:
                return
            _, length, kind = _HEAD.unpack(head)
            part = file.read(length)
            position += _HEAD.size + len(part)
            if len(part) < length or not _FULL <= kind <= _LAST or len(whole) + length > _LIMIT_BYTES:
                return
            whole = part if kind in (_FULL, _FIRST) else whole + part
            if kind in (_FULL, _LAST):
                yield whole
                whole = b""
