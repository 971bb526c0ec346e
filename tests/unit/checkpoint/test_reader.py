"""How reads are grouped into requests and shared among threads, and what a file that ends early does to them."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow.checkpoint.errors import DamagedStepError
from regrow.checkpoint.format.hashing import block_hashes, item_hash
from regrow.checkpoint.format.layout import Chunk, place_chunks
from regrow.checkpoint.format.rank_manifest import StoredChunk
from regrow.checkpoint.load.read_ops import ReadOp, requests_of, split_blocks
from regrow.checkpoint.load.read_plan import plan_reads
from regrow.checkpoint.load.reader import _shares
from regrow.checkpoint.memory import lasting_memory, raw_bytes
from regrow.checkpoint.storage.base import RangeReader, RemoteFile
from regrow.checkpoint.storage.local import LocalStorage

Stored = list[tuple[StoredChunk, Chunk, torch.Tensor]]


def stored(sizes: list[int]) -> tuple[bytes, Stored]:
    """One-dimensional tensors as a save lays them out: the file, and where each lies in it."""
    values = [torch.randint(0, 255, (n,), dtype=torch.uint8) for n in sizes]
    chunks = [
        Chunk(name=f"t{i}", dtype=v.dtype, global_shape=(len(v),), offset=(0,), shape=(len(v),))
        for i, v in enumerate(values)
    ]
    plan = place_chunks(chunks)
    blob = bytearray(sum(plan.file_bytes))
    found: Stored = []
    for item, value in zip(plan.items, values, strict=True):
        raw = value.numpy().tobytes()
        blob[item.data : item.data + item.data_bytes] = raw
        blocks = block_hashes(memoryview(raw), 64)
        stored_item = StoredChunk(
            name=item.chunk.name, dtype="uint8", global_shape=(len(raw),), offset=(0,), shape=(len(raw),), file="f",
            start=item.start, size=item.size, data=item.data, data_bytes=len(raw), hash=item_hash(blocks),
            block_bytes=64, blocks=blocks,
        )  # fmt: skip
        found.append((stored_item, item.chunk, value))
    return bytes(blob), found


def requests(found: Stored, request_bytes: int) -> tuple[list[ReadOp], list[torch.Tensor]]:
    targets = [torch.zeros(len(value), dtype=torch.uint8) for _, _, value in found]
    parts = []
    for (item, chunk, _), target in zip(found, targets, strict=True):
        (piece,) = plan_reads([item], chunk)
        parts += split_blocks("place", piece, chunk, target) or []
    return list(requests_of("place", parts, request_bytes)), targets


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=12),
    request_bytes=st.sampled_from([64, 1024, 1 << 20]),
    remote=st.booleans(),
)
def test_requests_fill_every_tensor(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], request_bytes: int, remote: bool
) -> None:
    blob, found = stored(sizes)
    fills, targets = requests(found, request_bytes)
    folder = tmp_path_factory.mktemp("f")
    (folder / "f").write_bytes(blob)
    asked = RemoteFile(lambda offset, length: blob[offset : offset + length])
    with LocalStorage(folder).open("f") as here:
        for fill in fills:
            assert fill.run(asked if remote else here) == fill.stop - fill.start
    assert all(torch.equal(target, value) for target, (_, _, value) in zip(targets, found, strict=True))


def test_many_small_tensors_are_few_requests() -> None:
    _, found = stored([1000] * 300)
    assert len(requests(found, 1 << 20)[0]) == 1
    assert len(requests(found, 64 * 1000)[0]) <= 6


@pytest.mark.parametrize("missing", [1, 2500, 5000])
def test_a_file_that_ends_early_is_damage(tmp_path: Path, missing: int) -> None:
    blob, found = stored([2000, 2000, 2000])
    end = found[-1][0].data + 2000
    (fill,), _ = requests(found, 1 << 20)
    (tmp_path / "f").write_bytes(blob[: end - missing])
    with LocalStorage(tmp_path).open("f") as here, pytest.raises(DamagedStepError, match="ends within t"):
        fill.run(here)


class Sized(ReadOp):
    """Bytes that nobody reads."""

    def run(self, file: RangeReader) -> int:
        return self.stop - self.start


@given(sizes=st.lists(st.integers(1, 1000), max_size=60), threads=st.integers(1, 9))
def test_threads_have_runs_of_about_the_same_size(sizes: list[int], threads: int) -> None:
    fills, position = [], 0
    for size in sizes:
        fills.append(Sized("place", "f", position, position + size))
        position += size
    shares = list(_shares(fills, threads))
    assert [fill for share in shares for fill in share] == fills
    assert len(shares) <= threads
    for share in shares:
        assert sum(f.stop - f.start for f in share) <= position / threads + 2 * max(sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_bytes_of_tensors_with_odd_strides(dtype: torch.dtype) -> None:
    for tensor in (
        torch.zeros(1, 8, dtype=dtype).t(),
        torch.zeros(10, dtype=dtype)[::5][:1],
        torch.ones((), dtype=dtype),
    ):
        assert tensor.is_contiguous()
        raw_bytes(tensor)[0] = 1
        assert raw_bytes(tensor).numel() == tensor.numel() * tensor.element_size()
        assert raw_bytes(tensor.clone())[0] == 1


def test_memory_begins_on_a_page_and_holds_what_is_written() -> None:
    memory = lasting_memory(3 << 20, torch.device("cpu"))
    assert memory.data_ptr() % 4096 == 0
    assert memory.numel() == 3 << 20
    view = memory[5:10].fill_(7)
    del memory
    assert view.tolist() == [7] * 5
