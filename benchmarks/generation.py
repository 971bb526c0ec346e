"""Generating text: ours beside `transformers.generate`, of the same weights, threads and tokens, in one run.

    python -m benchmarks.generation --model debug 90m --batch 1 16 --tokens 128 --rounds 3 --threads 1

Random weights, greedy, no end of text. Rounds alternate; printed are the median of tokens a second of each, and the
ratio. `weights` is what reading the weights once a token would allow, by the rate at which this process sums them.
`token 1000` is the time of a token there through that of token 10, of a row by itself.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import regrow
from regrow.models.base import LanguageModel
from regrow.trainer.data.tokenizer import train_bpe

__all__ = ["main"]

# Hidden size, width of the feed-forward part, layers, heads, key heads, vocabulary.
SIZES = {"tiny": (64, 128, 2, 4, 2, 320), "debug": (192, 512, 4, 6, 3, 4096), "90m": (768, 2048, 12, 12, 4, 8192)}
_PROMPT = 16


def _models(size: str, folder: Path) -> tuple[LanguageModel, Any]:
    """Ours and theirs, of one folder."""
    hidden, feed_forward, layers, heads, key_heads, vocabulary = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=feed_forward, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=vocabulary, max_position_embeddings=2048,
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(folder)
    train_bpe(["a text of some words"] * 3, 270, folder / "tokenizer.json")
    ours, _ = regrow.load_model(folder)
    return ours, theirs


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _reading_seconds(model: LanguageModel) -> float:
    """Of all weights once, at the best of some tries; of the embedding no more than some rows are read."""
    weights = [p for n, p in model.named_parameters() if n != "tok_embeddings.weight"]
    with torch.inference_mode():
        return min(_seconds(lambda: [w.sum() for w in weights]) for _ in range(5))


def _growth(model: LanguageModel) -> float:
    """The time of the tokens around 1,000 through that of those around 10."""
    times: list[float] = []

    def note(_row: int, _token: int) -> bool:
        times.append(time.perf_counter())
        return False

    model.generate([[1, 2, 3]], max_tokens=1020, temperature=0, ends=note)
    steps = [b - a for a, b in itertools.pairwise(times)]
    return statistics.median(steps[990:1010]) / statistics.median(steps[2:22])


def compare(size: str, batch: int, tokens: int, rounds: int) -> dict[str, float]:
    """One line of the table, by column."""
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = _models(size, Path(folder))
    ids = torch.randint(0, SIZES[size][-1], (batch, _PROMPT), generator=torch.Generator().manual_seed(1))
    prompts = ids.tolist()
    how = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}

    def run_ours() -> object:
        return ours.generate(prompts, max_tokens=tokens, temperature=0)

    def run_theirs() -> object:
        return theirs.generate(ids, attention_mask=torch.ones_like(ids), **how)

    run_ours(), run_theirs()
    times: dict[str, list[float]] = {"ours": [], "transformers": []}
    for _ in range(rounds):
        times["ours"].append(_seconds(run_ours))
        times["transformers"].append(_seconds(run_theirs))
    rates = {name: batch * tokens / statistics.median(of_name) for name, of_name in times.items()}
    ratios = [b / a for a, b in zip(*times.values(), strict=True)]
    return {
        **rates,
        "ratio": statistics.median(ratios),
        "weights": batch / _reading_seconds(ours),
        "token 1000": _growth(ours) if batch == 1 else float("nan"),
    }


def main() -> None:
    """The command's entry."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=SIZES, default=["debug"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for size in args.model:
        for batch in args.batch:
            row = compare(size, batch, args.tokens, args.rounds)
            shown = "  ".join(f"{name} {value:,.2f}" for name, value in row.items())
            print(f"{size} batch {batch}, {args.threads} threads: {shown}", flush=True)


if __name__ == "__main__":
    main()
