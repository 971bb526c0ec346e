"""What others wrote, or damaged, or meant to do harm: read as data, in bounds, or refused in one sentence."""

import codecs
import gc
import io
import itertools
import json
import math
import pickle
import random
import struct
import sys
import threading
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from regrow.checkpoint.documents import DocumentError
from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.format.inert_pickle import Global, Pairs, PickleReader, Record
from regrow.checkpoint.format.objects import MemoryFile
from regrow.checkpoint.format.tiling import tiles_exactly
from regrow.checkpoint.format.torch_file import TORCH_DTYPES, TorchArchive
from regrow.checkpoint.load.loading import load_tensors
from regrow.checkpoint.load.open_source import TorchFileSource, open_source, read_whole
from regrow.checkpoint.sources.dcp import DcpSource
from regrow.checkpoint.sources.foreign_metadata import ForeignMetadata, parse_metadata

DCP = "torch.distributed.checkpoint.metadata"


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    made = dist.group.WORLD
    assert made is not None
    yield made
    dist.destroy_process_group()


# Whether anything runs: Python tells its audit hooks of each import, call of exec, opened file and process.

_events: list[str] | None = None
_watched = 0  # The thread whose events count: a collector or a pool of another test may be at work beside it.
_RUNS = ("import", "compile", "exec", "open", "pickle.", "os.", "subprocess.", "socket.", "ctypes.", "builtins.")


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _events is not None and threading.get_ident() == _watched and event.startswith(_RUNS):
        _events.append(f"{event}{args!r}"[:200])


sys.addaudithook(_hook)


@contextmanager
def nothing_runs() -> Iterator[None]:
    """Fails where code is imported, compiled or run, a process is started or a file is opened meanwhile."""
    global _events, _watched
    found: list[str] = []
    # Neither do finalizers of another test's objects run in the middle.
    gc.disable()
    _events, _watched = found, threading.get_ident()
    try:
        yield
    finally:
        _events = None
        gc.enable()
    assert found == []


def _peak_bytes() -> int:
    """The most memory that this process has had since the last look."""
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
    Path("/proc/self/clear_refs").write_text("5")
    return peak


@contextmanager
def bounded(seconds: float = 10.0, megabytes: int = 256) -> Iterator[None]:
    """Fails where the body takes longer (on a processor of its own), or more memory."""
    _peak_bytes()
    before, start = _peak_bytes(), time.process_time()
    yield
    assert time.process_time() - start < seconds
    assert _peak_bytes() - before < megabytes << 20


