"""`regrow-data` as it is called."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from regrow.launch.commands import data
from regrow.launch.commands.data_mix import mix_of
from regrow.launch.commands.data_run import composed
from tests.support import TINY_MODEL
from tests.unit.launch.commands.data_stores import tokenizer_of, write_store
from tests.unit.trainer.data.chat.families import FAMILIES, save_family

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Calls it in this process; gives exit code, output and what was said."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["regrow-data", *arguments])
        with pytest.raises(SystemExit) as ended:
            data.main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("called")
    texts = ["tea for two and two for tea"] * 50
    tokenizer_of(texts, folder / "tokenizer.json")
    return write_store(folder / "store", [texts], folder / "tokenizer.json")


@pytest.fixture(scope="module")
def run(store: Path) -> list[str]:
    """Overrides."""
    shape = [
        "data.global_batch_size=16",
        "data.seq_len=16",
        "data.micro_batch_size=2",
        "data.validation_fraction=0.0",
    ]
    return [*TINY_MODEL, "data=tokens", f"data.path={store}", *shape, "train.steps=4"]


def test_show(command: Command, store: Path, tmp_path: Path) -> None:
    code, out, _ = command("show", str(store), "--plot", str(tmp_path / "a.png"))
    assert (code, out.splitlines()[0].split(",")[0]) == (0, "50 documents")
    assert (tmp_path / "a.png").is_file()
    code, out, _ = command("show", "--json", str(store))
    assert (code, json.loads(out)["text_bytes"]) == (0, 50 * 27)


def test_flags_may_stand_between_overrides(command: Command, run: list[str]) -> None:
    code, out, _ = command("preview", *run[:3], "--count", "2", *run[3:], "--first=1")
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith("===")] == [
        "=== sample 1",
        "=== sample 2",
    ]


def test_mix(command: Command, run: list[str]) -> None:
    code, out, _ = command("mix", run[0], "--json", *run[1:])
    found = json.loads(out)
    assert (code, found["samples"]) == (0, 4 * 16)
    assert found == mix_of(composed(run)).as_json()


def test_mix_is_a_table_otherwise(command: Command, run: list[str]) -> None:
    code, out, _ = command("mix", *run)
    assert (code, out.splitlines()[0]) == (0, "4 steps of 16 samples of 16 tokens: 1,024 tokens")


def test_configs_may_lie_in_a_folder_of_ones_own(command: Command, run: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "it's mine"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "short.yaml").write_text("# @package _global_\ntrain:\n  steps: 3\n")
    code, out, _ = command("mix", *run[:-1], "experiment=short", "--config-dir", str(folder), "--json")
    assert (code, json.loads(out)["steps"]) == (0, 3)
    code, _, said = command("mix", "--config-dir=/nowhere")
    assert (code, said.splitlines()[-1]) == (
        2,
        "error: --config-dir must be a folder of configs, but /nowhere is none; check the path",
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["data=nothing"], "data must be one of "),
        (["train.step=3"], "train.step"),
        (["--train.steps=3"], "fields are set without dashes: write train.steps=3"),
        (["train.steps=0"], "train.steps must be at least 1, but is 0; use 100"),
        (["data=tokens", "data.path=/nowhere"], "data.path must be a folder made by `regrow-data tokenize`"),
        (["seed=1,2"], "seed"),
    ],
)
def test_bad_input_is_one_sentence(command: Command, arguments: list[str], sentence: str) -> None:
    code, out, said = command("mix", *arguments, "--json")
    assert code == 2
    assert json.loads(out)["error"] in said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {sentence}")


def test_a_folder_that_is_no_store_is_refused(command: Command, tmp_path: Path) -> None:
    code, _, said = command("show", str(tmp_path))
    assert (code, said.splitlines()[-1].startswith("error: data.path must be a folder made by")) == (2, True)


@pytest.mark.parametrize("arguments", [["show", ".", "data=text"], ["mix", "--jsn"], ["preview", "-x"]])
def test_what_no_command_takes_is_named(command: Command, arguments: list[str]) -> None:
    code, _, said = command(*arguments)
    assert (code, said.splitlines()[-1]) == (2, f"regrow-data: error: unrecognized arguments: {arguments[-1]}")


def test_tokenizing_and_showing_wait_for_nothing_heavy() -> None:
    program = "import sys, regrow.launch.commands.data; print({'torch', 'matplotlib', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.slow
def test_tokenize_takes_what_data_takes(command: Command, tmp_path: Path) -> None:
    """Overrides give the store that a run would make, labels included."""
    save_family(tmp_path / "tokenizer", FAMILIES["marks"])
    turns = [{"role": "user", "content": "tea?"}, {"role": "assistant", "content": "for two"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": turns, "n": n}) + "\n" for n in range(9)))
    chat = [
        "data=chat", f"data.files=[{tmp_path / 'a.jsonl'}]", f"data.tokenizer={tmp_path / 'tokenizer'}",
        "+data.where_min={n: 4}", "data.workers=1",
    ]  # fmt: skip
    code, out, err = command("tokenize", str(tmp_path / "out"), *chat)
    assert (code, out.splitlines()[0].split(",")[0]) == (0, "5 documents"), err
    code, out, _ = command("show", "--json", str(tmp_path / "out"))
    assert 0 < json.loads(out)["labels"] < json.loads(out)["tokens"]
    code, _, err = command("tokenize", str(tmp_path / "other"), *chat, "--workers", "2")
    assert code == 2
    assert "overrides must say everything about the data, but --workers stands beside data=chat" in err
    code, _, err = command("tokenize", str(tmp_path / "other"), "data=tokens", f"data.path={tmp_path / 'out'}")
    assert code == 2
    assert (
        "data must be a source of documents to tokenise, but is regrow.trainer.data.token_store.TokensSource" in err
    )
    assert not (tmp_path / "other").exists()
