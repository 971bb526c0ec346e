"""How torch's elastic agent starts ranks on this machine."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig as ElasticConfig

__all__ = ["elastic_config"]

# How long the other ranks may take to end after one died, before they are killed.
_SHUTDOWN_S = 10


def elastic_config(ranks: int, folder: Path, *, restarts: int = 0) -> ElasticConfig:
    """The agent's own config, and in the environment which signals it leaves alone.

    Args:
        ranks: to start.
        folder: for what the agent writes.
        restarts: of all ranks, when one has failed.
    """
    known = {f.name for f in dataclasses.fields(ElasticConfig)}
    options: dict[str, Any] = {
        "min_nodes": 1,
        "max_nodes": 1,
        "nproc_per_node": ranks,
        "logs_specs": DefaultLogsSpecs(log_dir=f"{folder}/elastic"),
        "run_id": f"regrow-{os.getpid()}",
        "role": "rank",
        "rdzv_backend": "c10d",
        "rdzv_endpoint": "127.0.0.1:0",
        "rdzv_configs": {"is_host": True},
        "local_addr": "127.0.0.1",
        "max_restarts": restarts,
        "monitor_interval": 0.1,
        # TERM, INT and USR2 are ours; the agent would turn them into a kill.
        "signals_to_handle": "SIGHUP,SIGQUIT",
        "shutdown_timeout": _SHUTDOWN_S,
    }
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = options["signals_to_handle"]
    return ElasticConfig(**{name: value for name, value in options.items() if name in known})
