"""Which run in a logger's store a start of ours writes to. Pure, but for one small file per logger.

A run of ours is one run in the store for as long as it computes the same numbers, however often it is restarted.
Where it goes back and computes others, it goes on in a child run, so that no step stands twice.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from regrow.checkpoint.documents import Count, Token, read_document
from regrow.checkpoint.files import read_regular, write_json
from regrow.trainer.run_record import RunRecord

__all__ = ["LoggerLine", "begin_line", "needs_child", "read_line", "write_line"]

_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggerLine:
    """A run in the store.

    Attributes:
        lineage: the lineage whose steps it holds.
        branch: what its name has beside the run's own; empty for the run's first line.
        from_step: its steps begin after this one.
        changes: how often hyperparameters had been changed, or the schedule extended, when it was last written to.
        step: what it held when it was last closed in order.
    """

    lineage: Token
    branch: Token = ""
    from_step: Count = 0
    changes: Count = 0
    step: Count = 0


def begin_line(record: RunRecord, known: LoggerLine | None) -> LoggerLine:
    """The line that a start writes to, as long as its numbers are those of before.

    Args:
        record: the run's, of this start.
        known: what the logger noted last; None where it was not used before.
    """
    lineage = record.lineages[-1]
    changes = len(record.changes) + len(record.extensions)
    if known is not None and known.lineage == lineage.id:
        return replace(known, changes=changes)
    is_first = lineage.id == record.lineages[0].id
    return LoggerLine(
        lineage=lineage.id,
        branch="" if is_first else lineage.id,
        from_step=0 if is_first else lineage.origin_step,
        changes=changes,
        # Of versions that noted it there.
        step=record.wandb_step if is_first else 0,
    )


def needs_child(line: LoggerLine, known: LoggerLine | None, *, held: int, resumed_from: int) -> LoggerLine | None:
    """The child run to go on in, where the store has steps that will be computed again with other numbers.

    Args:
        line: as `begin_line` has it.
        known: what the logger noted last.
        held: the last step that the store has.
        resumed_from: the step that this start continues from.
    """
    same = known is None or known.lineage != line.lineage or known.changes == line.changes
    if same or held <= resumed_from:
        return None
    return replace(line, branch=f"{line.lineage}-{line.changes}", from_step=resumed_from, step=0)


def read_line(path: Path) -> LoggerLine | None:
    """What a logger noted; None where it was not used before.

    Raises:
        OSError: the file cannot be read.
        DocumentError: it is damaged.
    """
    try:
        return read_document(read_regular(path, _LIMIT_BYTES), LoggerLine)
    except FileNotFoundError:
        return None


def write_line(path: Path, line: LoggerLine) -> None:
    """Notes it, durably."""
    path.parent.mkdir(exist_ok=True)
    write_json(path, asdict(line))
