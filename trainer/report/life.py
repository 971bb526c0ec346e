"""The life line of a run: its starts, why each ended, its snapshots, its lines of steps, and the time that was lost.

Pure: from a run's record, the events of its log, and the steps on its disk. `run.json` says when a start began and
not when it ended: that is the last event of its log before the next one began.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from regrow.checkpoint.policy.lineage import Lineage, is_visible
from regrow.trainer.report.log_events import LogEvent
from regrow.trainer.run_record import Attempt, RunRecord

__all__ = ["DiskStep", "Life", "Lost", "Snapshot", "Start", "life_of_run"]

# Of a run that has saved more, the newest; the counts are of all.
SHOWN = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskStep:
    """A step in the checkpoint folder.

    Attributes:
        step: its number.
        state: `kept`, `incomplete` (a save that was cut short), `set aside`, or `damaged`.
        lineage: that wrote it; empty where that is not known.
        ranks: that wrote it; 0 likewise.
        at: when it became valid, in seconds since 1970.
    """

    step: int
    state: str
    lineage: str = ""
    ranks: int = 0
    at: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """One start of the ranks.

    Attributes:
        began: seconds since 1970.
        ended: its last sign of life.
        from_step, to_step: continued from, and the last step that is known of it.
        saved_step: the newest step that it made durable.
        how: `finished`, `terminated`, `preempted`, `failed`, `killed` or `running`.
        error: of a failure.
        host, job: where it ran.
        layout: degrees above 1, in words.
        degrees: all of them.
        ranks: how many.
        lineage: the line of steps that it worked on.
        version: of Regrow.
    """

    began: float
    ended: float
    from_step: int
    to_step: int
    saved_step: int
    how: str
    error: str
    host: str
    job: str
    layout: str
    degrees: dict[str, int]
    ranks: int
    lineage: str
    version: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A save of a step.

    Attributes:
        step: its number.
        start: the number of the start that made it, from 0.
        staged, committed, pruned: when, in seconds since 1970; 0 where it did not come to that or nothing tells.
        seconds: from the copy to durable.
        state: `kept`, `pruned`, `set aside`, `incomplete` or `failed`.
        resumed: how often a start went on from it.
    """

    step: int
    start: int
    staged: float
    committed: float
    pruned: float
    seconds: float
    state: str
    resumed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Lost:
    """What stops have cost.

    Attributes:
        down_s: between the last sign of life of a start and the next one's beginning, over all.
        again_steps: trained a second time.
        again_s: that they take, at the run's median.
    """

    down_s: float
    again_steps: int
    again_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Life:
    """A run's history.

    Attributes:
        starts: oldest first.
        snapshots: oldest first, the newest `SHOWN`.
        counts: snapshots by what became of them, of all.
        lineages: oldest first, each with `id parent step origin current`.
        lost: what stops have cost.
    """

    starts: list[Start]
    snapshots: list[Snapshot]
    counts: dict[str, int]
    lineages: list[dict[str, Any]]
    lost: Lost


def life_of_run(
    record: RunRecord, events: Sequence[LogEvent], disk: Sequence[DiskStep], status: str, step_s: float
) -> Life:
    """A run's history out of its files.

    Args:
        record: its `run.json`.
        events: of its log, in order.
        disk: the steps in its checkpoint folder.
        status: of the run as a whole, which tells what became of a start that has no end.
        step_s: the median time of a step.
    """
    begins = [a.started_at for a in record.attempts]
    by_start: list[list[LogEvent]] = [[] for _ in begins]
    for event in events:
        at = bisect_left(begins, event.at) - 1
        if at >= 0:
            by_start[at].append(event)
    starts = [
        _start(attempt, own, last=number == len(begins) - 1, status=status, step_s=step_s)
        for number, (attempt, own) in enumerate(zip(record.attempts, by_start, strict=True))
    ]
    snapshots = _snapshots(starts, by_start, disk, record.lineages)
    counts: dict[str, int] = {}
    for snapshot in snapshots:
        counts[snapshot.state] = counts.get(snapshot.state, 0) + 1
    return Life(
        starts=starts,
        snapshots=snapshots[-SHOWN:],
        counts=counts,
        lineages=[_lineage(x, current=x is record.lineages[-1]) for x in record.lineages],
        lost=_lost(starts, step_s),
    )


