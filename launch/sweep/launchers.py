"""Makes our launchers known to Hydra, which must happen before `hydra.main` looks for them."""

import tempfile

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from joblib.externals.loky import get_reusable_executor
from joblib.externals.loky.backend.synchronize import SemLock

from regrow.checkpoint.scratch import semaphore_prefix
from regrow.launch.sweep.launcher_config import LocalConfig, SlurmConfig
from regrow.launch.sweep.local import LocalLauncher
from regrow.launch.sweep.slurm import SlurmLauncher

__all__ = ["register_launchers", "stop_joblib"]


def register_launchers() -> None:
    """`hydra/launcher=slurm` and `local`, with their schemas."""
    store = ConfigStore.instance()
    for node in (SlurmConfig, LocalConfig):
        group, name = node.SCHEMA
        store.store(group=group, name=name, node=node)
    plugins = Plugins.instance()
    for launcher in (SlurmLauncher, LocalLauncher):
        plugins.register(launcher)
        # Hydra takes launchers by names of this namespace alone, which is that of the plugins installed beside it.
        plugins.class_name_to_class[f"hydra_plugins.regrow.{launcher.__name__}"] = launcher
    # `hydra/launcher=joblib`: its semaphores say whose they are, as ours do.
    names, prefix = tempfile._RandomNameSequence(), semaphore_prefix()  # type: ignore[attr-defined]  # noqa: SLF001
    SemLock._make_name = staticmethod(lambda: f"{prefix}-{next(names)}")  # noqa: SLF001


def stop_joblib() -> None:
    """Ends joblib's processes, which would outlive this one, that ends without Python's own clean-up, by minutes."""
    get_reusable_executor(reuse=True).shutdown(wait=True, kill_workers=True)
