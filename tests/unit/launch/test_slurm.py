"""Scripts, shapes and states: values in, values out."""

import dataclasses
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.errors import ConfigCompositionException

from regrow.launch.app import run_command
from regrow.launch.config.errors import UserError
from regrow.launch.run.ranks import detect_ranks
from regrow.launch.run.signals import StopFlag
from regrow.launch.sweep.launcher_config import LocalConfig, SlurmConfig
from regrow.launch.sweep.launchers import register_launchers
from regrow.launch.sweep.local import Budget, local_config
from regrow.launch.sweep.plan import kept_hydra_overrides, ranks_of
from regrow.launch.sweep.slurm import scripts, shape_of, slurm_config
from regrow.launch.sweep.slurm_jobs import Job, Partition, _gpus, grace_seconds
from regrow.launch.sweep.slurm_script import Shape
from regrow.launch.sweep.status import Sweep, SweepRun, inspect_run, open_sweep, result_of, run_name_override
from regrow.trainer.hooks.save_results import stop_seconds
from regrow.trainer.run_files import METRICS
from tests.support import typed_config

GPU_NODES = Partition(name="gpu", gpus=8, cpus=64, grace_s=30, max_array=1000)
CPU_NODES = Partition(name="cpu", gpus=0, cpus=16, grace_s=30, max_array=2)


def planned(name: str = "a", ranks: tuple[int, ...] = (1,), **fields: Any) -> SweepRun:
    resources = dataclasses.asdict(SlurmConfig(**fields))
    return SweepRun(
        name=name, run_dir=f"/s/{name}", arguments=["seed=1", f"run.name='{name}'"], steps=10,
        checkpoint_folder="checkpoint", ranks=list(ranks), gpu=True, cpus=1, launcher="slurm", resources=resources,
        working_dir="/w",
    )  # fmt: skip


def shape(partition: Partition | None, ranks: tuple[int, ...], **fields: Any) -> tuple[tuple[int, int], int, int]:
    found = shape_of(planned(ranks=ranks), SlurmConfig(**fields), partition)
    return found.nodes, found.tasks_per_node, found.gpus_per_node


def test_nodes_tasks_and_gpus_follow_from_the_degrees() -> None:
    assert shape(GPU_NODES, (4,)) == ((1, 1), 4, 4)
    assert shape(GPU_NODES, (16,)) == ((2, 2), 8, 8)
    assert shape(GPU_NODES, (16,), nodes=4) == ((4, 4), 4, 4)
    assert shape(GPU_NODES, (16,), gpus_per_node=2) == ((8, 8), 2, 2)
    assert shape(GPU_NODES, (16, 8, 4), tasks_per_node=4) == ((1, 4), 4, 4)
    assert shape(CPU_NODES, (4,)) == ((1, 1), 4, 0)
    assert shape(None, (4,)) == ((1, 1), 4, 0)


