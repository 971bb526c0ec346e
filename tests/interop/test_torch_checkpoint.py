"""What torch's public checkpoint tests ask of a writer and a reader, asked of ours beside the stock ones.

Each behaviour is tried three ways: our writer and the stock reader, the stock writer and our reader, ours and ours.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    StorageReader,
    StorageWriter,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from regrow.checkpoint.load.dcp_reader import ImageReader
from regrow.checkpoint.load.loading import load_tensors
from regrow.checkpoint.save.dcp_writer import ImageWriter
from tests.pool import run_distributed

pytestmark = pytest.mark.slow

Way = tuple[Callable[[Path], StorageWriter], Callable[[Path], StorageReader]]
WAYS: dict[str, Way] = {
    "our writer": (ImageWriter, FileSystemReader),
    "our reader": (FileSystemWriter, ImageReader),
    "ours": (ImageWriter, ImageReader),
}


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    made = dist.group.WORLD
    assert made is not None
    yield made
    dist.destroy_process_group()


@pytest.fixture(params=list(WAYS))
def way(request: pytest.FixtureRequest) -> Way:
    return WAYS[request.param]


def round_trip(way: Way, place: Path, saved: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
    """Saves one state and loads it into another."""
    dcp.save(saved, storage_writer=way[0](place))
    dcp.load(target, storage_reader=way[1](place))
    return target


def assert_equal(a: Any, b: Any) -> None:
    """Nested states hold the same, types included."""
    assert type(a) is type(b)
    if isinstance(a, DTensor):
        assert torch.equal(a.to_local(), b.to_local())
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a.detach(), b.detach())
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_equal(left, right)
    else:
        assert a == b


class Net(nn.Module):
    """Two layers, a shared weight, a buffer and state of its own beside tensors."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 8)
        self.c = nn.Linear(8, 6)
        self.c.weight = self.a.weight
        self.register_buffer("count", torch.tensor(seed))
        self.note: Any = {"seen": seed, "rates": (0.5, 1), "names": ["x", None, True]}

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))  # type: ignore[no-any-return]

    def get_extra_state(self) -> Any:
        return self.note

    def set_extra_state(self, state: Any) -> None:
        self.note = state


