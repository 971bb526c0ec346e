"""A sweep's state for people."""

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from regrow.launch.sweep.status import RunStatus

__all__ = ["status_table"]

_COLUMNS = ("step", "loss", "val_loss", "attempts", "job", "node", "lost", "checkpoints")


def status_table(statuses: Sequence[RunStatus], extra: str | None = None) -> Table:
    """One row per run.

    Args:
        statuses: of a sweep.
        extra: a measure that has a column too; one that is shown in any case has no second one.
    """
    fields = list(dict.fromkeys(name for status in statuses for name in status.fields))
    more = [extra] if extra is not None and extra not in (*_COLUMNS, *fields) else []
    table = Table("run", "state", *map(escape, fields), *_COLUMNS, *map(escape, more))
    for status in statuses:
        table.add_row(
            escape(status.name),
            status.state,
            *(escape(_plain(status.fields.get(name))) for name in fields),
            f"{status.step}/{status.steps}",
            _number(status.loss),
            _number(status.val_loss),
            str(status.attempts),
            status.job,
            status.node,
            f"{status.lost_s:.0f} s",
            ", ".join(str(s) for s in status.checkpoints[-3:]) or "none",
            *(_number(status.last.get(name)) for name in more),
        )
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _plain(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
