"""Windows into which a split's documents are packed, and the file that remembers how.

A file holds a checksum, then document, first token and positions of every piece and the windows' first pieces, as
int64. The checksum is also over everything that decides the packing, so a file is good for that alone.
"""

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, final

import numpy as np
import numpy.typing as npt
import xxhash

from regrow.checkpoint.files import fsync_folder, naming, open_regular, temporary_path
from regrow.trainer.data.config import TooLong
from regrow.trainer.data.label_mask import LabelMask
from regrow.trainer.data.packing import Packed, pack, tally
from regrow.trainer.data.source import DataError, digest
from regrow.trainer.data.token_store import TokenStore
from regrow.trainer.data.windows import IGNORE, Windows, documents_of_split

__all__ = ["PackedWindows", "packed_once"]

log = logging.getLogger(__name__)

Int64s = npt.NDArray[np.int64]
# Raised whenever the same documents are packed in another way.
_PACKING = "1"
_VALUE = np.dtype("<i8")
_CHECKSUM_BYTES = 16


@final
class PackedWindows(Windows):
    """The split's documents, packed by best fit into windows of `seq_len` positions; see `packing`.

    A document is in the validation split by its hash, see `documents_of_split`.

    Attributes:
        seq_len: positions of a window.
        packed: what is where; its documents are numbered within the split.

    Args:
        store: the corpus.
        seq_len: see above.
        validation_fraction: see `documents_of_split`.
        validation: which split.
        too_long: what becomes of a document that no window holds.
        cache: a folder that remembers packings; None packs anew.
        mask: which tokens are labels; None: all are.

    Raises:
        DataError: `seq_len` is no size of a window, or the mask is of another store.
    """

    WITHIN_DOCUMENTS: ClassVar[bool] = True

    def __init__(
        self,
        store: TokenStore,
        seq_len: int,
        validation_fraction: float,
        *,
        validation: bool,
        too_long: TooLong,
        cache: Path | None = None,
        mask: LabelMask | None = None,
    ) -> None:
        if mask is not None and len(mask) != store.index.tokens:
            raise DataError(
                f"the label mask of {store.folder} must have a value for each of its {store.index.tokens} tokens, "
                f"but has {len(mask)}; make it again"
            )
        chosen = documents_of_split(store, validation_fraction, validation=validation)
        self._store, self._mask, self.seq_len = store, mask, seq_len
        self._starts = (np.cumsum(store.lengths) - store.lengths)[chosen]
        lengths = store.lengths[chosen]
        if cache is None:
            self.packed = pack(lengths, seq_len, too_long)
        else:
            split = f"{'validation' if validation else 'training'} at {validation_fraction!r}"
            self.packed = packed_once(lengths, seq_len, too_long, cache, f"{store.index.fingerprint}, {split}")
        self._labels = self._count_labels()
        log.info(
            "%s split of %s: %s", "validation" if validation else "training", store.folder, _sentence(self.packed)
        )

    def __len__(self) -> int:
        return len(self.packed)

    def labels(self, windows: Int64s) -> Int64s:
        return self._labels[windows]

    def _count_labels(self) -> Int64s:
        """The labels of each window."""
        packed = self.packed
        if not len(packed):
            return np.zeros(0, dtype=np.int64)
        counts = packed.positions
        if self._mask is not None:
            starts = self._starts[packed.documents] + packed.firsts + 1
            counts = self._mask.count(starts, starts + packed.positions)
        return np.add.reduceat(counts, packed.window_starts[:-1])

    def read(self, window: int, tokens: Int64s, labels: Int64s, documents: Int64s | None) -> None:
        """See `Windows`: where no piece is, the token is 0 and there is no label and no document; a mask may take
        further labels away.
        """
        begin, end = self.packed.window_starts[window : window + 2].tolist()
        positions = self.packed.positions[begin:end]
        starts = self._starts[self.packed.documents[begin:end]] + self.packed.firsts[begin:end]
        both, masked = np.empty(self.seq_len + 1, dtype=np.int64), np.empty(self.seq_len, dtype=bool)
        at = 0
        for start, count in zip(starts.tolist(), positions.tolist(), strict=True):
            self._store.read(start, both[: count + 1])
            tokens[at : at + count] = both[:count]
            labels[at : at + count] = both[1 : count + 1]
            if self._mask is not None:
                self._mask.read(start + 1, masked[at : at + count])
            at += count
        if self._mask is not None:
            labels[:at][~masked[:at]] = IGNORE
        tokens[at:] = 0
        labels[at:] = IGNORE
        if documents is not None:
            documents[:at] = np.repeat(np.arange(end - begin), positions)
            documents[at:] = end - begin


