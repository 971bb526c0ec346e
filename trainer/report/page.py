"""From runs to one HTML page that holds everything it needs. Pure: values in, text out.

What is read from files goes into one compressed block of JSON, and the page's script sets it as text alone: a name
can hold no markup. The page's policy allows the scripts of this file, by their hashes, and no request at all.
"""

import base64
import hashlib
import html
import math
import statistics
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

import msgspec

from regrow.trainer.report.read import RunReport
from regrow.trainer.report.swept import swept_fields
from regrow.trainer.report.thin import thin

__all__ = ["LIMIT_BYTES", "build_page", "page_data"]

LIMIT_BYTES = 1_000_000
# Points of all curves together to try first; what they take is measured, and fewer are taken where it is too much.
_POINTS = 190_000
_FEWEST, _MOST = 16, 2000
# Of the curve from a step to tokens and seconds, between which the page draws straight lines.
_KNOTS = 200
_SCRIPTS = ("data.js", "draw.js", "curves.js", "table.js", "fields.js", "life.js", "main.js")


def build_page(runs: Sequence[RunReport], title: str, *, made_at: float, reload_s: float = 0.0) -> str:
    """The page.

    Args:
        runs: at least one.
        title: of the page.
        made_at: seconds since 1970.
        reload_s: after which the page loads itself again; 0 for never.
    """
    curves = sum(len(run.columns.curves) for run in runs)
    points = max(_FEWEST, min(_MOST, _POINTS // max(1, curves)))
    while True:
        data = {**page_data(runs, points), "title": title, "made": made_at, "reload": reload_s}
        page = _html(title, data)
        size = len(page.encode())
        if size <= LIMIT_BYTES or points == _FEWEST:
            return page
        points = max(_FEWEST, int(points * min(0.9, LIMIT_BYTES / size)))


def page_data(runs: Sequence[RunReport], points: int) -> dict[str, Any]:
    """What the page shows, as plain values.

    Args:
        runs: at least one.
        points: of a curve, at most.
    """
    fields = swept_fields([(run.config, run.overrides) for run in runs])
    thinned = any(len(values) > points for run in runs for _, values in run.columns.curves.values())
    return {
        "fields": list(fields),
        "points": points if thinned else 0,
        "runs": [
            _run_data(run, points, {name: values[n] for name, values in fields.items()}) for n, run in enumerate(runs)
        ],
    }


def _run_data(run: RunReport, points: int, fields: dict[str, Any]) -> dict[str, Any]:
    columns, steps = run.columns, run.columns.steps
    train = run.config.get("train")
    knots = thin([float(s) for s in steps], _KNOTS)
    model = run.config.get("model")
    return {
        "name": run.name,
        "status": run.status,
        "model": str(model.get("name", "")) if isinstance(model, dict) else "",
        "step": steps[-1] if steps else 0,
        "steps": train.get("steps") if isinstance(train, dict) else None,
        "fields": {n: v if isinstance(v, str | int | float | bool | None) else str(v) for n, v in fields.items()},
        "last": {name: values[-1] for name, (_, values) in columns.curves.items()},
        "median": {
            name: statistics.median(columns.curves[name][1])
            for name in ("tokens_per_s", "mfu", "step_time_s")
            if name in columns.curves
        },
        "axis": {
            "step": _differences([steps[k] for k in knots]),
            "tokens": [columns.tokens[k] for k in knots] if columns.tokens else [],
            "time": [_short(columns.seconds[k]) for k in knots] if columns.seconds else [],
        },
        "flops": run.flops_per_token,
        "curves": {name: _curve(*curve, points) for name, curve in columns.curves.items()},
        "life": None if run.life is None else asdict(run.life),
    }


def _curve(steps: Sequence[int], values: Sequence[float], points: int) -> list[list[Any]]:
    kept = thin(values, points)
    return [_differences([steps[k] for k in kept]), [_short(values[k]) for k in kept]]


def _differences(steps: Sequence[int]) -> list[int]:
    """The first and what each adds to the one before, which take less room than the numbers."""
    return [step - before for before, step in zip([0, *steps], steps, strict=False)]


def _short(value: float) -> float | int:
    """Six digits, more than a picture shows."""
    if not math.isfinite(value):
        return 0
    short = float(f"{value:.6g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def _html(title: str, data: dict[str, Any]) -> str:
    packed = base64.b64encode(zlib.compress(msgspec.json.encode(data), 9)).decode()
    script = "".join(["'use strict';\n", *(_asset(name) for name in _SCRIPTS)])
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _asset("page.html").format(
        title=html.escape(title),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        style=_asset("page.css"),
        data=packed,
        script=script,
    )


def _asset(name: str) -> str:
    return (files("regrow.trainer.report") / "assets" / name).read_text(encoding="utf-8")
