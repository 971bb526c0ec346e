"""Which hooks a run has, and in which order. Pure."""

from regrow.errors import ConfigError
from regrow.launch.config.schema import Config
from regrow.trainer.config import HookConfig, HookStage
from regrow.trainer.hooks.config import BeginConfig, CheckpointHookConfig, MetricsConfig, RecordConfig

__all__ = ["hook_order"]

_NEEDED: dict[str, type[HookConfig]] = {"begin": BeginConfig, "metrics": MetricsConfig, "record": RecordConfig}


def hook_order(config: Config) -> list[tuple[str, HookConfig]]:
    """The enabled hooks with their names below `hooks`, in the order in which they run.

    Raises:
        ConfigError: one is missing that no run can do without, or checkpoints are to be saved by a run without them.
    """
    enabled = [(name, hook) for name, hook in config.hooks.items() if hook.enabled]
    for name, kind in _NEEDED.items():
        if not any(isinstance(hook, kind) for _, hook in enabled):
            raise ConfigError(
                f"hooks.{name}.enabled must be true, since no run can do without it, but is not; leave it as it is"
            )
    for name, hook in enabled:
        if isinstance(hook, CheckpointHookConfig) and not config.checkpoint.enable:
            raise ConfigError(
                f"hooks.{name}.enabled must be false with checkpoint.enable=false, but is true; use "
                "checkpoint.enable=true"
            )
    saves = config.checkpoint.enable and not config.checkpoint.load_only
    if saves and not any(isinstance(hook, CheckpointHookConfig) for _, hook in enabled):
        raise ConfigError(
            "hooks.checkpoint.enabled must be true with checkpoint.enable=true, but the hook is off or not there, "
            "and nothing would be saved; use checkpoint=disabled, or checkpoint.load_only=true"
        )
    stages = list(HookStage)
    return sorted(enabled, key=lambda item: stages.index(item[1].stage))
