"""What a run's first rank wrote into its log of steps and saves, with the time of each."""

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from regrow.checkpoint.files import open_regular

__all__ = ["LogEvent", "parse_log", "read_log"]

# Of a log that has grown for months, what came last.
_LIMIT_BYTES = 32 << 20
# `logs/rank-0.log` as `launch/run/logs.py` formats it; the messages are those of `hooks/checkpoint.py`,
# `hooks/save_results.py` and `hooks/progress.py`.
_LINE = re.compile(
    r"^(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(?P<ms>\d{3}) \[rank \d+\] [A-Z]+ (?:"
    r"saving step (?P<staged>\d+) \((?P<why>[^()]*)\): (?P<staged_ms>[\d.]+) ms"
    r"|saved .*step-(?P<committed>\d+)/?, durable after (?P<seconds>[\d.]+) s$"
    r"|removed steps (?P<pruned>[\d, ]+)$"
    r"|step (?P<failed>\d+) was not saved"
    r"|step (?P<trained>\d+)/\d+  loss)",
    re.MULTILINE,
)
_KINDS = ("staged", "committed", "pruned", "failed", "trained")


@dataclass(frozen=True, kw_only=True, slots=True)
class LogEvent:
    """A line that tells of a step.

    Attributes:
        at: seconds since 1970, by this machine's clock and time zone.
        kind: `trained` (a line of progress), `staged` (copied, training goes on), `committed`, `pruned`, or `failed`
            (not saved).
        step: trained, or of the checkpoint.
        seconds: that staging or the whole save took; 0 where nothing tells.
    """

    at: float
    kind: str
    step: int
    seconds: float = 0.0


def read_log(path: Path) -> list[LogEvent]:
    """The events of a log, in order; a log that is not there or cannot be read has none."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _LIMIT_BYTES))
            return parse_log(file.read(_LIMIT_BYTES).decode(errors="replace"))
    except OSError:
        return []


def parse_log(text: str) -> list[LogEvent]:
    """The events of a log's text, in order."""
    events: list[LogEvent] = []
    seconds_of: dict[str, float] = {}
    for match in _LINE.finditer(text):
        second = match["time"]
        if second not in seconds_of:
            seconds_of[second] = _seconds(second)
        at = seconds_of[second] + int(match["ms"]) / 1000
        kind = next(k for k in _KINDS if match[k] is not None)
        took = float(match["staged_ms"] or 0) / 1000 + float(match["seconds"] or 0)
        steps = [int(s) for s in match[kind].split(", ")]
        events += [LogEvent(at=at, kind=kind, step=step, seconds=took) for step in steps]
    return [e for e in events if e.at > 0]


def _seconds(local: str) -> float:
    try:
        return time.mktime(time.strptime(local, "%Y-%m-%d %H:%M:%S"))
    except (ValueError, OverflowError):
        return 0.0
