"""The file image, the verified reader, and what stock DCP makes of our files."""

import io
import pickle
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings

from regrow.checkpoint.config import AsyncMode
from regrow.checkpoint.errors import CheckpointError, DamagedStepError
from regrow.checkpoint.format.hashing import BlockHasher, block_bytes_for, block_hashes, item_hash
from regrow.checkpoint.format.layout import Chunk, make_plan
from regrow.checkpoint.format.manifest import Manifest
from regrow.checkpoint.format.rank_manifest import StoredChunk
from regrow.checkpoint.format.stored_step import StoredStep
from regrow.checkpoint.format.torch_archive import frame_of
from regrow.checkpoint.load.loading import load_tensors
from regrow.checkpoint.load.read_plan import bytes_to_read, plan_reads
from regrow.checkpoint.load.reader import read_tensors
from regrow.checkpoint.save.saver import SaverOptions, StepSaver
from tests.pool import run_distributed

MODES = list(AsyncMode)


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """A group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    made = dist.new_group(backend="gloo")
    assert made is not None
    yield made
    dist.destroy_process_group()


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of many shapes and dtypes, one of them of several blocks."""
    torch.manual_seed(seed)
    return {
        "a.weight": torch.randn(300, 700),
        "b": torch.randn(7),
        "c.scalar": torch.randn(()),
        "d.counts": torch.arange(11) * (seed + 1),
        "e.half": torch.randn(33, 5).bfloat16(),
        "f.slice": torch.randn(8, 12)[:, 2:9],
        "g.flag": torch.tensor([True, False, seed % 2 == 0]),
    }


def save(folder: Path, group: dist.ProcessGroup, tensors: dict[str, torch.Tensor], step: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    saver = StepSaver(folder, AsyncMode["disabled"], torch.device("cpu"), group)
    (result,) = saver.save(tensors, Manifest(step=step, lineage="a"))
    saver.close()
    assert result.error is None
    assert result.url is not None
    return Path(result.url)


def empty_like(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: torch.zeros(t.shape, dtype=t.dtype) for n, t in tensors.items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


@given(
    shape=st.lists(st.integers(0, 9), max_size=4).map(tuple),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64, torch.uint8]),
)
@settings(max_examples=60, deadline=None)
def test_a_frame_and_any_bytes_are_a_stream_that_torch_opens(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = (torch.rand(shape) * 200).to(dtype)
    frame = frame_of(dtype, shape)
    assert len(frame.head) % 64 == 0
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert len(raw) == frame.data_bytes
    loaded = torch.load(io.BytesIO(frame.head + raw + frame.tail), weights_only=True)
    assert torch.equal(loaded, tensor)
    assert loaded.dtype == dtype


def test_what_is_saved_is_loaded(tmp_path: Path, group: dist.ProcessGroup) -> None:
    tensors = state()
    path = save(tmp_path / "c", group, tensors)
    loaded = empty_like(tensors)
    load_tensors(path, loaded, group)
    assert_equal(loaded, tensors)
    assert sorted(p.name for p in path.iterdir()) == [".metadata", "__0_0.distcp", "manifest.json", "rank-0.json"]
    assert list((tmp_path / "c").iterdir()) == [path]


@pytest.mark.slow
def test_stock_readers_open_ours(tmp_path: Path, group: dist.ProcessGroup) -> None:
    tensors = state()
    path = save(tmp_path / "c", group, tensors)
    loaded = empty_like(tensors)
    dcp.load(loaded, checkpoint_id=path, process_group=group)
    assert_equal(loaded, tensors)
    out = tmp_path / "one.pt"
    command = [sys.executable, "-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch", str(path), str(out)]
    subprocess.run(command, check=True, capture_output=True)
    converted: dict[str, torch.Tensor] = torch.load(out, weights_only=True)
    assert_equal(converted, tensors)


def test_ours_opens_stock_checkpoints(tmp_path: Path, group: dist.ProcessGroup) -> None:
    tensors = state()
    dcp.save(dict(tensors), checkpoint_id=tmp_path / "stock", process_group=group)
    loaded = empty_like(tensors)
    load_tensors(tmp_path / "stock", loaded, group)
    assert_equal(loaded, tensors)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES, ids=lambda m: str(m.name))
