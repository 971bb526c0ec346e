"""Profiles of some steps, and what held the memory where it ran out."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import final

from torch.profiler import ProfilerActivity, profile

from regrow.errors import ConfigError
from regrow.torch_compat import dump_memory_snapshot, memory_by_category, on_out_of_memory, remember_allocations
from regrow.trainer.device import memory_gib
from regrow.trainer.hook import Hook
from regrow.trainer.hooks.profile_config import ProfileConfig
from regrow.trainer.loop import Trainer
from regrow.trainer.profiling import allocated, in_mib, is_out_of_memory, operators, time_in_words, waits
from regrow.trainer.reduction import Slot

__all__ = ["ProfileHook"]

log = logging.getLogger(__name__)

# Rank 0 looks for a request so often.
_EVERY_S = 1.0
_ENTRIES = 100_000


@final
class ProfileHook(Hook):
    """See `ProfileConfig`. Whatever fails in it is logged, and ends profiling alone."""

    def __init__(self, config: ProfileConfig) -> None:
        if any(step < 1 for step in config.at):
            raise ConfigError(f"hooks.profile.at must be steps of at least 1, but is {list(config.at)}; use [10]")
        if config.count < 1:
            raise ConfigError(f"hooks.profile.count must be at least 1, but is {config.count}; use 3")
        if any(rank < 0 for rank in config.ranks):
            raise ConfigError(
                f"hooks.profile.ranks must be ranks from 0 on, but is {list(config.ranks)}; use [] for all"
            )
        if config.history < 0:
            raise ConfigError(f"hooks.profile.history must be at least 0, but is {config.history}; use 0")
        self._config = config
        self._running: profile | None = None
        self._first = 0
        self._last = 0
        self._began = self._looked = 0.0
        self._requested: Slot | None = None

    def before_fit(self, trainer: Trainer) -> None:
        ranks, world_size = self._config.ranks, trainer.context.world_size
        if trainer.context.is_main and any(rank >= world_size for rank in ranks):
            log.warning("hooks.profile.ranks has %s, but there are %d ranks", list(ranks), world_size)
        # One rank looks, and all hear of it at the same step.
        self._requested = trainer.reduction.sum("profile_request", lambda: self._request(trainer))
        if self._config.on_oom and trainer.context.device.type == "cuda":
            remember_allocations(self._config.history)
            on_out_of_memory(lambda: self._snapshot(trainer, f"out-of-memory-rank-{trainer.context.rank}"))

    def _folder(self, trainer: Trainer) -> Path:
        return trainer.resources.run_dir / "profile"

    def _request(self, trainer: Trainer) -> float:
        """Whether somebody has put the file there, which is taken away."""
        now = time.monotonic()
        if not trainer.context.is_main or now - self._looked < _EVERY_S:
            return 0.0
        self._looked = now
        try:
            (self._folder(trainer) / "request").unlink()
        except OSError:
            return 0.0
        return 1.0

    def before_step(self, trainer: Trainer) -> None:
        step = trainer.state.step + 1
        assert self._requested is not None, "before_fit comes first"
        if step > self._last and (step in self._config.at or self._requested.value > 0):
            self._first, self._last = step, step + self._config.count - 1
            if not self._config.ranks or trainer.context.rank in self._config.ranks:
                _only_warned(lambda: self._start(trainer), "starting")

    def _start(self, trainer: Trainer) -> None:
        memory, activities = self._config.memory, [ProfilerActivity.CPU]
        if trainer.context.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            if memory and not self._config.history:
                remember_allocations(_ENTRIES)
        running = profile(activities=activities, profile_memory=memory, record_shapes=memory, with_stack=memory)
        running.start()
        self._running, self._began = running, time.perf_counter()

    def after_step(self, trainer: Trainer) -> None:
        if self._running is not None and trainer.state.step >= min(self._last, trainer.options.steps):
            running, self._running = self._running, None
            seconds = time.perf_counter() - self._began
            _only_warned(lambda: self._finish(trainer, running, seconds), "writing")

    def _finish(self, trainer: Trainer, running: profile, seconds: float) -> None:
        """Writes the trace and tells what is in it."""
        running.stop()
        rank, step = trainer.context.rank, trainer.state.step
        name = f"steps-{self._first}-{step}-rank-{rank}"
        folder = self._folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        averages, whole_us = list(running.key_averages()), seconds * 1e6
        lines = [
            f"profile of steps {self._first} to {step}, rank {rank}: {seconds:.2f} s, with the profiler's own time",
            f"longest operators: {time_in_words(operators(averages), whole_us)}",
            f"waiting: {time_in_words(waits(averages), whole_us)}",
        ]
        if self._config.memory:
            held = memory_by_category(running)
            told = ", ".join(f"{category} {in_mib(size)}" for category, size in held)
            lines.append(f"peak of memory {in_mib(sum(size for _, size in held))}: {told}")
        trace = folder / f"{name}.json.gz"
        running.export_chrome_trace(str(trace))
        lines.append(f"trace: {trace} (open it at ui.perfetto.dev)")
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
        for line in lines:
            log.info("%s", line)
        if self._config.memory and trainer.context.device.type == "cuda":
            self._snapshot(trainer, name)
            if not self._config.history:
                remember_allocations(0)

    def _snapshot(self, trainer: Trainer, name: str) -> None:
        def dump() -> None:
            folder = self._folder(trainer)
            folder.mkdir(parents=True, exist_ok=True)
            dump_memory_snapshot(str(folder / f"{name}.pickle"))
            log.info("memory: %s (open it at pytorch.org/memory_viz)", folder / f"{name}.pickle")

        _only_warned(dump, "writing a snapshot")

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        if self._config.on_oom and is_out_of_memory(error):
            parameters = list(trainer.model.parameters())
            held = allocated(
                {
                    "parameters": parameters,
                    "gradients": (p.grad for p in parameters),
                    "optimizer state": trainer.optimizer.state_tensors().values(),
                }
            )
            context = trainer.context
            log.error(
                "rank %d ran out of memory at step %d, with at most %.2f GiB used: %s; the rest is activations and "
                "what the allocator keeps. Less is needed with a smaller data.micro_batch_size, "
                "train.activation_checkpoint=full, or a larger parallel.dp_shard",
                context.rank, trainer.state.step + 1, memory_gib(context.device), held,
            )  # fmt: skip

    def close(self, trainer: Trainer) -> None:
        if self._running is not None:
            running, self._running = self._running, None
            _only_warned(running.stop, "ending")


def _only_warned(act: Callable[[], None], what: str) -> None:
    """Does what no training is to be stopped by."""
    try:
        act()
    except Exception as error:
        log.warning("%s a profile failed (%s: %s); training goes on without it", what, type(error).__name__, error)