def trained(seed: int, kind: Callable[..., torch.optim.Optimizer]) -> tuple[Net, torch.optim.Optimizer]:
    """A model and its optimizer after a step."""
    net = Net(seed)
    options: dict[str, Any] = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    groups: list[dict[str, Any]] = [{"params": [*net.a.parameters()], "lr": 0.1}, {"params": [*net.b.parameters()]}]
    optimizer = kind(groups, lr=0.01, **options)
    net(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    return net, optimizer


@pytest.mark.parametrize(
    "kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad]
)
def test_a_model_and_its_stock_optimizer_come_back(
    way: Way, kind: Callable[..., torch.optim.Optimizer], tmp_path: Path
) -> None:
    net, optimizer = trained(1, kind)
    other, other_optimizer = trained(2, kind)
    saved: dict[str, Any] = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    target: dict[str, Any] = {"model": other.state_dict(), "optimizer": other_optimizer.state_dict(), "epoch": 0}
    round_trip(way, tmp_path / "c", saved, target)
    assert_equal(target, saved)
    other.load_state_dict(target["model"])
    other_optimizer.load_state_dict(target["optimizer"])
    assert other.note == net.note
    assert_equal(other_optimizer.state_dict(), optimizer.state_dict())


def test_get_and_set_state_dict(way: Way, tmp_path: Path) -> None:
    (net, optimizer), (other, other_optimizer) = trained(1, torch.optim.AdamW), trained(2, torch.optim.AdamW)
    model_state, optimizer_state = get_state_dict(net, optimizer)
    target_model, target_optimizer = get_state_dict(other, other_optimizer)
    round_trip(
        way,
        tmp_path / "c",
        {"model": model_state, "optimizer": optimizer_state},
        {"model": target_model, "optimizer": target_optimizer},
    )
    set_state_dict(other, other_optimizer, model_state_dict=target_model, optim_state_dict=target_optimizer)
    assert_equal(dict(other.state_dict()), dict(net.state_dict()))
    assert_equal(get_state_dict(other, other_optimizer)[1]["state"], optimizer_state["state"])


def test_nested_states_strange_tensors_and_plain_values(way: Way, tmp_path: Path) -> None:
    base = torch.arange(48.0).reshape(6, 8)
    saved: dict[str, Any] = {
        "plain": {"text": "äöü", "none": None, "big": 2**70, "list": [1, 2.5, [True, "x"]], "pair": (0.9, 0.999)},
        "tensors": {
            "scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "turned": base.t(), "strided": base[1:5:2, 1:7:3],
            "bf16": base.bfloat16(), "bool": base > 5, "long": base.long(), "complex": torch.complex(base, base),
            "f8": base.to(torch.float8_e4m3fn), "u16": torch.arange(5).to(torch.uint16), "one": torch.ones(1, 1, 1),
            "parameter": nn.Parameter(base.clone()),
        },
        "listed": [{"w": torch.ones(3)}, {"w": torch.zeros(3)}],
    }  # fmt: skip
    target = copy.deepcopy(saved)
    for holder in (target["tensors"], *target["listed"]):
        for tensor in holder.values():
            tensor.detach().zero_()
    target["plain"] = dict.fromkeys(target["plain"], 0)
    round_trip(way, tmp_path / "c", saved, target)
    assert_equal(target, saved)


def test_an_object_that_json_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    for number, value in enumerate(({1, 2}, float("nan"), {3: "x"}, b"raw", object, [torch.ones(2), 1, {4}], 1j)):
        with pytest.raises(CheckpointException, match="extra.*must be a tensor, or made of numbers, text"):
            dcp.save({"w": torch.ones(2), "extra": (value,)}, storage_writer=ImageWriter(tmp_path / f"{number}"))
        assert not list((tmp_path / f"{number}").glob("*"))


class _Stateful:
    def __init__(self, value: float) -> None:
        self.value = torch.full((3,), value)
        self.loaded: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "kind": "counter"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state


def test_stateful_objects_are_asked_and_told(way: Way, tmp_path: Path) -> None:
    target = _Stateful(0.0)
    round_trip(way, tmp_path / "c", {"it": _Stateful(7.0)}, {"it": target})
    assert torch.equal(target.loaded["value"], torch.full((3,), 7.0))
    assert target.loaded["kind"] == "counter"


def test_a_part_of_a_checkpoint_can_be_loaded_but_not_more_than_there_is(way: Way, tmp_path: Path) -> None:
    dcp.save({"a": torch.ones(2), "b": {"c": torch.full((3,), 2.0)}}, storage_writer=way[0](tmp_path / "c"))
    part = {"b": {"c": torch.zeros(3)}}
    dcp.load(part, storage_reader=way[1](tmp_path / "c"))
    assert torch.equal(part["b"]["c"], torch.full((3,), 2.0))
    with pytest.raises(CheckpointException, match="more"):
        dcp.load({"a": torch.zeros(2), "more": torch.zeros(2)}, storage_reader=way[1](tmp_path / "c"))
    lenient = {"a": torch.zeros(2), "more": torch.zeros(2)}
    planner = DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(lenient, storage_reader=way[1](tmp_path / "c"), planner=planner)
    assert torch.equal(lenient["a"], torch.ones(2))
    with pytest.raises(CheckpointException, match=r"[Ss]ize|shape"):
        dcp.load({"a": torch.zeros(5)}, storage_reader=way[1](tmp_path / "c"))


@pytest.mark.parametrize("flatten", [True, False])
def test_planners_that_flatten_and_those_that_do_not(way: Way, flatten: bool, tmp_path: Path) -> None:
    results = []
    for name, (write, read) in (("stock", (FileSystemWriter, FileSystemReader)), ("tried", way)):
        saved: dict[str, Any] = {"w": torch.arange(4.0), "options": {"lr": 0.1, "betas": [0.9, 0.99]}}
        target: dict[str, Any] = {"w": torch.zeros(4), "options": {"lr": 0.0, "betas": []}}
        dcp.save(saved, storage_writer=write(tmp_path / name), planner=DefaultSavePlanner(flatten, flatten))
        dcp.load(target, storage_reader=read(tmp_path / name), planner=DefaultLoadPlanner(flatten, flatten))
        results.append(target)
    assert_equal(*results)
    assert torch.equal(results[1]["w"], torch.arange(4.0))


def test_a_folder_becomes_a_torch_file_and_a_state_out_of_nothing(way: Way, tmp_path: Path) -> None:
    saved: dict[str, Any] = {"w": torch.arange(6.0).reshape(2, 3), "step": 4}
    dcp.save(saved, storage_writer=way[0](tmp_path / "c"))
    dcp_to_torch_save(tmp_path / "c", tmp_path / "c.pt")
    assert_equal(torch.load(tmp_path / "c.pt", weights_only=True), saved)
    found: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner()  # type: ignore[no-untyped-call]
    _load_state_dict(found, storage_reader=way[1](tmp_path / "c"), planner=planner, no_dist=True)
    assert_equal(found, saved)


def test_a_save_that_goes_on_beside_training(way: Way, tmp_path: Path) -> None:
    saved: dict[str, Any] = {"w": torch.arange(64.0), "step": 1}
    job = dcp.async_save(saved, storage_writer=way[0](tmp_path / "c"))
    saved["w"].zero_()
    job.result()  # type: ignore[union-attr]
    target: dict[str, Any] = {"w": torch.zeros(64), "step": 0}
    dcp.load(target, storage_reader=way[1](tmp_path / "c"))
    assert_equal(target, {"w": torch.arange(64.0), "step": 1})


@pytest.mark.filterwarnings("ignore:.*_get_pg_default_device", "ignore:Multiple backends")
def test_memory_is_needed_to_load_into(way: Way, group: dist.ProcessGroup, tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(4)}, storage_writer=way[0](tmp_path / "c"))
    with torch.device("meta"):
        model = nn.ParameterDict({"w": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"w must have memory to be loaded into, but is on the meta device"):
        load_tensors(tmp_path / "c", dict(model.state_dict()), group)
    # DCP's own planner gives it.
    state = {"w": torch.empty(4, device="meta")}
    dcp.load(state, storage_reader=way[1](tmp_path / "c"))
    assert torch.equal(state["w"], torch.ones(4))


def test_a_stock_optimizers_state_does_not_hinder_our_loader(
    way: Way, group: dist.ProcessGroup, tmp_path: Path
) -> None:
    net, optimizer = trained(1, torch.optim.AdamW)
    dcp.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, storage_writer=way[0](tmp_path / "c"))
    tensors = {"model.a.weight": torch.zeros(6, 8), "optimizer.state.0.exp_avg": torch.zeros(6, 8)}
    assert load_tensors(tmp_path / "c", tensors, group) == 2 * 6 * 8 * 4
    assert torch.equal(tensors["model.a.weight"], net.a.weight)
    with pytest.raises(ValueError, match=r"must (be a tensor|hold optimizer\.param_groups)"):
        load_tensors(tmp_path / "c", {"optimizer.param_groups.0.lr": torch.zeros(1)}, group)


