"""What only an accelerator can show: pinned copies beside training, and a run that continues from its own state."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from regrow.checkpoint.config import AsyncMode
from regrow.checkpoint.format.manifest import Manifest
from regrow.checkpoint.load.loading import load_tensors
from regrow.checkpoint.save.saver import StepSaver
from regrow.trainer.optimizer import global_grad_norm
from regrow.trainer.parallel.ring import block_attention, block_gradients
from tests.support import assert_same_tensors, curve, metrics, regrow, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator"),
]

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """A group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_on_the_device_repeats_and_continues(corpus: Path, tmp_path: Path, precision: str) -> None:
    """With deterministic algorithms a continued run is an undisturbed one, bit for bit."""
    arguments = tiny(
        corpus, "launch.device=cuda", "train.deterministic=true", f"precision={precision}", "hooks=none",
        "checkpoint.interval=5", "scheduler.total_steps=20", "data.global_batch_size=8",
    )  # fmt: skip
    assert regrow([*arguments, "train.steps=20", "run.name=whole"], tmp_path)[0] == 0
    for steps in (7, 20):
        code, out = regrow([*arguments, f"train.steps={steps}", "run.name=grown"], tmp_path)
        assert code == 0, out
    whole, grown = tmp_path / "outputs/whole", tmp_path / "outputs/grown"
    assert curve(grown) == curve(whole)
    assert_same_tensors(grown / "checkpoint/step-20", whole / "checkpoint/step-20")
    assert metrics(whole)[-1]["memory_gib"] > 0


def test_the_device_trains_what_the_cpu_trains(corpus: Path, tmp_path: Path) -> None:
    arguments = tiny(corpus, "train.steps=5", "hooks=none", "data.global_batch_size=8")
    for device in ("cpu", "cuda"):
        assert regrow([*arguments, f"launch.device={device}", f"run.name={device}"], tmp_path)[0] == 0
    rows = zip(metrics(tmp_path / "outputs/cpu"), metrics(tmp_path / "outputs/cuda"), strict=True)
    for cpu, cuda in rows:
        assert cuda["loss"] == pytest.approx(cpu["loss"], rel=1e-4)


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
