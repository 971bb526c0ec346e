"""Starts that are refused leave the run as it was; a lost record is made anew; a lost result is a failure."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from regrow.checkpoint.policy.lineage import StartKind
from regrow.checkpoint.run.lease import LeaseLostError
from regrow.errors import ConfigError
from regrow.launch.config.errors import UserError
from regrow.launch.run.failures import first_failure, note_failure
from regrow.launch.run.run_documents import begin_run
from regrow.launch.run.start import open_spec
from regrow.trainer.data.corpus import Corpus
from regrow.trainer.run_record import RunRecord, RunRecordError
from tests.compatibility.test_run_5d27da2 import KEPT, RECORDED, command
from tests.forging import forge
from tests.runs import Result, spec_of, train
from tests.support import curve, metrics, record, samples, tiny
from tests.warm import regrow

pytestmark = pytest.mark.slow


def overrides(corpus: Path, *more: str) -> list[str]:
    return tiny(
        corpus, "data.global_batch_size=8", "checkpoint.interval=3", "checkpoint.keep_latest_k=0", "hooks=none",
        "scheduler.total_steps=60", "data.log_samples=true", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the steps 3, 6, 9 and 12."""
    folder = tmp_path_factory.mktemp("starts") / "run"
    train(overrides(corpus, "train.steps=12"), folder)
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def flip(file: Path) -> None:
    """One bit in the middle of the largest tensor of a file of tensors."""
    items = json.loads(file.with_name("rank-0.json").read_text())["items"]
    item = max((i for i in items if i["file"] == file.name), key=lambda i: i["data_bytes"])
    data = bytearray(file.read_bytes())
    data[item["data"] + item["data_bytes"] // 2] ^= 1
    file.write_bytes(data)


def contents(run: Path) -> dict[str, bytes]:
    """What a refused start must not change."""
    names = ["run.json", "metrics.jsonl", "samples.jsonl", "config.yaml"]
    steps = sorted(p for p in (run / "checkpoint").rglob("*") if p.is_file() and "lease" not in p.name)
    return {str(p.relative_to(run)): p.read_bytes() for p in [*(run / n for n in names), *steps]}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_refused_load_step_changes_nothing(run: Path, made: Path, corpus: Path, ranks: int) -> None:
    flip(run / "checkpoint/step-6/__0_0.distcp")
    before = contents(run)
    more = [f"parallel.dp_shard={ranks}", "train.steps=15"]
    refused = train(overrides(corpus, *more, "checkpoint.load_step=6"), run, ranks)
    assert (refused.kind, refused.step) == ("refused", 0)
    assert "step-6/__0_0.distcp does not match its hash" in refused.message
    assert contents(run) == before
    assert train(overrides(corpus, *more), run, ranks) == Result("finished", 15, "")
    assert record(run)["attempts"][-1]["from_step"] == 12
    assert curve(run)[:12] == curve(made)


def test_the_real_command_ends_with_the_sentence(run: Path, corpus: Path) -> None:
    """On two ranks, which both fail to load."""
    flip(run / "checkpoint/step-6/__0_0.distcp")
    arguments = overrides(
        corpus, "train.steps=15", "checkpoint.load_step=6", "parallel.dp_shard=2", f"run.root={run.parent}",
        f"run.name={run.name}",
    )  # fmt: skip
    code, out = regrow(arguments, run.parent)
    assert code == 2
    assert out.strip().splitlines()[-1].startswith("error: ")
    assert "step-6/__0_0.distcp does not match its hash" in out.strip().splitlines()[-1]
    assert "Traceback" not in out


def test_going_back_keeps_what_was_trained_and_says_so_first(run: Path, corpus: Path) -> None:
    assert train(overrides(corpus, "train.steps=15", "checkpoint.load_step=6"), run).kind == "finished"
    lineages = record(run)["lineages"]
    assert [x["origin_step"] for x in lineages] == [0, 6]
    aside = run / "checkpoint/set-aside" / lineages[0]["id"]
    assert sorted(p.name for p in aside.iterdir()) == ["step-12", "step-9"]
    assert [r["step"] for r in metrics(run / "lineages" / lineages[0]["id"])] == list(range(1, 13))
    # A requeue continues that line.
    assert train(overrides(corpus, "train.steps=18", "checkpoint.load_step=6"), run).kind == "finished"
    assert len(record(run)["lineages"]) == 2


def rest_of(run: Path, whole: Path) -> None:
    """What continued is what would have been trained without the loss."""
    assert curve(run) == curve(whole)[12:]
    assert samples(run) == samples(whole)[12:]


def test_a_lost_directory_is_continued_from_its_newest_step(run: Path, corpus: Path, tmp_path: Path) -> None:
    """The checkpoints lay elsewhere; the machine is new. The run keeps its id and its lineages."""
    whole = tmp_path / "whole"
    shutil.copytree(run, whole)
    train(overrides(corpus, "train.steps=15"), whole)
    identity = record(run)["run_id"]
    for path in run.iterdir():
        if path.name != "checkpoint":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert train(overrides(corpus, "train.steps=15"), run).kind == "finished"
    assert record(run)["run_id"] == identity
    assert record(run)["attempts"][0]["from_step"] == 12
    assert not (run / "checkpoint/set-aside").exists()
    rest_of(run, whole)


def test_a_lost_record_after_going_back_keeps_the_line(run: Path, corpus: Path) -> None:
    train(overrides(corpus, "train.steps=9", "checkpoint.load_step=6"), run)
    lineages = record(run)["lineages"]
    (run / "run.json").unlink()
    assert train(overrides(corpus, "train.steps=12", "checkpoint.load_step=6"), run).kind == "finished"
    assert record(run)["lineages"] == lineages
    assert record(run)["attempts"][0]["from_step"] == 9


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["seed=3"], "must keep its model, data and seed, but seed is 3"),
        (["optimizer.lr=0.1"], "run.allow_change=\\[optimizer.lr\\]"),
        (["data.seq_len=16"], "must keep its model, data and seed, but data.seq_len is 16"),
    ],
)
def test_a_lost_record_does_not_let_another_run_in(run: Path, corpus: Path, more: Sequence[str], words: str) -> None:
    (run / "run.json").unlink()
    (run / "config.yaml").unlink()
    with pytest.raises(UserError, match=words):
        train(overrides(corpus, "train.steps=15", *more), run)
    assert sorted(p.name for p in (run / "checkpoint").glob("step-*")) == ["step-12", "step-3", "step-6", "step-9"]


