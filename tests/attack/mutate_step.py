"""A step's documents, a run's record and its notes, mutated; half of them with sizes, hashes and checksums made right.

What each case promises: a sentence (`CheckpointError`, `RunRecordError`) or a result; nothing is moved or removed
outside of the case's folder.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.inspect import maintenance as care
from regrow.checkpoint.load.open_source import open_source, read_whole
from regrow.checkpoint.policy.lineage import Lineage
from regrow.checkpoint.run.catalog import Catalog
from regrow.checkpoint.storage.local import LocalStorage
from regrow.launch.run.failures import first_failure
from regrow.launch.run.rank_spec import read_outcome
from regrow.trainer.run_record import RunRecord, RunRecordError
from regrow.trainer.state import TrainState
from tests.forging import SOUND, forge, sound_step

__all__ = ["mutations"]

Case = tuple[str, Callable[[], str]]

_LINE = [Lineage(id="0-8yhu")]
_ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 2**31, 2**62, 2**63, 2**64, 10**30, 0.5, -0.0, float("nan"), float("inf"), "", "8", "..",
    "../../x", "/etc/passwd", "a/b", "step-8", "\0", "\n", "\ud800", "x" * 70_000, [], {}, [[]], [0], {"": 0}, {"id": "../x"},
    "os.system", "float64", "__0_0.distcp", "rank-0.json", "0" * 32,
)  # fmt: skip


def mutations(rng: random.Random, work: Path) -> Iterator[Case]:
    """Endlessly: a name and a call.

    Args:
        rng: decides everything.
        work: an existing folder; each case makes a folder in it and removes it.
    """
    kinds: list[tuple[str, Callable[[random.Random, Path], str]]] = [
        ("manifest", _manifest),
        ("forged manifest", _forged_manifest),
        ("rank manifest", _rank_manifest),
        ("forged rank manifest", _forged_rank_manifest),
        ("step file", _step_file),
        ("record", _record),
        ("notes", _notes),
        ("train state", _train_state),
    ]
    number = 0
    while True:
        number += 1
        kind, act = rng.choice(kinds)
        seed = rng.randrange(1 << 32)

        def run(act: Any = act, seed: int = seed, number: int = number) -> str:
            folder = work / f"step-{number}"
            folder.mkdir()
            try:
                return str(act(random.Random(seed), folder))
            finally:
                shutil.rmtree(folder)

        yield f"{kind} {number} {seed}", run


def _change(rng: random.Random, document: Any) -> None:
    """One change somewhere in a document of dictionaries and lists."""
    place = document
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
            place = place[key]
            continue
        break
    kind = rng.randrange(6)
    if kind == 0:
        del place[key]
    elif kind == 1 and isinstance(place, dict):
        place[rng.choice(["later", "../x", "", "lineage", "step"])] = rng.choice(_ODD)
    elif kind == 2 and isinstance(place, list):
        place.insert(rng.randrange(len(place) + 1), rng.choice(place))
    elif kind == 3:
        deep: Any = 1
        for _ in range(rng.choice([10, 500, 900])):
            deep = [deep]
        place[key] = deep
    elif kind == 4 and isinstance(place[key], int):
        place[key] += rng.choice([-1, 1, 64, -64, 1 << 40])
    else:
        place[key] = rng.choice(_ODD)


def _change_some(rng: random.Random, document: Any) -> None:
    for _ in range(rng.choice([1, 1, 2, 5])):
        _change(rng, document)


def _bytes(rng: random.Random, body: bytes) -> bytes:
    """One change of a file's bytes."""
    kind, data = rng.randrange(7), bytearray(body)
    at = rng.randrange(len(data))
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[at : at + 64] = rng.randbytes(rng.randrange(200))
    elif kind == 3:
        return rng.choice(
            [b"", b"null", b"[]", b"{}", b"\xff\xfe", b"[" * 300_000, b'{"a":' * 200_000, b"9" * 200_000]
        )
    elif kind == 4:
        data[at:at] = data[: rng.randrange(len(data))]
    elif kind == 5:
        return json.dumps(json.loads(body)).encode(rng.choice(["utf-16", "utf-32", "utf-8-sig"]))
    else:
        document = json.loads(body)
        _change(rng, document)
        return json.dumps(document).encode()
    return bytes(data)


def _read_step(folder: Path) -> str:
    """What everything that reads a step makes of it."""
    found = []
    try:
        with open_source(folder / "step-8") as source:
            for name in source.infos:
                read_whole(source, name)
            found.append(f"{len(source.infos)} tensors")
    except CheckpointError as error:
        found.append(_line(error))
    try:
        care.list_steps(LocalStorage(folder))
        found += [p for r in care.verify(LocalStorage(folder)) for p in r["problems"]]
        found += Catalog(folder).clean_up(_LINE)
    except CheckpointError as error:
        found.append(_line(error))
    return "; ".join(found)


def _line(error: Exception) -> str:
    assert "\n" not in str(error), str(error)
    return str(error)


def _manifest(rng: random.Random, folder: Path) -> str:
    file = sound_step(folder) / "manifest.json"
    file.write_bytes(_bytes(rng, file.read_bytes()))
    return _read_step(folder)


def _rank_manifest(rng: random.Random, folder: Path) -> str:
    file = sound_step(folder) / "rank-0.json"
    file.write_bytes(_bytes(rng, file.read_bytes()))
    return _read_step(folder)


def _forged_manifest(rng: random.Random, folder: Path) -> str:
    step = sound_step(folder)
    try:
        forge(step, root=partial(_change_some, rng))
    except (UnicodeEncodeError, RecursionError):
        return "cannot be written"
    return _read_step(folder)


def _forged_rank_manifest(rng: random.Random, folder: Path) -> str:
    step = sound_step(folder)
    try:
        forge(step, rank=partial(_change_some, rng))
    except (UnicodeEncodeError, RecursionError):
        return "cannot be written"
    return _read_step(folder)


def _step_file(rng: random.Random, folder: Path) -> str:
    """The file of tensors, or DCP's description."""
    file = sound_step(folder) / rng.choice(["__0_0.distcp", ".metadata"])
    data = bytearray(file.read_bytes())
    at = rng.randrange(len(data))
    if rng.random() < 0.3:
        data = data[:at]
    else:
        data[at : at + 8] = rng.randbytes(8)
    file.write_bytes(data)
    return _read_step(folder)


def _record(rng: random.Random, folder: Path) -> str:
    body = (SOUND.parent.parent / "run.json").read_bytes()
    (folder / "run.json").write_bytes(_bytes(rng, body))
    try:
        record = RunRecord.load(folder)
    except RunRecordError as error:
        return _line(error)
    assert record is not None
    for lineage in record.lineages:
        assert "/" not in lineage.id
    record.save(folder)
    return "read"


def _notes(rng: random.Random, folder: Path) -> str:
    (folder / "logs").mkdir()
    body = json.dumps({"kind": "finished", "step": 3, "message": ""}).encode()
    (folder / "stop.json").write_bytes(_bytes(rng, body))
    body = json.dumps({"rank": 1, "at": 1.5, "message": "m"}).encode()
    (folder / "logs/failed-rank-1.json").write_bytes(_bytes(rng, body))
    return f"{read_outcome(folder)} {first_failure(folder)}"


def _train_state(rng: random.Random, folder: Path) -> str:
    values = json.loads((SOUND / "manifest.json").read_text())["train_state"]
    _change(rng, values)
    try:
        state = TrainState.from_json(values)
    except ValueError as error:
        return _line(error)
    assert all(isinstance(getattr(state, n), int) for n in ("step", "samples_consumed", "tokens"))
    return "read"
