"""Directories as runs leave them, made by hand where training would take too long."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

__all__ = ["make_run", "make_sweep"]


def make_run(
    run_dir: Path,
    rows: Sequence[Mapping[str, Any]] | str,
    *,
    overrides: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Writes a run's files; rows may be the text of theirs."""
    (run_dir / ".hydra").mkdir(parents=True)
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    (run_dir / "metrics.jsonl").write_text(text)
    (run_dir / ".hydra/overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
    (run_dir / "config.yaml").write_text(yaml.safe_dump(dict(config or {})))
    if record is not None:
        (run_dir / "run.json").write_text(json.dumps(record))


def make_sweep(root: Path, *, runs: int, steps: int) -> None:
    """Runs over learning rates and seeds with eleven measures each, every step's row as a run writes it."""
    rng = random.Random(1)
    # Drawn once, and met by each run in another order: half a million rows are made in seconds.
    noise = [rng.gauss(0, 0.05) for _ in range(9973)]
    words = [repr(rng.uniform(0.3, 0.9)) for _ in range(9973)]
    for n in range(runs):
        lr, seed = 10 ** -(2 + n % 10 / 4), 1 + n // 10
        rows = (_row(step, steps, lr, noise, words, 1 + (n + 1) * 37 * step) for step in range(1, steps + 1))
        make_run(
            root / f"run-optimizer.lr={lr:g},seed={seed}",
            "".join(rows),
            overrides=[f"optimizer.lr={lr}", f"seed={seed}", "train.steps=1"],
            config={
                "model": {"name": "m", "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 128,
                          "vocab_size": 512},
                "data": {"seq_len": 128},
                "optimizer": {"lr": lr},
                "seed": seed,
                "train": {"steps": steps},
            },
            record=_record(steps),
        )  # fmt: skip


def _row(step: int, steps: int, lr: float, noise: Sequence[float], words: Sequence[str], at: int) -> str:
    loss = 2.5 + 6 * math.exp(-10 * step / steps) + 0.2 * abs(math.log10(lr) + 3) + noise[at % 9973]
    a, b, c, d, e, f = (words[at * k % 9973] for k in (2, 3, 5, 7, 11, 13))
    validation = f', "val_loss": {loss + 0.05!r}' if step % 100 == 0 or steps < 100 else ""
    return (
        f'{{"step": {step}, "loss": {loss!r}, "grad_norm": {a}, "lr": {lr * min(1.0, step / 100)!r}, '
        f'"tokens": {step * 2048}, "tokens_per_s": 2{b[1:]}e4, "step_time_s": {c}, "data_wait_s": {d}, '
        f'"memory_gib": {e}, "mfu": {f}, "bits_per_byte": {loss / 2.7!r}{validation}}}\n'
    )


def _record(steps: int) -> dict[str, Any]:
    attempt = {"started_at": 1.7e9, "lineage": "0-abcd", "host": "n1", "layout": {"dp_shard": 2, "tp": 1},
               "to_step": steps, "saved_step": steps, "end": "finished"}  # fmt: skip
    return {"format": 1, "run_id": "a", "lineages": [{"id": "0-abcd"}], "attempts": [attempt]}