def test_a_snapshot_is_never_torn(tmp_path: Path, group: dist.ProcessGroup, mode: AsyncMode) -> None:
    """Everything changes from the moment the call allows it; what was written is what was there."""
    torch.manual_seed(1)
    tensors = {f"t{i}": torch.randn(64, 128) for i in range(12)}
    saver = StepSaver(tmp_path, mode, torch.device("cpu"), group)
    rounds = 200
    copies: dict[int, dict[str, torch.Tensor]] = {}
    committed = {}
    for step in range(1, rounds + 1):
        copies[step] = {n: t.clone() for n, t in tensors.items()}
        results = saver.save(tensors, Manifest(step=step, lineage="a"))
        saver.wait_staged()
        for tensor in tensors.values():
            tensor.add_(1.0)
        for result in [*results, *(saver.wait() if step == rounds else [])]:
            assert result.error is None
            committed[result.step] = result.url
            loaded = empty_like(tensors)
            assert result.url is not None
            load_tensors(result.url, loaded, group)
            assert_equal(loaded, copies.pop(result.step))
    saver.close()
    assert sorted(committed) == list(range(1, rounds + 1))


def test_the_image_is_kept_while_the_layout_is(tmp_path: Path, group: dist.ProcessGroup) -> None:
    saver = StepSaver(tmp_path, AsyncMode["async"], torch.device("cpu"), group)
    saver.save(state(), Manifest(step=1, lineage="a"))
    image = saver._image
    saver.save(state(1), Manifest(step=2, lineage="a"))
    assert saver._image is image
    saver.save({"other": torch.zeros(3)}, Manifest(step=3, lineage="a"))
    assert saver._image is not image
    assert [r.step for r in saver.wait()] == [3]
    saver.close()


