"""Where one training step's time goes, by the names of kernels (on a CPU, of operators)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import torch
from torch.profiler import ProfilerActivity, profile

from regrow.trainer.hook import Hook
from regrow.trainer.loop import Trainer

__all__ = ["CLASSES", "Watch", "class_of", "shares"]

# The first class one of whose words is in a kernel's name has it.
CLASSES: dict[str, tuple[str, ...]] = {
    "optimizer": ("adam", "foreach", "multi_tensor", "multitensor", "lpnorm"),
    "attention": ("flash", "fmha", "attention", "cudnn_generated", "sdpa", "varlen", "flex"),
    "copy": ("memcpy", "memset", "aten::copy_", "aten::_to_copy", "aten::zero_", "aten::fill_", "nccl", "gloo"),
    "matmul": ("gemm", "cutlass", "nvjet", "cublas", "aten::mm", "aten::addmm", "aten::bmm", "mkldnn", "_mm", "xmma"),
    "elementwise": (
        "triton", "elementwise", "vectorized", "reduce", "softmax", "embedding", "index", "scatter", "gather", "cat",
        "scan", "sort", "aten::",
    ),
}  # fmt: skip
OTHER = "other"


def class_of(kernel: str) -> str:
    """The class of a kernel, by its name."""
    name = kernel.lower()
    # The compiler's kernels are named after all that was fused; products and attention are left to others.
    if name.startswith(("triton_poi", "triton_red", "triton_per")):
        return "elementwise"
    return next((kind for kind, words in CLASSES.items() if any(word in name for word in words)), OTHER)


def shares(kernels: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Parts of the whole, by class, from (name, time); of nothing all are 0."""
    times = dict.fromkeys([*CLASSES, OTHER], 0.0)
    for name, time in kernels:
        times[class_of(name)] += time
    whole = sum(times.values()) or 1.0
    return {kind: round(time / whole, 4) for kind, time in times.items()}


@final
class Watch(Hook):
    """Collects a run's rows, and profiles one of its steps.

    Args:
        step: the number of that step; 0 profiles none.
    """

    def __init__(self, step: int = 0) -> None:
        self.rows: list[dict[str, Any]] = []
        self.profile: dict[str, Any] | None = None
        self.flops_ratio = 1.0
        self._step = step
        self._profiler: profile | None = None

    def before_fit(self, trainer: Trainer) -> None:
        # 6N alone, as a part of 6N + 12LdT.
        model = trainer.model
        self.flops_ratio = model.flops_per_token(0) / model.flops_per_token(trainer.options.seq_len)

    def before_step(self, trainer: Trainer) -> None:
        if trainer.state.step + 1 == self._step:
            _synchronize()
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profiler = profile(activities=activities, acc_events=True)
            self._profiler.__enter__()  # type: ignore[no-untyped-call]

    def after_step(self, trainer: Trainer) -> None:
        if self._profiler is not None:
            _synchronize()
            self._profiler.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self.profile = _summary(self._profiler)
            self._profiler = None

    def after_metrics(self, trainer: Trainer, row: Mapping[str, Any]) -> None:
        self.rows.append(dict(row))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _summary(profiler: profile) -> dict[str, Any]:
    kernels: Sequence[tuple[str, float]]
    if torch.cuda.is_available():
        found: Any = profiler.events()  # type: ignore[no-untyped-call]
        events = [
            e for e in found or [] if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation
        ]
        kernels = [(e.name, float(e.self_device_time_total)) for e in events]
    else:
        kernels = [(e.key, float(e.self_cpu_time_total)) for e in profiler.key_averages()]
    slowest: dict[str, float] = {}
    for name, time in kernels:
        slowest[name] = slowest.get(name, 0.0) + time
    top = sorted(slowest.items(), key=lambda pair: -pair[1])[:20]
    return {
        "shares": shares(kernels),
        "busy_ms": round(sum(t for _, t in kernels) / 1e3, 2),
        "kernels": len(kernels),
        "slowest": {name[:100]: round(time / 1e3, 3) for name, time in top},
    }
