"""The rows of a run's files as columns of numbers, in one pass that a page of fifty runs can wait for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec

from regrow.checkpoint.files import read_regular
from regrow.checkpoint.policy.lineage import Lineage, is_visible
from regrow.trainer.jsonlines import read_rows

__all__ = ["Columns", "read_columns", "read_evaluations", "read_rows_at_once"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """A run's measures.

    Attributes:
        steps: of the rows, ascending.
        tokens: trained on at the end of each; empty where rows do not tell.
        seconds: that the steps up to each took; empty likewise.
        curves: by the measure's name, the steps at which it has a finite value, and the values.
    """

    steps: list[int]
    tokens: list[int]
    seconds: list[float]
    curves: dict[str, tuple[list[int], list[float]]]


def read_rows_at_once(path: Path) -> list[dict[str, Any]]:
    """As `read_rows`, for a file that is read whole.

    Raises:
        OSError: it cannot be read, or is not a regular file.
    """
    try:
        lines = read_regular(path).split(b"\n")[:-1]
        rows = msgspec.json.decode(b"[" + b",".join(lines) + b"]")
    except FileNotFoundError:
        return []
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # A line that is damaged, or a number that is none.
        return list(read_rows(path))
    if len(rows) == len(lines) and all(type(r) is dict and type(r.get("step")) is int for r in rows):
        return list(rows)
    return list(read_rows(path))


def read_columns(path: Path) -> Columns:
    """`metrics.jsonl` by columns.

    Args:
        path: the file; one that is not there has no rows.

    Raises:
        OSError: it cannot be read, or is not a regular file.
    """
    rows = read_rows_at_once(path)
    steps = [row["step"] for row in rows]
    # Most rows have the same names, and are not asked for them one by one.
    names = dict.fromkeys(name for same in dict.fromkeys(map(tuple, rows)) for name in same)
    curves = {
        name: _finite(steps, [row.get(name) for row in rows]) for name in names if name not in ("step", "tokens")
    }
    tokens: list[Any] = [row.get("tokens") for row in rows]
    took = curves.get("step_time_s", ([], []))[1]
    return Columns(
        steps=steps,
        tokens=tokens if set(map(type, tokens)) == {int} else [],
        seconds=list(accumulate(took)) if len(took) == len(steps) else [],
        curves={name: curve for name, curve in curves.items() if curve[0]},
    )


def _is_number(value: object) -> bool:
    return (type(value) is float or type(value) is int) and math.isfinite(value)


def _finite(steps: list[int], values: list[Any]) -> tuple[list[int], list[float]]:
    kinds = set(map(type, values))
    if kinds == {float} and math.isfinite(sum(values)):
        return steps, values
    kept = [(s, float(v)) for s, v in zip(steps, values, strict=True) if v is not None and _is_number(v)]
    return [s for s, _ in kept], [v for _, v in kept]


def read_evaluations(path: Path, lineages: Sequence[Lineage]) -> dict[str, tuple[list[int], list[float]]]:
    """What was found beside the run, of the steps on its line, as curves named as those in `metrics.jsonl`.

    Args:
        path: `evaluations.jsonl`; one that is not there has no rows.
        lineages: of the run, oldest first; none takes every row.

    Raises:
        OSError: it cannot be read, or is not a regular file.
    """
    found: dict[str, dict[int, float]] = {}
    for row in read_rows_at_once(path):
        task, metrics, lineage = row.get("task"), row.get("metrics"), row.get("lineage")
        if not isinstance(task, str) or not isinstance(metrics, Mapping):
            continue
        if lineages and isinstance(lineage, str) and lineage and not is_visible(lineages, row["step"], lineage):
            continue
        for metric, value in metrics.items():
            if _is_number(value):
                found.setdefault(f"eval/{task}/{metric}", {})[row["step"]] = float(value)
    return {name: (sorted(by), [by[s] for s in sorted(by)]) for name, by in found.items()}