def _start(attempt: Attempt, own: Sequence[LogEvent], *, last: bool, status: str, step_s: float) -> Start:
    reached = max([attempt.to_step, *(e.step for e in own if e.kind == "trained")])
    trained_s = max(0, reached - attempt.from_step) * step_s
    how = attempt.end or ("running" if last and status == "running" else "killed")
    ranks = 1
    for name in ("dp_replicate", "dp_shard", "tp", "pp", "cp"):
        ranks *= attempt.layout.get(name, 1)
    words = " × ".join(f"{name} {n}" for name, n in attempt.layout.items() if n > 1)
    return Start(
        began=attempt.started_at,
        ended=max([e.at for e in own], default=attempt.started_at + trained_s),
        from_step=attempt.from_step,
        to_step=reached,
        saved_step=attempt.saved_step,
        how=how,
        error=attempt.error or "",
        host=attempt.host,
        job=attempt.job or "",
        layout=words or "one rank",
        degrees=dict(attempt.layout),
        ranks=ranks,
        lineage=attempt.lineage,
        version=attempt.versions.get("regrow", ""),
    )


def _snapshots(
    starts: Sequence[Start],
    by_start: Sequence[Sequence[LogEvent]],
    disk: Sequence[DiskStep],
    lineages: Sequence[Lineage],
) -> list[Snapshot]:
    """Of each start, and what the disk has that no start's log tells of."""
    on_disk = {(d.lineage, d.step): d for d in disk}
    # Retention may remove what an earlier start has made.
    pruned = {e.step: e.at for own in by_start for e in own if e.kind == "pruned"}
    found: dict[tuple[int, int], Snapshot] = {}
    for number, (start, own) in enumerate(zip(starts, by_start, strict=True)):
        for step, made in _saves(own, start).items():
            entry = on_disk.get((start.lineage, step)) or on_disk.get(("", step))
            gone = pruned.get(step, 0.0)
            gone = gone if gone >= made["committed"] > 0 or (gone and not made["staged"]) else 0.0
            if not made["committed"]:
                state = "failed" if made["failed"] else "incomplete"
            else:
                state = entry.state if entry is not None else _left(start, step, lineages, is_pruned=gone > 0)
            found[number, step] = Snapshot(
                step=step,
                start=number,
                staged=made["staged"],
                committed=made["committed"],
                pruned=gone,
                seconds=made["seconds"],
                state=state,
            )
    told = {(starts[number].lineage, step) for number, step in found}
    for entry in disk:
        number = next((n for n, s in enumerate(starts) if s.from_step < entry.step <= s.to_step), 0)
        if (entry.lineage, entry.step) not in told and not any(s == entry.step for _, s in told if not entry.lineage):
            found[number, entry.step] = Snapshot(
                step=entry.step, start=number, staged=0.0, committed=entry.at, pruned=0.0, seconds=0.0,
                state=entry.state,
            )  # fmt: skip
    for number, start in enumerate(starts):
        source = max((key for key in found if key[0] < number and key[1] == start.from_step), default=None)
        if source is not None and found[source].committed:
            found[source] = replace(found[source], resumed=found[source].resumed + 1)
    return sorted(found.values(), key=lambda s: (s.start, s.step))


def _saves(own: Sequence[LogEvent], start: Start) -> dict[int, dict[str, float]]:
    """Of one start: by step, when it was staged, committed and seen to fail, and how long it took."""
    saves: dict[int, dict[str, float]] = {}
    for event in own:
        if event.kind in ("staged", "committed", "failed"):
            empty = {"staged": 0.0, "committed": 0.0, "failed": 0.0, "seconds": 0.0}
            made = saves.setdefault(event.step, empty)
            made[event.kind] = event.at
            made["seconds"] = event.seconds or made["seconds"]
    if start.saved_step and not saves:
        # Its log is gone; its record tells of the newest one.
        saves[start.saved_step] = {"staged": 0.0, "committed": start.ended, "failed": 0.0, "seconds": 0.0}
    return saves


def _left(start: Start, step: int, lineages: Sequence[Lineage], *, is_pruned: bool) -> str:
    """What became of a committed step that is no longer among the run's own."""
    if is_pruned or not lineages or is_visible(lineages, step, start.lineage):
        return "pruned"
    return "set aside"


def _lineage(lineage: Lineage, *, current: bool) -> dict[str, Any]:
    request = lineage.request
    asked = [f"load_step={request.load_step}"] if request.load_step >= 0 else []
    asked += [f"without {', '.join(request.exclude)}"] if request.exclude else []
    asked += [f"weights of {request.initial_load_path}"] if request.initial_load_path else []
    return {
        "id": lineage.id,
        "parent": lineage.parent,
        "step": lineage.origin_step,
        "origin": lineage.origin.value,
        "asked": "; ".join(asked),
        "current": current,
    }


def _lost(starts: Sequence[Start], step_s: float) -> Lost:
    down, again = 0.0, 0
    for before, after in pairwise(starts):
        if before.how == "finished":
            continue  # nobody waited for what was asked for later
        down += max(0.0, after.began - before.ended)
        if after.lineage == before.lineage:
            again += max(0, before.to_step - after.from_step)
    return Lost(down_s=down, again_steps=again, again_s=again * step_s)