def test_a_lost_record_of_format_3_is_continued_where_hash_and_data_agree(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(KEPT / "run", run)
    (run / "run.json").unlink()
    (run / "config.yaml").unlink()
    with pytest.raises(UserError, match="restore it, or choose another run.name"):
        train(command(run, "train.steps=11", "seed=4"), run)
    # The hash covers where data lies, as it did then.
    recorded = ["data.files=[text.jsonl]", "data.tokenizer=tokenizer.json"]
    arguments = [o for o in command(run) if not o.startswith(("data.files", "data.tokenizer"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(KEPT)
        assert train([*arguments, *recorded, "train.steps=11"], run).kind == "finished"
    assert [r["loss"] for r in metrics(run)[-3:]] == pytest.approx([r["loss"] for r in RECORDED["next"]], abs=1e-5)
    assert record(run)["run_id"] != json.loads((KEPT / "run/run.json").read_text())["run_id"]
    assert record(run)["lineages"][0]["id"] == "0-8yhu"


def test_a_step_that_is_fallen_back_from_leaves_nothing(corpus: Path, tmp_path: Path) -> None:
    """Its last moment is damaged; what is fallen back to is a seed checkpoint, which holds weights alone."""
    arguments = overrides(corpus, "checkpoint.interval=5", f"run.root={tmp_path}")
    for name in ("whole", "run"):
        seed = [*arguments, f"run.name={name}", "train.steps=5", "checkpoint.create_seed_checkpoint=true"]
        assert regrow(seed, tmp_path)[0] == 0
    train([*arguments, "train.steps=8"], tmp_path / "whole")
    train([*arguments, "train.steps=5"], tmp_path / "run")
    file = tmp_path / "run/checkpoint/step-5/__0_0.distcp"
    items = json.loads(file.with_name("rank-0.json").read_text())["items"]
    last = next(i for i in items if i["name"] == "optimizer.state.output.weight.exp_avg_sq")
    data = bytearray(file.read_bytes())
    data[last["data"] + last["data_bytes"] - 1] ^= 1
    file.write_bytes(data)
    assert train([*arguments, "train.steps=8"], tmp_path / "run").kind == "finished"
    assert record(tmp_path / "run")["attempts"][-1]["from_step"] == 0
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_a_line_whose_origin_is_damaged_is_refused(run: Path, corpus: Path) -> None:
    """It has no older step of its own, and trying the same one again would never end."""
    flip(run / "checkpoint/step-12/__0_0.distcp")
    more = ["train.steps=15", "checkpoint.exclude_from_loading=[optimizer]"]
    refused = train(overrides(corpus, *more), run)
    assert refused.kind == "refused"
    assert "step 12, from which this line of steps goes on" in refused.message
    assert train(overrides(corpus, *more, "checkpoint.load_step=9"), run).kind == "finished"


def test_a_restart_before_the_record_is_written_chooses_the_same_again(
    run: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(overrides(corpus, "train.steps=15", "run.resume=never"), run, 1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch-1")
    records = []
    for restart in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart)
        records.append(open_spec(spec).record)
        assert [x.origin for x in records[-1].lineages] == [StartKind.fresh, StartKind.fresh]
    begin_run(spec.config_dict, run, Corpus(spec.data_folders), spec.overrides, records[-1])
    # From now on a restart goes on with it.
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert [x.id for x in open_spec(spec).record.lineages] == [x.id for x in records[-1].lineages]
    # Another launch does what it is told.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch-2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert len(open_spec(spec).record.lineages) == 3


def test_a_paused_start_does_not_write_over_the_record_of_a_later_one(run: Path, corpus: Path) -> None:
    spec = spec_of(overrides(corpus, "train.steps=15"), run, 1)
    paused = open_spec(spec).record
    train(overrides(corpus, "train.steps=15", "checkpoint.load_step=6"), run)
    before = contents(run)
    with pytest.raises(LeaseLostError, match="another start has begun"):
        begin_run(spec.config_dict, run, Corpus(spec.data_folders), spec.overrides, paused)
    assert contents(run) == before


def test_a_lost_record_that_no_step_tells_of_is_refused(run: Path, corpus: Path) -> None:
    """A copy without dot files: every step is damaged, and beginning afresh would set all of them aside."""
    (run / "run.json").unlink()
    for path in (run / "checkpoint").glob("step-*/.metadata"):
        path.unlink()
    rows = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="run.json is gone and that no step tells of"):
        train(overrides(corpus, "train.steps=15"), run)
    with pytest.raises(UserError, match="no step tells of"):
        train(overrides(corpus, "train.steps=15", "checkpoint=disabled"), run)
    assert len(list((run / "checkpoint").glob("step-*"))) == 4
    assert (run / "metrics.jsonl").read_bytes() == rows
    assert train(overrides(corpus, "train.steps=3", "run.resume=never"), run).kind == "finished"


def test_two_runs_that_share_a_folder_of_steps_refuse_each_other(run: Path, corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    train(overrides(corpus, "train.steps=3"), other)
    shutil.rmtree(other / "checkpoint")
    shutil.copytree(run / "checkpoint", other / "checkpoint")
    for resume in ("auto", "never"):
        with pytest.raises(UserError, match=f"step 3 of the run {record(run)['run_id']}"):
            train(overrides(corpus, "train.steps=15", f"run.resume={resume}"), other)
    assert len(list((other / "checkpoint").glob("step-*"))) == 4


def test_a_forged_train_state_is_damage(run: Path, corpus: Path) -> None:
    """The counters stand among the tensors too."""
    forge(run / "checkpoint/step-12", root=lambda d: d["train_state"].update(samples_consumed=8))
    assert train(overrides(corpus, "train.steps=15"), run).kind == "finished"
    assert record(run)["attempts"][-1]["from_step"] == 9
    assert (run / "checkpoint/set-aside/damaged/step-12").is_dir()


@pytest.mark.parametrize("body", ["", "{", "[]", '{"format": 1}', "\x00", '{"format": 1, "run_id": 3}'])
def test_a_damaged_record_is_refused_with_a_remedy_that_works(run: Path, corpus: Path, body: str) -> None:
    (run / "run.json").write_text(body)
    with pytest.raises(RunRecordError, match="move it away") as caught:
        train(overrides(corpus, "train.steps=12"), run)
    assert "\n" not in str(caught.value)
    (run / "run.json").unlink()
    assert train(overrides(corpus, "train.steps=12"), run).kind == "finished"


def test_records_that_point_outside_are_refused(tmp_path: Path) -> None:
    body = RunRecord(data_fingerprint="f").as_json()
    for lineage in ({"id": "../x"}, {"id": "b", "origin": "step", "parent": "b"}, {"id": ""}, {"id": 3}):
        (tmp_path / "run.json").write_text(json.dumps({**body, "lineages": [lineage]}))
        with pytest.raises(RunRecordError):
            RunRecord.load(tmp_path)


def test_a_last_save_that_fails_is_a_failed_run(corpus: Path, tmp_path: Path) -> None:
    """The disk is full at the end: exit code 1, the newest step is named, and the same command trains the rest."""
    run = [
        sys.executable, "-P", "-m", "regrow.launch.train", *overrides(corpus, "run.name=r"),
        f"run.root={tmp_path}/disk", "train.steps=12",
    ]  # fmt: skip
    quoted = " ".join(f"'{a}'" for a in run)
    script = f"""
    mkdir {tmp_path}/disk && mount -t tmpfs -o size=2m none {tmp_path}/disk || exit 90
    {quoted} > {tmp_path}/first 2>&1; first=$?
    cp {tmp_path}/disk/r/run.json {tmp_path}/run.json
    mount -o remount,size=40m {tmp_path}/disk
    {quoted} > {tmp_path}/second 2>&1; second=$?
    ls {tmp_path}/disk/r/checkpoint > {tmp_path}/steps
    echo $first $second
    """
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    first, second = (tmp_path / "first").read_text(), (tmp_path / "second").read_text()
    assert done.stdout.split() == ["1", "0"], first + second
    last = first.strip().splitlines()[-1]
    assert last.startswith("error: step 12 must be saved at the end, but was not")
    assert "the newest step is 9" in last
    assert "Traceback" not in first
    ended = json.loads((tmp_path / "run.json").read_text())["attempts"][-1]
    assert (ended["end"], ended["saved_step"]) == ("failed", 9)
    assert "step-12" in (tmp_path / "steps").read_text().split()


def test_of_several_ranks_the_first_to_fail_is_told(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    note_failure(tmp_path, 1, ConfigError("step 6 is damaged"))
    note_failure(tmp_path, 0, RuntimeError("connection closed by peer"))
    (tmp_path / "logs/failed-rank-7.json").write_text("{")
    assert first_failure(tmp_path) == "rank 1: step 6 is damaged"
