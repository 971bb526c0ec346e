"""Sweeps here, the wheel, the demo."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.support import REPO, curve, metrics, record, tiny
from tests.warm import regrow

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_sweep_makes_finds_and_extends_its_runs(corpus: Path, tmp_path: Path) -> None:
    sweep = [*tiny(corpus, "hooks=none"), "-m", "optimizer.lr=1e-3,3e-4", "seed=1,2"]
    code, out = regrow([*sweep, "train.steps=5"], tmp_path)
    assert code == 0, out
    runs = sorted(p for p in (tmp_path / "outputs").iterdir() if p.is_dir())
    assert len(runs) == 4
    settings = [OmegaConf.load(r / "config.yaml") for r in runs]
    assert sorted((s.optimizer.lr, s.seed) for s in settings) == [(3e-4, 1), (3e-4, 2), (1e-3, 1), (1e-3, 2)]
    assert all(len(metrics(r)) == 5 for r in runs)
    assert len({curve(r)[0][1] for r in runs}) == 2
    code, out = regrow([*sweep, "train.steps=5"], tmp_path)
    assert code == 0, out
    assert out.count("finished already at step 5") == 4
    assert all(len(record(r)["attempts"]) == 1 for r in runs)
    code, out = regrow([*sweep, "train.steps=8", "run.extend=hold"], tmp_path)
    assert code == 0, out
    assert all([r["step"] for r in metrics(x)] == list(range(1, 9)) for x in runs)
    assert sorted(p for p in (tmp_path / "outputs").iterdir() if p.is_dir()) == runs


def test_one_bad_run_does_not_end_the_sweep(corpus: Path, tmp_path: Path) -> None:
    sweep = tiny(corpus, "hooks=none", "train.steps=12", "scheduler.warmup_steps=0", "train.grad_clip=0")
    code, out = regrow([*sweep, "-m", "optimizer.lr=1e30,1e-3"], tmp_path)
    assert code == 1, out
    assert "the loss of step" in out
    runs = [p for p in (tmp_path / "outputs").iterdir() if p.is_dir()]
    assert sorted(record(p)["attempts"][-1]["end"] for p in runs) == ["failed", "finished"]


def test_the_wheel_trains_where_folders_have_our_names(tmp_path: Path) -> None:
    """Installed without the checkout; the dependencies are those of this environment."""
    built = tmp_path / "wheel"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(built), str(REPO)], check=True)
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0] for name in names} == {
        "regrow",
        wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info",
    }
    assert {"regrow/conf/config.yaml", "regrow/py.typed", "regrow/launch/train.py"} <= set(names)
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True)
    packages = next(p for p in sys.path if p.endswith("site-packages"))
    # This environment's packages, but not its link to the checkout.
    (site / "borrowed.pth").write_text(packages + "\n")
    work = tmp_path / "work"
    for name in ("models", "conf", "trainer", "checkpoint", "launch"):
        (work / name).mkdir(parents=True)
        (work / name / "__init__.py").write_text("raise RuntimeError('the wrong package')\n")
    corpus = tmp_path / "a.txt"
    corpus.write_text("some words that repeat themselves a little, and some more of them.\n\n" * 2000)
    command = [
        str(python),
        str(tmp_path / "env/bin/regrow"),
        *tiny(corpus, "train.steps=2", "hooks=none", "parallel.dp_shard=2"),
    ]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (run_dir,) = (work / "outputs").iterdir()
    assert len(metrics(run_dir)) == 2
    where = subprocess.run(
        [str(python), "-P", "-c", "import regrow.launch; print(regrow.launch.__file__)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path / "env") in where.stdout


def words_in(text: str) -> int:
    """English words of four letters and more, by the help topics of Python."""
    import re
    from pydoc_data.topics import topics

    known = set(re.findall(r"\b[a-z]{4,}\b", " ".join(topics.values())))
    return sum(w in known for w in re.findall(r"\b[a-z]{4,}\b", text))


def test_the_demo_learns_and_writes_english(tmp_path: Path) -> None:
    code, out = regrow(["experiment=demo"], tmp_path, timeout_s=400)
    assert code == 0, out
    run_dir = tmp_path / "outputs" / "demo"
    validated: list[Any] = [r["val_loss"] for r in metrics(run_dir) if "val_loss" in r]
    assert validated[-1] < 0.6 * validated[0]
    assert words_in((run_dir / "generated.txt").read_text()) >= 10
    picture = (run_dir / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert f"loss curve: {run_dir / 'loss.png'}" in out
