"""The mean of checkpoints is that of their tensors, rounded once, and takes the place of a checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import regrow
from regrow.checkpoint.convert.average import shares_of
from regrow.checkpoint.errors import CheckpointError
from regrow.launch.commands import checkpoint
from tests.runs import train
from tests.support import stored_tensors, tiny

pytestmark = pytest.mark.slow

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`regrow-ckpt` in this process; gives exit code, output and what was said."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["regrow-ckpt", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            checkpoint.main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("average")
    keep = ["train.steps=6", "checkpoint.interval=2", "checkpoint.keep_latest_k=0", "hooks=none", "optimizer.lr=1e-2"]
    train(tiny(corpus, *keep), folder / "run")
    train(tiny(corpus, *keep, "model.dim=64", "train.steps=2"), folder / "other")
    return folder / "run"


def test_the_mean_is_a_checkpoint(command: Command, run: Path, tmp_path: Path) -> None:
    steps = [run / f"checkpoint/step-{n}" for n in (2, 4, 6)]
    code, out, err = command("average", *steps, "-o", tmp_path / "mean", "--json")
    assert code == 0, err
    assert json.loads(out)["tensors"] == len(stored_tensors(tmp_path / "mean"))
    assert command("average", *steps, "-o", tmp_path / "weighted", "--weights", 1, 0, 3)[0] == 0
    assert command("average", *steps, "-o", tmp_path / "decayed", "--decay", 0.5, "--dtype", "bfloat16")[0] == 0
    stored = [stored_tensors(step) for step in steps]
    parts = {"mean": (1 / 3,) * 3, "weighted": (0.25, 0.0, 0.75), "decayed": (1 / 7, 2 / 7, 4 / 7)}
    for name, shares in parts.items():
        found = stored_tensors(tmp_path / name)
        assert "tok_embeddings.weight" in found
        for key, tensor in found.items():
            expected = sum(s[key].double() * share for s, share in zip(stored, shares, strict=True))
            limit = 4e-3 if tensor.dtype is torch.bfloat16 else 1e-6
            torch.testing.assert_close(tensor.double(), expected, rtol=limit, atol=limit * 1e-1)
    assert command("verify", tmp_path / "mean")[0] == 0
    model, _ = regrow.load_model(tmp_path / "mean", tokenizer=run)
    assert torch.equal(model.get_parameter("norm.weight"), stored_tensors(tmp_path / "mean")["norm.weight"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "--weights", "1", "2"], "--weights must be as many as checkpoints (1), but are 2"),
        (["run", "--decay", "2"], "--decay must be above 0 and at most 1, but is 2; use 0.9"),
        (["run", "--decay", "0.5", "--weights", "1"], "--weights must be given without --decay"),
        (["run", "run", "--weights", "1", "-1"], "--weights must have a sum above 0, but have 0"),
        (["run", "other"], "shape"),
        (["run", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_sentence(
    command: Command, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    monkeypatch.chdir(run.parent)
    code, _, err = command("average", "-o", tmp_path / "out", *arguments)
    assert code == 2
    (line,) = [x for x in err.splitlines() if x.startswith("error: ")]
    assert sentence in line, line
    assert not (tmp_path / "out").exists()


def test_shares() -> None:
    assert shares_of(4, None, None) == [0.25] * 4
    assert shares_of(2, [3.0, 1.0], None) == [0.75, 0.25]
    assert shares_of(3, None, 0.5) == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    with pytest.raises(CheckpointError, match="must have a sum above 0"):
        shares_of(2, [float("nan"), 1.0], None)
