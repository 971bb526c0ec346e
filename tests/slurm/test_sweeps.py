"""Sweeps as users give them: waiting for values, other launchers, changes of ranks, and what is refused."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.sweeps import (
    Runs,
    assert_same_runs,
    base,
    give,
    history,
    last_step,
    ranks_of,
    slurm,
    status,
    sweep_command,
    undisturbed,
    wait_finished,
    wait_for_step,
)
from tests.support import curve, metrics, record, samples, wait_until
from tests.warm import regrow, start

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(600)]

VALIDATED = [
    "hooks=none",
    "+hook@hooks.validation=validation",
    "hooks.validation.every=20",
    "hooks.validation.max_batches=2",
]
SWEEPER = '''
"""A sweeper that optimises: three values, then one beside the best of them."""

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper


class Best(Sweeper):
    def __init__(self, values):
        self.values = values

    def setup(self, *, hydra_context, task_function, config):
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments):
        tried = {}
        for batch in (list(self.values), None):
            if batch is None:
                batch = [min(tried, key=tried.get) * 2]
            jobs = [[*arguments, f"optimizer.lr={v}"] for v in batch]
            for value, job in zip(batch, self.launcher.launch(jobs, initial_job_idx=len(tried))):
                tried[value] = job.return_value
        print("TRIED", sorted(tried.items()))
'''


def test_a_sweeper_gets_its_values_from_slurm_and_from_here(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    plugins = tmp_path / "plugins" / "hydra_plugins"
    plugins.mkdir(parents=True)
    (plugins / "best.py").write_text(SWEEPER)
    (tmp_path / "more" / "hydra" / "sweeper").mkdir(parents=True)
    (tmp_path / "more" / "hydra" / "sweeper" / "best.yaml").write_text(
        "_target_: hydra_plugins.best.Best\nvalues: [0.001, 0.0001]\n"
    )
    common = [f"--config-dir={tmp_path / 'more'}", *base(corpus, 20, *VALIDATED), "hydra/sweeper=best", "-m"]
    waiting = [*slurm(0.0), "hydra.launcher.wait=true", "hydra.launcher.poll_s=1", "run.root=there"]
    out = give(cluster, tmp_path, [*common, *waiting], PYTHONPATH=str(tmp_path / "plugins"))
    here = ["hydra/launcher=local", "hydra.launcher.n_jobs=2", "run.root=here"]
    out_here = give(cluster, tmp_path, [*common, *here], PYTHONPATH=str(tmp_path / "plugins"))
    (tried,) = [line for line in out.splitlines() if line.startswith("TRIED")]
    (tried_here,) = [line for line in out_here.splitlines() if line.startswith("TRIED")]
    assert tried == tried_here
    runs = Runs(tmp_path / "there").all()
    assert len(runs) == 3
    for run in runs.values():
        assert str(metrics(Path(run.run_dir))[-1]["val_loss"]) in tried


def test_joblib_and_submitit_launch_too(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    """Hydra's own launchers for joblib (two runs here) and for Slurm (two runs, one preempted)."""
    grid = [*base(corpus, 200, interval=100), "-m", "seed=1,2"]
    submitit = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=low", "hydra.launcher.timeout_min=30",
                "hydra.launcher.gpus_per_node=2", "+hydra.launcher.additional_parameters={requeue:true}"]  # fmt: skip
    slow = ["+hook@hooks.throttle=throttle", "hooks.throttle.seconds=0.15"]
    login = start([*grid, *submitit, *slow, "run.root=submitit"], tmp_path, **cluster.environ)
    folder = tmp_path / "submitit"
    wait_until(lambda: len(list(folder.glob("*/run.json"))) == 2, 120.0, 0.2)
    for found in folder.glob("*/run.json"):
        wait_for_step(found.parent, 5)
    cluster.command("sbatch", "-p", "high", "-w", "n1", "--gpus-per-node=2", "-o", "/dev/null", "--wrap", "sleep 2")
    out, _ = login.communicate(timeout=300)
    assert login.returncode == 0, out
    give(cluster, tmp_path, [*grid, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "run.root=joblib"])
    pairs = list(
        zip(sorted(folder.glob("*/run.json")), sorted((tmp_path / "joblib").glob("*/run.json")), strict=True)
    )
    assert len(pairs) == 2
    attempts = [len(record(there.parent)["attempts"]) for there, _ in pairs]
    assert sorted(attempts) == [1, 2], attempts
    for there, here in pairs:
        assert_same_runs(there.parent, here.parent, 200)


