"""A hook that raises in any event: the first error is told, every hook that was begun is closed, nothing hangs."""

import dataclasses
import gc
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from regrow.launch.run.compose import compose_trainer
from regrow.launch.run.rank_spec import RankSpec
from regrow.launch.run.signals import StopFlag
from regrow.launch.run.start import open_spec
from regrow.trainer.hook import Hook
from regrow.trainer.loop import StopReason, Trainer
from regrow.trainer.parallel.context import close_parallel, open_parallel
from tests.pool import run_distributed
from tests.runs import spec_of
from tests.support import tiny

pytestmark = pytest.mark.slow

EVENTS = [
    "before_fit", "before_step", "before_optimizer_step", "after_optimizer_step", "after_step", "after_metrics",
    "before_commit", "after_commit", "after_last_step", "after_fit", "on_exception", "close",
]  # fmt: skip


class Boom(RuntimeError):
    """What the failing hook raises."""


@dataclasses.dataclass
class Seen:
    """What the hooks of a case saw.

    Attributes:
        begun: names, in order.
        told: (name, the error).
        closed: names, in order.
        raised: by `fit`.
        open_files: of the run's folder, after it.
        seconds: that `fit` took.
    """

    begun: list[str] = dataclasses.field(default_factory=list)
    told: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    closed: list[str] = dataclasses.field(default_factory=list)
    raised: str = ""
    open_files: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


class Witness(Hook):
    """Notes how it is treated."""

    def __init__(self, name: str, seen: Seen) -> None:
        self._name, self._seen = name, seen

    def before_fit(self, trainer: Trainer) -> None:
        self._seen.begun.append(self._name)

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        self._seen.told.append((self._name, repr(error)))

    def close(self, trainer: Trainer) -> None:
        self._seen.closed.append(self._name)


def failing(event: str, seen: Seen) -> Hook:
    """A witness that raises in an event, after it has noted it."""
    inherited = getattr(Witness, event)

    def raises(self: Any, *arguments: Any) -> None:
        inherited(self, *arguments)
        raise Boom(event)

    def in_step(self: Any, trainer: Trainer) -> None:
        raise Boom("first")

    methods: dict[str, Any] = {event: raises}
    if event == "on_exception":
        methods["before_step"] = in_step
    kind: type[Witness] = type("Failing", (Witness,), methods)
    return kind("failing", seen)


def _fail_in(event: str, ranks: Sequence[int], spec: RankSpec) -> Seen:
    """One run in which a hook fails on these ranks; a rank ends after it, as it would in a real one."""
    torch.set_num_threads(1)
    context, seen = open_parallel(spec.layout, "cpu", 30.0), Seen()
    trainer = compose_trainer(spec, context, StopFlag(), 1)
    # In the middle of the real ones, before checkpoints are saved.
    trainer.hooks.insert(0, Witness("first", seen))
    trainer.hooks.insert(-2, failing(event, seen) if context.rank in ranks else Witness("failing", seen))
    trainer.hooks.append(Witness("last", seen))
    began = time.monotonic()
    try:
        trainer.fit()
    except Exception as error:
        seen.raised = repr(error)
    seen.seconds = time.monotonic() - began
    files = [file.path for file in psutil.Process().open_files()]
    seen.open_files = [name for name in files if name.startswith(f"{spec.run_dir}/metrics")]
    assert gc.isenabled(), "the garbage collector is left as it was found"
    return seen


def _fail_in_each(specs: Sequence[tuple[str, RankSpec]]) -> list[Seen]:
    found = []
    for number, (event, spec) in enumerate(specs):
        # Each case has its own addresses in the store that all share.
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
        found.append(_fail_in(event, [0], spec))
        close_parallel()
    return found


def _specs(corpus: Path, folder: Path, world_size: int) -> list[tuple[str, RankSpec]]:
    overrides = tiny(
        corpus, "data.global_batch_size=8", "train.steps=2", "checkpoint.interval=1", "hooks=none",
        "+hook@hooks.garbage=garbage", f"parallel.dp_shard={world_size}",
    )  # fmt: skip
    spec, specs = spec_of(overrides, folder, world_size), []
    for event in EVENTS:
        (folder / event).mkdir()
        own = dataclasses.replace(spec, run_dir=folder / event)
        specs.append((event, dataclasses.replace(own, record=open_spec(own).record)))
    return specs


def _check(event: str, seen: Seen, *, fails: bool) -> None:
    case = f"{event} ({'here' if fails else 'elsewhere'}): {seen}"
    assert seen.closed == seen.begun[::-1], case
    assert seen.open_files == [], case
    assert seen.told == [(name, seen.raised) for name in seen.begun if seen.raised], case
    # Far from the timeout of a collective.
    assert seen.seconds < 25.0, case
    if fails:
        assert seen.begun == (["first", "failing"] if event == "before_fit" else ["first", "failing", "last"]), case
        assert seen.raised == {"on_exception": "Boom('first')", "close": ""}.get(event, f"Boom('{event}')"), case


def test_the_first_error_is_told_and_every_hook_is_closed(corpus: Path, tmp_path: Path) -> None:
    specs = _specs(corpus, tmp_path, 1)
    (found,) = run_distributed(_fail_in_each, specs, world_size=1, timeout_s=200.0)
    for (event, _), seen in zip(specs, found, strict=True):
        _check(event, seen, fails=True)


def test_the_other_ranks_end_too(corpus: Path, tmp_path: Path) -> None:
    """Rank 1 alone fails; rank 0, which knows nothing of it, ends by its own collectives or has ended already."""
    for event, spec in _specs(corpus, tmp_path, 2):
        for rank, seen in enumerate(run_distributed(_fail_in, event, [1], spec, world_size=2)):
            _check(event, seen, fails=rank == 1)


def _stop_from_a_hook(spec: RankSpec) -> tuple[str, int]:
    """Rank 1 alone asks; all ranks stop, at the same step."""

    class Asks(Hook):
        def after_step(self, trainer: Trainer) -> None:
            if trainer.state.step == 3 and trainer.context.rank == 1:
                trainer.request_stop(StopReason.terminated)

    torch.set_num_threads(1)
    context = open_parallel(spec.layout, "cpu", 30.0)
    trainer = compose_trainer(spec, context, StopFlag(), 1)
    trainer.hooks.insert(1, Asks())
    result = trainer.fit()
    close_parallel()
    return result.reason.value, result.step


def test_a_hook_on_one_rank_stops_all_of_them(corpus: Path, tmp_path: Path) -> None:
    overrides = tiny(
        corpus, "data.global_batch_size=8", "train.steps=50", "hooks=none", "parallel.dp_shard=2"
    )  # fmt: skip
    (tmp_path / "run").mkdir()
    spec = spec_of(overrides, tmp_path / "run", 2)
    spec = dataclasses.replace(spec, record=open_spec(spec).record)
    results = run_distributed(_stop_from_a_hook, spec, world_size=2)
    assert results == [("terminated", 5)] * 2
    assert (tmp_path / "run/checkpoint/step-5").is_dir()
