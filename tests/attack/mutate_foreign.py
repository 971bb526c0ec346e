"""Mutations of what others write: DCP folders, `torch.save` files, safetensors, Hugging Face folders with an index.

A fuzzer runs what `mutations` yields, one after the other; `check` says what must hold of each.
"""

import itertools
import json
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.load.open_source import open_source, read_whole

__all__ = ["make_inputs", "mutations"]

Mutation = tuple[str, Callable[[], str]]
# What a reader is told to read of a file that says that it is large.
_MOST_BYTES = 64 << 20


def make_inputs(folder: Path) -> None:
    """Small sound inputs, one folder for each kind."""
    torch.manual_seed(0)
    tensors = {"layers.0.w": torch.randn(6, 4), "layers.0.b": torch.randn(6).bfloat16(), "count": torch.tensor(3)}
    for kind in ("dcp", "torch", "old", "safetensors", "index"):
        (folder / kind).mkdir(parents=True)
    state = {**tensors, "options": {"lr": 0.1, "betas": (0.9, 0.99)}}
    dcp.save(state, checkpoint_id=folder / "dcp", no_dist=True)
    torch.save({"model": tensors, "step": 3}, folder / "torch/x.pt")
    torch.save({"model": tensors, "step": 3}, folder / "old/x.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(tensors, folder / "safetensors/x.safetensors", metadata={"format": "pt"})
    names = list(tensors)
    for number, part in enumerate((names[:1], names[1:])):
        safetensors.torch.save_file({n: tensors[n] for n in part}, folder / f"index/model-{number}.safetensors")
    places = {n: f"model-{int(n != names[0])}.safetensors" for n in names}
    (folder / "index/model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "index/config.json").write_text("{}")


def mutations(rng: random.Random, inputs: Path, work: Path, witness: Path) -> Iterator[Mutation]:
    """Endlessly: a name, and a call that reads a mutated input and says what came of it.

    Args:
        rng: decides everything.
        inputs: what `make_inputs` made.
        work: receives the mutated copies, one at a time.
        witness: a path that planted code would make; it must stay away.

    The call raises whatever the reader raises but for CheckpointError, whose sentence it returns.
    """
    kinds: list[tuple[str, Callable[[random.Random, Path, Path], str]]] = [
        ("dcp", _mutate_dcp),
        ("torch", _mutate_torch),
        ("old", _mutate_old),
        ("safetensors", _mutate_safetensors),
        ("index", _mutate_index),
    ]
    for number in itertools.count():
        kind, mutate = rng.choice(kinds)
        seed = rng.randrange(1 << 32)

        def run(kind: str = kind, mutate: Any = mutate, seed: int = seed) -> str:
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(inputs / kind, work)
            what = mutate(random.Random(seed), work, witness)
            return f"{what}: {read(work, kind)}"

        yield f"{number} {kind} {seed}", run


def read(folder: Path, kind: str) -> str:
    """What the readers make of an input: the sentence, or how many tensors there are."""
    place = next(folder.glob("*.pt"), folder) if kind in ("torch", "old") else folder
    try:
        with open_source(place) as source:
            for name, info in source.infos.items():
                if info.nbytes <= _MOST_BYTES:
                    read_whole(source, name)
            return f"{len(source.infos)} tensors"
    except CheckpointError as error:
        return str(error)


# Bytes.


def mutate_bytes(rng: random.Random, body: bytes) -> bytes:
    """A few random changes: bits, bytes, cuts, repeats, numbers at their limits."""
    data = bytearray(body)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 2:
            del data[at : at + rng.choice([1, 2, 8, 64, 1024])]
        elif kind == 3:
            data[at:at] = data[at : at + rng.choice([1, 8, 64])]
        elif kind == 4:
            data[at : at + 8] = rng.choice([b"\xff" * 8, bytes(8), struct.pack("<Q", 1 << rng.randrange(64))])
        elif kind == 5:
            del data[rng.randrange(len(data) + 1) :]
        else:
            data[at:at] = rng.randbytes(rng.choice([1, 4, 32]))
    return bytes(data)


def _mutate_file(rng: random.Random, path: Path) -> str:
    path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    return f"bytes of {path.name}"


# Pickles.


class Payload:
    """Pickled, a call that makes the witness."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return (__import__("os").system, (f"touch '{self.witness}'",))


_MODULE = b"torch.distributed.checkpoint.metadata"
_NAMES = [
    (_MODULE, b"field"), (_MODULE, b"dataclass"), (_MODULE, b"os"), (_MODULE, b"Metadata"), (_MODULE, b"Enum"),
    (b"os", b"system"), (b"builtins", b"eval"), (b"builtins", b"getattr"), (b"torch", b"load"), (b"torch", b"Size"),
    (b"torch._utils", b"_rebuild_device"), (b"torch.serialization", b"_get_layout"), (b"pathlib", b"PosixPath"),
    (b"torch.hub", b"load"), (b"collections", b"OrderedDict"), (b"builtins", b"bytearray"), (b"torch", b"Tensor"),
]  # fmt: skip


def hostile_pickle(rng: random.Random, witness: Path) -> bytes:
    """A program of instructions around names, calls and the memo."""

    def name() -> bytes:
        module, attribute = rng.choice(_NAMES)
        if rng.random() < 0.5:
            return b"c" + module + b"\n" + attribute + b"\n"
        return b"".join(b"\x8c" + bytes([len(t)]) + t for t in (module, attribute)) + b"\x93"

    command = f"touch '{witness}'".encode()
    text = b"X" + struct.pack("<I", len(command)) + command
    parts: list[Callable[[], bytes]] = [
        name, lambda: name() + text + b"\x85R", lambda: name() + b")R", lambda: name() + b")\x81",
        lambda: name() + text + b"\x85\x81", lambda: b"N}" + text + name() + b"s\x86b", lambda: b"(" + name() + text + b"o",
        lambda: b"(" + text + b"ios\nsystem\n", lambda: b"}" + text + name() + b"sb", lambda: text + b"Q", lambda: b"\x94",
        lambda: bytes([104, rng.randrange(256)]), lambda: bytes([113, rng.randrange(256)]), lambda: b"\x82\x01",
        lambda: b"\x8a\x08" + rng.randbytes(8), lambda: b"\x8d" + rng.randbytes(8), lambda: b"\x95" + rng.randbytes(8),
        lambda: b"]" * rng.choice([1, 10_000]), lambda: b"(" * rng.choice([1, 20_000]), lambda: rng.randbytes(2),
        lambda: b"\x85" * rng.choice([1, 50_000]), lambda: rng.choice([b"a", b"e", b"s", b"u", b"t", b"0", b"1", b"2", b"b", b"R"]),
    ]  # fmt: skip
    program = b"".join(rng.choice(parts)() for _ in range(rng.randint(1, 24)))
    return rng.choice([b"\x80\x02", b"\x80\x04", b""]) + program + b"."


def _mutate_pickle(rng: random.Random, body: bytes, witness: Path) -> bytes:
    """A pickle, changed or put in another's place."""
    kind = rng.randrange(4)
    if kind == 0:
        return mutate_bytes(rng, body)
    if kind == 1:
        return pickle.dumps({"a": Payload(witness)}, rng.randrange(2, 6))
    if kind == 2:
        # The call goes into a sound pickle, in front of an instruction.
        at = rng.randrange(2, len(body))
        return body[:at] + pickle.dumps(Payload(witness), 2)[2:-1] + body[at:]
    return hostile_pickle(rng, witness)


# DCP.


def _mutate_dcp(rng: random.Random, folder: Path, witness: Path) -> str:
    metadata = folder / ".metadata"
    kind = rng.randrange(5)
    if kind < 2:
        metadata.write_bytes(_mutate_pickle(rng, metadata.read_bytes(), witness))
        return "pickle of .metadata"
    if kind == 2:
        return _mutate_file(rng, next(folder.glob("*.distcp")))
    if kind == 3:
        return _mutate_description(rng, metadata)
    path = rng.choice([metadata, next(folder.glob("*.distcp"))])
    path.unlink()
    if rng.random() < 0.5:
        path.mkdir()
    return f"{path.name} gone"


_FILES = ["../x", "/etc/passwd", "..", ".", "", "a/b", "a\0b", "a\nb", "\udc00", ".metadata", "é" * 300, 7, None]
_NUMBERS = [-1, 0, 1, 1 << 31, 1 << 60, 1 << 64, 1 << 600, True, None, "3", 2.5]


def _mutate_description(rng: random.Random, path: Path) -> str:
    """One value of DCP's own description."""
    metadata = pickle.loads(path.read_bytes())
    name = rng.choice(list(metadata.state_dict_metadata))
    entry = metadata.state_dict_metadata[name]
    index = rng.choice(list(metadata.storage_data))
    where = metadata.storage_data[index]
    kind = rng.randrange(7)
    if kind == 0:
        where.relative_path = rng.choice(_FILES)
    elif kind == 1:
        setattr(where, rng.choice(["offset", "length"]), rng.choice(_NUMBERS))
    elif kind == 2:
        del metadata.storage_data[index]
    elif kind == 3:
        metadata.state_dict_metadata[rng.choice(["", "a\nb", 3, None, "x" * 5000, "\ud800"])] = entry
    elif kind == 4 and getattr(entry, "chunks", None):
        entry.chunks += entry.chunks * rng.choice([1, 1000])
    elif kind == 5:
        entry.size = rng.choice(
            [torch.Size([1 << 40]), (-1,), (1 << 600,), (1,) * 99, 3, None, ["x"], torch.Size([0])]
        )
    else:
        metadata.state_dict_metadata[name] = rng.choice([None, 3, where, index, {}, []])
    path.write_bytes(pickle.dumps(metadata, rng.randrange(2, 6)))
    return "description of .metadata"


# torch.save.


def _mutate_torch(rng: random.Random, folder: Path, witness: Path) -> str:
    path = folder / "x.pt"
    kind = rng.randrange(5)
    if kind == 0:
        return _mutate_file(rng, path)
    if kind == 1:
        torch.save(
            {"w": torch.ones(3), "x": Payload(witness)}, path, _use_new_zipfile_serialization=rng.random() < 0.5
        )
        return "payload"
    with zipfile.ZipFile(path) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    compression = zipfile.ZIP_STORED
    if kind == 2:
        members["x/data.pkl"] = _mutate_pickle(rng, members["x/data.pkl"], witness)
    elif kind == 3:
        name = rng.choice(list(members))
        body = members.pop(name)
        if rng.random() < 0.7:
            members[rng.choice([name, "../x", "/x", "x/data.pkl/", "y/data.pkl", "x/data/../../0"])] = body[
                : rng.randrange(99)
            ]
    else:
        compression = zipfile.ZIP_DEFLATED
        members[f"x/data/{rng.randrange(3)}"] = bytes(rng.choice([1, 1 << 20]))
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, body in members.items():
            archive.writestr(name, body)
    return "archive"


def _mutate_old(rng: random.Random, folder: Path, witness: Path) -> str:
    """A file from before torch 1.6: pickles in a row."""
    path = folder / "x.pt"
    if rng.random() < 0.5:
        return _mutate_file(rng, path)
    body = path.read_bytes()
    stops = [at for at, byte in enumerate(body) if byte == ord(".")][:4]
    at = rng.choice(stops) + 1
    path.write_bytes(body[:at] + _mutate_pickle(rng, body[at:], witness))
    return "pickles"


# Safetensors.


def _mutate_safetensors(rng: random.Random, folder: Path, _witness: Path) -> str:
    path = folder / "x.safetensors"
    body = path.read_bytes()
    (size,) = struct.unpack("<Q", body[:8])
    header, data = body[8 : 8 + size], body[8 + size :]
    kind = rng.randrange(5)
    if kind == 0:
        return _mutate_file(rng, path)
    if kind == 1:
        header = mutate_bytes(rng, header)
    elif kind == 2:
        header = rng.choice(
            [b"[" * 100_000, b'{"a":' * 100_000, b"", b"null", b"1" * 9000, b'{"a":{}}', b'"\\ud800"']
        )
    else:
        document = json.loads(header)
        entry = document[rng.choice([n for n in document if n != "__metadata__"])]
        field = rng.choice(["dtype", "shape", "data_offsets"])
        value: Any = rng.choice(
            [*_NUMBERS, [1 << 62] * 3, [1] * 99, [-1, -4], [0, 1 << 63], [3, 1], "F4", [], {}, [[0, 4]]]
        )
        entry[field] = value
        if kind == 4:
            del entry[rng.choice(list(entry))]
        header = json.dumps(document).encode()
    length = len(header) if rng.random() < 0.9 else rng.choice([0, 1 << 63, len(header) + 1, 1 << 30])
    path.write_bytes(struct.pack("<Q", length) + header + data)
    return "header"


def _mutate_index(rng: random.Random, folder: Path, _witness: Path) -> str:
    path = folder / "model.safetensors.index.json"
    kind = rng.randrange(4)
    if kind == 0:
        return _mutate_file(rng, path)
    if kind == 1:
        path.write_bytes(
            rng.choice([b"[" * 100_000, b'{"weight_map":' * 100_000, b"{}", b"\xff", b'{"weight_map":[]}'])
        )
        return "index"
    document = json.loads(path.read_bytes())
    if kind == 2:
        name = rng.choice(list(document["weight_map"]))
        document["weight_map"][name] = rng.choice(
            [*_FILES, "model-0.safetensors", "model-1.safetensors", "config.json"]
        )
    else:
        document["weight_map"][rng.choice(["", "other", "\ud800"])] = rng.choice([*_FILES, "model-0.safetensors"])
    path.write_text(json.dumps(document))
    return "weight map"
