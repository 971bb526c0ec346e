"""What a checkpoint of a large model costs beside its bytes, on ranks that are simulated.

    python -m benchmarks.scale --ranks 1024 16384 --json out.json

Llama 3 405B with dp_replicate 2, tp 8, pp 16 and dp_shard for the rest. Every rank's chunks are known by arithmetic;
planning, the ranks' manifests, `.metadata`, the root manifest and discovery are the engine's own code on them. Files
are made with holes, so that listing and checking them is real.
"""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regrow.checkpoint.format.hashing import HASH_CHARS, block_bytes_for
from regrow.checkpoint.format.layout import Chunk, SavePlan, place_chunks, spread
from regrow.checkpoint.format.manifest import Manifest
from regrow.checkpoint.format.rank_manifest import rank_manifest, rank_manifest_name
from regrow.checkpoint.format.step_name import METADATA
from regrow.checkpoint.policy.lineage import Lineage
from regrow.checkpoint.run.catalog import Catalog
from regrow.checkpoint.save.commit import assemble_metadata, complete_step
from regrow.checkpoint.save.coordinator import report_of
from regrow.checkpoint.save.writer import file_name
from regrow.checkpoint.storage.local import LocalStorage
from regrow.launch.config.composition import compose_config
from regrow.launch.config.typed import to_config
from regrow.launch.run.build import build_model

REPLICATE, TP, PP = 2, 8, 16
STATE = ("", ".exp_avg", ".exp_avg_sq")
# Of Llama's matrices, those that tensor parallelism cuts along their columns.
ROWWISE = ("wo.weight", "w2.weight")


def shapes_of(model: str) -> dict[str, tuple[int, ...]]:
    """The parameters' shapes."""
    config = to_config(compose_config([f"model={model}"]))
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in build_model(config).named_parameters()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Coordinates:
    """Where a rank is."""

    pp: int
    replicate: int
    shard: int
    tp: int


def coordinates(ranks: int) -> Iterator[Coordinates]:
    """All ranks, in order."""
    shards = ranks // (REPLICATE * TP * PP)
    for pp, replicate, shard, tp in itertools.product(range(PP), range(REPLICATE), range(shards), range(TP)):
        yield Coordinates(pp=pp, replicate=replicate, shard=shard, tp=tp)


def _stage_of(name: str, layers: int) -> int:
    if name.startswith("layers."):
        return int(name.split(".")[1]) * PP // layers
    return 0 if name.startswith("tok_embeddings") else PP - 1


def _cut(length: int, parts: int, index: int) -> tuple[int, int]:
    """Offset and length of a part, as torch cuts."""
    step = -(-length // parts)
    start = min(index * step, length)
    return start, min(step, length - start)


def chunks_of(shapes: dict[str, tuple[int, ...]], place: Coordinates, shards: int) -> list[Chunk]:
    """What a rank writes: weights and two moments."""
    layers = 1 + max(int(n.split(".")[1]) for n in shapes if n.startswith("layers."))
    chunks = []
    for name, shape in shapes.items():
        if _stage_of(name, layers) != place.pp:
            continue
        offset, local = [0] * len(shape), list(shape)
        replicated = len(shape) == 1
        if not replicated:
            axis = 1 if name.endswith(ROWWISE) else 0
            offset[axis], local[axis] = _cut(shape[axis], TP, place.tp)
        start, local[0] = _cut(local[0], shards, place.shard)
        offset[0] += start
        for state in STATE:
            key = f"optimizer.state.{name}{state}" if state else name
            copies = REPLICATE * (TP if replicated else 1)
            mine = place.replicate * (TP if replicated else 1) + (place.tp if replicated else 0)
            if 0 not in local and spread(key) % copies == mine:
                chunks.append(
                    Chunk(name=key, dtype=torch.float32, global_shape=shape, offset=tuple(offset), shape=tuple(local))
                )
    return chunks


def manifest_of(plan: SavePlan, rank: int) -> bytes:
    """The rank's manifest, with hashes of the right length."""
    hashes = ["0" * HASH_CHARS * -(-i.data_bytes // block_bytes_for(i.data_bytes)) for i in plan.items]
    return rank_manifest(plan, [file_name(rank, n) for n in range(len(plan.file_bytes))], hashes)


def measure(model: str, ranks: int, folder: Path) -> dict[str, Any]:
    """Times in seconds, sizes in bytes."""
    shapes, shards = shapes_of(model), ranks // (REPLICATE * TP * PP)
    step = LocalStorage(folder / "step-1")
    step.make()
    plan_s, manifest_s, bodies, reports = [], [], [], []
    for rank, place in enumerate(coordinates(ranks)):
        chunks = chunks_of(shapes, place, shards)
        started = time.perf_counter()
        plan = place_chunks(chunks)
        plan_s.append(time.perf_counter() - started)
        started = time.perf_counter()
        body = manifest_of(plan, rank)
        manifest_s.append(time.perf_counter() - started)
        for name, size in zip((file_name(rank, n) for n in range(2)), plan.file_bytes, strict=False):
            with (step.path / name).open("wb") as file:
                file.truncate(size)
        (step.path / rank_manifest_name(rank)).write_bytes(body)
        bodies.append(len(body))
        reports.append(report_of(body))
    started = time.perf_counter()
    metadata = assemble_metadata(step, ranks)
    metadata_s = time.perf_counter() - started
    started = time.perf_counter()
    complete_step(step, Manifest(step=1, lineage="a"), reports, metadata)
    commit_s = time.perf_counter() - started
    started = time.perf_counter()
    (entry,) = Catalog(folder).entries([Lineage(id="a")])
    discovery_s = time.perf_counter() - started
    assert entry.manifest.ranks == ranks
    sizes = step.sizes()
    # The first plan of a process also makes the frames, which every later one finds made.
    return {
        "ranks": ranks,
        "plan_first_s": plan_s[0],
        "plan_s": sorted(plan_s)[len(plan_s) // 2],
        "rank_manifest_s": sorted(manifest_s)[len(manifest_s) // 2],
        "rank_manifest_bytes": max(bodies),
        "metadata_once_per_layout_s": metadata_s,
        "metadata_bytes": sizes[METADATA],
        "commit_s": commit_s,
        "root_manifest_bytes": sizes["manifest.json"],
        "discovery_s": discovery_s,
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1024, 16384])
    parser.add_argument("--model", default="llama3_405b")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(args.model, ranks, Path(folder)))
    for name in rows[0]:
        print(f"{name:<28}" + "".join(f"{row[name]:>16,.6g}" for row in rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