def inert(body: bytes) -> Any:
    """The value, or the reason why there is none; never another error, and nothing runs."""
    known = {
        *(Global("torch", name) for name in (*TORCH_DTYPES, "Size")),
        *(Global(DCP, name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
        Global("collections", "OrderedDict"), Global("builtins", "getattr"), Global("pathlib", "PosixPath"),
        Global("torch.serialization", "_get_layout"),
    }  # fmt: skip
    with nothing_runs():
        try:
            return PickleReader(body, known).load()
        except DocumentError as error:
            assert "\n" not in str(error)
            assert len(str(error)) < 400
            return error


# Programs of instructions that fit each other more often than not.

NAMES = [
    ("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "exec"), ("builtins", "getattr"),
    ("builtins", "__import__"), ("subprocess", "Popen"), ("torch", "load"), ("torch.serialization", "_get_layout"),
    ("torch._utils", "_rebuild_device"), ("torch", "Size"), ("torch", "float32"), ("torch", "os"),
    ("pathlib", "PosixPath"), ("pathlib", "Path.write_text"), ("collections", "OrderedDict"),
    ("collections", "namedtuple"), ("operator", "attrgetter"), ("functools", "partial"), ("copyreg", "__newobj__"),
    *((DCP, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "dataclass", "field", "os", "torch",
                               "os.system", "Any", "Enum", "Metadata.__init__", "TensorProperties.__setstate__")),
]  # fmt: skip


def text(value: str) -> bytes:
    """BINUNICODE."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def named(module: str, name: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{name}\n".encode()


def long_text(size: int) -> bytes:
    """BINUNICODE8 with a size, without the text."""
    return b"\x8d" + struct.pack("<Q", size)


values = st.one_of(
    st.sampled_from([b"N", b"\x88", b"K\x07", b")", b"]", b"}", b"J\xff\xff\xff\xff", b"G" + bytes(8), b"\x8f"]),
    st.sampled_from(NAMES).map(lambda n: named(*n)),
    st.sampled_from(NAMES).map(lambda n: text(n[0]) + text(n[1]) + b"\x93"),
    st.sampled_from(["touch /tmp/ran", "__setstate__", "__reduce__", "__class__", "storage", "fqn"]).map(text),
)
steps = st.one_of(
    values,
    values.map(lambda v: v + b"\x85R"),
    values.map(lambda v: v + b"\x85\x81"),
    values.map(lambda v: b")\x81" + b"}" + text("x") + v + b"sb"),
    values.map(lambda v: b"N}" + text("__class__") + v + b"s\x86b"),
    values.map(lambda v: b"(" + v + b"o"),
    values.map(lambda v: b")}" + text("k") + v + b"s\x92"),
    st.sampled_from([
        b"R", b"\x81", b"\x92", b"b", b"o", b"ios\nsystem\n", b"(ios\nsystem\n", b"Q", b"P7\n", b"\x82\x01",
        b"\x83\x01\x00", b"\x84\x01\x00\x00\x00", b"\x94", b"q\x00", b"h\x00", b"r\xff\xff\xff\xff",
        b"j\xff\xff\xff\xff", b"2", b"0", b"1", b"(", b"t", b"\x85", b"\x86", b"\x87", b"a", b"e", b"s", b"u", b"d",
        b"l", b"\x90", b"\x91", b"I1\n", b"L1L\n", b"S'x'\n", b"Vx\n", b"F1\n", b"\x8b\xff\xff\xff\x7f", b"\x97",
        b"\x98", b"\x95" + bytes(8), b"\x95" + b"\xff" * 8, long_text(1 << 62), b"T\xff\xff\xff\xff", b".",
    ]),
    st.binary(max_size=3),
)  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(st.lists(steps, max_size=40).map(b"".join), st.sampled_from([b"", b"\x80\x02", b"\x80\x04", b"\x80\x05"]))
def test_no_pickle_runs_anything(program: bytes, protocol: bytes) -> None:
    inert(protocol + program + b".")
    with nothing_runs():
        for parse in (lambda b: parse_metadata(b, {}), lambda b: PickleReader(b, _Everything()).load()):
            with suppress(DocumentError):
                parse(protocol + program + b".")


@settings(max_examples=150, deadline=None)
@given(st.lists(steps, max_size=40).map(b"".join))
def test_no_torch_file_runs_anything(program: bytes) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + program + b".")
        archive.writestr("x/data/0", bytes(64))
    body = stream.getvalue()
    # Python's reader of archives imports the encoding of their names when it first meets it.
    codecs.lookup("cp437")
    with nothing_runs(), suppress(DocumentError):
        TorchArchive(MemoryFile(body), 0, len(body)).tensors()


class _Everything:
    """Even where every name were known, nothing would run."""

    def __contains__(self, _name: object) -> bool:
        return True


class _Runs:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return (__import__("os").system, (self.command,))


@pytest.mark.parametrize("protocol", range(6))
def test_a_payload_in_every_place_of_every_file_is_named_and_not_run(protocol: int, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    body = pickle.dumps({"state_dict_metadata": {"w": _Runs(f"touch {ran}")}}, protocol)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / ".metadata").write_bytes(body)
    with pytest.raises(CheckpointError, match=r"\.metadata must be a description by DCP, but"):
        open_source(folder)
    torch.save({"w": torch.ones(2), "x": _Runs(f"touch {ran}")}, tmp_path / "x.pt", pickle_protocol=max(protocol, 2))
    with pytest.raises(CheckpointError, match="must be a torch.save file of tensors, but is not"):
        open_source(tmp_path / "x.pt")
    torch.save(
        _Runs(f"touch {ran}"), tmp_path / "old.pt", _use_new_zipfile_serialization=False, pickle_protocol=protocol
    )
    with pytest.raises(CheckpointError, match="must be a torch.save file of tensors, but is not"):
        open_source(tmp_path / "old.pt")
    assert not ran.exists()


# Bombs.


@pytest.mark.parametrize(
    "program",
    [
        b"]" * 400_000,
        b"}" * 400_000,
        b"(" * 400_000,
        b"N" * 400_000,
        b"]" + b"\x85" * 400_000,
        b"".join(b"(h%c" % (i % 256) + b"t\x94" for i in range(100_000)),
        long_text(1 << 40),
        b"\x8e" + struct.pack("<Q", 1 << 63),
        b"\x8b\xff\xff\xff\x7f",
        b"r\x00\x00\x00\x7f",
        text("é" * 100) + b"\x94" + b"h\x00" * 400_000,
    ],
)
def test_bombs_stay_small(program: bytes) -> None:
    with bounded():
        inert(b"\x80\x04" + program + b".")


def laughs(levels: int) -> Any:
    """A mapping that holds itself's predecessor twice, again and again."""
    value: Any = {"x": torch.ones(1)}
    for _ in range(levels):
        value = {"a": value, "b": value}
    return value


def test_values_that_share_their_parts_are_not_unfolded(tmp_path: Path) -> None:
    torch.save(laughs(40), tmp_path / "laughs.pt")
    itself: dict[str, Any] = {"w": torch.ones(1)}
    itself["again"] = itself
    torch.save(itself, tmp_path / "itself.pt")
    deep: dict[str, Any] = {"w": torch.ones(1)}
    for _ in range(300):
        deep = {"d": deep}
    torch.save(deep, tmp_path / "deep.pt")
    # A long key, again and again.
    long = {f"{i}": torch.zeros(0) for i in range(5000)}
    torch.save({"k" * 4000: long}, tmp_path / "long.pt")
    for name in ("laughs", "itself", "deep", "long"):
        with bounded(), pytest.raises(CheckpointError, match="nests mappings too deeply, or one in itself"):
            open_source(tmp_path / f"{name}.pt")


def test_a_chunk_that_is_named_again_and_again_is_not_unfolded() -> None:
    many = [ChunkStorageMetadata(torch.Size([0]), torch.Size([0]))] * 30_000
    entry = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([0]), many)
    body = pickle.dumps(Metadata({f"n{i}": entry for i in range(3000)}, None, {}))
    with bounded(10), pytest.raises(DocumentError, match="more chunks than fit into it"):
        parse_metadata(body, {})


# DCP's metadata: all that stock classes can say comes back, whatever the protocol.


def grid(rng: random.Random, shape: tuple[int, ...]) -> list[tuple[tuple[int, int], ...]]:
    """Boxes that cut a shape at random places."""
    cuts = [sorted({0, n, *(rng.randint(0, n) for _ in range(rng.randint(0, 2)))}) for n in shape]
    return list(itertools.product(*([*itertools.pairwise(c)] or [(0, 0)] for c in cuts)))


def random_metadata(rng: random.Random) -> tuple[Metadata, dict[str, int], dict[str, Any]]:
    """Stock metadata, the sizes of the files it needs, and what a reader must find."""
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    expected: dict[str, Any] = {}
    ends = {f"__{rank}_0.distcp": 0 for rank in range(3)}
    for number in range(rng.randint(0, 5)):
        name = f"layers.{number}.wäight"
        dtype = rng.choice(list(TORCH_DTYPES.values()))
        shape = tuple(rng.randint(0, 5) for _ in range(rng.randint(0, 4)))
        boxes = grid(rng, shape)
        chunks = [
            ChunkStorageMetadata(torch.Size(a for a, _ in box), torch.Size(b - a for a, b in box)) for box in boxes
        ]
        entries[name] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), chunks)
        for index, box in enumerate(boxes):
            file = rng.choice(list(ends))
            size = dtype.itemsize * math.prod(b - a for a, b in box) + rng.randint(1, 900)
            storage[MetadataIndex(name, torch.Size(a for a, _ in box), index)] = _StorageInfo(file, ends[file], size)
            ends[file] += size
        expected[name] = (dtype, shape, {box for box in boxes if all(a < b for a, b in box)})
    entries["step"] = BytesStorageMetadata()
    storage[MetadataIndex("step")] = _StorageInfo("__0_0.distcp", ends["__0_0.distcp"], 7)
    ends["__0_0.distcp"] += 7
    meta = StorageMeta(checkpoint_id=Path("/anywhere/else"), save_id="x")
    return Metadata(entries, {n: tuple(n.split(".")) for n in entries}, storage, meta, "1.0.0"), ends, expected