def _sentence(packed: Packed) -> str:
    """What became of documents, in words."""
    counts = packed.tally
    return (
        f"{counts.documents} documents fill {100 * packed.fill_rate:.2f} % of {len(packed)} windows of "
        f"{packed.capacity} tokens ({counts.dropped} dropped, {counts.of_one_token} of them of one token, "
        f"{counts.cut} cut, {counts.split} split, {counts.tokens_lost} tokens lost)"
    )


def packed_once(lengths: Int64s, capacity: int, too_long: TooLong, folder: Path, documents: str) -> Packed:
    """`pack`, or what it gave before.

    A file that cannot be read, or is not what was written, is made again. One that cannot be written costs the next
    start the time of packing, nothing else.

    Args:
        lengths: see `pack`.
        capacity: see `pack`.
        too_long: see `pack`.
        folder: where files are kept; made if need be.
        documents: identifies the documents: the store's fingerprint, and which of them.

    Raises:
        DataError: see `pack`.
    """
    identity = f"packing {_PACKING} of {documents}: {too_long.value} into {capacity}"
    path = folder / f"{digest(identity)}.packed"
    try:
        found = _load(path, identity, lengths, capacity, too_long)
        if found is not None:
            return found
        log.warning("%s is damaged; the documents are packed again", path)
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("%s cannot be read (%s); the documents are packed again", path, error.strerror or error)
    packed = pack(lengths, capacity, too_long)
    try:
        _store(path, identity, packed)
    except OSError as error:
        log.warning("%s cannot be written (%s); the next start packs again", path, error.strerror or error)
    return packed


def _checksum(identity: str, arrays: list[Int64s]) -> bytes:
    hashed = xxhash.xxh3_128(identity.encode())
    for array in arrays:
        hashed.update(array.data)
    return hashed.digest()


def _store(path: Path, identity: str, packed: Packed) -> None:
    """Writes a packing; readers see no file or a whole one."""
    columns = [packed.documents, packed.firsts, packed.positions, packed.window_starts]
    arrays = [np.ascontiguousarray(column, dtype=_VALUE) for column in columns]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        with naming(path), temporary.open("wb") as out:
            out.write(_checksum(identity, arrays))
            for array in arrays:
                out.write(array.data)
            out.flush()
            os.fsync(out.fileno())
        temporary.rename(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    with naming(path):
        fsync_folder(path.parent)


def _load(path: Path, identity: str, lengths: Int64s, capacity: int, too_long: TooLong) -> Packed | None:
    """A packing as it was written, mapped; None where it is not.

    Raises:
        OSError: it cannot be read.
        DataError: see `pack`.
    """
    counts = tally(lengths, capacity, too_long)
    pieces = counts.pieces
    with os.fdopen(open_regular(path), "rb") as file:
        values, rest = divmod(os.fstat(file.fileno()).st_size - _CHECKSUM_BYTES, _VALUE.itemsize)
        # There is no window without a piece.
        if rest or not 3 * pieces + 1 <= values <= 4 * pieces + 1:
            return None
        checksum = file.read(_CHECKSUM_BYTES)
        mapped = np.memmap(file, dtype=_VALUE, mode="r", offset=_CHECKSUM_BYTES, shape=(values,))
    body = np.asarray(mapped)
    if checksum != _checksum(identity, [body]):
        return None
    packed = Packed(
        capacity=capacity,
        documents=body[:pieces],
        firsts=body[pieces : 2 * pieces],
        positions=body[2 * pieces : 3 * pieces],
        window_starts=body[3 * pieces :],
        tally=counts,
    )
    return packed if packed.fits(lengths) else None
