"""A picture of the loss."""

import logging
from pathlib import Path
from typing import final

from matplotlib.figure import Figure

from regrow.trainer.hook import Hook
from regrow.trainer.hooks.config import PlotConfig
from regrow.trainer.jsonlines import read_rows
from regrow.trainer.loop import Trainer
from regrow.trainer.run_files import METRICS

__all__ = ["PlotHook", "plot_loss"]

log = logging.getLogger(__name__)


def plot_loss(run_dir: Path) -> Path:
    """Draws `metrics.jsonl` into `loss.png` and returns its path."""
    rows = list(read_rows(run_dir / METRICS))
    # Without pyplot, which would look for a screen.
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], linewidth=1, label="training")
    validated = [r for r in rows if "val_loss" in r]
    if validated:
        steps = [r["step"] for r in validated]
        axes.plot(steps, [r["val_loss"] for r in validated], marker="o", markersize=3, label="validation")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(run_dir.name)
    axes.grid(alpha=0.3)
    axes.legend()
    path = run_dir / "loss.png"
    figure.savefig(path)
    return path


@final
class PlotHook(Hook):
    """See `PlotConfig`."""

    def __init__(self, config: PlotConfig) -> None:
        self._config = config

    def after_fit(self, trainer: Trainer) -> None:
        if trainer.context.is_main and trainer.state.step >= trainer.options.steps:
            log.info("loss curve: %s", plot_loss(trainer.resources.run_dir))