def check_found(found: ForeignMetadata, expected: dict[str, Any]) -> None:
    assert list(found.objects) == ["step"]
    described = {n: (t.info.dtype, t.info.shape, {c.box for c in t.chunks}) for n, t in found.tensors.items()}
    assert described == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 5))
def test_what_stock_dcp_writes_is_understood(seed: int, protocol: int) -> None:
    metadata, sizes, expected = random_metadata(random.Random(seed))
    body = pickle.dumps(metadata, protocol)
    with nothing_runs():
        found = parse_metadata(body, sizes)
    check_found(found, expected)


def test_what_older_versions_wrote_is_understood() -> None:
    metadata, sizes, expected = random_metadata(random.Random(5))
    metadata.version = metadata.storage_meta = None
    assert expected
    body = pickle.dumps(metadata, 2)
    # Until torch 2.2 the properties came from elsewhere; Python 3.11 wrote members of enumerations by name for a while.
    old = "torch.distributed._shard.sharded_tensor.metadata"
    body = body.replace(f"c{DCP}\nTensorProperties".encode(), f"c{old}\nTensorProperties".encode())
    body = body.replace(f"c{DCP}\n_MEM_FORMAT".encode(), f"c{old}\nMEM_FORMAT".encode())
    assert old.encode() in body
    check_found(parse_metadata(body, sizes), expected)

    class ByName(pickle.Pickler):
        def reducer_override(self, value: Any) -> Any:
            kind = type(value)
            return (getattr, (kind, value.name)) if kind.__name__ == "_MEM_FORMAT_ENCODING" else NotImplemented

    stream = io.BytesIO()
    ByName(stream, 4).dump(metadata)
    assert b"getattr" in stream.getvalue()
    check_found(parse_metadata(stream.getvalue(), sizes), expected)


