"""Following the jobs of a sweep until every run has come to an end."""

import logging
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.live import Live

from regrow.launch.config.errors import UserError
from regrow.launch.sweep.slurm_jobs import Job, list_jobs
from regrow.launch.sweep.status import FINAL, RunFailed, RunStatus, Sweep, inspect_run, result_of
from regrow.launch.sweep.table import status_table

__all__ = ["wait_for_runs"]

log = logging.getLogger(__name__)


def wait_for_runs(folder: Path, names: Sequence[str], poll_s: float) -> list[float | RunFailed | None]:
    """The result of each run, in the order of `names`; a run that did not finish has its error instead.

    Args:
        folder: the sweep's.
        names: of the runs to wait for.
        poll_s: seconds between looks.
    """
    sweep = Sweep.load(folder)
    assert sweep is not None
    runs = [sweep.runs[name] for name in names]
    live = Live(console=Console(stderr=True), auto_refresh=False) if sys.stderr.isatty() else None
    statuses: list[RunStatus] = []
    with live or nullcontext():
        while not statuses or any(s.state not in FINAL for s in statuses):
            if statuses:
                time.sleep(poll_s)
            queue = _queue()
            if queue is None:
                continue
            before, statuses = {s.name: s.state for s in statuses}, [inspect_run(r, queue) for r in runs]
            if live is not None:
                live.update(status_table(statuses), refresh=True)
            else:
                for status in statuses:
                    if before.get(status.name) != status.state:
                        log.info("%s: %s at step %d", status.name, status.state, status.step)
    return [
        result_of(Path(run.run_dir))
        if status.state == "finished"
        else RunFailed(f"{run.name} is {status.state} at step {status.step}; see {run.run_dir}/logs")
        for run, status in zip(runs, statuses, strict=True)
    ]


def _queue() -> dict[str, Job] | None:
    """None while the controller does not answer."""
    try:
        return list_jobs()
    except (UserError, subprocess.TimeoutExpired) as error:
        log.warning("the queue cannot be read now (%s); trying again", error)
        return None
