"""Hashes of raw bytes: one per fixed block, and one over those per item."""

import xxhash

__all__ = ["HASH_CHARS", "BlockHasher", "Hashes", "block_bytes_for", "block_hashes", "item_hash"]

HASH_CHARS = 32
# Of each item's blocks, by name.
Hashes = dict[str, str]
_SMALLEST, _LARGEST = 1 << 16, 1 << 20


def block_bytes_for(data_bytes: int) -> int:
    """The block size of an item: what is read in part is verified in blocks, counted from the item's start.

    A 256th of the item, between 64 KiB and 1 MiB: a quarter of it then costs at most 3 % more to read, and the
    hashes of the largest tensors stay few.
    """
    return min(max(1 << max((data_bytes // 256).bit_length() - 1, 0), _SMALLEST), _LARGEST)


def block_hashes(data: memoryview, block_bytes: int) -> str:
    """xxh3-128 of each of an item's blocks, `HASH_CHARS` characters of hex, one behind the other."""
    digest = xxhash.xxh3_128_hexdigest
    return "".join([digest(data[s : s + block_bytes]) for s in range(0, len(data), block_bytes)])


def item_hash(blocks: str) -> str:
    """xxh3-128 over an item's block hashes."""
    return str(xxhash.xxh3_128_hexdigest(blocks.encode()))


class BlockHasher:
    """Makes `block_hashes` of an item that comes in pieces.

    Args:
        block_bytes: as in `block_hashes`.
    """

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._open = xxhash.xxh3_128()
        self._room = block_bytes
        self._done: list[str] = []

    def update(self, data: memoryview) -> None:
        """The next bytes."""
        while len(data):
            part = data[: self._room]
            self._open.update(part)
            self._room -= len(part)
            data = data[len(part) :]
            if self._room == 0:
                self._close()

    def _close(self) -> None:
        self._done.append(self._open.hexdigest())
        self._open = xxhash.xxh3_128()
        self._room = self._block_bytes

    def blocks(self) -> str:
        """All hashes, once the last byte was given."""
        if self._room < self._block_bytes:
            self._close()
        return "".join(self._done)
