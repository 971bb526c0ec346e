"""What a run does at the end of a signalled stop under submitit, which knows nothing of it."""

import logging
import os
import subprocess
import time

__all__ = ["stay_until_killed", "task_id"]

log = logging.getLogger(__name__)
# A job that nobody kills after all ends by itself.
_MOST_S = 900.0


def task_id() -> str:
    """This job's name for scontrol: the last task's SLURM_JOB_ID would name its whole array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


def stay_until_killed(*, requeue: bool) -> None:
    """Ends neither well nor badly: either would end the job within its grace time, and Slurm would not requeue it.

    Args:
        requeue: the signal was a warning, after which nobody else would requeue the job.
    """
    if requeue and os.environ.get("SLURM_PROCID", "0") == "0":
        log.info("saved; requeueing job %s", task_id())
        subprocess.run(["scontrol", "requeue", task_id()], check=True)
    log.info("saved; waiting for Slurm to end this start of the job")
    time.sleep(_MOST_S)