def test_ranks_change_and_load_options_act_once(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    """A run goes from four ranks to two when a node is taken away; another goes back to 20 and is stopped at 35."""
    back = [*base(corpus, 60, interval=20), *slurm(0.1), "run.root=back", "run.name=a"]
    give(cluster, tmp_path, [*base(corpus, 40, interval=20), "run.root=back", "run.name=a"])
    elastic = ["parallel.dp_shard=-1", "launch.elastic=[4,2]", "hydra.launcher.tasks_per_node=2", "run.root=elastic"]
    give(cluster, tmp_path, [*base(corpus, 200, interval=100), *slurm(0.1), *elastic])
    (run,) = Runs(tmp_path / "elastic").all().values()
    run_dir, job = Path(run.run_dir), run.jobs[-1]
    wait_for_step(run_dir, 10)
    assert len(ranks_of(run_dir)) == 4
    cluster.command("scontrol", "update", "nodename=n2", "state=drain", "reason=test")
    try:
        cluster.command("scancel", "--signal=USR2", job)
        wait_until(lambda: len(record(run_dir)["attempts"]) == 2, 120.0, 0.2)
        assert len(ranks_of(run_dir)) == 2
        wait_finished(cluster, [run_dir], 200)
    finally:
        cluster.command("scontrol", "update", "nodename=n2", "state=resume")
    layouts = [a["layout"]["dp_shard"] for a in record(run_dir)["attempts"]]
    assert layouts == [4, 2]
    whole = undisturbed(tmp_path / "whole", base(corpus, 200, interval=200))
    assert samples(run_dir) == samples(whole)
    assert max(abs(a[1] - b[1]) for a, b in zip(curve(run_dir), curve(whole), strict=True)) < 5e-5

    give(cluster, tmp_path, [*back, "checkpoint.load_step=20", "train.steps=300", "run.extend=hold"])
    rewound = tmp_path / "back" / "a"
    # Rows of the lineage that was left are dropped before the attempt is recorded.
    wait_until(lambda: len(record(rewound)["attempts"]) == 2 and last_step(rewound) >= 35, 120.0, 0.02)
    cluster.command("scancel", "--signal=USR2", Runs(tmp_path / "back").job("run.name='a'"))
    wait_until(lambda: len(record(rewound)["attempts"]) == 3, 120.0, 0.2)
    history_ = record(rewound)
    assert len(history_["lineages"]) == 2
    assert history_["attempts"][1]["from_step"] == 20
    assert history_["attempts"][2]["from_step"] == history_["attempts"][1]["to_step"] >= 35
    sweep_command(cluster, "cancel", str(tmp_path / "back"))


def test_status_resubmit_and_cancel(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    grid = [*base(corpus, 250, interval=100), *slurm(0.1), "run.root=sweep", "-m"]
    give(cluster, tmp_path, [*grid, "seed=1,2"])
    # The same again leaves them alone, a larger grid adds to them.
    out = give(cluster, tmp_path, [*grid, "seed=1,2,3"])
    assert "1 of 3 runs submitted" in out
    folder = tmp_path / "sweep"
    dirs = [Runs(folder).find(f"seed={s}") for s in (1, 2, 3)]
    for run_dir in dirs:
        wait_for_step(run_dir, 5)
    assert {s["state"] for s in status(cluster, folder)} == {"running"}
    (folder / "keep").touch()
    sweep_command(cluster, "cancel", str(folder))
    wait_until(lambda: all(s["state"] in ("stopped", "finished") for s in status(cluster, folder)), 60.0, 0.3)
    stopped = [s["name"] for s in status(cluster, folder) if s["state"] == "stopped"]
    assert stopped
    assert all(s["step"] in s["checkpoints"] for s in status(cluster, folder))
    out = sweep_command(cluster, "resubmit", str(folder), "--json")
    assert sorted(json.loads(out)) == sorted(stopped)
    wait_finished(cluster, dirs, 250)
    wait_until(lambda: not cluster.jobs(), 60.0, 0.3)
    assert sweep_command(cluster, "resubmit", str(folder)) == "resubmitted: none\n"
    assert "0 of 3 runs submitted" in give(cluster, tmp_path, [*grid, "seed=1,2,3"])
    assert [h["event"] for h in history(dirs[0])][-1] == "finished"


def test_what_cannot_be_submitted_is_refused_in_a_sentence(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    sweep = [*base(corpus, 5), "hydra/launcher=slurm"]
    bare = tmp_path / "bin"
    bare.mkdir()
    (bare / "python").symlink_to(sys.executable)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "sweep.json").write_text('{"method": "bayes"}')
    before = cluster.jobs()
    cases: list[tuple[list[str], dict[str, str], str]] = [
        ([], {"PATH": str(bare)}, "must find sbatch on the PATH"),
        (["hydra.launcher.partition=gold"], {}, "hydra.launcher.partition must be one of low, high, but is gold"),
        (["hydra.launcher.gpus_per_node=3"], {}, r"must be at most what a node of partition low has (2), but is 3"),
        (["parallel.dp_shard=3", "hydra.launcher.nodes=2"], {}, "the product of the degrees is 3"),
        (["parallel.dp_shard=-1"], {}, "hydra.launcher.tasks_per_node must be set"),
        (["run.root=foreign"], {}, "is another program's; choose another run.root"),
        (["hydra.launcher.tasks_per_node=0"], {}, "hydra.launcher.tasks_per_node must be at least 1"),
        (["hydra.launcher.partitoin=low"], {}, "did you mean"),
    ]
    for more, environ, sentence in cases:
        code, out = regrow([*sweep, *more], tmp_path, 60.0, **{**cluster.environ, **environ})
        assert code == 2, out
        (line,) = [x for x in out.splitlines() if x.startswith("error: ")]
        assert sentence in line
        assert "Traceback" not in out
    assert cluster.jobs() == before
    assert shutil.which("sbatch")
