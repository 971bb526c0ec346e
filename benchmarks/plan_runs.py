"""Real small runs, and the most bytes that were live in a step of theirs by the profiler's memory events.

What a plan says of the same commands is compared with that, by `benchmarks.plan` and by a test.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from regrow.launch.config.composition import compose_config
from regrow.launch.config.typed import to_config
from regrow.launch.run.compose import compose_trainer
from regrow.launch.run.plan import plan_of
from regrow.launch.run.prepare import prepare_run
from regrow.launch.run.rank_spec import RankSpec
from regrow.launch.run.signals import StopFlag
from regrow.launch.run.start import open_spec
from regrow.trainer.hook import Hook
from regrow.trainer.loop import Trainer
from regrow.trainer.parallel.context import close_parallel, open_parallel

__all__ = ["RUNS", "measured_peak", "overrides_of", "planned_peaks", "rank_of", "spec_of"]

_DENSE = ["model=llama3_debug", "model.n_layers=4", "model.vocab_size=2048"]
_MOE = ["model=qwen3_moe_debug", "model.n_layers=3", "model.vocab_size=2048"]
_SELECTIVE, _FULL = "train.activation_checkpoint=selective", "train.activation_checkpoint=full"
_BF16, _BF16_PARAMS = "precision=bf16", "precision=bf16_params"
_TIED = "model.tied_embeddings=true"
_SEVERAL = "data.micro_batch_size=2"
# What each run is, by what differs from the debug models' defaults.
RUNS: dict[str, list[str]] = {
    "dense fp32": _DENSE,
    "dense fp32, selective": [*_DENSE, _SELECTIVE],
    "dense fp32, full": [*_DENSE, _FULL],
    "dense fp32, budget 0.5": [*_DENSE, "train.activation_checkpoint=budget"],
    "dense fp32, tied": [*_DENSE, _TIED],
    "dense fp32, vocabulary 32,000": [*_DENSE, "model.vocab_size=32000"],
    "dense fp32, vocabulary 32,000, tied": [*_DENSE, "model.vocab_size=32000", _TIED],
    "dense fp32, 4 micro-batches": [*_DENSE, "data.micro_batch_size=1"],
    "dense fp32, optimizer offloaded": [*_DENSE, "train.offload_optimizer=true"],
    "dense bf16": [*_DENSE, _BF16],
    "dense bf16, selective": [*_DENSE, _BF16, _SELECTIVE],
    "dense bf16, full": [*_DENSE, _BF16, _FULL],
    "dense bf16_params": [*_DENSE, _BF16_PARAMS],
    "dense bf16_params, 2 micro-batches": [*_DENSE, _BF16_PARAMS, _SEVERAL],
    "experts fp32": _MOE,
    "experts bf16": [*_MOE, _BF16],
    "experts bf16, selective": [*_MOE, _BF16, _SELECTIVE],
    "dense fp32, FSDP 2": [*_DENSE, "parallel.dp_shard=2"],
    "dense bf16, FSDP 2, selective": [*_DENSE, _BF16, "parallel.dp_shard=2", _SELECTIVE],
    "dense bf16_params, FSDP 2": [*_DENSE, _BF16_PARAMS, "parallel.dp_shard=2"],
    "experts fp32, FSDP 2": [*_MOE, "parallel.dp_shard=2"],
    "dense fp32, TP 2": [*_DENSE, "parallel.tp=2"],
    "dense bf16, TP 2, selective": [*_DENSE, _BF16, "parallel.tp=2", _SELECTIVE],
    "dense fp32, CP 2": [*_DENSE, "parallel.cp=2"],
    "dense fp32, PP 2": [*_DENSE, "parallel.pp=2", "data.micro_batch_size=1"],
    "dense bf16, PP 2, full": [*_DENSE, _BF16, "parallel.pp=2", "data.micro_batch_size=1", _FULL],
    "experts fp32, EP 2": [*_MOE, "parallel.dp_shard=2", "parallel.ep=2"],
}
_STEPS = 3
_LAST_STEP = "regrow.last_step"


def overrides_of(name: str, corpus: Path) -> list[str]:
    """The command of a run.

    Args:
        name: of `RUNS`.
        corpus: a JSONL file of text.
    """
    return ["data=text", f"data.files=[{corpus}]", f"data.cache={corpus.parent / 'cache'}", "data.workers=1",
            "data.tokenizer_vocab_size=300", "data.seq_len=512", "data.micro_batch_size=4",
            "data.global_batch_size=4", "launch.device=cpu", "launch.threads_per_rank=1", "launch.kernels=plain",
            "hooks=none", "checkpoint=disabled", f"train.steps={_STEPS}", "run.name=planned",
            *RUNS[name]]  # fmt: skip


def planned_peaks(overrides: Sequence[str]) -> list[int]:
    """What the plan says of the first rank of each stage, bytes."""
    return [rank.live for rank in plan_of(to_config(compose_config(list(overrides)))).ranks]


def spec_of(overrides: Sequence[str], run_dir: Path, world_size: int) -> RankSpec:
    """What the ranks of the run are told.

    Args:
        overrides: its command.
        run_dir: its folder.
        world_size: ranks.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    spec = prepare_run(compose_config(list(overrides)), run_dir, overrides=overrides, world_size=world_size)
    return dataclasses.replace(spec, record=open_spec(spec).record)


@final
class _LastStep(Hook):
    """Marks where the last step begins, among the profiler's events."""

    def before_step(self, trainer: Trainer) -> None:
        if trainer.state.step == _STEPS - 1:
            with record_function(_LAST_STEP):
                pass


def measured_peak(spec: RankSpec) -> int:
    """The most bytes that were live during the last step on this rank, of all that it has allocated since its start.

    Every event counts from before the model is made, so parameters and optimizer state are among them.

    Args:
        spec: of a run on CPUs; this process is one of its ranks.
    """
    torch.set_num_threads(1)
    context = open_parallel(spec.layout, "cpu", 60.0)
    # torch 2.11 warns of lost cycles unless it is told to add them up.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        trainer = compose_trainer(spec, context, StopFlag(), 1)
        trainer.hooks.append(_LastStep())
        trainer.fit()
    close_parallel()
    return _most_live(seen.profiler)


def _most_live(profiler: Any) -> int:
    """The most bytes that were live from the mark of the last step on.

    Storages are told apart by their addresses, not added up: gloo's threads, which the profiler does not see, free
    some of what a collective was given. Such a storage counts until its address is given out again.
    """
    allocations: list[tuple[int, int, int]] = []
    begins = 0
    waiting = list(profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.name == _LAST_STEP:
            begins = event.start_time_ns
        if event.tag.name == "Allocation":
            fields = event.extra_fields
            allocations.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    live: dict[int, int] = {}
    total = most = 0
    for at, address, size in sorted(allocations, key=lambda a: a[0]):
        total -= live.pop(address, 0)
        if size > 0:
            live[address] = size
            total += size
        most = max(most, total) if at >= begins else 0
    return most


def rank_of(index: int, spec: RankSpec, world_size: int, port: int, results: Any) -> None:
    """One of several ranks, in a process of its own."""
    os.environ |= {
        "RANK": str(index),
        "LOCAL_RANK": str(index),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    results[index] = measured_peak(spec)
