"""What a user can get wrong: one sentence, exit code 2, nothing lost."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from regrow.launch.run.signals import StopFlag
from regrow.launch.train import _run
from tests.runs import train
from tests.support import REPO, metrics, tiny

pytestmark = pytest.mark.slow

HF_FOLDER = REPO / "tests/interop/qwen3_folder"
FIELD, RULE, VALUE = "names the field", "the rule", "the value"


def run_here(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """The command in this process: exit code and standard error."""
    monkeypatch.setattr(sys, "argv", ["regrow"])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    code = _run(arguments, StopFlag())
    return code, capsys.readouterr().err


def one_sentence(text: str) -> str:
    """The one line that begins with `error: `; nothing of a traceback."""
    assert "Traceback" not in text
    (line,) = [x for x in text.splitlines() if x.startswith("error: ")]
    return line


# Arguments, and what the sentence must say: field, value, remedy.
WRONG: dict[str, tuple[list[str], str]] = {
    "unknown group": (["model=llama3_9b"], r"model must be one of .*llama3_8b.*, but is 'llama3_9b'; did you mean"),
    "misspelt key": (["checkpoint.load_stp=5"], r"load_stp is not a field; did you mean checkpoint.load_step\?"),
    "misspelt section": (["trian.steps=5"], r"trian is not a field; did you mean train\?"),
    "added key": (["+parallel.tpp=2"], r"parallel.tpp is not a field; did you mean parallel.tp\?"),
    "wrong type": (["train.steps=many"], r"train.steps must be a whole number, but is 'many'"),
    "null": (["train.steps=null"], r"train.steps must not be null"),
    "wrong choice": (["launch.device=tpu"], r"launch.device must be one of .*cpu.*, but is 'tpu'"),
    "missing value": (["data=tokens"], r"data.path must be set, but is missing; add data.path=VALUE"),
    "below the range": (["train.steps=0"], r"train.steps must be at least 1, but is 0; use"),
    "heads": (["model.n_kv_heads=3"], r"model.n_kv_heads must divide model.n_heads \(4\), but is 3; use 1 or 2 or 4"),
    "degrees": (["parallel.dp_shard=0"], r"parallel.dp_shard must be at least 1 or -1, but is 0; use"),
    "missing file": (["data.files=[nothing.txt]"], r"data.files must name files that exist, but nothing.txt matches none"),
    "empty corpus": (["data.files=[empty.txt]"], r"the corpus .* must not be empty, but has no text"),
    "short corpus": (["data.files=[short.txt]"], r"at least one sequence of data.seq_len \+ 1 tokens .* data.seq_len is 32"),
    "tokenizer": (["data.tokenizer=nowhere"], r"data.tokenizer must be a tokenizer.json .*, but nowhere is not"),
    "vocabulary": (["model.vocab_size=290"], r"model.vocab_size must be at least the tokenizer's \(300\), but is 290"),
    "long sequence": (["data.seq_len=4096"], r"data.seq_len must be at most model.max_seq_len \(2048\).* but is 4096; use"),
    "load_step": (["checkpoint.load_step=7"], r"checkpoint.load_step must be one of .*\(2, 4\), but is 7; choose"),
    "must": (["run.resume=must", "run.name=new"], r"run.resume must not be 'must' where there is nothing to resume"),
    "no folder": (["model=from_hf"], r"model.path must be set, but is missing; add model.path=VALUE"),
    "not a folder of theirs": (["model=from_hf", "model.path=outputs"], r"outputs must be a Hugging Face folder, but has no config.json; give"),
    "seed without checkpoints": (["checkpoint=seed", "checkpoint.enable=false", "run.name=b"],
                                 r"checkpoint.enable must be true with checkpoint.create_seed_checkpoint, but is false; use"),
    "weights without checkpoints": (["model=from_hf", f"model.path={HF_FOLDER}", "checkpoint=disabled"],
                                    r"checkpoint.enable must be true to start from the weights of model.path, but is false; use"),
    "start without checkpoints": (["checkpoint=disabled", "checkpoint.initial_load_path=x", "run.name=b"],
                                  r"checkpoint.enable must be true to start from checkpoint.initial_load_path \(x\), but is false; use"),
    "shard size": (["checkpoint.export.max_shard_size=big"], r"checkpoint.export.max_shard_size must be a size like 5GB .*, but is 'big'; use"),
    "rename rule": (["checkpoint.load_rename=['a']"], r"checkpoint.load_rename must hold rules PATTERN=>REPLACEMENT, but holds 'a'; write"),
    "no assets": (["checkpoint.initial_load_in_hf=true"], r"checkpoint.initial_load_path must be set with checkpoint.initial_load_in_hf=true, .* add"),
    "excluded name": (["checkpoint.exclude_from_loading=[model]"], r"exclude_from_loading must hold .*'model'; remove it"),
    "reference's form": (["--checkpoint.load_step", "500"], r"write checkpoint.load_step=500"),
    "target": (["optimizer._target_=os.system"], r"optimizer._target_ must begin with"),
    "optimizer": (["optimizer.beta1=1.5"], r"optimizer.beta1 must be within 0 and 1 .*, but is 1.5; use 0.9"),
    "unreadable": (["train.steps=["], r"the override 'train.steps=\[' cannot be read"),
    "initial load": (["checkpoint=finetune"], r"checkpoint.initial_load_path must be set .*; add checkpoint.initial_load_path=PATH"),
    "seed": (["seed=-1"], r"seed must be at least 0, but is -1; use 0"),
    "workers": (["data.workers=-1"], r"data.workers must be at least 0, but is -1; use 0"),
    "prompt": (["hooks=default", "hooks.sample.prompts=['']"], r"hooks.sample.prompts must hold texts, but one is empty"),
    "other shape": (["checkpoint.initial_load_path=outputs/a", "run.name=b", "model.dim=64"],
                    r"tok_embeddings.weight in outputs/a/checkpoint/step-4 has shape \(320, 32\), but the model's has \(320, 64\)"),
    "another precision": (["precision=fp16"], r"precision must be one of bf16, bf16_params, fp32, fp64, fp8, but is 'fp16'; choose one of them$"),
    "misspelt group": (["modle=llama3_1b"], r"modle is not a field; did you mean model\?"),
    "field without its section": (["prompts=hello"], r"prompts is not a field; did you mean hooks.sample.prompts\?"),
    "field of another choice": (["model.path=x"], r"model.path is a field of model=from_hf alone; add model=from_hf"),
    "experiment": (["+experiment=x"], r"experiment must be one of demo, but is 'x'; .*--config-dir=DIR with DIR/experiment/x.yaml"),
    "section": (["train=x"], r"train is a section and has no value of its own; set its fields, as in train.steps=VALUE"),
    "number for a group": (["precision=16"], r"precision must be the name of a choice, .* but is 16; write for instance precision.name=VALUE"),
    "no list": (["run.allow_change=optimizer.lr"], r"run.allow_change must be a list, .* write run.allow_change=\[optimizer.lr\]"),
    "open list": (["data.files=[a.txt"], r"cannot be read \(its \[ is not closed\); write 'data.files=\[a.txt\]'"),
    "brackets": (["data.files=[a[1].txt]"], r"""cannot be read .* write 'data.files=\["a\[1\].txt"\]'"""),
    "signs": (["run.name=größe"], r"""must stand in quotes\); write 'run.name="größe"'"""),
    "interpolation": (["run.name=${foo}"], r"\$\{foo\} must name a field of the config, but foo is none; name another"),
    "environment": (["run.root=${oc.env:NOPE}"], r"but NOPE is not set; set it, or write \$\{oc.env:NOPE,DEFAULT\}"),
    "several values": (["seed=1,2"], r"seed must have one value, but seed=1,2 has several; write -m seed=1,2 to sweep over them, seed=\[1,2\]"),
    "no place for runs": (["run.root=/proc/x"], r"run.root must be a folder that can be written, but /proc/x cannot \(No such file"),
    "long name": ([f"run.name={'n' * 300}"], r"run.name must be at most 255 bytes long, but n+… has 300; choose a shorter one"),
    "no place for tokens": (["data.cache=/proc/x", "run.name=b"], r"data.cache must be a folder that can be written, but /proc/x cannot"),
    "another folder": (["hydra.job.chdir=true", "run.name=b"], r"hydra.job.chdir must be false, but is true: data.files, run.root .* leave it out"),
    "name on the Hub": (["model=from_hf", "model.path=meta-llama/Llama-3.2-1B"], r"model.path must be a folder .*\(hf download meta-llama/Llama-3.2-1B"),
    "beyond the schedule": (["train.steps=1000"], r"train.steps must be at most 4, .* but is 1000: 996 steps .* run.extend=stretch .* run.resume=never"),
    "disabled": (["checkpoint=disabled"], r"checkpoint.enable must not be false for a run that has checkpoints"),
}  # fmt: skip


# Variables that another launch left, and what the sentence must say.
LEFT: dict[str, tuple[dict[str, str], str]] = {
    "rank": ({"RANK": "2", "WORLD_SIZE": "2"}, r"RANK must be below WORLD_SIZE \(2\), but is 2; .* unset RANK"),
    "world": ({"RANK": "0", "WORLD_SIZE": "two"}, r"WORLD_SIZE must be a whole number of at least 1, but is 'two'; .* unset"),
    "local rank": ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "1"}, r"LOCAL_RANK must be below LOCAL_WORLD_SIZE \(1\), but is 1"),
    "port": ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "http"}, r"MASTER_PORT must be a whole number"),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run and some bad files."""
    folder = tmp_path_factory.mktemp("place")
    overrides = tiny(corpus, "run.name=a", "hooks=none", "train.steps=4", "checkpoint.interval=2")
    train(overrides, folder / "outputs" / "a")
    (folder / "empty.txt").touch()
    (folder / "short.txt").write_text("a few words")
    return folder


