"""The bytes of .gz, .zst, .bz2 and .xz files: all their streams, one after another, none too much at a time."""

import bz2
import gzip
import io
import lzma
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, final

import zstandard

__all__ = ["DAMAGE", "DamagedStreamError", "decompressed"]

# What is put together in memory at once; a kibibyte of zstd's shortest blocks becomes 32 MiB.
_BUFFER_BYTES = 1 << 16
_ZSTD_STEP_BYTES = 1 << 10
# Of an .xz file's dictionary; xz -9 needs 65 MiB. The limit of 128 MiB that zstd's library has on a window holds.
_XZ_MEMORY_BYTES = 256 << 20


class DamagedStreamError(Exception):
    """What was compressed by bz2 or xz is damaged."""


# The errors of damaged files, as the libraries raise them.
DAMAGE = (gzip.BadGzipFile, zlib.error, zstandard.ZstdError, DamagedStreamError)


class _StreamReader(io.RawIOBase, ABC):
    """The bytes of all streams of a file; tells a cut file from a whole one, as the libraries' readers do not."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, out: Any) -> int:
        """Fills `out`; 0 at the end.

        Raises:
            EOFError: the file ends within a stream, or is empty.
        """
        while not self._ready:
            more = self._more()
            if more is None:
                return 0
            self._ready = memoryview(more)
        count = min(len(out), len(self._ready))
        out[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    @abstractmethod
    def _more(self) -> bytes | None:
        """The next bytes, which may be none yet; None at the end."""


@final
class _ZstdReader(_StreamReader):
    """A .zst file's frames."""

    def __init__(self, raw: IO[bytes]) -> None:
        super().__init__(raw)
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame = self._decompressor.decompressobj()
        self._pending = b""

    def _more(self) -> bytes | None:
        data = self._pending or self._raw.read(_ZSTD_STEP_BYTES)
        if not data:
            if not self._frame.eof:
                raise EOFError
            return None
        if self._frame.eof:
            self._frame = self._decompressor.decompressobj()
        more = bytes(self._frame.decompress(data))
        self._pending = self._frame.unused_data if self._frame.eof else b""
        return more


@final
class _BoundedReader(_StreamReader):
    """The streams of a .bz2 or .xz file, whose libraries give as little at a time as they are asked for.

    Args:
        raw: the file.
        begin: makes the decompressor of one stream.
        padded: zeros may lie between streams and after the last.
    """

    def __init__(
        self, raw: IO[bytes], begin: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor], *, padded: bool
    ) -> None:
        super().__init__(raw)
        self._begin = begin
        self._stream = begin()
        self._padded = padded

    def _more(self) -> bytes | None:
        data = b""
        if self._stream.eof:
            data = self._next_stream()
            if not data:
                return None
            self._stream = self._begin()
        elif self._stream.needs_input:
            data = self._raw.read(_BUFFER_BYTES)
            if not data:
                raise EOFError
        try:
            return self._stream.decompress(data, _BUFFER_BYTES)
        except (OSError, lzma.LZMAError) as error:
            raise DamagedStreamError(str(error)) from error

    def _next_stream(self) -> bytes:
        """What follows the stream that has ended."""
        data = self._stream.unused_data or self._raw.read(_BUFFER_BYTES)
        while self._padded and data and not (data := data.lstrip(b"\0")):
            data = self._raw.read(_BUFFER_BYTES)
        return data


@contextmanager
def decompressed(raw: io.BufferedReader, ending: str) -> Iterator["io.BufferedReader[Any]"]:
    """A file's bytes.

    Args:
        raw: the file at its beginning.
        ending: of its name; one that is not a compression's leaves the bytes as they are.

    Raises:
        EOFError: it is cut short, or empty though compressed; on reading.
    """
    reader: io.RawIOBase
    if ending.endswith(".gz"):
        if len(raw.peek(2)) < 2:
            raise EOFError  # the gzip module takes nothing at all for an empty text
        reader = gzip.GzipFile(fileobj=raw)  # type: ignore[assignment]
    elif ending.endswith(".zst"):
        reader = _ZstdReader(raw)
    elif ending.endswith(".bz2"):
        reader = _BoundedReader(raw, bz2.BZ2Decompressor, padded=False)
    elif ending.endswith(".xz"):
        reader = _BoundedReader(raw, _xz_decompressor, padded=True)
    else:
        yield raw
        return
    with reader, io.BufferedReader(reader, _BUFFER_BYTES) as file:
        yield file


def _xz_decompressor() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES)
