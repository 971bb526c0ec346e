"""Training steps a second: this trainer beside a plain `transformers` loop, one rank, the same model and batches.

    python -m benchmarks.throughput --model 90m debug --precision fp32 bf16 --threads 1 --rounds 15

Ours is `Trainer.fit` itself, with its data, hooks and metrics, checkpoints off. After each of its steps the peer
takes the same step on the same micro-batches, from the same weights, and between the two the matrix products of the
model are measured alone. The figure is the median over rounds of (peer's seconds / our seconds); rounds in which the
products' speed changed by more than a fifth say more about the machine's other users and are left out, and counted.
"products" is the share of a step that the products would take alone, by `torch.mm` at the rate measured in the same
round: above 100 % where ours are faster than `torch.mm`. "loss" is the largest relative difference of the losses.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from hydra import compose, initialize_config_module

from benchmarks.peers import TransformersLoop
from benchmarks.products import Products
from launch.preflight import check_config, prepare_data
from launch.run_dir import open_run
from launch.run_name import register_resolver
from launch.schema import register_schemas
from launch.signals import StopFlag
from launch.typed import plain, to_config
from launch.worker import RankSpec, build_trainer
from models.llama3.model import Llama3
from trainer.config import AdamWConfig
from trainer.data.token_store import TokenStore
from trainer.device import pin_threads
from trainer.hook import Hook
from trainer.loop import Trainer
from trainer.parallel.context import close_parallel, open_parallel
from trainer.parallel.layout import resolve_layout

__all__ = ["main"]

MODELS = {
    "90m": ["dim=768", "n_layers=12", "n_heads=12", "n_kv_heads=4", "ffn_dim=2048", "vocab_size=8192"],
    "debug": [],
}
DRIFT = 1.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One step of each.

    Attributes:
        ours_s, theirs_s: seconds.
        products_s: seconds of the model's products alone, before ours, between, and after theirs.
        loss, peer_loss: of the same batch.
    """

    ours_s: float
    theirs_s: float
    products_s: tuple[float, float, float]
    loss: float
    peer_loss: float

    @property
    def steady(self) -> bool:
        """Whether the machine was as fast at the end as at the beginning."""
        return max(self.products_s) <= DRIFT * min(self.products_s)


@final
class SideBySide(Hook):
    """Lets the peer take each step after ours; the last hook, so that all of ours is in our time."""

    def __init__(self, peer: TransformersLoop, products: Products) -> None:
        self.rounds: list[Round] = []
        self._peer, self._products = peer, products
        self._before_s = 0.0
        self._started = 0.0

    def fit_start(self, trainer: Trainer) -> None:
        self._products.seconds()
        self._before_s = self._products.seconds()
        self._started = time.perf_counter()

    def step_end(self, trainer: Trainer) -> None:
        ours_s = time.perf_counter() - self._started
        assert trainer.batch is not None
        between_s = self._products.seconds()
        started = time.perf_counter()
        lr = trainer.options.lr * trainer.schedule.factor(trainer.state.step, trainer.state.schedule_total)
        peer_loss = self._peer.step(trainer.batch.micro_batches, lr)
        theirs_s = time.perf_counter() - started
        after_s = self._products.seconds()
        loss = self._loss_of(trainer)
        self.rounds.append(
            Round(
                ours_s=ours_s,
                theirs_s=theirs_s,
                products_s=(self._before_s, between_s, after_s),
                loss=loss,
                peer_loss=peer_loss,
            )
        )
        self._before_s = after_s
        self._started = time.perf_counter()

    @staticmethod
    def _loss_of(trainer: Trainer) -> float:
        rows: list[float] = []
        trainer.hooks.append(_Catch(rows))
        trainer.flush()
        trainer.hooks.pop()
        return rows[0]


@final
class _Catch(Hook):
    """Reads the loss of the step just done."""

    def __init__(self, losses: list[float]) -> None:
        self._losses = losses

    def on_metrics(self, trainer: Trainer, row: Any) -> None:
        self._losses.append(row["loss"])


def overrides_of(model: str, precision: str, rounds: int, arguments: argparse.Namespace) -> list[str]:
    """The run's overrides."""
    return [
        *(f"model.{field}" for field in MODELS[model]),
        f"precision={precision}",
        f"train.steps={rounds}",
        f"data.seq_len={arguments.seq_len}",
        f"data.global_batch_size={arguments.batch_size}",
        f"data.micro_batch_size={arguments.micro_batch_size or arguments.batch_size}",
        f"launch.threads_per_rank={arguments.threads}",
        "launch.device=cpu",
        "train.log_every=1000000",
        "checkpoint=disabled",
        "hooks=none",
        *arguments.set,
    ]


