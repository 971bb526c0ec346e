"""`hydra/launcher=local`: several runs of a sweep at once on this machine, within a budget of CPUs and GPUs."""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, final

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from joblib import Parallel, delayed
from omegaconf import DictConfig

from regrow.launch.config.errors import UserError
from regrow.launch.exit_code import ExitCode, gravest
from regrow.launch.run.signals import SIGNALS
from regrow.launch.sweep.launcher_config import LocalConfig
from regrow.launch.sweep.plan import compose_runs_once, plan_runs
from regrow.launch.sweep.status import RunFailed, SweepRun, open_sweep, result_of
from regrow.trainer.process import PARENT_VARIABLE

__all__ = ["Budget", "LocalLauncher", "run_here"]

log = logging.getLogger(__name__)
_LOGS = "local"


@final
class Budget:
    """CPUs and GPUs that runs take and give back.

    Args:
        cpus: how many.
        gpus: their names, as CUDA_VISIBLE_DEVICES has them.
    """

    def __init__(self, cpus: int, gpus: Sequence[str]) -> None:
        self.cpus, self.gpus = cpus, list(gpus)
        self._free_cpus, self._free_gpus = cpus, list(gpus)
        self._changed = threading.Condition()

    @contextmanager
    def take(self, cpus: int, gpus: int) -> Iterator[list[str]]:
        """Waits until so much is free; yields the GPUs' names."""
        with self._changed:
            self._changed.wait_for(lambda: self._free_cpus >= cpus and len(self._free_gpus) >= gpus)
            self._free_cpus -= cpus
            taken, self._free_gpus = self._free_gpus[:gpus], self._free_gpus[gpus:]
        try:
            yield taken
        finally:
            with self._changed:
                self._free_cpus += cpus
                self._free_gpus += taken
                self._changed.notify_all()


@final
class LocalLauncher(Launcher):
    """See `LocalConfig`, whose fields are the arguments."""

    def __init__(self, **fields: Any) -> None:
        self._config: DictConfig | None = None
        self._context: HydraContext | None = None
        local_config(fields)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context, self._config = hydra_context, config
        compose_runs_once(hydra_context)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        assert self._config is not None
        assert self._context is not None
        runs = plan_runs(self._context, self._config, job_overrides, initial_job_idx, "local")
        codes = run_here(Path(str(self._config.hydra.sweep.dir)).absolute(), runs)
        returned = []
        for overrides, run, code in zip(job_overrides, runs, codes, strict=True):
            job = JobReturn(overrides=list(overrides))
            job.return_value = result_of(Path(run.run_dir)) if code == 0 else _failure(run, code, codes)
            job.status = JobStatus.COMPLETED if code == 0 else JobStatus.FAILED
            returned.append(job)
        return returned


def _failure(run: SweepRun, code: int | None, codes: Sequence[int | None]) -> RunFailed:
    how = "was not started" if code is None else f"ended with exit code {code}"
    # One that was not started can be: the sweep was asked to stop.
    worst = gravest(ExitCode.resumable if c is None else c for c in codes)
    return RunFailed(f"{run.name} {how}; see {run.run_dir}/logs", exit_code=worst)


def local_config(fields: dict[str, Any]) -> LocalConfig:
    """Typed fields, checked.

    Raises:
        UserError: naming field, rule, value and remedy.
    """
    config = LocalConfig(**fields)
    for name, low in (("n_jobs", 1), ("cpus", 0), ("gpus", -1)):
        value = getattr(config, name)
        if value < low:
            raise UserError(f"hydra.launcher.{name} must be at least {low}, but is {value}; use {low}")
    return config


def run_here(folder: Path, runs: Sequence[SweepRun]) -> list[int | None]:
    """Runs them, as many at once as the budget has room for; returns exit codes, None for one not started.

    Raises:
        UserError: one needs more than there is; then none is started.
    """
    config = local_config(runs[0].resources)
    # A single run may always share what there is, as it may without a launcher.
    most = max(run.ranks[0] * run.cpus for run in runs)
    budget = Budget(config.cpus or max(os.cpu_count() or 1, most), _gpus(config.gpus))
    for run in runs:
        _check_fits(run, budget)
    with open_sweep(folder) as sweep:
        for run in runs:
            sweep.add(run)
    (folder / _LOGS).mkdir(exist_ok=True)
    children = _Children()
    with children.passing_signals_on():
        work = (delayed(children.run)(folder, run, budget) for run in runs)
        codes: list[int | None] = Parallel(n_jobs=config.n_jobs, backend="threading", batch_size=1)(work)
    return codes


def _gpus(wanted: int) -> list[str]:
    """The names of the GPUs to share out."""
    if wanted == 0:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        # Only a sweep over GPUs that nothing names needs torch, which takes seconds to import.
        import torch

        names = [str(i) for i in range(torch.cuda.device_count())]
    else:
        names = [n for n in visible.split(",") if n]
    return names if wanted == -1 else names[:wanted]


def _check_fits(run: SweepRun, budget: Budget) -> None:
    cpus, gpus = _needs(run, budget)
    if cpus > budget.cpus:
        raise UserError(
            f"hydra.launcher.cpus must be at least a run's ranks × launch.threads_per_rank ({cpus}), but is "
            f"{budget.cpus}; use fewer ranks or threads, or hydra.launcher.cpus={cpus} to share them"
        )
    if gpus > len(budget.gpus):
        raise UserError(
            f"hydra.launcher.gpus must be at least a run's ranks ({gpus}), but is {len(budget.gpus)}; use fewer "
            "ranks, or launch.device=cpu"
        )


def _needs(run: SweepRun, budget: Budget) -> tuple[int, int]:
    ranks = run.ranks[0]
    return ranks * run.cpus, ranks if run.gpu and budget.gpus else 0


@final
class _Children:
    """The runs' processes."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._stopping = False

    @contextmanager
    def passing_signals_on(self) -> Iterator[None]:
        """What this process receives goes to the runs, which save and end; no further one is started."""

        def handle(number: int, _frame: FrameType | None) -> None:
            self._stopping = True
            for process in self._processes:
                if process.poll() is None:
                    process.send_signal(number)

        previous = {number: signal.signal(number, handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def run(self, folder: Path, run: SweepRun, budget: Budget) -> int | None:
        """One run to its end; its output goes to a file."""
        cpus, gpus = _needs(run, budget)
        with budget.take(cpus, gpus) as names:
            environ = {**os.environ, **run.environment()}
            environ |= {PARENT_VARIABLE: str(os.getpid()), "REGROW_SWEEP": folder.name}
            if names:
                environ["CUDA_VISIBLE_DEVICES"] = ",".join(names)
            with self._lock:
                if self._stopping:
                    return None
                with (folder / _LOGS / f"{run.name}.log").open("ab") as output:
                    process = subprocess.Popen(
                        [sys.executable, "-P", "-m", "regrow.launch.train", *run.arguments],
                        cwd=run.working_dir, env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                        # Ctrl-C reaches the launcher alone, which passes it on once.
                        start_new_session=True,
                    )  # fmt: skip
                self._processes.append(process)
            log.info("%s: started", run.name)
            code = process.wait()
            log.info("%s: ended with exit code %d", run.name, code)
            return code if code in tuple(ExitCode) else ExitCode.failed