# What needs ranks: each body tries everything for one way, since processes are dear.


def _layouts(mesh: DeviceMesh, flat: DeviceMesh) -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "rows": lambda t: distribute_tensor(t, flat, [Shard(0)]),
        "columns": lambda t: distribute_tensor(t, flat, [Shard(1)]),
        "replicated": lambda t: distribute_tensor(t, flat, [Replicate()]),
        "both": lambda t: distribute_tensor(t, mesh, [Shard(0), Shard(1)]),
        "turned": lambda t: distribute_tensor(t, mesh, [Shard(1), Shard(0)]),
        "hybrid": lambda t: distribute_tensor(t, mesh, [Replicate(), Shard(0)]),
        "same twice": lambda t: distribute_tensor(t, mesh, [Shard(0), Shard(0)]),
        "plain": lambda t: t.clone(),
    }


def _reshards(folder: Path) -> None:
    dist.init_process_group("gloo")
    mesh, flat = init_device_mesh("cpu", (2, 2)), init_device_mesh("cpu", (4,))
    # Rows and columns that four ranks share unevenly: some have none.
    whole = torch.arange(3 * 9.0).reshape(3, 9)
    layouts = _layouts(mesh, flat)
    order = list(layouts)
    for way_name, way in WAYS.items():
        place = folder / way_name
        dcp.save({**{n: make(whole) for n, make in layouts.items()}, "step": 5}, storage_writer=way[0](place))
        turned: dict[str, Any] = {"step": 0}
        for index, name in enumerate(order):
            turned[name] = layouts[order[(index + 3) % len(order)]](torch.zeros_like(whole))
        dcp.load(turned, storage_reader=way[1](place))
        assert turned.pop("step") == 5
        for name, tensor in turned.items():
            found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            assert torch.equal(found, whole), (way_name, name)


