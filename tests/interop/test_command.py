"""`regrow-ckpt`, as a user gives it: conversion, what is wrong with its input, and looking after steps."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from regrow.checkpoint.format.manifest import read_manifest
from regrow.checkpoint.load.open_source import open_source, read_whole
from regrow.checkpoint.sources.safetensors import INDEX
from regrow.launch.commands.checkpoint import main
from regrow.launch.commands.convert import ConversionRequest, import_checkpoint
from regrow.launch.commands.convert import main as reference_main
from tests.interop.hf_models import KINDS, make
from tests.runs import train
from tests.support import stored_tensors, tiny

pytestmark = pytest.mark.slow

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ckpt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command here; gives exit code, output and error output."""

    def run(*arguments: object, entry: Callable[[], None] = main) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["regrow-ckpt", *map(str, arguments)])
        code = 0
        capsys.readouterr()
        try:
            entry()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def one_sentence(err: str) -> str:
    """The one `error:` line."""
    assert "Traceback" not in err
    (line,) = [x for x in err.splitlines() if x.startswith("error: ")]
    return line


@pytest.fixture(scope="module")
def run_dir(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("care") / "run"
    train(tiny(corpus, "hooks=none", "train.steps=6", "checkpoint.interval=2"), folder)
    return folder


@pytest.fixture
def run_copy(run_dir: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(run_dir, tmp_path / "run"))


def flip_bit(step: Path, name: str) -> None:
    """In the middle of a tensor's bytes."""
    items = json.loads((step / "rank-0.json").read_text())["items"]
    item = next(i for i in items if i["name"] == name)
    with (step / item["file"]).open("r+b") as file:
        position = item["data"] + item["data_bytes"] // 2
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("kind", KINDS)
def test_in_and_out(kind: str, tmp_path: Path, ckpt: Command) -> None:
    make(kind, tmp_path / "hf")
    code, out, err = ckpt("import", tmp_path / "hf", tmp_path / "step", "--format", "hf", "--json")
    assert code == 0, err
    assert json.loads(out)["resumed_tensors"] == 0
    assert read_manifest(tmp_path / "step").model["name"] == "hf"
    assert ckpt("diff", tmp_path / "step", tmp_path / "hf")[:2] == (0, "no difference\n")
    for extra, out_name in ((["--hf-assets-path", tmp_path / "hf"], "a"), ([], "b")):
        assert ckpt("export", tmp_path / "step", tmp_path / out_name, "--format", "hf", *extra)[0] == 0
        with open_source(tmp_path / "hf") as a, open_source(tmp_path / out_name) as b:
            assert all(torch.equal(read_whole(a, n), read_whole(b, n)) for n in a.infos)
            assert a.infos == b.infos
    for form, name in (("torch", "model.pt"), ("safetensors", "one.safetensors")):
        assert ckpt("export", tmp_path / "step", tmp_path / name, "--format", form, "--dtype", "bfloat16")[0] == 0
        assert ckpt("diff", tmp_path / name, tmp_path / "hf")[0] == 0
        assert ckpt("import", tmp_path / name, tmp_path / f"from-{form}", "--format", form)[0] == 0
        assert ckpt("diff", tmp_path / f"from-{form}", tmp_path / name)[:2] == (0, "no difference\n")
    stock = torch.load(tmp_path / "model.pt", weights_only=True)
    assert stock["tok_embeddings.weight"].dtype == torch.bfloat16
    assert not list(tmp_path.glob("*.partial*"))


def test_the_references_argument_order(tmp_path: Path, ckpt: Command) -> None:
    make("llama3", tmp_path / "hf")
    arguments = ["from-hf", tmp_path / "hf", tmp_path / "step"]
    assert ckpt(*arguments, entry=reference_main)[0] == 0
    code, _, err = ckpt(
        "to-hf", tmp_path / "step", tmp_path / "out", "--hf_assets_path", tmp_path / "hf",
        "--model_name", "llama3", "--model_flavor", "8B", entry=reference_main,
    )  # fmt: skip
    # Forced to be what it is not: one sentence, and nothing is left of it.
    assert code == 2
    assert "must hold layers.3.attention.wq.weight, but does not" in one_sentence(err)
    assert not list(tmp_path.glob("out*"))
    done = ckpt("to-hf", tmp_path / "step", tmp_path / "out", "--export_dtype", "bfloat16", entry=reference_main)
    assert done[0] == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def wrong_inputs(folder: Path) -> dict[str, tuple[list[object], str]]:
    """Cases by name: arguments, and what the sentence says."""
    hf, step, out = folder / "hf", folder / "step", folder / "out"
    return {
        "missing shard": (["import", folder / "no-shard", out], r"names the shard model-00002-of-\d+.safetensors, but"),
        "cut shard": (["import", folder / "cut", out], r"must have \d+ bytes, but has \d+: it is cut short; copy"),
        "no header": (["import", folder / "empty-shard", out], "must be a whole safetensors file"),
        "architecture": (["import", folder / "gpt", out], "architectures in .* must be one of LlamaFor.*, but is GPT2"),
        "gelu": (["import", folder / "gelu", out], "hidden_act in config.json must be 'silu' for Llama 3, but is 'gelu'"),
        "no field": (["import", folder / "no-field", out], "must have the field 'hidden_size', but has not"),
        "type": (["export", folder / "large", out, "--dtype", "float16"],
                 r"must be able to hold every value, but model.norm.weight in .* has 1e\+06 and float16 ends at 65504"),
        "not empty": (["export", step, folder], "OUT must be new or an empty folder, but .* is not; choose another"),
        "nothing there": (["export", folder / "nowhere", out], "nowhere must be a checkpoint, but does not exist"),
        "no model": (["export", folder / "plain.pt", out], "--model must be given, because .* does not say"),
        "variant": (["export", step, out, "--model", "llama3_9b"], "model must be one of .*; did you mean"),
        "format": (["import", hf, out, "--format", "torch"], "--format must be hf for .*, but is torch; leave it out"),
        "shard size": (["export", step, out, "--max-shard-size", "0"], "--max-shard-size must be a size like 5GB"),
        "assets": (["export", step, out, "--hf-assets-path", step], "--hf-assets-path must .* config.json, but"),
        "threads": (["import", hf, out, "--threads", "0"], "--threads must be at least 1, but is 0; use 2"),
        "url": (["import", hf, "s3://bucket/x"], "OUT must be a local path, but is s3:/.*; write it here"),
        "not a run": (["ls", hf], "RUN must be a run or a folder with steps, but .* is neither"),
        "not a step": (["pin", hf], "STEP must be a complete step, but .* has no manifest"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the cases need."""
    folder = tmp_path_factory.mktemp("wrong")
    theirs = make("llama3", folder / "hf")
    for name in ("no-shard", "cut", "empty-shard", "gpt", "gelu", "no-field"):
        shutil.copytree(folder / "hf", folder / name)
    (next((folder / "no-shard").glob("model-00002-*"))).unlink()
    shard = next((folder / "cut").glob("model-00003-*"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    next((folder / "empty-shard").glob("model-00001-*")).write_bytes(b"")
    changes: dict[str, dict[str, Any]] = {
        "gpt": {"architectures": ["GPT2LMHeadModel"]},
        "gelu": {"hidden_act": "gelu"},
        "no-field": {"hidden_size": None},
    }
    for name, change in changes.items():
        path = folder / name / "config.json"
        fields: dict[str, Any] = json.loads(path.read_text())
        fields |= change
        path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    with torch.no_grad():
        theirs.model.get_parameter("model.norm.weight").fill_(1e6)
    theirs.model.save_pretrained(folder / "hf-large", max_shard_size="100KB")
    for source, out in (("hf", "step"), ("hf-large", "large")):
        import_checkpoint(
            ConversionRequest(checkpoint=str(folder / source), out=folder / out, threads=1, shows_progress=False)
        )
    torch.save({"a": torch.zeros(3)}, folder / "plain.pt")
    return folder


@pytest.mark.parametrize("case", list(wrong_inputs(Path())))
def test_wrong_input_is_one_sentence_and_nothing_half_written(case: str, wrong: Path, ckpt: Command) -> None:
    before = sorted(wrong.rglob("*"))
    arguments, pattern = wrong_inputs(wrong)[case]
    code, _, err = ckpt(*arguments)
    assert code == 2
    assert re.search(pattern, one_sentence(err)), err
    assert sorted(wrong.rglob("*")) == before


@pytest.mark.slow
def test_a_disk_too_small_is_seen_before_anything_is_written(wrong: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    command = f"{sys.executable} -m regrow.launch.commands.checkpoint import {wrong / 'hf'} {tmp_path}/m/out"
    script = f"mount -t tmpfs -o size=300k none {tmp_path}/m && {command}; code=$?; ls -A {tmp_path}/m; exit $code"
    namespace = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    done = subprocess.run([*namespace, "bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "OUT must have room for 0.6 MiB, but" in one_sentence(done.stderr)
    assert done.stdout == ""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["hf", "torch"])
def test_killed_anywhere_and_given_again(form: str, tmp_path: Path, ckpt: Command) -> None:
    """SIGKILL after more and more of the work; in the end the output is what an undisturbed conversion writes."""
    from regrow.checkpoint.convert.conversion_plan import plan_step
    from regrow.checkpoint.convert.convert import convert
    from regrow.checkpoint.format.manifest import Manifest
    from tests.interop.large import RandomModel

    source = RandomModel(layers=12, dim=1024, vocab=8192)
    convert(
        source,
        lambda infos, _work: plan_step(infos, Manifest(step=0, lineage="", kind="model", model=source.settings)),
        tmp_path / "step",
        identity={},
    )
    out = tmp_path / ("out" if form == "hf" else "out.pt")
    command = [sys.executable, "-m", "regrow.launch.commands.checkpoint", "export", str(tmp_path / "step"), str(out)]
    command += ["--format", form, "--max-shard-size", "100MB", "--json"]
    journal = out.with_name(f"{out.name}.partial-convert") / "journal.jsonl"
    kills = 0
    for lines in (1, 20, 60):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") <= lines):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        assert not out.exists() or process.returncode == 0
    assert kills >= 2
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["resumed_tensors"] > 0
    assert ckpt("diff", tmp_path / "step", out)[:2] == (0, "no difference\n")
    assert not journal.parent.exists()


def test_verify_names_the_tensor_with_a_flipped_bit(run_copy: Path, ckpt: Command) -> None:
    code, out, _ = ckpt("verify", run_copy, "--json")
    assert code == 0
    assert [r["problems"] for r in json.loads(out)] == [[], [], []]
    for name in ("layers.1.feed_forward.w2.weight", "optimizer.state.output.weight.exp_avg_sq"):
        flip_bit(run_copy / "checkpoint/step-4", name)
        code, out, _ = ckpt("verify", run_copy / "checkpoint/step-4")
        assert code == 1
        assert f"{name} in " in out
        assert "does not match its hash" in out
    code, out, _ = ckpt("verify", run_copy, "--json")
    assert code == 1
    assert [len(r["problems"]) for r in json.loads(out)] == [0, 2, 0]


def test_diff_of_a_checkpoint_and_its_export_is_empty(run_copy: Path, ckpt: Command, tmp_path: Path) -> None:
    step = run_copy / "checkpoint/step-6"
    for dtype in ("float32", "bfloat16"):
        assert ckpt("export", run_copy, tmp_path / dtype, "--dtype", dtype)[0] == 0
        assert (tmp_path / dtype / "tokenizer.json").read_bytes() == (run_copy / "tokenizer.json").read_bytes()
        assert ckpt("diff", step, tmp_path / dtype)[:2] == (0, "no difference\n")
    code, out, _ = ckpt("diff", run_copy / "checkpoint/step-4", tmp_path / "float32", "--json")
    assert code == 1
    found = json.loads(out)
    assert len(found["changes"]) == found["compared"] == len(stored_weights(step))
    assert not found["only_left"]
    # And with one value changed, that tensor alone.
    shutil.copytree(tmp_path / "float32", tmp_path / "changed")
    with open_source(tmp_path / "changed") as source:
        position = source._places["model.norm.weight"].start  # type: ignore[attr-defined]
    with next((tmp_path / "changed").glob("*.safetensors")).open("r+b") as file:
        file.seek(position)
        file.write(b"\0\0\0\0")
    code, out, _ = ckpt("diff", step, tmp_path / "changed")
    assert code == 1
    assert out.startswith("norm.weight: 1 of 32 elements differ, by at most")
    assert len(out.splitlines()) == 1


def stored_weights(step: Path) -> dict[str, torch.Tensor]:
    """Without optimizer and counters."""
    return {n: t for n, t in stored_tensors(step).items() if not n.startswith(("optimizer.", "train_state."))}


def test_ls_tells_complete_partial_damaged_and_pinned(run_copy: Path, ckpt: Command) -> None:
    folder = run_copy / "checkpoint"
    assert ckpt("pin", folder / "step-2")[0] == 0
    (folder / "step-8.partial-abcd").mkdir()
    (folder / "step-8.partial-abcd/__0_0.distcp").write_bytes(b"x" * 5000)
    os.truncate(folder / "step-4/__0_0.distcp", 100)
    code, out, _ = ckpt("ls", run_copy, "--json")
    rows = {r["name"]: r for r in json.loads(out)}
    assert code == 0
    assert {n: r["state"] for n, r in rows.items()} == {
        "step-2": "complete",
        "step-4": "damaged",
        "step-6": "complete",
        "step-8.partial-abcd": "partial",
    }
    assert [n for n, r in rows.items() if r["pinned"]] == ["step-2"]
    assert rows["step-8.partial-abcd"]["nbytes"] == 5000
    assert rows["step-6"]["layout"]
    assert 0 <= rows["step-6"]["age_s"] < 600
    text = ckpt("ls", run_copy)[1]
    assert "must have" in text
    assert "pinned" in text
    # Repaired: what is incomplete is gone, what is damaged set aside, and training goes on from the newest.
    code, out, _ = ckpt("repair", run_copy)
    assert code == 0
    assert "removed the incomplete step-8.partial-abcd" in out
    assert "set step 4 aside" in out
    assert "the newest step to continue from is 6" in out
    states = {r["name"]: r["state"] for r in json.loads(ckpt("ls", run_copy, "--json")[1])}
    assert states == {"step-2": "complete", "step-6": "complete", "set-aside/damaged/step-4": "set aside"}
    assert ckpt("repair", run_copy)[1] == "nothing to repair\n"
    assert ckpt("unpin", folder / "step-2")[0] == 0
    assert not (folder / "step-2/pinned").exists()


def test_a_folder_of_another_name_is_found(run_copy: Path, ckpt: Command) -> None:
    (run_copy / "checkpoint").rename(run_copy / "steps")
    config = (run_copy / "config.yaml").read_text()
    (run_copy / "config.yaml").write_text(config.replace("folder: checkpoint", "folder: steps"))
    rows = json.loads(ckpt("ls", run_copy, "--json")[1])
    assert [r["step"] for r in rows] == [2, 4, 6]
    assert ckpt("verify", run_copy)[0] == 0


def test_best_is_marked(run_copy: Path, ckpt: Command) -> None:
    import dataclasses

    from regrow.checkpoint.format.manifest import write_manifest

    for step, loss in ((2, 3.0), (4, 1.0), (6, 2.0)):
        place = run_copy / f"checkpoint/step-{step}"
        write_manifest(place, dataclasses.replace(read_manifest(place), metrics={"val_loss": loss}))
    rows = json.loads(ckpt("ls", run_copy, "--json")[1])
    assert [r["step"] for r in rows if r["best"]] == [4]


def test_prune_keeps_the_pinned_and_the_newest(run_copy: Path, ckpt: Command) -> None:
    ckpt("pin", run_copy / "checkpoint/step-2")
    arguments = ["prune", run_copy, "--keep-latest", 1]
    assert json.loads(ckpt(*arguments, "--dry-run", "--json")[1]) == {"removed": [4]}
    assert (run_copy / "checkpoint/step-4").exists()
    assert ckpt(*arguments)[:2] == (0, "removed step 4\n")
    assert sorted(p.name for p in (run_copy / "checkpoint").glob("step-*")) == ["step-2", "step-6"]
    assert "must be at least 1" in one_sentence(ckpt("prune", run_copy, "--keep-latest", 0)[2])


def test_show_lists_tensors_and_sums(run_copy: Path, ckpt: Command) -> None:
    code, out, _ = ckpt("show", run_copy, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["about"]["step"] == 6
    by_name = {t["name"]: t for t in found["tensors"]}
    assert by_name["output.weight"]["shape"] == [320, 32]
    assert by_name["output.weight"]["shards"] == 1
    tree = ckpt("show", run_copy, "--tree")[1]
    assert "\nlayers  " in tree
    assert "\n  1  " in tree


def test_a_url_works_as_a_path_does(run_copy: Path, ckpt: Command, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(run_copy / "checkpoint"), "/care/checkpoint", recursive=True)
    url = "memory://care"
    rows: list[dict[str, Any]] = json.loads(ckpt("ls", url, "--json")[1])
    assert [(r["name"], r["state"]) for r in rows] == [(f"step-{n}", "complete") for n in (2, 4, 6)]
    assert ckpt("verify", url)[0] == 0
    assert ckpt("pin", f"{url}/checkpoint/step-2")[0] == 0
    assert ckpt("show", f"{url}/checkpoint/step-4", "--json")[0] == 0
    assert ckpt("diff", f"{url}/checkpoint/step-6", run_copy / "checkpoint/step-6")[:2] == (0, "no difference\n")
    assert ckpt("export", f"{url}/checkpoint/step-6", tmp_path / "out")[0] == 0
    assert ckpt("prune", url, "--keep-latest", 1)[:2] == (0, "removed step 4\n")
    assert ckpt("repair", url)[:2] == (0, "nothing to repair\n")
    memory.rm("/care", recursive=True)


def test_an_index_may_be_old(tmp_path: Path) -> None:
    """transformers leaves an index behind when it saves in one file."""
    theirs = make("llama3_tied", tmp_path / "hf")
    theirs.model.save_pretrained(tmp_path / "hf")
    assert (tmp_path / "hf" / INDEX).exists()
    with open_source(tmp_path / "hf") as source:
        assert len(source.infos) == 29
