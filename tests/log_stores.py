"""What loggers' stores hold of the runs below a folder, as each library's own reader has it.

`python -P -m tests.log_stores ROOT` prints it as JSON: logger → run → rows in the order in which they were stored. A
process of its own, because Trackio reads where its folder is when it is imported.
"""

import csv
import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["read_stores", "wandb_entries", "wandb_rows"]

Rows = list[dict[str, Any]]


def wandb_entries(file: Path) -> Iterator[Any]:
    """The records of a `.wandb` file, decoded with the library: LevelDB's log format after a head of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    record_type: Any = getattr(wandb_internal_pb2, "Record")  # noqa: B009 (generated at import)
    data, position, whole = file.read_bytes(), 7, b""
    assert data.startswith(b":W&B") or not data
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        part = data[position + 7 : position + 7 + length]
        if kind == 0 or len(part) < length:
            return  # the tail that a kill cut off
        position += 7 + length
        whole += part
        if kind in (1, 4):  # full, last
            entry = record_type()
            entry.ParseFromString(whole)
            yield entry
            whole = b""


def wandb_rows(root: Path) -> dict[str, Rows]:
    """By W&B's run id, over all of its files, oldest first."""
    found: dict[str, Rows] = {}
    for file in sorted(root.glob("*/wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_ctime_ns):
        run_id = file.stem.removeprefix("run-")
        rows = found.setdefault(run_id, [])
        for entry in wandb_entries(file):
            row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in entry.history.item}
            if "train/global_step" in row:
                rows.append(
                    {"step": row["train/global_step"]} | {k.removeprefix("train/"): v for k, v in row.items()}
                )
    return found


def tensorboard_rows(root: Path) -> dict[str, Rows]:
    """By folder; values are of single precision there."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, Rows] = {}
    for folder in {p.parent for p in root.rglob("events.out.tfevents.*")}:
        # It sorts nothing, and keeps all of it.
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        rows: dict[int, dict[str, Any]] = {}
        order = [event.step for event in events.Scalars("loss")]
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                rows.setdefault(event.step, {})[tag] = event.value
        found[str(folder.relative_to(root))] = [{"step": step, **rows[step]} for step in order]
    return found


def csv_rows(root: Path) -> dict[str, Rows]:
    """By file."""
    found: dict[str, Rows] = {}
    for path in root.glob("*/*.csv"):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        found[str(path.relative_to(root))] = [
            {"step": int(row["step"])} | {k: float(v) for k, v in row.items() if v and k != "step"} for row in rows
        ]
    return found


def mlflow_rows(root: Path) -> dict[str, Rows]:
    """By the runs' names."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "regrow"]
    found: dict[str, Rows] = {}
    for run in client.search_runs([experiment.experiment_id]):
        rows: dict[int, dict[str, Any]] = {}
        order = [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")]
        for key in run.data.metrics:
            for metric in client.get_metric_history(run.info.run_id, key):
                rows.setdefault(metric.step, {})[key] = metric.value
        assert run.info.run_name not in found
        found[run.info.run_name] = [{"step": step, **rows[step]} for step in order]
    return found


def trackio_rows(root: Path) -> dict[str, Rows]:
    """By the runs' names."""
    os.environ["TRACKIO_DIR"] = str(root / "trackio")
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    return {
        run.name: SQLiteStorage.get_logs("regrow", run.name, run_id=run.id) for run in trackio.Api().runs("regrow")
    }


def read_stores(root: Path) -> dict[str, dict[str, Rows]]:
    """All of them."""
    return {
        "wandb": wandb_rows(root),
        "tensorboard": tensorboard_rows(root),
        "csv": csv_rows(root),
        "mlflow": mlflow_rows(root),
        "trackio": trackio_rows(root),
    }


if __name__ == "__main__":
    print(json.dumps(read_stores(Path(sys.argv[1])), default=str))