def boxes(shape: tuple[int, ...]) -> st.SearchStrategy[tuple[tuple[int, ...], tuple[int, ...]]]:
    sides = [st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted) for n in shape]
    return st.tuples(*sides).map(lambda s: (tuple(a for a, _ in s), tuple(b - a for a, b in s)))


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_box_is_read_from_any_shards(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A tensor stored in shards along any dimension fills a target of any box, verified, bit for bit."""
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    dim = data.draw(st.integers(0, len(shape) - 1))
    parts = data.draw(st.integers(1, 4))
    whole = torch.randn(shape)
    folder = tmp_path_factory.mktemp("box")
    items, position, blob, start = [], 0, b"", 0
    with pytest.MonkeyPatch.context() as patch:
        request_bytes = data.draw(st.sampled_from([32, 64, 4096]))
        for owner in ("LocalStorage", "_Descriptor"):
            patch.setattr(f"regrow.checkpoint.storage.local.{owner}.request_bytes", request_bytes)
        for chunk in whole.tensor_split(parts, dim):
            offset = tuple(start if d == dim else 0 for d in range(len(shape)))
            start += chunk.shape[dim]
            if chunk.numel() == 0:
                continue
            raw = chunk.contiguous().numpy().tobytes()
            blocks = block_hashes(memoryview(raw), 32)
            items.append(
                StoredChunk(
                    name="t", dtype="float32", global_shape=shape, offset=offset, shape=tuple(chunk.shape), file="f",
                    start=position, size=len(raw), data=position, data_bytes=len(raw), hash=item_hash(blocks),
                    block_bytes=32, blocks=blocks,
                )
            )  # fmt: skip
            blob += raw
            position += len(raw)
        (folder / "f").write_bytes(blob)
        offset, size = data.draw(boxes(shape))
        target = torch.zeros(size)
        chunk_ = Chunk(name="t", dtype=torch.float32, global_shape=shape, offset=offset, shape=size)
        patch.setattr("regrow.checkpoint.load.reader.chunk_of", lambda name, tensor: chunk_)
        patch.setattr("regrow.checkpoint.load.reader.check_names", lambda folder, items, tensors: {"t": list(items)})
        read_tensors(folder, items, {"t": target}, threads=data.draw(st.integers(1, 4)))
    expected = whole[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]
    assert torch.equal(target, expected)


def test_rows_that_are_not_needed_are_not_read(tmp_path: Path, group: dist.ProcessGroup) -> None:
    tensors = {"w": torch.randn(4096, 1024)}
    path = save(tmp_path / "c", group, tensors)
    items = StoredStep.open(path).items()
    for ranks in (2, 3, 4):
        for rank in range(ranks):
            first, last = rank * 4096 // ranks, (rank + 1) * 4096 // ranks
            target = Chunk(
                name="w",
                dtype=torch.float32,
                global_shape=(4096, 1024),
                offset=(first, 0),
                shape=(last - first, 1024),
            )
            needed = (last - first) * 1024 * 4
            read = bytes_to_read(plan_reads(items, target))
            assert needed <= read <= needed + 2 * block_bytes_for(items[0].data_bytes)
            assert read <= 1.05 * needed


def test_loading_leaves_no_file_open(tmp_path: Path, group: dist.ProcessGroup) -> None:
    tensors = state()
    path = save(tmp_path / "c", group, tensors)
    load_tensors(path, empty_like(tensors), group)
    # Only names are compared: other tests' sockets and threads come and go in this process.
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [link for link in links if str(link.readlink()).startswith(str(tmp_path))]


def test_a_hole_is_damage(tmp_path: Path, group: dist.ProcessGroup) -> None:
    path = save(tmp_path / "c", group, {"w": torch.randn(8, 4)})
    (item,) = StoredStep.open(path).items()
    target = Chunk(name="w", dtype=torch.float32, global_shape=(9, 4), offset=(0, 0), shape=(9, 4))
    with pytest.raises(DamagedStepError, match="once and whole, but 32 of 36"):
        plan_reads([item], target)


def test_weights_that_the_model_does_not_have_are_an_error(tmp_path: Path, group: dist.ProcessGroup) -> None:
    path = save(
        tmp_path / "c", group, {"w": torch.ones(3), "more": torch.ones(2), "optimizer.state.w.step": torch.ones(1)}
    )
    target = {"w": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"weights alone, but holds more \(1 such names\); use the model"):
        load_tensors(path, target, group, known={"w"})
    assert not target["w"].any()
    load_tensors(path, target, group, known={"w", "more", "elsewhere"})
    assert target["w"].all()


def test_replicated_state_is_spread_evenly() -> None:
    tensors = {f"t{i}": torch.zeros(16) for i in range(400)}
    shares = [len(make_plan(tensors, rank, 4).items) for rank in range(4)]
    assert sum(shares) == 400
    assert min(shares) > 70


class Planted:
    """Runs when a careless reader unpickles it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("ours", [True, False])
def test_planted_pickles_do_not_run(tmp_path: Path, group: dist.ProcessGroup, ours: bool) -> None:
    tensors = state()
    if ours:
        path = save(tmp_path / "c", group, tensors)
    else:
        path = tmp_path / "stock"
        dcp.save(dict(tensors), checkpoint_id=path, process_group=group)
    marker = tmp_path / "ran"
    for file in sorted(path.iterdir()):
        kept = file.read_bytes()
        file.write_bytes(pickle.dumps(Planted(marker)).ljust(len(kept), b"."))
        with pytest.raises(CheckpointError):
            load_tensors(path, empty_like(tensors), group)
        buffer = io.BytesIO()
        torch.save(Planted(marker), buffer)
        file.write_bytes(buffer.getvalue().ljust(len(kept), b"."))
        with pytest.raises((CheckpointError, RuntimeError)):
            load_tensors(path, empty_like(tensors), group)
        file.write_bytes(kept)
        assert not marker.exists(), file.name
    load_tensors(path, empty_like(tensors), group)


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path, group: dist.ProcessGroup) -> None:
    """A full disk: the error names the cause, the step before is intact, the next save works."""
    saver = StepSaver(tmp_path, AsyncMode["async"], torch.device("cpu"), group)
    saver.save(state(), Manifest(step=1, lineage="a"))
    assert [r.error for r in saver.wait()] == [None]
    blocker = tmp_path / saver._committer.working_name(2)
    blocker.write_text("in the way")
    saver.save(state(), Manifest(step=2, lineage="a"))
    (result,) = saver.wait()
    assert result.url is None
    assert "rank 0: File exists" in str(result.error)
    saver.save(state(), Manifest(step=3, lineage="a"))
    assert [r.error for r in saver.wait()] == [None]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1", "step-3"]
    saver.close()


