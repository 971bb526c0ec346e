"""`mode=plan`: what a run will need, after the checks that a run makes; nothing is written and nothing trains."""

import dataclasses
import json
from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from omegaconf import DictConfig

from regrow.checkpoint.config import AsyncMode
from regrow.errors import ConfigError
from regrow.launch.config.refusals import refusing
from regrow.launch.config.schema import Config, Device
from regrow.launch.run.build import build_model, build_optimizer
from regrow.launch.run.plan_text import fits_as_text, plan_as_text
from regrow.launch.run.preflight import check_config, check_parallel
from regrow.launch.run.prepare import convert_config
from regrow.models.base import LanguageModel
from regrow.models.config import DecoderConfig
from regrow.trainer.optimizer import Optimizer
from regrow.trainer.parallel.layout import resolve_layout
from regrow.trainer.parallel.memory_rules import compiles
from regrow.trainer.parallel.rules import Batch
from regrow.trainer.plan.dry_run import Step
from regrow.trainer.plan.fit import Cluster, Fit, read_cluster, search
from regrow.trainer.plan.plan import RankMemory, RunPlan, Saves, plan_run, rank_memory
from regrow.trainer.precision import change_parameters

__all__ = ["fit_layouts", "plan_config", "plan_of", "step_of"]


def plan_config(config: DictConfig | Config) -> str:
    """What the command prints.

    Args:
        config: the root config, composed or typed.

    Raises:
        Refused: in one sentence, for what a run would refuse too.
    """
    with refusing():
        typed, _ = convert_config(config)
        if typed.plan.fit is not None:
            fits = fit_layouts(typed)
            if typed.plan.json:
                return _as_json([{**_plain(fit), "overrides": fit.overrides} for fit in fits])
            return fits_as_text(typed.plan.fit, fits)
        plan = plan_of(typed)
        return _as_json(_plain(plan)) if typed.plan.json else plan_as_text(plan, typed.plan)


def plan_of(config: Config) -> RunPlan:
    """The plan of a run, which is checked first.

    Raises:
        ConfigError: a run would be refused.
    """
    step = step_of(config)
    checkpoint = config.checkpoint
    saves = Saves(
        enabled=checkpoint.enable and not checkpoint.load_only,
        staged=checkpoint.async_mode is not AsyncMode.disabled,
        every_steps=checkpoint.interval,
        model_only=checkpoint.create_seed_checkpoint,
    )
    makers = _Makers(config)
    return plan_run(step, config.plan, saves, makers.model, makers.optimizer)


def step_of(config: Config) -> Step:
    """The step of a config that passes the checks of a run.

    Raises:
        ConfigError: it does not.
    """
    _check_machine(config)
    check_config(config)
    device_type = "cpu" if config.launch.device is Device.cpu else "cuda"
    # A machine with GPUs has what compiles for them.
    compiled = compiles(config.train, config.parallel, config.precision.name, device_type, can_compile=True)
    if config.train.compile == "auto":
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, compile=compiled))
    available = config.plan.nodes * config.plan.gpus_per_node if device_type == "cuda" else 1
    layout = resolve_layout(config.parallel, available, ranks_are_given=False)
    check_parallel(config, layout, device_type)
    assert isinstance(config.model, DecoderConfig), "others are refused"
    data = config.data
    return Step(
        model=config.model,
        layout=layout,
        parallel=config.parallel,
        train=config.train,
        precision=config.precision,
        batch=Batch(
            global_batch_size=data.global_batch_size, micro_batch_size=data.micro_batch_size, seq_len=data.seq_len
        ),
        device_type=device_type,
    )


def fit_layouts(config: Config) -> list[Fit]:
    """The best layouts for `plan.fit`, each of which passes the checks of a run.

    Raises:
        ConfigError: the field is no cluster, or what does not depend on the layout is refused.
    """
    assert config.plan.fit is not None
    cluster = read_cluster(config.plan.fit)
    machine = dataclasses.replace(
        config.plan, nodes=cluster.nodes, gpus_per_node=cluster.gpus, memory_gib=cluster.gib, fit=None
    )
    base = dataclasses.replace(config, plan=machine, launch=dataclasses.replace(config.launch, device=Device.auto))
    makers = _Makers(base)
    whole = makers.whole()
    parameters = sum(p.numel() for p in whole.parameters())
    width = next(iter(whole.parameters())).itemsize
    step = _step_for_search(base, cluster)

    def valid(one: Step) -> bool:
        try:
            step_of(_config_of(base, one))
        except ConfigError:
            return False
        return True

    def memory_of(one: Step) -> RankMemory:
        # The first stage holds the most micro-batches, the last one the loss.
        world, pp = one.layout.world_size, one.layout.pp
        ranks = {0, (pp - 1) * (world // pp)}
        found = [rank_memory(one, machine, r, makers.model, makers.optimizer) for r in sorted(ranks)]
        return max(found, key=lambda memory: memory.total)

    return search(
        step,
        machine,
        cluster,
        flops_per_token=whole.flops_per_token(config.data.seq_len),
        parameters=parameters,
        state_bytes=width * (2 if config.train.offload_optimizer else 4),
        valid=valid,
        memory_of=memory_of,
    )


def _step_for_search(config: Config, cluster: Cluster) -> Step:
    """What does not depend on the layout is refused as a run refuses it."""
    degrees: dict[str, Any] = {
        "dp_replicate": 1,
        "dp_shard": cluster.nodes * cluster.gpus,
        "tp": 1,
        "pp": 1,
        "cp": 1,
        "ep": 1,
    }
    parallel = dataclasses.replace(config.parallel, **degrees, pp_layers=[])
    return step_of(dataclasses.replace(config, parallel=parallel))


def _config_of(config: Config, step: Step) -> Config:
    return dataclasses.replace(config, parallel=step.parallel, train=step.train)


def _check_machine(config: Config) -> None:
    plan = config.plan
    for name in ("nodes", "gpus_per_node"):
        if getattr(plan, name) < 1:
            raise ConfigError(f"plan.{name} must be at least 1, but is {getattr(plan, name)}; use 1")
    for name in ("memory_gib", "node_link_gbs", "network_gbs", "host_link_gbs", "storage_gbs", "peak_tflops"):
        if not getattr(plan, name) > 0:
            raise ConfigError(f"plan.{name} must be above 0, but is {getattr(plan, name):g}; leave it out")
    if not 0 < plan.mfu <= 1:
        raise ConfigError(f"plan.mfu must be above 0 and at most 1, but is {plan.mfu:g}; use 0.4")
    for name in ("reserved_gib", "allocator_slack"):
        if getattr(plan, name) < 0:
            raise ConfigError(f"plan.{name} must be at least 0, but is {getattr(plan, name):g}; leave it out")


class _Makers:
    """Models and optimizers of a config, of any depth.

    Args:
        config: of the run.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        # Of offloaded state, what lies in the host's memory is arithmetic.
        self._here = dataclasses.replace(config, train=dataclasses.replace(config.train, offload_optimizer=False))

    def model(self, model: DecoderConfig) -> LanguageModel:
        return build_model(dataclasses.replace(self._config, model=model))

    def optimizer(self, model: LanguageModel) -> Optimizer:
        return build_optimizer(self._here, model)

    def whole(self) -> LanguageModel:
        """The whole model, without memory."""
        with torch.device("meta"):
            model = build_model(self._config)
        change_parameters(model, self._config.precision.name)
        return model


def _plain(value: Any) -> Any:
    """Dataclasses, enums and tuples as what JSON has."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v) for v in value]
    return value


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
