"""One rank of ours and the same model in a plain `transformers` loop, step by step in turn."""

import dataclasses
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from benchmarks.pairs import Seconds, Spread, clocks, counted, since
from benchmarks.peers import TransformersLoop
from benchmarks.products import Products
from regrow.launch.config.composition import compose_config
from regrow.launch.config.schema import Config
from regrow.launch.run.compose import compose_trainer
from regrow.launch.run.prepare import prepare_run
from regrow.launch.run.signals import StopFlag
from regrow.launch.run.start import open_spec
from regrow.models.llama3.model import Llama3
from regrow.trainer.config import AdamWConfig, PrecisionName
from regrow.trainer.device import pin_threads
from regrow.trainer.hook import Hook
from regrow.trainer.loop import Trainer
from regrow.trainer.parallel.context import close_parallel, open_parallel

__all__ = ["Comparison", "Round", "compare", "profile_steps"]

DRIFT = 1.2
WARM_UP = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One step of each.

    Attributes:
        ours_s, theirs_s: seconds, by the clock.
        ours_cpu_s, theirs_cpu_s: the process' seconds on CPUs, which other users of the machine change less.
        products_s: seconds of the model's products alone, before ours, between, and after theirs.
        loss, peer_loss: of the same batch.
    """

    ours_s: float
    theirs_s: float
    ours_cpu_s: float
    theirs_cpu_s: float
    products_s: tuple[float, float, float]
    loss: float
    peer_loss: float

    @property
    def steady(self) -> bool:
        """Whether the machine was as fast at the end as at the beginning."""
        return max(self.products_s) <= DRIFT * min(self.products_s)


@final
class _InTurn(Hook):
    """Lets the peer take each step after ours; the last hook, so that all of ours is in our time."""

    def __init__(self, peer: TransformersLoop, products: Products) -> None:
        self._peer, self._products = peer, products
        self._steps: list[dict[str, Any]] = []
        self._losses: list[float] = []
        self._before_s = 0.0
        self._started = Seconds(0.0, 0.0)

    def before_fit(self, trainer: Trainer) -> None:
        self._before_s = self._products.seconds()
        self._started = clocks()

    def after_step(self, trainer: Trainer) -> None:
        ours = since(self._started)
        assert trainer.batch is not None
        between_s = self._products.seconds()
        started = clocks()
        lr = trainer.options.lr * trainer.schedule.factor(trainer.state.step, trainer.state.schedule_total)
        peer_loss = self._peer.step(trainer.batch.micro_batches, lr)
        theirs = since(started)
        after_s = self._products.seconds()
        step = {"ours_s": ours[0], "ours_cpu_s": ours[1], "theirs_s": theirs[0], "theirs_cpu_s": theirs[1]}
        products_s = (self._before_s, between_s, after_s)
        self._steps.append({**step, "products_s": products_s, "peer_loss": peer_loss})
        self._before_s, self._started = after_s, clocks()

    def after_metrics(self, trainer: Trainer, row: Mapping[str, Any]) -> None:
        self._losses.append(row["loss"])

    def rounds(self) -> list[Round]:
        """Those after the warm-up."""
        both = zip(self._steps, self._losses, strict=True)
        return [Round(**step, loss=loss) for step, loss in both][WARM_UP:]


@contextmanager
def one_rank(overrides: Sequence[str]) -> Iterator[tuple[Config, Trainer]]:
    """A trainer as the command would make it, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        config = compose_config([*overrides, "launch.device=cpu"])
        spec = prepare_run(config, Path(folder), overrides=overrides, world_size=1)
        spec = dataclasses.replace(spec, record=open_spec(spec).record)
        threads = pin_threads(spec.config.launch.threads_per_rank, 1)
        try:
            yield spec.config, compose_trainer(spec, open_parallel(spec.layout, "cpu", 60.0), StopFlag(), threads)
        finally:
            close_parallel()


def compare(overrides: Sequence[str], rounds: int) -> list[Round]:
    """Trains both for so many rounds after the warm-up.

    Args:
        overrides: of the run, without `train.steps`.
        rounds: steps of each.
    """
    with one_rank([*overrides, f"train.steps={rounds + WARM_UP}"]) as (config, trainer):
        hook = _in_turn(config, trainer)
        trainer.hooks.append(hook)
        trainer.fit()
    return hook.rounds()


@final
class _Profiled(Hook):
    """Profiles all steps after the warm-up."""

    def __init__(self) -> None:
        # Without a schedule there is one cycle; torch 2.11 warns of lost ones unless it is told to add them up.
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True)

    def after_step(self, trainer: Trainer) -> None:
        if trainer.state.step == WARM_UP:
            self.profile.start()

    def after_fit(self, trainer: Trainer) -> None:
        self.profile.stop()


def profile_steps(overrides: Sequence[str], steps: int) -> dict[str, float]:
    """Seconds of a step that each operator took by itself, the longest first.

    Args:
        overrides: of the run, without `train.steps`.
        steps: profiled after the warm-up.
    """
    with one_rank([*overrides, f"train.steps={steps + WARM_UP}"]) as (_, trainer):
        hook = _Profiled()
        trainer.hooks.append(hook)
        trainer.fit()
    seconds = {e.key: e.self_cpu_time_total / 1e6 / steps for e in hook.profile.key_averages()}
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _in_turn(config: Config, trainer: Trainer) -> _InTurn:
    assert isinstance(trainer.model, Llama3)
    assert isinstance(config.optimizer, AdamWConfig)
    bf16 = config.precision.name is PrecisionName.bf16
    peer = TransformersLoop(trainer.model, config.optimizer, config.train.grad_clip, bf16=bf16)
    rows = config.data.global_batch_size * config.data.seq_len
    return _InTurn(peer, Products(trainer.model, rows, torch.bfloat16 if bf16 else torch.float32))


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Medians and quartiles over the rounds that count.

    Attributes:
        rounds: that count: the steady ones, or all where fewer than three were.
        steady: how many were.
        ratio: the peer's time through ours, by the clock.
        cpu_ratio: the same of CPU seconds, over all rounds.
        tokens_per_s, peer_tokens_per_s: by the clock.
        products, peer_products: the share of a step that its products would take alone.
        loss_difference: the largest relative difference of the losses.
    """

    rounds: int
    steady: int
    ratio: Spread
    cpu_ratio: Spread
    tokens_per_s: float
    peer_tokens_per_s: float
    products: float
    peer_products: float
    loss_difference: float

    @classmethod
    def of(cls, rounds: Sequence[Round], tokens: int) -> "Comparison":
        """Of steps of so many tokens."""
        used, steady = counted(rounds, lambda r: r.steady)
        products = [statistics.median(r.products_s) for r in used]
        return cls(
            rounds=len(used),
            steady=steady,
            ratio=Spread.of([r.theirs_s / r.ours_s for r in used]),
            cpu_ratio=Spread.of([r.theirs_cpu_s / r.ours_cpu_s for r in rounds]),
            tokens_per_s=tokens / statistics.median(r.ours_s for r in used),
            peer_tokens_per_s=tokens / statistics.median(r.theirs_s for r in used),
            products=statistics.median(p / r.ours_s for p, r in zip(products, used, strict=True)),
            peer_products=statistics.median(p / r.theirs_s for p, r in zip(products, used, strict=True)),
            loss_difference=max(abs(r.loss - r.peer_loss) / abs(r.peer_loss) for r in rounds),
        )