def compare(overrides: Sequence[str], rounds: int) -> list[Round]:
    """Trains both for `rounds` rounds after two to warm up."""
    register_resolver()
    register_schemas()
    with initialize_config_module("conf", version_base="1.3"):
        composed = compose("config", overrides=[*overrides, f"train.steps={rounds + 2}"])
    config, settings = to_config(composed), plain(composed)
    check_config(config)
    with tempfile.TemporaryDirectory() as folder:
        layout = resolve_layout(config.parallel, 1, ranks_are_given=False)
        spec = RankSpec(
            config=config,
            settings=settings,
            layout=layout,
            device_type="cpu",
            run_dir=Path(folder),
            data_folder=prepare_data(config),
            sweep=None,
        )
        open_run(config, settings, spec.run_dir, TokenStore(spec.data_folder), overrides=overrides)
        threads = pin_threads(config.launch.threads_per_rank, 1)
        try:
            trainer = build_trainer(spec, open_parallel(layout, "cpu", 60.0), StopFlag(), threads)
            assert isinstance(trainer.model, Llama3)
            assert isinstance(config.optimizer, AdamWConfig)
            bf16 = config.precision.name.value == "bf16"
            side_by_side = SideBySide(
                TransformersLoop(trainer.model, config.optimizer, config.train.grad_clip, bf16=bf16),
                Products(
                    trainer.model,
                    config.data.global_batch_size * config.data.seq_len,
                    torch.bfloat16 if bf16 else torch.float32,
                ),
            )
            trainer.hooks.append(side_by_side)
            trainer.fit()
        finally:
            close_parallel()
    return side_by_side.rounds[2:]


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What a row of the table shows; medians over the steady rounds, and quartiles of the ratio."""

    model: str
    precision: str
    threads: int
    rounds: int
    left_out: int
    ratio: float
    ratio_quartiles: tuple[float, float]
    tokens_per_s: float
    peer_tokens_per_s: float
    products: float
    peer_products: float
    loss_difference: float


def summarise(rounds: Sequence[Round], *, model: str, precision: str, tokens: int) -> Summary:
    """Medians; every round counts where fewer than three were steady."""
    steady = [r for r in rounds if r.steady]
    used = steady if len(steady) >= 3 else list(rounds)
    ratios = sorted(r.theirs_s / r.ours_s for r in used)
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    products = [statistics.median(r.products_s) for r in used]
    return Summary(
        model=model,
        precision=precision,
        threads=torch.get_num_threads(),
        rounds=len(used),
        left_out=len(rounds) - len(used),
        ratio=statistics.median(ratios),
        ratio_quartiles=(quartiles[0], quartiles[2]),
        tokens_per_s=tokens / statistics.median(r.ours_s for r in used),
        peer_tokens_per_s=tokens / statistics.median(r.theirs_s for r in used),
        products=statistics.median(p / r.ours_s for p, r in zip(products, used, strict=True)),
        peer_products=statistics.median(p / r.theirs_s for p, r in zip(products, used, strict=True)),
        loss_difference=max(abs(r.loss - r.peer_loss) / abs(r.peer_loss) for r in rounds),
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=1, help="0: all cores")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=4, help="sequences a step")
    parser.add_argument("--micro-batch-size", type=int, default=0, help="sequences a forward pass; 0: all")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--json", type=Path, help="also write every round there")
    parser.add_argument("--set", nargs="*", default=[], help="further overrides of the run")
    arguments = parser.parse_args()
    written: list[dict[str, Any]] = []
    print(
        "| model | precision | threads | peer's time / ours (quartiles) | tokens/s | peer | products | peer | loss |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for model in arguments.model:
        for precision in arguments.precision:
            rounds = compare(overrides_of(model, precision, arguments.rounds, arguments), arguments.rounds)
            tokens = arguments.batch_size * arguments.seq_len
            s = summarise(rounds, model=model, precision=precision, tokens=tokens)
            low, high = s.ratio_quartiles
            print(
                f"| {model} | {precision} | {s.threads} | {s.ratio:.2f} ({low:.2f} – {high:.2f}), {s.rounds} rounds, "
                f"{s.left_out} left out | {s.tokens_per_s:,.0f} | {s.peer_tokens_per_s:,.0f} | {s.products:.0%} "
                f"| {s.peer_products:.0%} | {s.loss_difference:.1e} |",
                flush=True,
            )
            written.append({**asdict(s), "each": [asdict(r) for r in rounds]})
    if arguments.json:
        arguments.json.write_text(json.dumps(written, indent=1))


if __name__ == "__main__":
    main()
