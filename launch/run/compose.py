"""The one place where a rank's config becomes the objects that it trains with."""

import os

import torch

from regrow.launch.config.schema import Config, Kernels
from regrow.launch.run.build import build_model, build_optimizer, build_schedule
from regrow.launch.run.compose_checkpoint import compose_restorer
from regrow.launch.run.compose_data import batches_of
from regrow.launch.run.compose_hooks import compose_hooks, compose_resources
from regrow.launch.run.rank_spec import RankSpec
from regrow.launch.run.signals import StopFlag
from regrow.launch.run.stop_request import StopRequest
from regrow.models.base import LanguageModel
from regrow.models.config import DecoderConfig
from regrow.models.kernels import cases_of
from regrow.torch_compat import make_compiler_repeatable
from regrow.trainer.config import PrecisionName
from regrow.trainer.data.corpus import Corpus
from regrow.trainer.device import seed_everything
from regrow.trainer.kernels import choose_kernels, use_plain_operators
from regrow.trainer.loop import Trainer, TrainerOptions
from regrow.trainer.loss_kernels import LossKernels, compiled_kernels
from regrow.trainer.parallel.apply import ParallelModel, initialise, parallelise
from regrow.trainer.parallel.context import ParallelContext
from regrow.trainer.parallel.engine import Engine
from regrow.trainer.state import TrainState

__all__ = ["compose_trainer"]


def compose_trainer(spec: RankSpec, context: ParallelContext, flag: StopFlag, threads: int) -> Trainer:
    """Everything that this rank trains with.

    Args:
        spec: of the run, which has been opened.
        context: this rank's process groups.
        flag: the process' signal handler.
        threads: that this rank computes with, for the run's record.
    """
    config = spec.config
    saves = config.checkpoint.enable and not config.checkpoint.load_only
    _make_repeatable(config)
    corpus = Corpus(spec.data_folders)
    parallel = _compose_model(spec, context)
    engine = Engine(
        parallel,
        context,
        model_config=_decoder(config),
        schedule=config.parallel.pp_schedule,
        precision=config.precision.name,
        z_loss=config.train.z_loss,
        sources=len(corpus.stores),
        reset_positions=config.data.reset_positions,
        loss_kernels=_loss_kernels(config, context),
    )
    return Trainer(
        options=_options(config, tuple(sorted(corpus.stores))),
        resources=compose_resources(spec, context, threads, corpus),
        context=context,
        engine=engine,
        optimizer=build_optimizer(config, parallel.model),
        schedule=build_schedule(config),
        make_batches=batches_of(config, context, corpus),
        restorer=compose_restorer(spec) if config.checkpoint.enable else None,
        hooks=compose_hooks(config, context),
        state=TrainState(schedule_total=config.scheduler.total_steps or config.train.steps),
        stop_requested=StopRequest(flag, compiles=config.train.compile is True, saves=saves),
    )


def _make_repeatable(config: Config) -> None:
    """Seeds every generator, and takes deterministic operators where asked."""
    seed_everything(config.seed)
    if config.train.deterministic:
        # cuBLAS is deterministic only with a fixed workspace, set before it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        if config.train.compile is True:
            make_compiler_repeatable()


def _decoder(config: Config) -> DecoderConfig:
    assert isinstance(config.model, DecoderConfig), "the launcher refuses other models"
    return config.model


def _compose_model(spec: RankSpec, context: ParallelContext) -> ParallelModel:
    """The model in this rank's layout, with its first weights."""
    config, data = spec.config, spec.config.data
    with torch.device("meta"):
        whole = build_model(config)
    _choose_kernels(spec, whole, context)
    parallel = parallelise(
        whole,
        context,
        model_config=_decoder(config),
        parallel=config.parallel,
        train=config.train,
        precision=config.precision,
        sequences=data.global_batch_size,
    )
    initialise(parallel, context.device, config.seed, data.seq_len)
    return parallel


def _loss_kernels(config: Config, context: ParallelContext) -> LossKernels | None:
    """On a CPU blocks of rows stay in the cache, operator by operator."""
    compiled = config.train.compile is True and context.device.type == "cuda"
    return compiled_kernels(config.train.compile_backend) if compiled else None


def _choose_kernels(spec: RankSpec, whole: LanguageModel, context: ParallelContext) -> None:
    """Says what a CPU computes with; layouts that cut sequences or matrices, and float64, are there to be checked."""
    config, layout = spec.config, context.layout
    cut, name = layout.tp * layout.cp > 1, config.precision.name
    measured = name in (PrecisionName.fp32, PrecisionName.bf16)
    plain = config.launch.kernels is Kernels.plain or config.train.compile is True or not measured
    if plain or cut or context.device.type != "cpu":
        use_plain_operators()
        return
    rows = min(config.data.micro_batch_size, -(-config.data.global_batch_size // layout.data_ranks))
    dtype = torch.bfloat16 if name is PrecisionName.bf16 else torch.float32
    choose_kernels(cases_of(whole, rows, config.data.seq_len, dtype), context, spec.run_dir)


def _options(config: Config, sources: tuple[str, ...]) -> TrainerOptions:
    return TrainerOptions(
        seed=config.seed,
        steps=config.train.steps,
        lr=config.optimizer.lr,
        grad_clip=config.train.grad_clip,
        global_batch_size=config.data.global_batch_size,
        seq_len=config.data.seq_len,
        sources=sources,
    )