@given(
    data=st.binary(max_size=5000),
    block=st.sampled_from([16, 64, 1000]),
    cuts=st.lists(st.integers(0, 5000), max_size=6),
)
def test_hashing_in_pieces_is_hashing(data: bytes, block: int, cuts: list[int]) -> None:
    hasher, memory = BlockHasher(block), memoryview(data)
    ends = sorted({min(c, len(data)) for c in cuts} | {len(data)})
    start = 0
    for end in ends:
        hasher.update(memory[start:end])
        start = end
    assert hasher.blocks() == block_hashes(memory, block)


def test_blocks_are_between_64_kib_and_1_mib() -> None:
    sizes = [block_bytes_for(n) for n in (1, 1 << 20, 1 << 24, 1 << 26, 1 << 30, 1 << 34)]
    assert sizes == [1 << 16, 1 << 16, 1 << 16, 1 << 18, 1 << 20, 1 << 20]


@pytest.mark.parametrize("files", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES, ids=lambda m: str(m.name))
def test_several_files_a_rank(tmp_path: Path, group: dist.ProcessGroup, files: int, mode: AsyncMode) -> None:
    """Whether streamed or imaged, in one file or several: the same tensors, for ours and for stock readers."""
    saver = StepSaver(tmp_path, mode, torch.device("cpu"), group, SaverOptions(files_per_rank=files))
    tensors = {**state(), **{f"more{i}": torch.randn(300 + i, 1000) for i in range(5)}}
    results = [*saver.save(tensors, Manifest(step=1, lineage="a")), *saver.wait()]
    assert [r.error for r in results] == [None]
    assert len(list((tmp_path / "step-1").glob("*.distcp"))) == files
    loaded, stock = empty_like(tensors), empty_like(tensors)
    load_tensors(tmp_path / "step-1", loaded, group)
    dcp.load(stock, checkpoint_id=tmp_path / "step-1", process_group=group)
    assert_equal(loaded, tensors)
    assert_equal(stock, tensors)
    saver.close()


class _Broken(torch.Tensor):
    """A tensor that cannot be copied."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.detach:
            raise RuntimeError("no such memory")
        return super().__torch_function__(function, types, args, kwargs or {})  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("mode", ["disabled", "async_with_pinned_mem"])
def test_a_thread_that_dies_is_a_failed_save(tmp_path: Path, group: dist.ProcessGroup, mode: str) -> None:
    """Whatever ends the background work is told with its cause, and the next save works."""
    saver = StepSaver(tmp_path, AsyncMode[mode], torch.device("cpu"), group)
    broken = {"w": torch.randn(10).as_subclass(_Broken)}
    results = [*saver.save(broken, Manifest(step=1, lineage="a")), *saver.wait()]
    assert ["no such memory" in str(r.error) for r in results] == [True]
    results = [*saver.save(state(), Manifest(step=2, lineage="a")), *saver.wait()]
    assert [r.error for r in results] == [None]
    assert [p.name for p in tmp_path.iterdir()] == ["step-2"]
    saver.close()


def test_a_disk_without_room_is_not_written_to(
    tmp_path: Path, group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = StepSaver(tmp_path, AsyncMode["async"], torch.device("cpu"), group)
    monkeypatch.setattr("regrow.checkpoint.storage.local.LocalStorage.free_bytes", lambda self: 1000)
    results = [*saver.save(state(), Manifest(step=1, lineage="a")), *saver.wait()]
    assert ["No space left on device" in str(r.error) for r in results] == [True]
    assert list(tmp_path.iterdir()) == []
    saver.close()


@contextmanager
def small_files() -> Iterator[None]:
    """As on a disk that is too small: no file of this process can be longer than 64 KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("mode", MODES, ids=lambda m: str(m.name))