def _sound() -> tuple[dict[str, Any], dict[MetadataIndex, _StorageInfo]]:
    chunks = [ChunkStorageMetadata(torch.Size([row, 0]), torch.Size([2, 3])) for row in (0, 2)]
    entry = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size([4, 3]), chunks)
    storage = {
        MetadataIndex("w", torch.Size([row, 0]), row): _StorageInfo("a.distcp", row * 50, 100) for row in (0, 2)
    }
    return {"w": entry}, storage


def _changed(change: Callable[[dict[str, Any], dict[MetadataIndex, _StorageInfo]], object]) -> bytes:
    entries, storage = _sound()
    change(entries, storage)
    return pickle.dumps(Metadata(entries, None, storage))


def _info(storage: dict[MetadataIndex, _StorageInfo], **fields: Any) -> None:
    for key, value in fields.items():
        setattr(next(iter(storage.values())), key, value)


def _number_as_name(entries: dict[Any, Any]) -> None:
    entries[3] = entries["w"]


FIRST = MetadataIndex("w", torch.Size([0, 0]))
DEFECTS: dict[str, tuple[Callable[[dict[str, Any], dict[MetadataIndex, _StorageInfo]], object], str]] = {
    "a path above": (
        lambda e, s: _info(s, relative_path="../a.distcp"),
        "must lie in a file of the folder, but is in",
    ),
    "an absolute path": (lambda e, s: _info(s, relative_path="/etc/passwd"), "must lie in a file of the folder"),
    "a folder": (lambda e, s: _info(s, relative_path="x/a.distcp"), "must lie in a file of the folder"),
    "the folder itself": (lambda e, s: _info(s, relative_path=".."), "must lie in a file of the folder"),
    "a name that ends the line": (lambda e, s: _info(s, relative_path="a\nb"), "must lie in a file of the folder"),
    "another file": (
        lambda e, s: _info(s, relative_path="b.distcp"),
        r"names the file b\.distcp, which is not there",
    ),
    "behind the file": (lambda e, s: _info(s, offset=1 << 40), r"a\.distcp must have \d+ bytes, but has 200"),
    "a huge length": (lambda e, s: _info(s, length=1 << 61), "two of its parts overlap|must have"),
    "a huge number": (lambda e, s: _info(s, length=1 << 90), "must lie at a place in"),
    "before the file": (lambda e, s: _info(s, offset=-1), "must lie at a place in"),
    "no number": (lambda e, s: _info(s, offset="0"), "must lie at a place in"),
    "true for a number": (lambda e, s: _info(s, offset=True), "must lie at a place in"),
    "too short a stream": (lambda e, s: _info(s, length=23), "has 24 bytes, but 23 are stored"),
    "streams that overlap": (lambda e, s: _info(s, offset=50), "two of its parts overlap"),
    "a transform": (lambda e, s: _info(s, transform_descriptors=["zstd"]), "compressed or encrypted"),
    "a chunk not stored": (lambda e, s: s.pop(FIRST), r"the chunk of w at \(0, 0\) is not stored"),
    "another place": (
        lambda e, s: s.update({MetadataIndex("w", torch.Size([1, 0])): _StorageInfo("a.distcp", 0, 0)}),
        "none of its chunks",
    ),
    "another name": (
        lambda e, s: s.update({MetadataIndex("v", torch.Size([0])): _StorageInfo("a.distcp", 0, 0)}),
        "'v', which is not described",
    ),
    "a gap": (lambda e, s: e["w"].chunks.pop(), "do not fill it exactly once"),
    "one chunk twice": (lambda e, s: e["w"].chunks.append(e["w"].chunks[0]), "do not fill it exactly once"),
    "one half twice": (
        lambda e, s: setattr(e["w"].chunks[1], "offsets", torch.Size([0, 0])),
        "do not fill it exactly once",
    ),
    "a chunk beyond": (lambda e, s: setattr(e["w"].chunks[1], "sizes", torch.Size([3, 3])), "do not fill it exactly"),
    "other dimensions": (lambda e, s: setattr(e["w"].chunks[1], "sizes", torch.Size([6])), "has 2 dimensions|has 2"),
    "a negative size": (lambda e, s: setattr(e["w"], "size", (-4, 3)), "w: a tuple is no shape"),
    "a huge size": (lambda e, s: setattr(e["w"], "size", torch.Size([1 << 59, 1 << 59])), "which no file can hold"),
    "many dimensions": (lambda e, s: setattr(e["w"], "size", torch.Size([1] * 65)), "is no shape"),
    "a number for a size": (lambda e, s: setattr(e["w"], "size", 12), "w: 12 is no shape"),
    "no dtype": (lambda e, s: setattr(e["w"].properties, "dtype", 3), "3 is no dtype"),
    "another object": (lambda e, s: e.update(w=StorageMeta()), "w must be a TensorStorageMetadata"),
    "no chunks": (lambda e, s: setattr(e["w"], "chunks", None), "w has no chunks"),
    "a number for a name": (lambda e, s: _number_as_name(e), "must be text of one line, but is 3"),
    "a surrogate in a name": (lambda e, s: e.update({"\udc00": e["w"]}), "must be text of one line"),
    "an object that is nowhere": (lambda e, s: e.update(o=BytesStorageMetadata()), "o must be stored once"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_metadata_that_does_not_fit_is_refused(defect: str) -> None:
    change, sentence = DEFECTS[defect]
    with pytest.raises(DocumentError, match=sentence) as caught:
        parse_metadata(_changed(change), {"a.distcp": 200})
    str(caught.value).encode()
    assert parse_metadata(_changed(lambda e, s: None), {"a.distcp": 200}).tensors["w"].info.shape == (4, 3)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_tiling_is_what_counting_says(seed: int) -> None:
    rng = random.Random(seed)
    shape = tuple(rng.randint(0, 3) for _ in range(rng.randint(0, 3)))
    boxes = grid(rng, shape)
    for _ in range(rng.randint(0, 2)):
        if boxes and rng.random() < 0.5:
            boxes.pop(rng.randrange(len(boxes)))
        elif shape:
            boxes.append(tuple((a, rng.randint(a, n)) for n in shape for a in [rng.randint(0, n)]))
    counts = dict.fromkeys(itertools.product(*(range(n) for n in shape)), 0)
    for box in boxes:
        for point in itertools.product(*(range(a, b) for a, b in box)):
            counts[point] += 1
    assert tiles_exactly(shape, boxes) == all(n == 1 for n in counts.values())


# Whole folders and files.


def test_a_stock_folder_is_read_by_every_way_alike(tmp_path: Path, group: dist.ProcessGroup) -> None:
    base = torch.arange(48.0).reshape(6, 8)
    tensors = {
        "w": base, "turned": base.t(), "scalar": torch.tensor(2), "empty": torch.empty(0, 4),
        "strided": base[1:5:2, 1:7:3], "half": base.bfloat16(), "part": base[2:4].requires_grad_(),
    }  # fmt: skip
    dcp.save({**tensors, "step": 3, "odd": {1, 2}}, checkpoint_id=tmp_path / "c")
    loaded = {n: torch.full_like(t, 9).detach() for n, t in tensors.items()}
    assert load_tensors(tmp_path / "c", loaded, group) == sum(t.nbytes for t in tensors.values())
    with DcpSource(tmp_path / "c") as source:
        for name, tensor in tensors.items():
            assert torch.equal(loaded[name], tensor)
            assert torch.equal(read_whole(source, name), tensor)
        assert torch.equal(source.read("turned", ((2, 5), (1, 3))), base.t()[2:5, 1:3])
        assert source.read_object("step") == 3
        with pytest.raises(CheckpointError, match=r"odd in .* must be as \.metadata says, but is not .*holds a"):
            source.read_object("odd")


def test_a_stream_that_is_not_what_metadata_says(tmp_path: Path, group: dist.ProcessGroup) -> None:
    dcp.save({"w": torch.arange(6.0)}, checkpoint_id=tmp_path / "c")
    (data,) = (tmp_path / "c").glob("*.distcp")
    sound = data.read_bytes()
    stream = io.BytesIO()
    torch.save(torch.arange(6), stream)
    other = stream.getvalue().ljust(len(sound), b"\0")[: len(sound)]
    for body in (
        bytes(len(sound)),
        other,
        sound[:200] + bytes(len(sound) - 200),
        sound.replace(b"PK\3\4", b"PK\3\5"),
    ):
        data.write_bytes(body)
        with pytest.raises(
            CheckpointError, match=r"^w in .*\.distcp must be as \.metadata says, but is not"
        ) as caught:
            load_tensors(tmp_path / "c", {"w": torch.zeros(6)}, group)
        assert "\n" not in str(caught.value)


OLD_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32))
def test_torch_files_hold_what_torch_reads(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    rng = random.Random(seed)
    path = tmp_path_factory.mktemp("files") / "x.pt"
    flat: dict[str, torch.Tensor] = {}

    def tensor() -> torch.Tensor:
        dtype = rng.choice([d for d in TORCH_DTYPES.values() if d is not torch.complex32])
        made = torch.arange(60).to(dtype).reshape(rng.choice([(60,), (6, 10), (3, 4, 5), (60, 1)]))
        made = made.transpose(0, -1) if rng.random() < 0.3 else made
        made = made[rng.randint(0, 2) :: rng.randint(1, 3)]
        floating = dtype in (torch.float32, torch.bfloat16)
        return torch.nn.Parameter(made) if floating and rng.random() < 0.5 else made

    def state(prefix: str, depth: int) -> dict[Any, Any]:
        made: dict[Any, Any] = OrderedDict() if rng.random() < 0.5 else {}
        for number in range(rng.randint(1, 3)):
            key = number if rng.random() < 0.2 else f"k{number}"
            if depth and rng.random() < 0.4:
                made[key] = state(f"{prefix}{key}.", depth - 1)
            else:
                made[key] = flat[f"{prefix}{key}"] = tensor()
        made["other"] = rng.choice([3, "text", [1, 2], None, {1, 2}, torch.device("cpu"), torch.float16, 1j, b"raw"])
        return made

    # Files from before torch 1.6 are read, too; they know the older dtypes alone.
    saved, is_old = state("", 3), rng.random() < 0.3
    if is_old:
        flat = {n: t for n, t in flat.items() if t.dtype in OLD_DTYPES}
        saved = dict(flat)
    torch.save(saved, path, _use_new_zipfile_serialization=not is_old)
    with TorchFileSource(path) as source:
        assert source.infos.keys() == flat.keys()
        for name, expected in flat.items():
            assert source.infos[name].dtype == expected.dtype
            found = read_whole(source, name)
            assert found.is_contiguous()
            assert found.shape == expected.shape
            assert torch.equal(_bytes(found), _bytes(expected.detach()))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Not every operator knows every dtype."""
    return tensor.contiguous().flatten().view(torch.uint8)


def _rewritten(path: Path, **how: Any) -> None:
    """The same archive, its members stored in another way."""
    with zipfile.ZipFile(path) as old:
        members = {n: old.read(n) for n in old.namelist()}
    members |= how.pop("more", {})
    with zipfile.ZipFile(path, "w", how.get("compression", zipfile.ZIP_STORED)) as new:
        for name, body in members.items():
            if name not in how.get("without", ()):
                new.writestr(name, body)


def test_torch_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"

    def refused(sentence: str) -> None:
        with bounded(), pytest.raises(CheckpointError, match=sentence) as caught:
            open_source(path)
        assert "\n" not in str(caught.value)

    def save(value: Any) -> None:
        torch.save(value, path)

    save({"w": torch.ones(9)})
    sound = path.read_bytes()
    _rewritten(path, compression=zipfile.ZIP_DEFLATED)
    refused("is compressed, which torch.save's are not")
    # A member a thousand times as large as the file.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb, bomb.open("x/data.pkl", "w") as member:
        for _ in range(8):
            member.write(bytes(1 << 24))
    refused("is compressed")
    save({"w": torch.ones(9)})
    _rewritten(path, without=["x/data/0"])
    refused("it has no member 'x/data/0'")
    save({"w": torch.ones(9)})
    _rewritten(path, more={"x/data/0": b"1234"})
    refused("its storage must have 36 bytes, but has 4")
    save({"w": torch.ones(9)})
    _rewritten(path, more={"x/byteorder": b"big"})
    refused("not little-endian")
    save({"w": torch.ones(9)})
    _rewritten(path, more={"y/data.pkl": b"N."})
    refused("no pickle where torch.save puts it")
    save({"w": torch.ones(1).expand(1 << 40)})
    refused("its storage holds 1 elements")
    save({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}})
    refused(r"two tensors 'a\.b'")
    save({"w": torch.ones(3).to_sparse()})
    refused("tensor 'w' cannot be read: it is a .*_rebuild_sparse_tensor, not a dense tensor")
    save({(1, 2): torch.ones(1)})
    refused("its keys must be text or numbers, but one is a tuple")
    torch.save({"w": torch.ones(9)}, path, _use_new_zipfile_serialization=False)
    old = path.read_bytes()
    for body in (
        b"",
        b"PK",
        sound[:-30],
        sound[: len(sound) // 2],
        b"\x80\x02" + bytes(100),
        bytes(1000),
        old[:-8],
        old[:99],
    ):
        path.write_bytes(body)
        refused("must be a torch.save file of tensors")


def test_torch_is_not_asked_to_make_what_a_file_names(tmp_path: Path) -> None:
    """What torch's own restricted unpickler calls: memory of a size that the file says, and more."""
    stream = io.BytesIO()
    for call in (named("builtins", "bytearray") + b"\x8a\x06" + (1 << 40).to_bytes(6, "little") + b"\x85R",
                 named("torch", "Tensor") + b"\x8a\x06" + (1 << 40).to_bytes(6, "little") + b"\x85R"):  # fmt: skip
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("x/data.pkl", b"\x80\x02}" + text("w") + call + b"s.")
        with bounded(megabytes=16):
            assert TorchArchive(MemoryFile(stream.getvalue()), 0, len(stream.getvalue())).tensors() == {}


# Safetensors.


def _file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(body) if length is None else length) + body + data


