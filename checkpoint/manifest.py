"""A step's manifest: what is in it, who wrote it, and which files it consists of.

A folder with a valid manifest is a complete checkpoint; the manifest is the last file written before the
rename that commits, or, where folders cannot be renamed, the last file of all.
"""

import dataclasses
import errno
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from checkpoint.errors import CheckpointError, DamagedStepError
from checkpoint.storage.base import Storage
from checkpoint.storage.opening import as_storage

__all__ = ["FORMAT", "MANIFEST", "Manifest", "checksum", "read_manifest", "write_manifest"]

FORMAT = 3
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The root manifest of a step.

    Attributes:
        step: the optimizer step whose end this is.
        lineage: the lineage that wrote it (`checkpoint.lineage`).
        kind: `full`, or `model` for weights alone.
        train_state: step, samples consumed and the like, as plain JSON.
        metrics: values measured at this step.
        layout: degrees that wrote it.
        ranks: how many wrote it, `rank-0.json` and so on.
        writer: is in the names of the ranks' files where a step is written under its final name, so that a paused
            writer that wakes up replaces nobody else's; empty elsewhere.
        data_fingerprint: identifies the data and the tokenizer.
        config_hash: hash of identity and hyperparameters.
        model: the model's config, as plain JSON; empty where it is not known.
        versions: of the software that wrote it.
        files: size in bytes of every file but the manifest.
        hashes: xxh3-128 of the small files, the ranks' manifests among them.
    """

    step: int
    lineage: str
    kind: str = "full"
    train_state: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    layout: dict[str, int] = field(default_factory=dict)
    ranks: int = 1
    writer: str = ""
    data_fingerprint: str = ""
    config_hash: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)


def checksum(body: dict[str, Any]) -> str:
    """Of a manifest's fields but this one."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return str(xxhash.xxh3_128_hexdigest(canonical.encode()))


def write_manifest(place: Storage | Path | str, manifest: Manifest) -> None:
    """Writes `manifest.json` into a step's folder, durable when it returns.

    Raises:
        FileExistsError: where it is what commits the step, and there is one already.
    """
    body = {"format": FORMAT, **dataclasses.asdict(manifest)}
    text = json.dumps({"checksum": checksum(body), **body}, indent=1).encode()
    storage = as_storage(place)
    if storage.renames:
        storage.write(MANIFEST, text)
    elif not storage.create(MANIFEST, text) and storage.read(MANIFEST) != text:
        # The same bytes are this one's: the answer to a first attempt was lost.
        raise FileExistsError(errno.EEXIST, f"{storage.url} is complete already")


def read_manifest(place: Storage | Path | str, *, check_files: bool = True) -> Manifest:
    """Reads and checks a step's manifest and the presence and size of its files.

    Args:
        place: the step's folder.
        check_files: where many ranks read a step, one of them looks at all of its files.

    Raises:
        FileNotFoundError: there is no manifest: not a checkpoint of ours, or not a complete one.
        DamagedStepError: the manifest or a file is not what was written.
        CheckpointError: another version wrote it.
    """
    storage = as_storage(place)
    path = f"{storage.url}/{MANIFEST}"
    try:
        document = json.loads(storage.read(MANIFEST))
        given = document.pop("checksum")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
        raise DamagedStepError(f"{path} is not a manifest; the step is damaged, use another one") from error
    if given != checksum(document):
        raise DamagedStepError(f"{path} does not match its own checksum; the step is damaged, use another one")
    found = document.pop("format")
    if found != FORMAT:
        raise CheckpointError(
            f"{path} has format {found}, but this version reads {FORMAT}; use that version of regrow"
        )
    manifest = Manifest(**document)
    if check_files:
        _check_files(storage, manifest)
    return manifest


def _check_files(storage: Storage, manifest: Manifest) -> None:
    there = storage.sizes()
    for name, size in manifest.files.items():
        if name not in there:
            raise DamagedStepError(f"{storage.url}/{name} is missing; the step is damaged, use another one")
        if there[name] != size:
            raise DamagedStepError(
                f"{storage.url}/{name} must have {size} bytes, but has {there[name]}; the step is damaged, use "
                "another one"
            )
