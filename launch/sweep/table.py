"""A sweep's state for people."""

from collections.abc import Sequence

from rich.table import Table

from regrow.launch.sweep.status import RunStatus

__all__ = ["status_table"]

_COLUMNS = ("run", "state", "step", "loss", "val_loss", "attempts", "job", "node", "lost", "checkpoints")


def status_table(statuses: Sequence[RunStatus]) -> Table:
    """One row per run."""
    table = Table(*_COLUMNS)
    for status in statuses:
        table.add_row(
            status.name,
            status.state,
            f"{status.step}/{status.steps}",
            _number(status.loss),
            _number(status.val_loss),
            str(status.attempts),
            status.job,
            status.node,
            f"{status.lost_s:.0f} s",
            ", ".join(str(s) for s in status.checkpoints[-3:]) or "none",
        )
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
