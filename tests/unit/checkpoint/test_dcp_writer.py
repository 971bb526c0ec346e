"""The file image as a writer for stock DCP."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from regrow.checkpoint.format.manifest import read_manifest
from regrow.checkpoint.format.stored_step import StoredStep
from regrow.checkpoint.load.dcp_reader import ImageReader
from regrow.checkpoint.load.loading import is_verified, load_tensors
from regrow.checkpoint.save.dcp_writer import ImageWriter
from tests.pool import run_distributed


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    made = dist.group.WORLD
    assert made is not None
    yield made
    dist.destroy_process_group()


def test_stock_save_through_it_is_verified_and_opened_by_both(tmp_path: Path, group: dist.ProcessGroup) -> None:
    state = {"a": torch.randn(300, 700), "nested": {"b": torch.arange(5), "c": torch.randn(3, 4).bfloat16()}}
    dcp.save(dict(state), storage_writer=ImageWriter(tmp_path / "c"))
    assert is_verified(tmp_path / "c")
    flat = {"a": state["a"], "nested.b": state["nested"]["b"], "nested.c": state["nested"]["c"]}  # type: ignore[index]
    ours = {n: torch.zeros_like(t) for n, t in flat.items()}
    load_tensors(tmp_path / "c", ours, group)
    assert all(torch.equal(t, flat[n]) for n, t in ours.items())
    stock = {"a": torch.zeros(300, 700), "nested": {"b": torch.zeros(5).long(), "c": torch.zeros(3, 4).bfloat16()}}
    dcp.load(stock, checkpoint_id=tmp_path / "c")
    assert torch.equal(stock["a"], state["a"])  # type: ignore[arg-type]


def test_what_json_cannot_hold_is_refused(tmp_path: Path, group: dist.ProcessGroup) -> None:
    with pytest.raises(CheckpointException, match="step must be a tensor, or made of numbers, text"):
        dcp.save({"step": {1, 2}}, storage_writer=ImageWriter(tmp_path / "c"))


def test_objects_are_json_in_the_ranks_manifest_and_compared_with_it(
    tmp_path: Path, group: dist.ProcessGroup
) -> None:
    place = tmp_path / "c"
    saved = {"w": torch.ones(3), "options": {"betas": (0.9, 0.99), "names": ["äöü", None]}, "step": 3}
    dcp.save(dict(saved), storage_writer=ImageWriter(place))
    document = json.loads((place / "rank-0.json").read_text())
    values = {entry["name"]: entry["value"] for entry in document["objects"]}
    assert values == {"options.betas": [0.9, 0.99], "options.names": ["äöü", None], "step": 3}
    assert read_manifest(place).files["__0_objects.distcp"] == (place / "__0_objects.distcp").stat().st_size
    # Another value in the stream, which nothing else would notice.
    stream = place / "__0_objects.distcp"
    sound = stream.read_bytes()
    assert sound.count("äöü".encode()) == 1
    stream.write_bytes(sound.replace("äöü".encode(), "äöo".encode() + b"o"))
    target = {"w": torch.zeros(3), "options": {"betas": 0, "names": 0}, "step": 0}
    with pytest.raises(
        CheckpointException, match=r"options\.names in .* cannot be read .*not what the manifest says"
    ):
        dcp.load(dict(target), storage_reader=ImageReader(place))
    stream.write_bytes(sound)
    dcp.load(target, storage_reader=ImageReader(place))
    assert target["options"] == saved["options"]
    rank = place / "rank-0.json"
    rank.write_bytes(rank.read_bytes().replace(b"0.99", b"0.98"))
    with pytest.raises(CheckpointException, match=r"rank-0\.json .*does not match its hash"):
        dcp.load(target, storage_reader=ImageReader(place))


def test_an_old_folder_is_not_overwritten(tmp_path: Path, group: dist.ProcessGroup) -> None:
    dcp.save({"a": torch.ones(3)}, storage_writer=ImageWriter(tmp_path / "c"))
    with pytest.raises(CheckpointException, match="must not be there yet"):
        dcp.save({"a": torch.zeros(3)}, storage_writer=ImageWriter(tmp_path / "c"))


def _sharded(folder: Path) -> bool:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(7 * 6, dtype=torch.float32).reshape(7, 6)
    dcp.save(
        {"w": distribute_tensor(whole, mesh, [Shard(0)]), "r": torch.arange(4)}, storage_writer=ImageWriter(folder)
    )
    other = DTensor.from_local(torch.zeros(7, 3), mesh, [Shard(1)], run_check=False)
    load_tensors(folder, {"w": other}, dist.new_group(backend="gloo"))
    return torch.equal(other.full_tensor(), whole)


def test_shards_of_two_ranks(tmp_path: Path) -> None:
    assert run_distributed(_sharded, tmp_path / "c", world_size=2) == [True, True]
    items = StoredStep.open(tmp_path / "c").items()
    assert sorted((i.name, i.shape) for i in items) == [("r", (4,)), ("w", (3, 6)), ("w", (4, 6))]
