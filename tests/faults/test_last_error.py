"""Several ranks, one of which fails: its error is the last thing that the command says."""

import signal
from pathlib import Path

import pytest

from tests.faults.hook_package import write_hook
from tests.faults.test_kills import command
from tests.warm import regrow

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

RANKS = ["parallel.dp_shard=2", "hooks=none", "+hook@hooks.bad=bad", "run.name=a", "train.steps=400"]


def test_of_a_rank_that_raises(corpus: Path, tmp_path: Path) -> None:
    """The other one is in a collective, and sees it go."""
    write_hook(tmp_path, "raising", step=3, rank=1, act='raise RuntimeError("the first word")')
    code, out = regrow(command(corpus, *RANKS), tmp_path)
    assert code == 1, out
    last = out.strip().splitlines()[-1]
    assert last.startswith("error: rank 1: RuntimeError: the first word; its log is ")
    assert last.endswith("logs/rank-1.log")
    assert "the first word" in (tmp_path / "outputs/a/logs/rank-1.log").read_text()


def test_of_a_rank_that_is_killed(corpus: Path, tmp_path: Path) -> None:
    act = f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"
    write_hook(tmp_path, "dying", step=3, rank=1, act=act)
    code, out = regrow(command(corpus, *RANKS), tmp_path)
    assert code == 1, out
    assert out.strip().splitlines()[-1].startswith("error: rank 1 died (signal SIGKILL); its log is ")
