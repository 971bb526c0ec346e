"""Projects of one's own under a real Slurm: their packages travel in the batch script, not by the working directory."""

import sys
from pathlib import Path

import pytest

from tests.plugins.projects import PROJECTS
from tests.slurm.cluster import Cluster
from tests.slurm.sweeps import Runs, assert_same_runs, base, give, history, kill_rank, wait_finished, wait_for_step
from tests.support import regrow

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(600)]

STEPS = 500


def test_they_train_are_killed_and_go_on(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    command = f"hydra.launcher.command='{sys.executable} -P -m regrow.launch.train'"
    plain = base(corpus, STEPS, "data.global_batch_size=4", interval=25)
    # The experiment sets fields of the default hooks.
    mine = ["experiment=first", *(o for o in plain if o != "hooks=none")]
    runs = {}
    for name, make in PROJECTS.items():
        (tmp_path / name).mkdir()
        project = make(tmp_path / name)
        give(cluster, project, [*mine, "hydra/launcher=slurm", command, "run.root=there", "-m", "seed=0"])
        (project / "pyproject.toml").rename(project / "away.toml")
        (run,) = Runs(project / "there").all().values()
        runs[project] = Path(run.run_dir)
    for run_dir in runs.values():
        wait_for_step(run_dir, 60)
        kill_rank(run_dir, 0)
    wait_finished(cluster, list(runs.values()), STEPS)
    for project, run_dir in runs.items():
        assert [h["event"] for h in history(run_dir)] == ["start", "crashed", "start", "finished"]
        (project / "away.toml").rename(project / "pyproject.toml")
        code, out = regrow([*mine, "run.root=here", "run.name=whole"], project, 120.0)
        assert code == 0, out
        assert_same_runs(run_dir, project / "here/whole", STEPS)
