"""What only an accelerator can show: pinned copies beside training, and a run that continues from its own state."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from regrow.checkpoint.config import AsyncMode
from regrow.checkpoint.format.manifest import Manifest
from regrow.checkpoint.load.loading import load_tensors
from regrow.checkpoint.save.saver import StepSaver
from regrow.trainer.offload import HostState, Piece
from regrow.trainer.optimizer import global_grad_norm
from regrow.trainer.parallel.ring import block_attention, block_gradients
from regrow.trainer.shards import local_part
from tests.runs import train
from tests.support import assert_same_tensors, curve, metrics, regrow, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator"),
]

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """A group of one; nccl on the device, as in a run."""
    dist.init_process_group("cuda:nccl,cpu:gloo", store=dist.HashStore(), rank=0, world_size=1)
    made = dist.new_group(backend="gloo")
    assert made is not None
    yield made
    dist.destroy_process_group()


@pytest.mark.parametrize("mode", list(AsyncMode), ids=lambda m: str(m.name))
def test_a_snapshot_from_the_device_is_never_torn(tmp_path: Path, group: dist.ProcessGroup, mode: AsyncMode) -> None:
    """Kernels that change everything are queued the moment that the call allows it."""
    tensors = {f"t{i}": torch.randn(512, 1024, device=DEVICE) for i in range(12)}
    saver = StepSaver(tmp_path, mode, DEVICE, group)
    copies: dict[int, dict[str, torch.Tensor]] = {}
    for step in range(1, 51):
        copies[step] = {n: t.clone() for n, t in tensors.items()}
        results = saver.save(tensors, Manifest(step=step, lineage="a"))
        saver.wait_staged()
        for tensor in tensors.values():
            tensor.add_(1.0)
        for result in [*results, *(saver.wait() if step == 50 else [])]:
            assert result.url is not None, result.error
            loaded = {n: torch.zeros_like(t) for n, t in tensors.items()}
            load_tensors(result.url, loaded, group)
            assert all(torch.equal(t, copies[result.step][n]) for n, t in loaded.items())
            del copies[result.step]
    saver.close()
    assert not copies


@pytest.mark.parametrize(("precision", "compiled"), [("fp32", "false"), ("bf16", "auto")])
def test_a_run_on_the_device_repeats_and_continues(
    corpus: Path, tmp_path: Path, precision: str, compiled: str
) -> None:
    """With deterministic algorithms a continued run is an undisturbed one, bit for bit; compiled too."""
    arguments = tiny(
        corpus, "train.deterministic=true", f"precision={precision}", f"train.compile={compiled}", "hooks=none",
        "checkpoint.interval=5", "scheduler.total_steps=20", "data.global_batch_size=8",
    )  # fmt: skip
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    assert train([*arguments, "train.steps=20"], whole, device="cuda").kind == "finished"
    for steps in (7, 20):
        assert train([*arguments, f"train.steps={steps}"], grown, device="cuda").step == steps
    assert curve(grown) == curve(whole)
    assert_same_tensors(grown / "checkpoint/step-20", whole / "checkpoint/step-20")
    assert metrics(whole)[-1]["memory_gib"] > 0


def test_the_device_trains_what_the_cpu_trains(corpus: Path, tmp_path: Path) -> None:
    arguments = tiny(corpus, "train.steps=5", "hooks=none", "data.global_batch_size=8", "train.compile=false")
    assert train(arguments, tmp_path / "cpu").kind == "finished"
    # As the command, in a process of its own.
    code, out = regrow([*arguments, "launch.device=cuda", "run.name=cuda"], tmp_path)
    assert code == 0, out
    rows = zip(metrics(tmp_path / "cpu"), metrics(tmp_path / "outputs/cuda"), strict=True)
    for cpu, cuda in rows:
        assert cuda["loss"] == pytest.approx(cpu["loss"], rel=1e-4)


def test_state_on_the_host_changes_no_bit_and_leaves_the_device(corpus: Path, tmp_path: Path) -> None:
    """Runs with the moments on the device and on the host, and one that changes over at a restart."""
    arguments = tiny(
        corpus, "train.deterministic=true", "train.compile=false", "hooks=none", "checkpoint.interval=3",
        "scheduler.total_steps=6", "data.global_batch_size=8",
    )  # fmt: skip
    offloaded = "train.offload_optimizer=true"
    assert train([*arguments, "train.steps=6"], tmp_path / "near", device="cuda").step == 6
    assert train([*arguments, "train.steps=6", offloaded], tmp_path / "far", device="cuda").step == 6
    for steps, more in ((3, [offloaded]), (6, [])):
        assert train([*arguments, f"train.steps={steps}", *more], tmp_path / "both", device="cuda").step == steps
    for name in ("far", "both"):
        assert curve(tmp_path / name) == curve(tmp_path / "near")
        assert_same_tensors(tmp_path / name / "checkpoint/step-6", tmp_path / "near/checkpoint/step-6")


def test_moments_travel_in_parts_beside_each_other() -> None:
    """Many parts through two buffers, step after step: every element is updated once a step."""
    parameters = {f"p{i}": torch.randn(129, 64, device=DEVICE) for i in range(40)}
    state = HostState(parameters, ("m",), part_bytes=1 << 16)

    def work(pieces: Sequence[Piece], moments: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        for piece in pieces:
            assert moments["m"][piece.name].device.type == "cuda"
            moments["m"][piece.name].add_(parameters[piece.name][piece.rows])

    for _ in range(20):
        state.update(work)
    state.wait()
    for name, tensor in parameters.items():
        held = state.tensors["m"][name]
        assert held.device.type == "cpu"
        expected = torch.zeros_like(tensor)
        for _ in range(20):
            expected += tensor
        assert torch.equal(held, expected.cpu()), name


def test_shards_over_nccl_are_the_whole_on_one_rank(group: dist.ProcessGroup) -> None:
    """FSDP's gathers and reductions run, and change no bit."""
    results = []
    for sharded in (False, True):
        torch.manual_seed(3)
        model = torch.nn.Sequential(*(torch.nn.Linear(64, 64, device=DEVICE) for _ in range(3)))
        if sharded:
            mesh = init_device_mesh("cuda", (1,))
            for layer in model:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        out = model(torch.ones(8, 64, device=DEVICE))
        out.square().sum().backward()
        results.append([local_part(p.grad) for p in model.parameters() if p.grad is not None])
    assert len(results[0]) == 6
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_norm_is_exact_on_the_device(dtype: torch.dtype) -> None:
    """Large, tiny, constant, empty and transposed gradients, in a few launches that copy none of them."""
    torch.manual_seed(0)
    shapes = [(32_000, 512), (70_001,), (3,), (0,), *[(64, 64)] * 300]
    grads = [(torch.randn(s) * 1e-25).to(DEVICE, dtype) for s in shapes]
    grads += [torch.full((3_000_000,), 1e-26).to(DEVICE, dtype), grads[0][:300].t()]
    parameters = [torch.nn.Parameter(torch.empty_like(g)) for g in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    exact = sum(float(g.double().square().sum()) for g in grads) ** 0.5
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    assert float(global_grad_norm(parameters)) == pytest.approx(exact, rel=1e-12)
    assert torch.cuda.max_memory_allocated() - held < 8 << 20


@pytest.mark.parametrize(
    ("dtype", "masked"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)]
)
@pytest.mark.parametrize("length", [64, 72])
def test_blocks_of_a_ring_are_those_of_the_cpu(dtype: torch.dtype, masked: bool, length: int) -> None:
    """Outputs, sums and gradients of a block, by the kernels of the device."""
    q, k, v, grad = (torch.randn(2, 4, length, 32, dtype=dtype) for _ in range(4))
    mask = (torch.rand(2, 1, length, length) < 0.4) | torch.eye(length, dtype=torch.bool) if masked else None
    wide = [x.double() for x in (q, k, v, grad)]
    out, lse = block_attention(wide[0], wide[1], wide[2], mask, causal=not masked)
    expected = block_gradients(wide[3], wide[0], wide[1], wide[2], out, lse, mask, causal=not masked)
    near = [x.to(DEVICE) for x in (q, k, v, grad)]
    sight = mask.to(DEVICE) if mask is not None else None
    found, found_lse = block_attention(near[0], near[1], near[2], sight, causal=not masked)
    grads = block_gradients(near[3], near[0], near[1], near[2], found, found_lse, sight, causal=not masked)
    limit = 5e-2 if dtype is torch.bfloat16 else 1e-4
    for a, b in zip((found, found_lse, *grads), (out, lse, *expected), strict=True):
        assert a.device.type == "cuda"
        torch.testing.assert_close(a.double().cpu(), b.double(), rtol=limit, atol=limit)
