"""What the tests do with sweeps: give the command, look at runs, disturb them, compare them."""

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from regrow.launch.sweep.status import Sweep, SweepRun
from tests.runs import train
from tests.slurm.cluster import Cluster
from tests.support import assert_same_tensors, curve, metrics, record, regrow, samples, tiny, wait_until
from tests.warm import regrow as regrow_warm

__all__ = ["Runs", "assert_same_runs", "base", "ranks_of", "slurm", "status", "undisturbed"]


def base(corpus: Path, steps: int, *more: str, interval: int = 20) -> list[str]:
    """A tiny run; under Slurm its steps take at least as long as `slurm` says."""
    how = ["launch.device=cpu", "launch.timeout_s=60", "hooks=none", "data.log_samples=true", "data.prefetch=2"]
    when = [f"checkpoint.interval={interval}", "checkpoint.keep_latest_k=0", f"train.steps={steps}"]
    return [*tiny(corpus, *how, *when), *more]


def slurm(step_s: float, *more: str) -> list[str]:
    """The launcher, with steps that take so much longer."""
    return [
        "hydra/launcher=slurm", "hydra.launcher.partition=low", "hydra.launcher.grace_s=60",
        "+hook@hooks.throttle=throttle", f"hooks.throttle.seconds={step_s}", *more,
    ]  # fmt: skip


@dataclass(frozen=True)
class Runs:
    """The runs of one sweep directory, by the value of the swept override that tells them apart.

    Attributes:
        folder: the sweep's.
    """

    folder: Path

    def all(self) -> dict[str, SweepRun]:
        """From `sweep.json`."""
        sweep = Sweep.load(self.folder)
        assert sweep is not None
        return sweep.runs

    def find(self, override: str) -> Path:
        """The directory of the run whose arguments hold an override."""
        (run,) = [r for r in self.all().values() if override in r.arguments]
        return Path(run.run_dir)

    def job(self, override: str) -> str:
        """Its newest job."""
        (run,) = [r for r in self.all().values() if override in r.arguments]
        return run.jobs[-1]


def give(cluster: Cluster, cwd: Path, arguments: Sequence[str], **environ: str) -> str:
    """Gives a command that must succeed; returns its output."""
    code, out = regrow(arguments, cwd, timeout_s=300.0, **{**cluster.environ, **environ})
    assert code == 0, out
    return out


def status(cluster: Cluster, folder: Path) -> list[dict[str, Any]]:
    """`regrow-sweep status --json`."""
    found: list[dict[str, Any]] = json.loads(sweep_command(cluster, "status", str(folder), "--json"))
    return found


def sweep_command(cluster: Cluster, *arguments: str) -> str:
    """Runs `regrow-sweep`."""
    code, out = regrow_warm(arguments, Path.cwd(), 60.0, "regrow.launch.commands.sweep", **cluster.environ)
    assert code == 0, out
    return out


def ranks_of(run_dir: Path) -> list[psutil.Process]:
    """The living processes that train a run, lowest rank first."""
    found = []
    for process in psutil.process_iter():
        try:
            environ = process.environ()
            command = process.cmdline()
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        trains = "SLURM_PROCID" in environ and any(f"hydra.run.dir='{run_dir}'" in a for a in command)
        if trains and "srun" not in command[0] and process.status() != psutil.STATUS_ZOMBIE:
            found.append((int(environ["SLURM_PROCID"]), process))
    return [p for _, p in sorted(found, key=lambda pair: pair[0])]


def wait_for_step(run_dir: Path, step: int, timeout_s: float = 180.0) -> None:
    """Until a run has done so many steps."""
    wait_until(lambda: last_step(run_dir) >= step, timeout_s, 0.1)


def last_step(run_dir: Path) -> int:
    """As `metrics.jsonl` has it."""
    rows = metrics(run_dir)
    return int(rows[-1]["step"]) if rows else 0


def is_finished(run_dir: Path, steps: int) -> bool:
    """Whether its record says so."""
    if not (run_dir / "run.json").exists():
        return False
    attempts = record(run_dir)["attempts"]
    return bool(attempts) and attempts[-1]["end"] == "finished" and attempts[-1]["to_step"] >= steps


def wait_finished(
    cluster: Cluster, runs: Mapping[str, Path] | Sequence[Path], steps: int, timeout_s: float = 400.0
) -> None:
    """Until all have finished, their jobs too; tells what their logs say when they do not."""
    folders = list(runs.values()) if isinstance(runs, Mapping) else list(runs)
    deadline = time.monotonic() + timeout_s
    # The batch script's last line comes a moment after the run's own record.
    while not all(is_finished(f, steps) and history(f)[-1]["event"] == "finished" for f in folders):
        if time.monotonic() > deadline:
            raise AssertionError(
                "\n".join(tell(f) for f in folders if not is_finished(f, steps)) + str(cluster.jobs())
            )
        time.sleep(0.5)


def tell(run_dir: Path) -> str:
    """What is known of a run, for messages."""
    history = (run_dir / "slurm.jsonl").read_text() if (run_dir / "slurm.jsonl").exists() else ""
    logs = [p.read_text()[-2000:] for p in sorted(run_dir.parent.glob("slurm/*.log"))]
    return "\n".join([str(run_dir), f"step {last_step(run_dir)}", history, *logs])


def history(run_dir: Path) -> list[dict[str, Any]]:
    """The batch script's own lines."""
    return [json.loads(line) for line in (run_dir / "slurm.jsonl").read_text().splitlines()]


def kill_rank(run_dir: Path, rank: int) -> None:
    """With SIGKILL."""
    os.kill(ranks_of(run_dir)[rank].pid, signal.SIGKILL)


def undisturbed(folder: Path, arguments: Sequence[str], ranks: int = 1) -> Path:
    """The directory of a run that nobody stops, without Slurm."""
    result = train(arguments, folder, ranks)
    assert result.kind == "finished", result.message
    return folder


def assert_same_runs(disturbed: Path, undisturbed: Path, steps: int) -> None:
    """Bitwise the same losses, samples and final state."""
    assert [r["step"] for r in metrics(disturbed)] == list(range(1, steps + 1))
    assert curve(disturbed) == curve(undisturbed)
    assert samples(disturbed) == samples(undisturbed)
    assert_same_tensors(disturbed / f"checkpoint/step-{steps}", undisturbed / f"checkpoint/step-{steps}")
    assert not list((disturbed / "checkpoint").glob("*.partial-*"))
