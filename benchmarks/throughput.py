"""Tokens a second: of this trainer beside a plain `transformers` loop on one rank, and of any list of runs.

    python -m benchmarks.throughput --model 90m debug --precision fp32 bf16 --threads 1 --rounds 15
    python -m benchmarks.throughput --runs "model=llama3_debug parallel.dp_shard=2" "model=qwen3_debug parallel.tp=2"
    python -m benchmarks.throughput --model 90m --profile --rounds 2

In the first form ours is `Trainer.fit` itself, with its data, hooks and metrics, checkpoints off. After each of its
steps the peer takes the same step on the same micro-batches, having begun with the same weights, and between the two
the matrix products of the model are measured alone. The figure is the median over rounds of (peer's seconds / our
seconds), with quartiles. In rounds that are not steady the products' speed changed by more than a fifth, which says
more about the machine's other users; they are left out unless fewer than three rounds were steady. "CPU" is the same
ratio of CPU seconds, over all rounds. "products" is the share of a step that the products would take alone, by
`torch.mm` at the rate measured in the same round: above 100 % where ours are faster than `torch.mm`. "loss" is the
largest relative difference of the losses.

In the second form every run is the whole command, with as many ranks as its layout has, on the devices that are
there; the first quarter of its steps is left out. MFU is given where the device's peak is known.
"""

import argparse
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.pairs import machine, write_rounds
from benchmarks.side_by_side import Comparison, compare, profile_steps
from regrow.trainer.jsonlines import read_rows

__all__ = ["main"]

MODELS = {
    "90m": ["dim=768", "n_layers=12", "n_heads=12", "n_kv_heads=4", "ffn_dim=2048", "vocab_size=8192"],
    "debug": [],
}


def shape(arguments: argparse.Namespace) -> list[str]:
    """The overrides that all runs share."""
    micro = arguments.micro_batch_size or arguments.batch_size
    return [
        f"data.seq_len={arguments.seq_len}",
        f"data.global_batch_size={arguments.batch_size}",
        f"data.micro_batch_size={micro}",
        f"launch.threads_per_rank={arguments.threads}",
        f"launch.kernels={arguments.kernels}",
        "train.log_every=1000000",
        "checkpoint=disabled",
        "hooks=none",
    ]


def of_model(model: str, precision: str, arguments: argparse.Namespace) -> list[str]:
    """The overrides of a model of the comparison."""
    fields = [f"model.{field}" for field in MODELS[model]]
    return [*shape(arguments), *fields, f"precision={precision}", "launch.device=cpu"]


def profiles(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints what our steps spend their time on."""
    written = []
    for model in arguments.model:
        for precision in arguments.precision:
            seconds = profile_steps(of_model(model, precision, arguments), arguments.rounds)
            total = sum(seconds.values())
            print(f"\n{model}, {precision}: {total:.3f} s a step\n\n| operator | share |\n|---|---|")
            for name, own_s in list(seconds.items())[:12]:
                print_row(f"`{name}`", f"{own_s / total:.1%}")
            written.append({"model": model, "precision": precision, "seconds": seconds})
    return written


def beside_transformers(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints a row per model and precision."""
    columns = ("model", "precision", "peer's time / ours", "CPU", "tokens/s", "peer", "products", "peer", "loss")
    print_row(*columns)
    print("|" + "---|" * len(columns))
    written = []
    for model in arguments.model:
        for precision in arguments.precision:
            rounds = compare(of_model(model, precision, arguments), arguments.rounds)
            c = Comparison.of(rounds, arguments.batch_size * arguments.seq_len)
            print_row(
                model,
                precision,
                f"{c.ratio}, {c.rounds} of {len(rounds)} rounds, {c.steady} steady",
                str(c.cpu_ratio),
                f"{c.tokens_per_s:,.0f}",
                f"{c.peer_tokens_per_s:,.0f}",
                f"{c.products:.0%}",
                f"{c.peer_products:.0%}",
                f"{c.loss_difference:.1e}",
            )
            row = {"model": model, "precision": precision, "kernels": arguments.kernels, **asdict(c)}
            written.append({**row, "machine": machine(), "each": [asdict(r) for r in rounds]})
            write_rounds(arguments.json, written)
    return written


def of_runs(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints a row per run."""
    print_row("run", "tokens/s", "MFU", "GiB a rank")
    print("|---|---|---|---|")
    written = []
    for run in arguments.runs:
        with tempfile.TemporaryDirectory() as folder:
            rows = train([*shape(arguments), *shlex.split(run)], Path(folder), arguments.rounds)
        rows = rows[len(rows) // 4 :]
        per_s = statistics.median(r["tokens_per_s"] for r in rows)
        mfu = None if rows[-1]["mfu"] is None else statistics.median(r["mfu"] for r in rows)
        memory_gib = max(r["memory_gib"] for r in rows)
        print_row(f"`{run}`", f"{per_s:,.0f}", "" if mfu is None else f"{mfu:.1%}", f"{memory_gib:.2f}")
        written.append({"run": run, "tokens_per_s": per_s, "mfu": mfu, "memory_gib": memory_gib})
        write_rounds(arguments.json, written)
    return written


def train(overrides: Sequence[str], folder: Path, steps: int) -> list[dict[str, Any]]:
    """Runs the command; the rows of `metrics.jsonl`."""
    command = [sys.executable, "-m", "regrow.launch.train", *overrides, f"train.steps={steps}"]
    done = subprocess.run(
        [*command, f"run.root={folder}", "run.name=run"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}")
    return list(read_rows(folder / "run" / "metrics.jsonl"))


def print_row(*cells: str) -> None:
    """One row of a Markdown table."""
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--runs", nargs="+", help="overrides, a string for each run; instead of the comparison")
    parser.add_argument("--profile", action="store_true", help="our steps, by operator; instead of the comparison")
    parser.add_argument("--threads", type=int, default=1, help="of a rank; 0: all cores")
    parser.add_argument("--kernels", choices=("auto", "plain"), default="auto", help="launch.kernels")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences a step")
    parser.add_argument("--micro-batch-size", type=int, default=0, help="sequences a forward pass; 0: all")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--json", type=Path, help="also write every round there")
    arguments = parser.parse_args()
    work = of_runs if arguments.runs else profiles if arguments.profile else beside_transformers
    print(machine(), end="\n\n", flush=True)
    write_rounds(arguments.json, work(arguments))


if __name__ == "__main__":
    main()