def test_every_layout_becomes_every_other_one(tmp_path: Path) -> None:
    run_distributed(_reshards, tmp_path, world_size=4)


def _wrapped(kind: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model under one of torch's parallelisms, and its optimizer after a step."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6))
    mesh = init_device_mesh("cpu", (2,))
    if kind == "fsdp":
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif kind == "tp":
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * seed)
    model(torch.ones(3, 6)).sum().backward()
    optimizer.step()
    return model, optimizer


def _whole(state: Any) -> Any:
    if isinstance(state, DTensor):
        return state.full_tensor()
    return {k: _whole(v) for k, v in state.items()} if isinstance(state, dict) else state


def _parallel_models(folder: Path) -> None:
    dist.init_process_group("gloo")
    for way_name, way in WAYS.items():
        for kind, other_kind in (("fsdp", "tp"), ("tp", "plain"), ("plain", "fsdp")):
            (model, optimizer), (other, other_optimizer) = _wrapped(kind, 1), _wrapped(other_kind, 2)
            place = folder / way_name / kind
            model_state, optimizer_state = get_state_dict(model, optimizer)
            dcp.save({"model": model_state, "optimizer": optimizer_state}, storage_writer=way[0](place))
            new_model, new_optimizer = get_state_dict(other, other_optimizer)
            dcp.load({"model": new_model, "optimizer": new_optimizer}, storage_reader=way[1](place))
            set_state_dict(other, other_optimizer, model_state_dict=new_model, optim_state_dict=new_optimizer)
            after = get_state_dict(other, other_optimizer)
            assert_equal(_whole(dict(after[0])), _whole(dict(model_state)))
            assert_equal(_whole(after[1]["state"]), _whole(optimizer_state["state"]))
            groups: Any = after[1]["param_groups"]
            assert groups[0]["lr"] == 0.1


def test_parallel_models_and_optimizers_come_back_under_another_parallelism(tmp_path: Path) -> None:
    run_distributed(_parallel_models, tmp_path, world_size=2)


def _sharded_tensor(dim: int, order: tuple[int, int], fill: bool) -> sharded_tensor.ShardedTensor:
    spec = ChunkShardingSpec(dim=dim, placements=[f"rank:{rank}/cpu" for rank in order])
    made = sharded_tensor.zeros(spec, 8, 6)
    whole = torch.arange(48.0).reshape(8, 6)
    for shard in made.local_shards() if fill else []:
        box = tuple(
            slice(o, o + n) for o, n in zip(shard.metadata.shard_offsets, shard.metadata.shard_sizes, strict=True)
        )
        shard.tensor.copy_(whole[box])
    return made


def _same_shards(a: sharded_tensor.ShardedTensor, b: sharded_tensor.ShardedTensor) -> bool:
    return all(torch.equal(x.tensor, y.tensor) for x, y in zip(a.local_shards(), b.local_shards(), strict=True))


def _old_shards_and_errors(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for way_name, way in WAYS.items():
        place = folder / way_name
        dcp.save({"w": _sharded_tensor(0, (0, 1), fill=True)}, storage_writer=way[0](place))
        for dim, order in ((0, (1, 0)), (1, (0, 1)), (1, (1, 0))):
            target = _sharded_tensor(dim, order, fill=False)
            dcp.load({"w": target}, storage_reader=way[1](place))
            assert _same_shards(target, _sharded_tensor(dim, order, fill=True)), (way_name, dim, order)
        plain = torch.zeros(8, 6)
        dcp.load({"w": plain}, storage_reader=way[1](place))
        assert torch.equal(plain, torch.arange(48.0).reshape(8, 6))
    # One rank's refusal reaches them all, with its number and its sentence.
    state: dict[str, Any] = {"w": torch.ones(2), f"own-{rank}": {1, 2} if rank else 3}
    with pytest.raises(CheckpointException) as caught:
        dcp.save(state, storage_writer=ImageWriter(folder / "refused"))
    assert list(caught.value.failures) == [1]
    assert "own-1 must be a tensor, or made of" in str(caught.value)
    assert not (folder / "refused/.metadata").exists()


def test_sharded_tensors_and_errors_of_one_rank(tmp_path: Path) -> None:
    run_distributed(_old_shards_and_errors, tmp_path, world_size=2)
