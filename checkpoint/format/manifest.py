"""A step's manifest: what is in it, who wrote it, and which files it consists of.

A folder with a valid manifest is a complete checkpoint; the manifest is the last file written before the
rename that commits, or, where folders cannot be renamed, the last file of all.
"""

import dataclasses
import errno
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import xxhash
from msgspec import Meta

from regrow.checkpoint.documents import Count, DocumentError, FileName, Token, convert_document, parse_json
from regrow.checkpoint.errors import DamagedStepError, OtherFormatError
from regrow.checkpoint.policy.lineage import Lineage, check_lineages
from regrow.checkpoint.storage.base import COMMIT_FILE, Storage
from regrow.checkpoint.storage.opening import as_storage

__all__ = ["FORMAT", "MANIFEST", "Manifest", "checksum", "read_manifest", "write_manifest"]

FORMAT = 4
# Format 3 has neither the run's id nor its config and lineages.
_READABLE = (3, FORMAT)
MANIFEST = COMMIT_FILE
# A rank is named in it twice, a config is some thousand bytes.
_LIMIT_BYTES = 64 << 20

Hash = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The root manifest of a step.

    Attributes:
        step: the optimizer step whose end this is.
        lineage: the lineage that wrote it (`regrow.checkpoint.policy.lineage`).
        kind: `full`, or `model` for weights alone.
        train_state: step, samples consumed and the like, as plain JSON.
        metrics: values measured at this step.
        layout: degrees that wrote it.
        ranks: how many wrote it, `rank-0.json` and so on.
        writer: is in the names of the ranks' files where a step is written under its final name, so that a paused
            writer that wakes up replaces no other writer's; empty elsewhere.
        data_fingerprint: identifies the data and the tokenizer.
        config_hash: hash of identity and hyperparameters.
        model: the model's config, as plain JSON; empty where it is not known.
        versions: of the software that wrote it.
        files: size in bytes of every file but the manifest.
        hashes: xxh3-128 of the small files, the ranks' manifests among them.
        run_id: of the run that wrote it; empty where no run did, and in format 3.
        config: of the run, as plain JSON, so that a run that has lost its directory can be continued; empty likewise.
        lineages: of the run, oldest first; empty likewise.
    """

    step: Count
    lineage: Token
    kind: Annotated[str, Meta(pattern=r"^(full|model)\Z")] = "full"
    train_state: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    layout: dict[str, Count] = field(default_factory=dict)
    ranks: Annotated[int, Meta(ge=1, le=1 << 20)] = 1
    writer: Token = ""
    data_fingerprint: Annotated[str, Meta(max_length=256)] = ""
    config_hash: Annotated[str, Meta(max_length=256)] = ""
    model: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[FileName, Count] = field(default_factory=dict)
    hashes: dict[FileName, Hash] = field(default_factory=dict)
    run_id: Token = ""
    config: dict[str, Any] = field(default_factory=dict)
    lineages: tuple[Lineage, ...] = ()


def checksum(body: Mapping[str, Any]) -> str:
    """Of a manifest's fields but this one."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return str(xxhash.xxh3_128_hexdigest(canonical.encode()))


def write_manifest(location: Storage | Path | str, manifest: Manifest) -> None:
    """Writes `manifest.json` into a step's folder, durable when it returns.

    Raises:
        FileExistsError: where it is what commits the step, and there is one already.
    """
    body = {"format": FORMAT, **dataclasses.asdict(manifest)}
    body["lineages"] = [lineage.as_json() for lineage in manifest.lineages]
    # Not every reader of JSON takes numbers that are none.
    body["metrics"] = {n: v for n, v in manifest.metrics.items() if math.isfinite(v)}
    text = json.dumps({"checksum": checksum(body), **body}, indent=1).encode()
    storage = as_storage(location)
    if storage.renames:
        storage.write(MANIFEST, text)
    elif not storage.create(MANIFEST, text) and storage.read(MANIFEST) != text:
        # The same bytes are this one's: the answer to a first attempt was lost.
        raise FileExistsError(errno.EEXIST, f"{storage.url} is complete already")


def read_manifest(location: Storage | Path | str, *, check_files: bool = True) -> Manifest:
    """Reads and checks a step's manifest and the presence and size of its files.

    Args:
        location: the step's folder.
        check_files: where many ranks read a step, one of them looks at all of its files.

    Raises:
        FileNotFoundError: there is no manifest: not a checkpoint of ours, or not a complete one.
        DamagedStepError: the manifest or a file is not what was written.
        OtherFormatError: another version wrote it.
        OSError: it cannot be read.
    """
    storage = as_storage(location)
    path = f"{storage.url}/{MANIFEST}"
    try:
        document = parse_json(storage.read(MANIFEST, _LIMIT_BYTES))
        if not isinstance(document, dict) or "checksum" not in document:
            raise DocumentError("it has no checksum")
        if document.pop("checksum") != checksum(document):
            raise DocumentError("it does not match its own checksum")
        _check_format(path, document)
        manifest = convert_document(document, Manifest)
        _check_state(manifest)
    except (DocumentError, RecursionError) as error:
        raise DamagedStepError(f"{path} is damaged ({error}); the step cannot be used, use another one") from error
    if check_files:
        _check_files(storage, manifest)
    return manifest


def _check_format(path: str, document: Mapping[str, Any]) -> None:
    found, versions = document.get("format"), document.get("versions")
    if found in _READABLE:
        return
    if not isinstance(found, int):
        raise DocumentError("it has no format")
    made = versions.get("regrow") if isinstance(versions, dict) else None
    by = f", made by version {made} of regrow" if made else ""
    raise OtherFormatError(
        f"{path} has format {found}{by}, but this version reads {' and '.join(map(str, _READABLE))}; use that version"
    )


def _check_state(manifest: Manifest) -> None:
    """What the fields say of each other.

    Raises:
        DocumentError: a contradiction.
    """
    state = manifest.train_state
    if state and state.get("step") != manifest.step:
        raise DocumentError(f"its train state is of step {state.get('step')!r}, not of step {manifest.step}")
    check_lineages(manifest.lineages)
    if manifest.lineages and manifest.lineage not in {x.id for x in manifest.lineages}:
        raise DocumentError(f"its lineage {manifest.lineage!r} is not among its run's")


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
