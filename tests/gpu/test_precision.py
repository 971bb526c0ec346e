"""bfloat16 parameters and products in 8 bits by the device's own kernels, compiled and not."""

from pathlib import Path

import pytest
import torch

from regrow.trainer.rounded_adamw import _update, compiled_update
from regrow.trainer.rounding import coordinates_of, random_words, words_of_name
from tests.support import assert_same_tensors, curve, metrics, regrow, stored_tensors, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator"),
]

DEVICE = torch.device("cuda", 0)
FP8 = ["precision=fp8", "precision.fp8_min_features=0"]
PRECISIONS = {
    "bf16": ["precision=bf16"],
    "bf16_params": ["precision=bf16_params"],
    "tensorwise": FP8,
    "rowwise": [*FP8, "precision.fp8_recipe=rowwise"],
}


def on_device(corpus: Path, precision: str, *more: str) -> list[str]:
    return tiny(
        corpus, "launch.device=cuda", "train.deterministic=true", "hooks=none", "data.global_batch_size=8",
        *PRECISIONS[precision], *more,
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["bf16_params", "tensorwise", "rowwise"])
def test_a_run_on_the_device_repeats_and_continues(corpus: Path, tmp_path: Path, precision: str) -> None:
    arguments = on_device(corpus, precision, "checkpoint.interval=5", "scheduler.total_steps=12")
    for name, steps in (("whole", 12), ("grown", 7), ("grown", 12)):
        code, out = regrow([*arguments, f"train.steps={steps}", f"run.name={name}"], tmp_path, timeout_s=280.0)
        assert code == 0, out
    whole, grown = tmp_path / "outputs/whole", tmp_path / "outputs/grown"
    assert curve(grown) == curve(whole)
    assert_same_tensors(grown / "checkpoint/step-12", whole / "checkpoint/step-12")
    dtype = torch.bfloat16 if precision == "bf16_params" else torch.float32
    stored = stored_tensors(whole / "checkpoint/step-12")
    assert {t.dtype for n, t in stored.items() if n.endswith(("weight", "exp_avg", "exp_avg_sq"))} == {dtype}


@pytest.mark.parametrize("compiled", ["true", "false"])
def test_they_train_what_bfloat16_trains(corpus: Path, tmp_path: Path, compiled: str) -> None:
    losses = {}
    for precision in PRECISIONS:
        arguments = on_device(corpus, precision, f"train.compile={compiled}", "train.steps=10", "checkpoint=disabled")
        code, out = regrow([*arguments, f"run.name={precision}"], tmp_path, timeout_s=280.0)
        assert code == 0, out
        losses[precision] = [r["loss"] for r in metrics(tmp_path / "outputs" / precision)]
    for precision, found in losses.items():
        assert found == pytest.approx(losses["bf16"], rel=0.02), precision
        assert precision == "bf16" or found != losses["bf16"], precision


def test_the_update_has_the_cpus_bits_and_its_results(tmp_path: Path) -> None:
    """Random bits are equal; of the results, those whose float32 was rounded otherwise may differ by one step."""
    shape, whole = (300, 513), (1000, 1000)
    torch.manual_seed(0)
    tensors = [torch.randn(shape).bfloat16() for _ in range(4)]
    tensors[2].abs_()
    results = []
    for device in (torch.device("cpu"), DEVICE):
        at, name = coordinates_of(shape, (7, 11), whole, device), words_of_name(3, "w", device)
        step = torch.tensor(9, dtype=torch.int32, device=device)
        numbers = [step, *(torch.tensor(v, device=device) for v in (0.0, 0.5, 0.01, 0.999, 0.3))]
        own = [t.to(device, copy=True) for t in tensors]
        if device.type == "cuda":
            compiled_update("inductor")(own, at, name, numbers, 0.9, 0.95, 1e-8)
        else:
            _update(own, at.rows, at.columns, name, numbers, 0.9, 0.95, 1e-8)
        results.append([*(w.cpu() for w in random_words(at, name, step)), *(t.cpu() for t in own[:3])])
    cpu, cuda = results
    assert torch.equal(cpu[0], cuda[0])
    assert torch.equal(cpu[1], cuda[1])
    for a, b in zip(cpu[2:], cuda[2:], strict=True):
        assert float((a != b).double().mean()) < 1e-2
        torch.testing.assert_close(a, b, rtol=1 / 64, atol=1e-6)
