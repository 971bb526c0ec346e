"""Damaged checkpoints: none loads silently, each error names the file, automatic resume goes to the step before."""

import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from regrow.checkpoint.errors import CheckpointError, DamagedStepError
from regrow.checkpoint.format.stored_step import StoredStep
from regrow.checkpoint.load.reader import read_tensors
from regrow.trainer.jsonlines import read_rows
from tests.runs import train
from tests.support import curve, record, tiny

pytestmark = pytest.mark.slow


def overrides(corpus: Path) -> list[str]:
    return tiny(corpus, "data.global_batch_size=8", "checkpoint.interval=5", "hooks=none", "scheduler.total_steps=20")


@pytest.fixture(scope="module")
def run_dir(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-rank run with steps 5 and 10."""
    folder = tmp_path_factory.mktemp("damage") / "run"
    train([*overrides(corpus), "train.steps=10", "parallel.dp_shard=2"], folder, 2)
    return folder


def flip(file: Path, rng: random.Random, other: Path) -> None:
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def zero_page(file: Path, rng: random.Random, other: Path) -> None:
    data = bytearray(file.read_bytes())
    start = rng.randrange(len(data))
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    file.write_bytes(data)


def truncate(file: Path, rng: random.Random, other: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(len(data))])


def stale(file: Path, rng: random.Random, other: Path) -> None:
    """The same file of an older step."""
    file.write_bytes((other / file.name).read_bytes())


def remove(file: Path, rng: random.Random, other: Path) -> None:
    file.unlink()


def swap(file: Path, rng: random.Random, other: Path) -> None:
    """Two files of a step in each other's place."""
    partner = rng.choice(sorted(p for p in file.parent.iterdir() if p != file))
    mine, theirs = file.read_bytes(), partner.read_bytes()
    file.write_bytes(theirs)
    partner.write_bytes(mine)


def edit(file: Path, rng: random.Random, other: Path) -> None:
    """Another digit somewhere in a manifest."""
    file = rng.choice([file.with_name("manifest.json"), file.with_name("rank-0.json"), file.with_name("rank-1.json")])
    text = file.read_text()
    place = rng.choice([m.start() for m in re.finditer(r"\d", text)])
    file.write_text(text[:place] + str((int(text[place]) + rng.randint(1, 9)) % 10) + text[place + 1 :])


def mix(file: Path, rng: random.Random, other: Path) -> None:
    """All that one rank wrote, of an older step."""
    rank = rng.randrange(2)
    for name in (f"__{rank}_0.distcp", f"rank-{rank}.json"):
        file.with_name(name).write_bytes((other / name).read_bytes())


FAULTS: list[Callable[[Path, random.Random, Path], None]] = [
    flip,
    zero_page,
    truncate,
    stale,
    remove,
    swap,
    edit,
    mix,
]


def load(step: Path, expected: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Everything in a step, as automatic resume reads it."""
    items = StoredStep.open(step).items()
    tensors = {i.name: torch.zeros(i.global_shape, dtype=i.torch_dtype) for i in items}
    read_tensors(step, items, tensors)
    return tensors


@pytest.mark.slow
def test_a_thousand_faults_and_none_loads_silently(run_dir: Path, tmp_path: Path) -> None:
    sound, older = run_dir / "checkpoint/step-10", run_dir / "checkpoint/step-5"
    expected = load(sound)
    files = sorted(p.name for p in sound.iterdir())
    assert files == [".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "rank-0.json", "rank-1.json"]
    caught = harmless = 0
    for seed in range(1200):
        rng = random.Random(seed)
        victim = tmp_path / "step-10"
        shutil.copytree(sound, victim)
        file, fault = rng.choice(files), FAULTS[seed % len(FAULTS)]
        fault(victim / file, rng, older)
        changed = [
            n for n in files if not (victim / n).exists() or (victim / n).read_bytes() != (sound / n).read_bytes()
        ]
        try:
            loaded = load(victim)
        except (DamagedStepError, FileNotFoundError) as error:
            caught += 1
            # A file of another step shows in what no longer fits it.
            named = files if fault in (stale, swap, mix) else changed
            assert any(name in str(error) for name in named), (seed, fault.__name__, file, error)
            if "does not match its hash" in str(error) and ".distcp" in str(error):
                assert any(name in str(error) for name in expected), error
        else:
            # Bytes around a tensor (or already zero) may change without any tensor changing.
            harmless += 1
            assert loaded.keys() == expected.keys()
            assert all(torch.equal(t, expected[n]) for n, t in loaded.items()), (seed, fault.__name__, file)
        shutil.rmtree(victim)
    assert caught + harmless == 1200
    assert caught > 1000


def damage_newest(run_dir: Path, target: Path) -> Path:
    shutil.copytree(run_dir, target)
    file = target / "checkpoint/step-10/__1_0.distcp"
    data = bytearray(file.read_bytes())
    items = StoredStep.open(target / "checkpoint/step-10").items()
    item = next(i for i in items if i.file == file.name and i.name == "tok_embeddings.weight")
    data[item.data + 100] ^= 1
    file.write_bytes(data)
    return target


@pytest.mark.parametrize("world", [1, 2])
def test_automatic_resume_goes_to_the_step_before(corpus: Path, run_dir: Path, tmp_path: Path, world: int) -> None:
    """Only one rank of two reads the flipped bit; both go back."""
    target = damage_newest(run_dir, tmp_path / "run")
    degrees = ["parallel.dp_shard=2"] if world == 2 else []
    train([*overrides(corpus), "train.steps=12", *degrees], target, world)
    assert record(target)["attempts"][-1]["from_step"] == 5
    assert (target / "checkpoint/set-aside/damaged/step-10").exists()
    log = (target / "logs/rank-0.log").read_text()
    assert "tok_embeddings.weight in" in log
    assert "__1_0.distcp does not match its hash" in log
    if world == 2:
        assert curve(target)[:10] == curve(run_dir)


def test_load_step_refuses_a_damaged_step(corpus: Path, run_dir: Path, tmp_path: Path) -> None:
    target = damage_newest(run_dir, tmp_path / "run")
    refused = train([*overrides(corpus), "train.steps=12", "checkpoint.load_step=10"], target)
    assert refused.kind == "refused"
    assert re.search("tok_embeddings.weight in .*does not match its hash", refused.message)
    assert (target / "checkpoint/step-10").exists()


def test_nothing_sound_is_an_error_not_a_fresh_start(corpus: Path, run_dir: Path, tmp_path: Path) -> None:
    target = damage_newest(run_dir, tmp_path / "run")
    shutil.rmtree(target / "checkpoint/step-5")
    refused = train([*overrides(corpus), "train.steps=12"], target)
    assert refused.kind == "refused"
    assert "must hold a sound step" in refused.message
    assert (target / "checkpoint/step-10").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sync", "async", "pinned"])
def test_every_mode_trains_the_same(corpus: Path, run_dir: Path, tmp_path: Path, mode: str) -> None:
    arguments = [*overrides(corpus), f"checkpoint={mode}", "checkpoint.interval=2", "parallel.dp_shard=2"]
    train([*arguments, "train.steps=6"], tmp_path / "run", 2)
    train([*arguments, "train.steps=10"], tmp_path / "run", 2)
    assert curve(tmp_path / "run") == curve(run_dir)
    assert load(tmp_path / "run/checkpoint/step-10").keys() == load(run_dir / "checkpoint/step-10").keys()
    ours, theirs = load(tmp_path / "run/checkpoint/step-10"), load(run_dir / "checkpoint/step-10")
    assert all(torch.equal(t, theirs[n]) for n, t in ours.items())


def test_a_foreign_error_is_not_damage(run_dir: Path) -> None:
    step = run_dir / "checkpoint/step-5"
    items = StoredStep.open(step).items()
    with pytest.raises(CheckpointError, match="must hold nothing.weight") as caught:
        read_tensors(step, items, {"nothing.weight": torch.zeros(1)})
    assert not isinstance(caught.value, DamagedStepError)


@pytest.mark.slow
def test_a_disk_that_fills_up_stops_nothing(corpus: Path, tmp_path: Path) -> None:
    """A file system of its own, filled while the run trains and emptied again."""
    mount = tmp_path / "m"
    mount.mkdir()
    wide = ["model.dim=128", "model.ffn_dim=512", "data.seq_len=64", "data.global_batch_size=16"]
    arguments = tiny(
        corpus, *wide, "hooks=none", "train.steps=200", "checkpoint.interval=4", "checkpoint.keep_latest_k=2",
        f"run.root={mount}", "run.name=a", "checkpoint.max_save_errors=1000",
    )  # fmt: skip
    run = " ".join([sys.executable, "-P -m regrow.launch.train", *(f"'{a}'" for a in arguments)])
    # The mount is seen by this shell and its children alone, so the filling is done here too.
    script = f"""
    mount -t tmpfs -o size=40m none {mount} && {run} > {tmp_path}/log 2>&1 &
    run=$!
    until [ -e {mount}/a/checkpoint/step-8 ]; do sleep 0.05; done
    dd if=/dev/zero of={mount}/fill bs=1M count=64 2>/dev/null
    until grep -q "was not saved" {tmp_path}/log; do sleep 0.05; kill -0 $run || break; done
    ls {mount}/a/checkpoint > {tmp_path}/while-full
    rm {mount}/fill
    wait $run; code=$?
    ls {mount}/a/checkpoint > {tmp_path}/after
    cp {mount}/a/metrics.jsonl {tmp_path}/metrics.jsonl
    exit $code
    """
    namespace = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    done = subprocess.run([*namespace, "bash", "-c", script], cwd=tmp_path, timeout=240, check=False)
    log = (tmp_path / "log").read_text()
    assert done.returncode == 0, log
    assert "No space left on device" in log
    assert "training goes on and the next due save is tried" in log
    # Two steps were kept through the full disk, and the last one was saved after it.
    assert (
        len([n for n in (tmp_path / "while-full").read_text().split() if n.startswith("step-") and "." not in n]) >= 1
    )
    after = (tmp_path / "after").read_text().split()
    assert "step-200" in after
    assert not [n for n in after if "partial" in n]
    assert [r["step"] for r in read_rows(tmp_path / "metrics.jsonl")] == list(range(1, 201))
