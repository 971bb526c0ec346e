"""Profiles: which ranks and steps, on request, what they say, and that nothing of theirs ends training."""

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from regrow.errors import ConfigError
from regrow.launch.run.compose import compose_trainer
from regrow.launch.run.rank_spec import RankSpec
from regrow.launch.run.signals import StopFlag
from regrow.trainer.hook import Hook
from regrow.trainer.hooks.profile import ProfileHook
from regrow.trainer.hooks.profile_config import ProfileConfig
from regrow.trainer.loop import Trainer
from regrow.trainer.parallel.context import close_parallel, open_parallel
from regrow.trainer.profiling import is_out_of_memory
from tests.pool import run_distributed
from tests.runs import spec_of
from tests.support import tiny

PROFILE = ["hooks=none", "checkpoint=disabled", "+hook@hooks.profile=profile", "data.global_batch_size=8"]


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Asks(Hook):
    """Puts the request there, as a user would."""

    def __init__(self, step: int) -> None:
        self._step = step

    def before_step(self, trainer: Trainer) -> None:
        if trainer.state.step == self._step and trainer.context.is_main:
            folder = trainer.resources.run_dir / "profile"
            folder.mkdir(exist_ok=True)
            (folder / "request").touch()


class Eats(Hook):
    """More memory than there is."""

    def before_optimizer_step(self, trainer: Trainer) -> None:
        torch.empty(1 << 50, dtype=torch.uint8)


def _run(spec: RankSpec, hooks: list[Hook]) -> tuple[list[str], str, int]:
    torch.set_num_threads(1)
    lines = Lines()
    logging.getLogger("regrow").addHandler(lines)
    logging.getLogger("regrow").setLevel(logging.INFO)
    context = open_parallel(spec.layout, "cpu", 30.0)
    trainer = compose_trainer(spec, context, StopFlag(), 1)
    trainer.hooks[:] = [*hooks, *(h for h in trainer.hooks if isinstance(h, ProfileHook))]
    raised = ""
    try:
        trainer.fit()
    except Exception as error:
        raised = repr(error)
    close_parallel()
    return lines.lines, raised, trainer.state.step


def run(corpus: Path, folder: Path, ranks: int, hooks: list[Hook], *more: str) -> list[tuple[list[str], str, int]]:
    folder.mkdir(exist_ok=True)
    overrides = tiny(corpus, *PROFILE, f"parallel.dp_shard={ranks}", *more)
    found: list[Any] = run_distributed(_run, spec_of(overrides, folder, ranks), hooks, world_size=ranks)
    return found


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "profile").iterdir())


@pytest.mark.slow
def test_given_steps_of_given_ranks_are_traced_and_told(corpus: Path, tmp_path: Path) -> None:
    chosen = [
        "hooks.profile.at=[2]",
        "hooks.profile.count=2",
        "hooks.profile.ranks=[1]",
        "hooks.profile.memory=true",
        "model.n_layers=1",
    ]
    quiet, told = run(corpus, tmp_path, 2, [], *chosen, "train.steps=5")
    assert names(tmp_path) == ["steps-2-3-rank-1.json.gz", "steps-2-3-rank-1.txt"]
    trace = json.loads(gzip.decompress((tmp_path / "profile/steps-2-3-rank-1.json.gz").read_bytes()))
    events = {e.get("name") for e in trace["traceEvents"]}
    assert {"aten::mm", "gloo:all_reduce"} <= events or any("gloo:" in str(e) for e in events)
    lines = told[0]
    assert (tmp_path / "profile/steps-2-3-rank-1.txt").read_text().splitlines() == lines[-5:]
    assert lines[-5].startswith("profile of steps 2 to 3, rank 1")
    assert "aten::" in lines[-4]
    assert "gloo:" in lines[-3] or "c10d::" in lines[-3]
    assert lines[-2].startswith("peak of memory ")
    assert "parameter " in lines[-2] or "activation " in lines[-2], lines[-2]
    assert not any("profile of" in line for line in quiet[0])
    assert (quiet[1], told[1], told[2]) == ("", "", 5)


@pytest.mark.slow
def test_a_request_begins_one_on_all_ranks(corpus: Path, tmp_path: Path) -> None:
    none = ["hooks.profile.at=[]", "hooks.profile.count=1", "hooks.profile.ranks=[]"]
    run(corpus, tmp_path, 2, [Asks(0)], *none, "train.steps=6")
    found = names(tmp_path)
    # All ranks hear of it at once, one step late.
    assert found == [f"steps-3-3-rank-{rank}.{kind}" for rank in (0, 1) for kind in ("json.gz", "txt")]


def test_what_fails_in_it_is_a_warning(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "profile").touch()
    ((lines, raised, step),) = run(corpus, tmp_path, 1, [], "hooks.profile.at=[1]", "train.steps=4")
    assert (raised, step) == ("", 4)
    assert any("training goes on without it" in line for line in lines)


def test_running_out_of_memory_says_what_held_it(corpus: Path, tmp_path: Path) -> None:
    ((lines, raised, _),) = run(corpus, tmp_path, 1, [Eats()], "train.steps=4")
    assert "DefaultCPUAllocator" in raised
    (told,) = [line for line in lines if "ran out of memory" in line]
    assert "rank 0 ran out of memory at step 1" in told
    assert "optimizer state " in told
    assert "data.micro_batch_size" in told


def test_kinds_of_errors() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("no"))


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"at": [0]}, "profile.at"), ({"count": 0}, "profile.count"), ({"ranks": [-1]}, "profile.ranks"), ({"history": -1}, "profile.history")],
)  # fmt: skip
def test_bad_fields(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ProfileHook(ProfileConfig(**fields))
