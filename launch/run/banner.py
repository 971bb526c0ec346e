"""What a start says of its run in six lines: what is trained, where, on what, for how long, and how it is saved."""

import math
import os
from functools import partial
from math import prod

import torch

from regrow.checkpoint.storage.opening import is_url
from regrow.launch.config.schema import Config
from regrow.launch.run.build import build_schedule
from regrow.launch.run.rank_spec import RankSpec
from regrow.launch.run.weights import shapes_of
from regrow.models.config import DecoderConfig, ModelConfig
from regrow.trainer.data.corpus import Corpus
from regrow.trainer.data.windows import documents_of_split
from regrow.trainer.parallel.context import ParallelContext
from regrow.trainer.resources import BannerLines, Started
from regrow.trainer.wording import count_text, size_text

__all__ = ["banner_of", "parameter_counts"]


def banner_of(spec: RankSpec, context: ParallelContext, corpus: Corpus, threads: int) -> BannerLines:
    """The lines, once the trainer says where it starts.

    Args:
        spec: of the run.
        context: this rank's place.
        corpus: the run's tokens.
        threads: of each rank.
    """
    return partial(_lines, spec, context, corpus, threads)


def _lines(spec: RankSpec, context: ParallelContext, corpus: Corpus, threads: int, started: Started) -> list[str]:
    config = spec.config
    parts = {
        "model": _model(config.model),
        "device": _device(config, context, threads),
        "data": _data(config, corpus),
        "steps": _steps(config, corpus, started.schedule_total),
        "checkpoint": _checkpoint(config, started.step_bytes),
        "run": f"{spec.run_dir}; {started.source}; continuing after step {started.step}",
    }
    return [f"{name:<10}  {text}" for name, text in parts.items()]


def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """A model's parameters, and those that a token goes through: of a mixture's experts those that it is sent to."""
    shapes = shapes_of(config)
    total = sum(map(prod, shapes.values()))
    experts = config.n_experts if isinstance(config, DecoderConfig) else 0
    each = getattr(config, "experts_per_token", experts)
    if not experts:
        return total, total
    routed = sum(prod(shape) for name, shape in shapes.items() if ".experts." in name and shape[0] == experts)
    return total, total - routed + routed * each // experts


def _model(config: ModelConfig) -> str:
    total, active = parameter_counts(config)
    of_each = f", {count_text(active)} active for a token" if active < total else ""
    return f"{config.name}: {count_text(total)} parameters{of_each}"


def _device(config: Config, context: ParallelContext, threads: int) -> str:
    if context.device.type == "cuda":
        name = torch.cuda.get_device_name(context.device)
        memory = torch.cuda.get_device_properties(context.device).total_memory
        device = f"{name}, {memory / 2**30:.0f} GiB"
    else:
        device = f"CPU, {threads} of {os.cpu_count()} threads"
    extra = ", compiled" if config.train.compile is True else ""
    ranks = f"{context.world_size} ranks: {context.layout}" if context.world_size > 1 else "one rank"
    return f"{device}; {config.precision.name.value}{extra}; {ranks}"


def _tokens_a_step(config: Config) -> int:
    return config.data.global_batch_size * config.data.seq_len


def _tokens_an_epoch(config: Config, corpus: Corpus) -> int:
    """Of the training split of all sources."""
    held_out = config.data.validation_fraction
    return sum(
        int(store.lengths[documents_of_split(store, held_out, validation=False)].sum())
        for store in corpus.stores.values()
    )


def _data(config: Config, corpus: Corpus) -> str:
    data, stores = config.data, corpus.stores
    tokens = sum(store.index.tokens for store in stores.values())
    sources = f" in {len(stores)} sources" if len(stores) > 1 else ""
    step, epoch = _tokens_a_step(config), _tokens_an_epoch(config, corpus)
    return (
        f"{count_text(tokens)} tokens{sources}; {step:,} a step ({data.global_batch_size} × {data.seq_len:,}); "
        f"an epoch has {count_text(epoch)}, {math.ceil(epoch / step):,} steps"
    )


def _steps(config: Config, corpus: Corpus, schedule_total: int) -> str:
    steps, scheduler = config.train.steps, config.scheduler
    tokens = steps * _tokens_a_step(config)
    epochs = tokens / max(1, _tokens_an_epoch(config, corpus))
    optimizer, shape = (part._target_.rpartition(".")[2] for part in (config.optimizer, scheduler))
    over = f" over {schedule_total:,} steps" if schedule_total != steps else ""
    shortened = build_schedule(config).shortened(schedule_total) is not None
    warm_up = "warm-up shortened" if shortened else f"warm-up {scheduler.warmup_steps:,}"
    return (
        f"{steps:,}, {count_text(tokens)} tokens, {epochs:.2g} epochs; {optimizer}, "
        f"lr {config.optimizer.lr:g}, {shape}{over}, {warm_up}"
    )


def _checkpoint(config: Config, step_bytes: int) -> str:
    options = config.checkpoint
    if not options.enable:
        return "none: nothing is saved or resumed"
    if options.load_only:
        return "load_only: resumed, but never saved"
    more = "".join(f", {name}" for name in options.save_policies)
    keep = f"newest {options.keep_latest_k} kept" if options.keep_latest_k else "all kept"
    rules = "".join(f", {name}" for name in options.retention_rules)
    where = f"; in {options.folder}" if is_url(options.folder) else ""
    return (
        f"every {options.interval:,} steps{more}; {keep}{rules}; {options.async_mode.value}; "
        f"{size_text(step_bytes)} a step{where}"
    )