def test_a_process_alone_tells_at_once_why_a_save_failed(tmp_path: Path, mode: AsyncMode) -> None:
    saver = StepSaver(tmp_path, mode, torch.device("cpu"), None)
    tensors = {"w": torch.ones(1 << 16)}
    with small_files():
        results = [*saver.save(tensors, Manifest(step=1, lineage="a")), *saver.wait()]
    assert ["rank 0: File too large" in str(r.error) for r in results] == [True]
    assert results[0].seconds < 60, "the ranks' time-out is 600 s"
    results = [*saver.save(tensors, Manifest(step=1, lineage="a")), *saver.wait()]
    assert [r.error for r in results] == [None]
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    saver.close()


def _fail_by_files(folder: Path, failing: int) -> list[tuple[str, bool]]:
    """One rank cannot write its part of step 1, which is then tried again."""
    dist.init_process_group("gloo")
    made = dist.new_group(backend="gloo")
    assert made is not None
    saver = StepSaver(folder, AsyncMode.disabled, torch.device("cpu"), made, SaverOptions(use_store=False))
    found = []
    for value in (1.0, 2.0):
        tensors = {f"w{i}": torch.full((1 << 16,), value) for i in range(8)}
        fails = value == 1.0 and dist.get_rank() == failing
        with small_files() if fails else nullcontext():
            (result,) = saver.save(tensors, Manifest(step=1, lineage="a"))
        found.append((str(result.error), result.seconds < 60))
        dist.barrier(made)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_ranks_learn_from_files_why_one_has_failed(tmp_path: Path, failing: int) -> None:
    for errors in run_distributed(_fail_by_files, tmp_path, failing, world_size=2):
        (first, in_time), second = errors
        assert f"rank {failing}: File too large" in first
        assert in_time, "the ranks' time-out is 600 s"
        assert second == ("None", True)
    loaded = {f"w{i}": torch.zeros(1 << 16) for i in range(8)}
    load_tensors(tmp_path / "step-1", loaded, None)
    assert all(tensor.eq(2).all() for tensor in loaded.values()), "no part of the first attempt is in the second"


class _GoneStore:
    """What a store is whose server has died."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("the store is gone")


def _save_without_a_store(folder: Path, breaks: bool) -> list[str | None]:
    dist.init_process_group("gloo")
    made = dist.new_group(backend="gloo")
    assert made is not None
    saver = StepSaver(folder, AsyncMode["async"], torch.device("cpu"), made, SaverOptions(use_store=breaks))
    errors: list[str | None] = []
    for step in (1, 2, 3):
        if breaks and step == 2:
            cast(Any, saver._coordinator)._store = _GoneStore()
        results = [*saver.save({"a": torch.ones(5) * step}, Manifest(step=step, lineage="a")), *saver.wait()]
        errors += [r.error for r in results]
        dist.barrier(made)
    return errors


@pytest.mark.slow
@pytest.mark.parametrize("breaks", [False, True], ids=["no store", "a store that fails"])
def test_ranks_agree_by_files(tmp_path: Path, breaks: bool) -> None:
    results = run_distributed(_save_without_a_store, tmp_path, breaks, world_size=2)
    assert results == [[None] * 3] * 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-1", "step-2", "step-3"]


def _save_where_one_has_left(folder: Path, leaving: int) -> tuple[str | None, float]:
    dist.init_process_group("gloo")
    assert dist.group.WORLD is not None
    options = SaverOptions(commit_timeout_s=60.0)
    saver = StepSaver(folder, AsyncMode.async_with_pinned_mem, torch.device("cpu"), dist.group.WORLD, options)
    began = time.monotonic()
    if dist.get_rank() == leaving:
        saver.close(wait=False)
        dist.barrier()
        return None, 0.0
    found = [*saver.save(state(), Manifest(step=1, lineage="a")), *saver.wait()]
    seconds = time.monotonic() - began
    saver.close()
    dist.barrier()
    return found[0].error, seconds


@pytest.mark.slow
@pytest.mark.parametrize("leaving", [0, 1])
def test_a_rank_that_has_ended_is_not_waited_for(tmp_path: Path, leaving: int) -> None:
    """As where an error ends one of them, and nobody kills the other."""
    answers = run_distributed(_save_where_one_has_left, tmp_path, leaving, world_size=2)
    error, seconds = answers[1 - leaving]
    assert error is not None
    assert seconds < 20.0
    assert [p.name for p in tmp_path.iterdir() if p.name == "step-1"] == []
