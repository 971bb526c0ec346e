"""A project of one's own trains, is killed and goes on, is swept, looked at and exported, as it stands."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from regrow.launch.template.mylab.model.config import GegluConfig
from regrow.launch.template.mylab.model.model import Geglu
from tests.plugins.projects import bare_names, written
from tests.support import (
    assert_same_tensors,
    curve,
    metrics,
    regrow,
    samples,
    start,
    stored_tensors,
    tiny,
    wait_until,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 60


def first(corpus: Path, *more: str) -> list[str]:
    """The project's own experiment, tiny."""
    fields = [
        f"train.steps={STEPS}",
        "checkpoint.interval=20",
        "checkpoint.keep_latest_k=0",
        "data.log_samples=true",
        "data.global_batch_size=4",
    ]
    # Each rise of the loss is a jump, so that there are rows to compare.
    return ["experiment=first", *tiny(corpus, *fields, "hooks.spikes.factor=1", "hooks.spikes.window=2"), *more]


def command(cwd: Path, *arguments: str, expected: int = 0, **environ: str) -> str:
    """`regrow-ckpt`; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "regrow.launch.commands.checkpoint", *arguments],
        cwd=cwd, env={**os.environ, **environ}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == expected, done.stdout + done.stderr
    return done.stdout + done.stderr


def kill_and_go_on(project: Path, arguments: Sequence[str], run_dir: Path) -> None:
    """With SIGKILL in the middle, behind a step that was saved."""
    process = start(arguments, project)
    wait_until(lambda: len(metrics(run_dir)) > 25 and (run_dir / "checkpoint/step-20/manifest.json").exists(), 120.0)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(metrics(run_dir)) < STEPS
    code, out = regrow(arguments, project)
    assert code == 0, out
    assert "continuing after step" in out
    assert "fresh weights" not in out


def test_packages_named_as_ours(corpus: Path, tmp_path: Path) -> None:
    project = bare_names(tmp_path)
    policy = ["+save_policy@checkpoint.save_policies.thirds=thirds", "checkpoint.interval=50"]
    mine = first(corpus, *policy, "logger=table")
    # In a sweep, here: its first run is what the others are compared with.
    code, out = regrow([*mine, "-m", "seed=0,1", "hydra/launcher=local", "run.root=sweep"], project, 300.0)
    assert code == 0, out
    (whole,) = (project / "sweep").glob("*seed=0*")
    (other,) = (project / "sweep").glob("*seed=1*")
    assert len(curve(whole)) == len(curve(other)) == STEPS
    assert (whole / "losses.csv").read_text().count("\n") == STEPS
    assert (whole / "spikes.jsonl").read_text().count("\n") > 2
    assert {p.name for p in (whole / "checkpoint").glob("step-*")} >= {"step-20", "step-40", "step-60"}

    killed = project / "outputs/one"
    kill_and_go_on(project, [*mine, "run.name=one"], killed)
    assert curve(killed) == curve(whole)
    assert samples(killed) == samples(whole)
    assert (killed / "spikes.jsonl").read_bytes() == (whole / "spikes.jsonl").read_bytes()
    assert_same_tensors(killed / f"checkpoint/step-{STEPS}", whole / f"checkpoint/step-{STEPS}")

    sharded = project / "outputs/two"
    kill_and_go_on(project, [*mine, "run.name=two", "parallel=fsdp", "parallel.dp_shard=2"], sharded)
    assert samples(sharded) == samples(whole)
    assert max(abs(a[1] - b[1]) for a, b in zip(curve(sharded), curve(whole), strict=True)) < 1e-3

    assert "optimizer.state.layers.0.attention.wq.weight.momentum" in command(project, "show", "outputs/one")
    command(project, "verify", "outputs/two")
    assert "no difference" in command(project, "diff", "outputs/one", str(whole))
    command(project, "export", "outputs/one", "exported", "--hf-assets-path", "exported", expected=2)
    command(project, "export", "outputs/one", "exported")
    assert "no difference" in command(project, "diff", "exported", "outputs/one")
    assert_transformers_agrees(project / "exported", killed / f"checkpoint/step-{STEPS}")

    # A stored config names no package: somewhere else nothing of it is imported, unless it is named there.
    told = command(tmp_path, "export", str(killed), "again", expected=2)
    assert 'name it under [tool.regrow] in pyproject.toml (packages = ["models"])' in told
    assert "Traceback" not in told
    command(tmp_path, "export", str(killed), "again", REGROW_PACKAGES="models", REGROW_PACKAGES_PATH=str(project))


def assert_transformers_agrees(folder: Path, step: Path) -> None:
    """The class there computes what ours does."""
    config = GegluConfig(
        name="x", vocab_size=320, max_seq_len=2048, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64
    )
    ours, theirs = Geglu(config), AutoModelForCausalLM.from_pretrained(folder)
    ours.init_buffers(torch.device("cpu"), 16)
    weights = {n: t for n, t in stored_tensors(step).items() if n in dict(ours.named_parameters())}
    ours.load_state_dict(weights)
    tokens = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


def test_what_regrow_new_writes(corpus: Path, tmp_path: Path) -> None:
    """Its tests pass, its experiment is killed and goes on, and what is wrong with it is said in a sentence."""
    project = written(tmp_path)
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(tests, cwd=project, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    mine = first(corpus, "run.name=first")
    kill_and_go_on(project / "tests", mine, project / "tests/outputs/first")
    assert "sound" in command(project, "verify", "tests/outputs/first")

    wrong = "hooks.spikes._target_=lab.model.model.Geglu"
    assert_refused(project, [*mine, wrong], "hooks.spikes._target_ must name a class that extends")
    schema = (project / "lab/hook/config.py").read_text().replace("spikes_schema", "garbage_schema")
    (project / "lab/broken_config.py").write_text(schema)
    assert_refused(project, mine, "hook/garbage_schema is that of regrow.trainer.hooks.config.GarbageConfig")
    assert_refused(project, mine, "but gone is not installed", REGROW_PACKAGES="gone")


def assert_refused(cwd: Path, arguments: Sequence[str], sentence: str, **environ: str) -> None:
    code, out = regrow(arguments, cwd, 120.0, **environ)
    assert code == 2, out
    (line,) = [x for x in out.splitlines() if x.startswith("error: ")]
    assert sentence in line
    assert "Traceback" not in out