@pytest.mark.parametrize(
    ("partition", "ranks", "fields", "sentence"),
    [
        (GPU_NODES, (6,), {"nodes": 4}, r"nodes × tasks_per_node \(4 × 6\), but the product of the degrees is 6"),
        (GPU_NODES, (6,), {"tasks_per_node": 4}, r"a multiple of 4.*degrees is 6"),
        (GPU_NODES, (4,), {"gpus_per_node": 9}, r"at most what a node of partition gpu has \(8\), but is 9"),
        (GPU_NODES, (4,), {"tasks_per_node": 4, "gpus_per_node": 2}, r"at least tasks_per_node \(4\)"),
        (CPU_NODES, (4,), {"cpus_per_task": 8}, r"at most the CPUs of a node of partition cpu \(16\), but is 32"),
    ],
)
def test_what_does_not_fit_is_a_sentence(
    partition: Partition, ranks: tuple[int, ...], fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        shape_of(planned(ranks=ranks), SlurmConfig(**fields), partition)


@pytest.mark.parametrize("fields", [{"nodes": 0}, {"grace_s": 5}, {"max_stuck": 0}, {"poll_s": 0.0}])
def test_fields_have_limits(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^hydra\.launcher\.\w+ must be .*, but is .*; use "):
        slurm_config(fields)


def test_a_script_says_what_was_asked_and_is_shell() -> None:
    run = planned(
        "it's 100%", (4,), account="lab", time="1:00:00", mem="8G", array_parallelism=3, env={"A": "x y"},
        setup=["module load cuda"], extra=["--exclude=n7"], extra_srun=["--mpi=none"], container="/images/a.sif",
    )  # fmt: skip
    ((members, text),) = scripts(Path("/sweeps/lr"), [run], GPU_NODES)
    assert members == [run]
    for line in ("#SBATCH --account=lab", "#SBATCH --time=1:00:00", "#SBATCH --mem=8G", "#SBATCH --exclude=n7",
                 "#SBATCH --nodes=1", "#SBATCH --ntasks-per-node=4", "#SBATCH --gpus-per-node=4", "#SBATCH --requeue",
                 "#SBATCH --signal=USR2@120", "#SBATCH --array=0", "export A='x y'", "module load cuda",
                 "#SBATCH --output=/sweeps/lr/slurm/%A_%a.log", '    run="/s/it\'s 100%"'):  # fmt: skip
        assert line in text.splitlines(), line
    assert "apptainer exec --nv --bind /w --bind /sweeps/lr /images/a.sif regrow" in text
    assert "REGROW_GRACE_S=30" in text
    assert "%%" not in text
    checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_arrays_are_cut_where_the_cluster_wants_it_and_one_per_shape() -> None:
    runs = [planned(f"r{i}", (2,)) for i in range(5)] + [planned("wide", (4,))]
    made = scripts(Path("/s"), runs, CPU_NODES)
    assert [[r.name for r in members] for members, _ in made] == [["r0", "r1"], ["r2", "r3"], ["r4"], ["wide"]]
    limited = scripts(Path("/s"), [planned(f"r{i}", (2,), array_parallelism=1) for i in range(2)], CPU_NODES)
    assert "#SBATCH --array=0-1%1" in limited[0][1]


def test_pyxis_and_elastic_runs() -> None:
    run = planned("a", (4, 2), container="reg/img:1", tasks_per_node=2)
    ((_, text),) = scripts(Path("/s"), [run], None)
    assert "#SBATCH --nodes=1-2" in text
    assert "--container-image=reg/img:1 --container-mounts=/w:/w,/s:/s --container-workdir=/w regrow" in text
    assert str(Shape(ranks=(4, 2), tasks_per_node=2, gpus_per_node=0)) == "4-2ranks-2per-node"


def test_ranks_of_a_run() -> None:
    target = {"_target_": "hydra_plugins.regrow.SlurmLauncher"}
    assert ranks_of(typed_config(["parallel.dp_shard=4", "parallel.dp_replicate=2"]), target) == [8]
    free = ["parallel.dp_shard=-1"]
    assert ranks_of(typed_config([*free, "launch.elastic=[2,8,4]"]), target) == [8, 4, 2]
    assert ranks_of(typed_config(free), {**target, "nodes": 2, "tasks_per_node": 4}) == [8]
    for overrides in (free, ["launch.elastic=[2]"], [*free, "parallel.dp_replicate=2", "launch.elastic=[4,3]"]):
        with pytest.raises(UserError, match=r" must .*, but .*; use "):
            ranks_of(typed_config(overrides), target)


def test_slurms_variables_count_only_in_a_step_of_the_right_size() -> None:
    step = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4",
            "SLURM_NNODES": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_JOB_ID": "17"}  # fmt: skip
    found = detect_ranks(step, 4)
    assert found is not None
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (3, 4, 1, 2)
    assert detect_ranks(step, 2) is None
    shell = {k: v for k, v in step.items() if not k.startswith("SLURM_STEP")}
    assert detect_ranks(shell, 4) is None
    other = detect_ranks({**step, "SLURM_JOB_ID": "18"}, 4)
    again = detect_ranks({**step, "SLURM_RESTART_COUNT": "1"}, 4)
    assert other is not None
    assert again is not None
    assert len({found.port, found.port + 1, other.port, other.port + 1, again.port, again.port + 1}) == 6


def test_overrides_of_a_run_keep_what_is_not_the_sweeps() -> None:
    given = ["hydra/launcher=slurm", "hydra.launcher.time=2", "+hydra.launcher.env.A=1", "hydra.sweep.dir=x",
             "hydra.verbose=true", "hydra/sweeper=basic", "+hydra.job.env_set.B=2"]  # fmt: skip
    assert kept_hydra_overrides(given) == ["hydra.verbose=true", "+hydra.job.env_set.B=2"]
    assert run_name_override(r"a'b\c") == r"run.name='a\'b\\c'"


def test_cluster_facts() -> None:
    assert _gpus("gpu:a100:4(S:0-1),gpu:2") == 6
    assert _gpus("(null)") == 0
    assert grace_seconds({"GraceTime": "20"}, {"KillWait": "30"}) == 20
    assert grace_seconds({"GraceTime": "0"}, {"KillWait": "45"}) == 45
    assert stop_seconds([3.0, 9.0, 4.0], 2.0) == 13.0
    assert stop_seconds([], 2.0) == 4.0


@pytest.mark.parametrize("name", ["slurm", "local"])
def test_launchers_compose_and_know_their_fields(name: str) -> None:
    register_launchers()
    with initialize_config_module("regrow.conf", version_base="1.3"):
        config = compose("config", overrides=[f"hydra/launcher={name}"], return_hydra_config=True)
        fields = {f.name for f in dataclasses.fields(SlurmConfig if name == "slurm" else LocalConfig)}
        assert set(config.hydra.launcher) == fields
        with pytest.raises(ConfigCompositionException):
            compose("config", overrides=[f"hydra/launcher={name}", "hydra.launcher.nope=1"], return_hydra_config=True)


def history(run_dir: Path, *events: tuple[float, str]) -> None:
    lines = [{"time": t, "job": "7_0", "restart": 0, "node": "n1", "event": e, "step": 0} for t, e in events]
    (run_dir / "slurm.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


def test_states(tmp_path: Path) -> None:
    run = dataclasses.replace(planned(), run_dir=str(tmp_path), jobs=["7_0"])

    def state(job: str | None) -> str:
        jobs = {} if job is None else {"7_0": Job(id="7_0", state=job, reason="", nodes="n1")}
        return inspect_run(run, jobs).state

    assert state("PENDING") == "waiting"
    assert state("RUNNING") == "running"
    assert state(None) == "lost"
    history(tmp_path, (10.0, "start"), (20.0, "preempted"), (33.0, "start"), (50.0, "crashed"), (51.5, "start"))
    assert state("PENDING") == "requeued"
    assert state("COMPLETING") == "ending"
    assert inspect_run(run, {}).lost_s == pytest.approx(14.5)
    for event, word in (("stuck", "stuck"), ("gave_up", "gave up"), ("refused", "refused"), ("stopped", "stopped")):
        history(tmp_path, (10.0, "start"), (20.0, event))
        assert state(None) == word
    (tmp_path / METRICS).write_text('{"step": 1, "loss": 3.0, "val_loss": 2.5}\n{"step": 2, "loss": 2.0}\n')
    assert result_of(tmp_path) == 2.5
    (tmp_path / "checkpoint" / "step-2").mkdir(parents=True)
    (tmp_path / "checkpoint" / "step-3.partial-x").mkdir()
    found = inspect_run(run, None)
    assert (found.step, found.loss, found.val_loss, found.checkpoints) == (2, 2.0, 2.5, [2])


def test_a_sweep_remembers_and_refuses_strangers(tmp_path: Path) -> None:
    with open_sweep(tmp_path) as sweep:
        sweep.add(planned("a")).jobs.append("7_0")
    with open_sweep(tmp_path) as sweep:
        assert sweep.add(planned("a")).jobs == ["7_0"]
        with pytest.raises(UserError, match="must have directories of their own"):
            sweep.add(dataclasses.replace(planned("b"), run_dir="/s/a"))
    for text in ('{"method": "bayes"}', "[]", "not json"):
        (tmp_path / "sweep.json").write_text(text)
        with pytest.raises(UserError, match=r"is another program's; choose another run\.root"):
            Sweep.load(tmp_path)


def test_the_budget_is_never_exceeded() -> None:
    budget, most, now = Budget(3, ["0", "1"]), [0], [0]
    seen: list[list[str]] = []
    lock = threading.Lock()

    def work() -> None:
        with budget.take(2, 1) as gpus:
            with lock:
                now[0] += 2
                most[0] = max(most[0], now[0])
                seen.append(gpus)
            with lock:
                now[0] -= 2

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 2
    assert all(len(gpus) == 1 for gpus in seen)
    with budget.take(3, 2) as gpus:
        assert sorted(gpus) == ["0", "1"]
    with pytest.raises(UserError, match=r"hydra\.launcher\.n_jobs must be at least 1, but is 0; use 1"):
        local_config({"n_jobs": 0})


@pytest.mark.parametrize("launcher", ["slurm", "local"])
def test_each_run_of_a_sweep_is_composed_once(
    launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Besides what Hydra composes for the sweep itself."""
    composed: list[str] = []
    compose = ConfigLoaderImpl.load_sweep_config

    def counting(self: ConfigLoaderImpl, master: Any, overrides: list[str]) -> Any:
        composed.append(" ".join(overrides))
        return compose(self, master, overrides)

    monkeypatch.setattr(ConfigLoaderImpl, "load_sweep_config", counting)
    monkeypatch.setattr("regrow.launch.sweep.local.run_here", lambda _folder, runs: [1] * len(runs))
    monkeypatch.setattr(sys, "argv", ["regrow"])
    monkeypatch.chdir(tmp_path)
    shown = ["hydra.launcher.dry_run=true"] if launcher == "slurm" else []
    run_command(["-m", "seed=1,2,3", f"hydra/launcher={launcher}", *shown], StopFlag())
    assert composed == ["seed=1", "seed=2", "seed=3"], capfd.readouterr()