def _entry(shape: Any, first: Any, last: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


SAFETENSORS = {
    "nothing": b"", "a length alone": struct.pack("<Q", 8), "a huge length": _file(b"{}", length=1 << 63),
    "deep": _file(b"[" * 100_000), "deep mappings": _file(b'{"a":' * 100_000), "no JSON": _file(b"{,}"),
    "no mapping": _file([1]), "not UTF-8": _file(b'{"\xff": 1}'), "long digits": _file(b'{"a": ' + b"1" * 9999 + b"}"),
    "a number for a tensor": _file({"a": 1}), "no shape": _file({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"abcd"),
    "another dtype": _file({"a": _entry([1], 0, 4, "Q4")}, b"abcd"), "a list of dtypes": _file({"a": _entry([1], 0, 4, [])}),
    "a negative dimension": _file({"a": _entry([-1, -1], 0, 4)}, b"abcd"),
    "a broken dimension": _file({"a": _entry([1.5], 0, 4)}, b"abcd"), "true": _file({"a": _entry([True], 0, 4)}, b"abcd"),
    "many dimensions": _file({"a": _entry([1] * 70, 0, 4)}, b"abcd"),
    "dimensions that overflow": _file({"a": _entry([2**62, 4], 0, 0)}),
    "before": _file({"a": _entry([1], -4, 0)}, b"abcd"), "turned": _file({"a": _entry([1], 4, 0)}, b"abcd"),
    "other bytes": _file({"a": _entry([2], 0, 4)}, b"abcd"), "behind": _file({"a": _entry([1], 96, 100)}, b"abcd"),
    "overlap": _file({"a": _entry([1], 0, 4), "b": _entry([1], 0, 4)}, b"abcd"),
    "a hole": _file({"a": _entry([1], 0, 4), "b": _entry([1], 8, 12)}, bytes(12)), "more": _file({"a": _entry([1], 0, 4)}, bytes(9)),
    "three offsets": _file({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, b"abcd"),
    "a name of two lines": _file({"a\nb": _entry([1], 0, 4)}, b"abcd"), "a surrogate": _file(b'{"\\ud800": 3}'),
    "no name": _file({"": _entry([1], 0, 4)}, b"abcd"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors_files_that_are_none(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(SAFETENSORS[name])
    with bounded(), pytest.raises(CheckpointError, match=r"x\.safetensors must (be a whole|have)") as caught:
        open_source(path)
    str(caught.value).encode()
    assert "\n" not in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_what_we_take_for_safetensors_the_library_does(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    rng = random.Random(seed)
    path = tmp_path_factory.mktemp("files") / "x.safetensors"
    tensors = {f"t{i}": torch.arange(rng.randint(0, 9)).float() for i in range(rng.randint(1, 3))}
    body = bytearray(safetensors.torch.save(tensors))
    for _ in range(rng.randint(0, 2)):
        where = rng.randrange(len(body))
        body[where : where + rng.randint(0, 2)] = rng.choice(
            [b"", b"0", b"9", b"{", b"]", bytes([rng.randrange(256)])]
        )
    path.write_bytes(bytes(body))
    try:
        with open_source(path) as source:
            ours = {n: read_whole(source, n) for n in source.infos}
    except CheckpointError:
        return
    theirs = safetensors.torch.load(path.read_bytes())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n].view(torch.uint8), theirs[n].view(torch.uint8)) for n in ours)


@pytest.mark.parametrize(
    "index",
    [b"", b"[" * 50_000, b"{}", b'{"weight_map": 3}', b'{"weight_map": {"a": 3}}', b'{"weight_map": {"a": "../x.safetensors"}}',
     b'{"weight_map": {"a": "/etc/x.safetensors"}}', b'{"weight_map": {"a": "sub/x.safetensors"}}', b'{"weight_map": {"a": ".."}}',
     b'{"weight_map": {"a": "y.safetensors"}}', b'{"weight_map": {"b": "x.safetensors"}}', b"\xff\xfe"],
)  # fmt: skip
def test_indexes_stay_in_their_folder(index: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for place in (tmp_path, folder):
        safetensors.torch.save_file({"a": torch.ones(2)}, place / "x.safetensors")
    (folder / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(CheckpointError, match=r"index\.json (must map names to shards|names the shard|says that)"):
        open_source(folder)


def test_a_name_in_two_files_is_not_guessed(tmp_path: Path) -> None:
    for number in (1, 2):
        safetensors.torch.save_file({"a": torch.full((2,), float(number))}, tmp_path / f"{number}.safetensors")
    with pytest.raises(CheckpointError, match=r"a in .* must be in one file, but is in 1\.safetensors and 2"):
        open_source(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "1.safetensors"}}')
    safetensors.torch.save_file({"a": torch.zeros(2), "b": torch.ones(1)}, tmp_path / "2.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}'
    )
    with open_source(tmp_path) as source:
        assert torch.equal(read_whole(source, "a"), torch.ones(2))


def test_inert_values_are_values() -> None:
    value = inert(pickle.dumps({"a": [1, -(2**70), 0.5, "ü", b"x", (None, True)]}, 5))
    assert isinstance(value, Pairs)
    assert value.items == [("a", [1, -(2**70), 0.5, "ü", b"x", (None, True)])]
    record = inert(pickle.dumps(torch.Size([2, 3])))
    assert isinstance(record, Record)
    assert (record.what, record.args) == (Global("torch", "Size"), ((2, 3),))
