"""What each way to save memory saves and costs, in real steps on a CPU: bytes from the profiler, and CPU seconds.

    python -m benchmarks.activations

A row's memory is the peak of what a step has allocated and not freed, beyond what was there when it began:
activations, gradients, logits, and what the optimizer needs meanwhile.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, final

from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_runs import train, write_corpus
from regrow.trainer.hook import Hook
from regrow.trainer.loop import Trainer

__all__ = ["MemoryWatch", "main", "peak_of"]

_MODEL = ["model=llama3_debug", "model.n_layers=8", "data.seq_len=512", "data.micro_batch_size=4",
          "data.global_batch_size=4", "launch.device=cpu", "launch.threads_per_rank=1", "launch.kernels=plain",
          "hooks=none", "checkpoint=disabled", "data=text", "data.tokenizer_vocab_size=300",
          "data.workers=1"]  # fmt: skip
_WAYS: dict[str, list[str]] = {
    "none": [],
    "selective": ["train.activation_checkpoint=selective"],
    "budget 0.75": ["train.activation_checkpoint=budget", "train.activation_memory_budget=0.75"],
    "budget 0.5": ["train.activation_checkpoint=budget"],
    "budget 0.25": ["train.activation_checkpoint=budget", "train.activation_memory_budget=0.25"],
    "full": ["train.activation_checkpoint=full"],
    "optimizer offloaded": ["train.offload_optimizer=true"],
}


def peak_of(changes: Iterable[tuple[int, int]]) -> int:
    """The most bytes that were live at once, from (time, bytes allocated or, below 0, freed)."""
    live = most = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        live += size
        most = max(most, live)
    return most


@final
class MemoryWatch(Hook):
    """Follows memory in the third step, and takes the CPU seconds of those behind it."""

    def __init__(self) -> None:
        self.peak = 0
        self.seconds: list[float] = []
        self._profiler: profile | None = None
        self._began = 0.0

    def before_step(self, trainer: Trainer) -> None:
        if trainer.state.step == 2:
            self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
            self._profiler.__enter__()  # type: ignore[no-untyped-call]
        self._began = time.process_time()

    def after_step(self, trainer: Trainer) -> None:
        if self._profiler is not None:
            self._profiler.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            events: Any = self._profiler.profiler
            memory = [e for e in events.kineto_results.events() if e.name() == "[memory]"]
            self.peak = peak_of((e.start_ns(), e.nbytes()) for e in memory)
            self._profiler = None
        elif trainer.state.step > 3:
            self.seconds.append(time.process_time() - self._began)


def main() -> int:
    """Prints the table; 0 when it is whole."""
    print("| | peak of a step | CPU seconds of a step |\n|---|---|---|")
    first: tuple[int, float] | None = None
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "text.jsonl")
        write_corpus(corpus, 200)
        for name, more in _WAYS.items():
            watch = MemoryWatch()
            places = [f"data.files=[{corpus}]", f"data.cache={folder}/cache", f"run.root={folder}"]
            train([*_MODEL, *more, *places, "train.steps=6"], name.replace(" ", "-"), watch)
            seconds = statistics.median(watch.seconds)
            first = first or (watch.peak, seconds)
            print(
                f"| {name} | {watch.peak / 2**20:.1f} MiB ({watch.peak / first[0]:.0%}) | "
                f"{seconds:.2f} ({seconds / first[1]:.2f} ×) |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