def contents(run_dir: Path) -> list[tuple[Path, int]]:
    """Every file with its time, but for the locks and leases by which a command looks whether it may go on."""
    files = (p for p in run_dir.rglob("*") if p.is_file() and ".lock" not in p.name and "lease-" not in p.name)
    return sorted((p, p.stat().st_mtime_ns) for p in files)


@pytest.mark.parametrize("case", WRONG)
def test_one_sentence_and_nothing_lost(
    case: str,
    place: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    wrong, pattern = WRONG[case]
    before = contents(place / "outputs/a")
    # The last override of a field wins in our favour: Hydra refuses two of one group.
    arguments = tiny(corpus, "run.name=a", "hooks=none", "train.steps=4", "checkpoint.interval=2")
    names = {w.split("=")[0] for w in wrong}
    if any(w.startswith(("data=", "model=")) for w in wrong):
        arguments = ["run.name=b"]
    arguments = [a for a in arguments if a.split("=")[0] not in names]
    if case == "short corpus":
        # A corpus of a few words has not enough text for 300 tokens.
        arguments = [a for a in arguments if "vocab" not in a]
    code, err = run_here([*arguments, *wrong], monkeypatch, capsys)
    assert code == 2, err
    assert re.search(pattern, one_sentence(err)), err
    assert contents(place / "outputs/a") == before
    assert not [p for p in (place / "outputs").iterdir() if p.name == "b"]


@pytest.mark.parametrize("case", LEFT)
def test_ranks_that_contradict_each_other_are_refused(
    case: str, place: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    variables, pattern = LEFT[case]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, err = run_here(tiny(corpus, "run.name=b"), monkeypatch, capsys)
    assert code == 2, err
    assert re.search(pattern, one_sentence(err)), err
    assert not (place / "outputs/b").exists()


def test_two_runs_of_a_sweep_never_share_a_folder(
    place: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    sweep = tiny(
        corpus, "run.name=a", "hooks=none", "train.steps=4", "-m", "optimizer.lr=0.001,1e-3", "run.name='a${mode}'"
    )
    sweep.remove("run.name=a")
    code, err = run_here([*sweep, "data.files=[nothing.txt]"], monkeypatch, capsys)
    assert code == 2
    assert "the runs of a sweep must have directories of their own, but two share" in err


def test_the_version_is_ours(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["regrow"])
    assert _run(["--version"], StopFlag()) == 0
    assert re.fullmatch(r"regrow \S+\n", capsys.readouterr().out)


def test_a_traceback_is_there_for_those_who_want_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["regrow"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert _run(["train.steps=many"], StopFlag()) == 2
    assert "Traceback" in capsys.readouterr().err


def mounted(options: str, corpus: Path, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The command with a file system of its own kind at `folder/m`, seen by nobody else."""
    (folder / "m").mkdir()
    run = " ".join(
        [sys.executable, "-P -m regrow.launch.train", *(f"'{a}'" for a in tiny(corpus, "hooks=none", *more))]
    )
    script = f"mount -t tmpfs -o {options} none {folder}/m && exec {run}"
    namespace = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    return subprocess.run([*namespace, "bash", "-c", script], cwd=folder, capture_output=True, text=True, check=False)


def test_a_read_only_folder_is_refused(corpus: Path, tmp_path: Path) -> None:
    done = mounted("ro", corpus, tmp_path, f"run.root={tmp_path}/m")
    assert done.returncode == 2, done.stderr
    assert "run.root must be a folder that can be written" in one_sentence(done.stderr)


def test_a_disk_too_small_for_one_checkpoint_is_refused(corpus: Path, tmp_path: Path) -> None:
    big = ["model.dim=256", "model.ffn_dim=1024"]
    done = mounted("size=4m", corpus, tmp_path, f"run.root={tmp_path}/m", *big)
    assert done.returncode == 2, done.stderr
    sentence = one_sentence(done.stderr)
    assert re.search(
        r"run.root must have room for one checkpoint \(\d+ MiB\), but .* has 4 MiB free; free some", sentence
    )


def test_the_rank_log_has_the_whole_error(corpus: Path, tmp_path: Path) -> None:
    """A failure that is nobody's input keeps its traceback, in the rank's log."""
    overrides = tiny(corpus, "hooks=none", "train.steps=4", "train.compile=true", "train.compile_backend=nothing")
    with pytest.raises(AssertionError, match="nothing"):
        train(overrides, tmp_path / "run")
    assert "Traceback" in (tmp_path / "run/logs/rank-0.log").read_text()
    assert metrics(tmp_path / "run") == []
