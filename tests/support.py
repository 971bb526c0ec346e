"""What the tests share: tiny runs, composing configs, running the command, reading results."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from regrow.launch.config.schema import Config
from regrow.launch.config.typed import to_config, to_dict
from regrow.trainer.jsonlines import read_rows
from tests.composing import compose_config as compose_config

REPO = Path(__file__).resolve().parent.parent

# A model and a corpus that train in milliseconds a step.
TINY_MODEL = [
    "model.dim=32",
    "model.n_layers=2",
    "model.n_heads=4",
    "model.n_kv_heads=2",
    "model.ffn_dim=64",
    "model.vocab_size=320",
]
# Nothing is measured, and nothing depends on the machine.
ONE_THREAD = ["launch.threads_per_rank=1", "launch.kernels=plain"]
TINY_DATA = ["data=text", "data.tokenizer_vocab_size=300", "data.seq_len=32", "data.micro_batch_size=4"]


def tiny(corpus: Path, *overrides: str) -> list[str]:
    """Overrides for a tiny run over `corpus`."""
    return [*TINY_MODEL, *TINY_DATA, f"data.files=[{corpus}]", *ONE_THREAD, *overrides]


def typed_config(overrides: Sequence[str]) -> Config:
    """The composed config as typed objects."""
    return to_config(compose_config(overrides))


def settings_of(overrides: Sequence[str]) -> dict[str, Any]:
    """The composed config as plain values."""
    return to_dict(compose_config(overrides))


def start(arguments: Sequence[str], cwd: Path, **environ: str) -> subprocess.Popen[str]:
    """Starts `regrow` in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "regrow.launch.train", *arguments],
        cwd=cwd,
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def regrow(arguments: Sequence[str], cwd: Path, timeout_s: float = 120.0, **environ: str) -> tuple[int, str]:
    """Runs `regrow` to its end; returns exit code and output."""
    process = start(arguments, cwd, **environ)
    out, _ = process.communicate(timeout=timeout_s)
    return process.returncode, out


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0, every_s: float = 0.001) -> None:
    """Polls; AssertionError when it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(every_s)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl`."""
    return list(read_rows(run_dir / "metrics.jsonl"))


def samples(run_dir: Path) -> list[dict[str, Any]]:
    """`samples.jsonl`."""
    return list(read_rows(run_dir / "samples.jsonl"))


def record(run_dir: Path) -> dict[str, Any]:
    """`run.json`."""
    loaded: dict[str, Any] = json.loads((run_dir / "run.json").read_text())
    return loaded


def curve(run_dir: Path) -> list[tuple[int, float, float, float]]:
    """What must repeat bit for bit: step, loss, grad_norm, lr."""
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in metrics(run_dir)]


def stored_tensors(step: Path) -> dict[str, torch.Tensor]:
    """All tensors of a step, read by stock DCP into one process."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner()  # type: ignore[no-untyped-call]
    _load_state_dict(state, storage_reader=FileSystemReader(step), planner=planner, no_dist=True)
    return flat(state)


def flat(state: Mapping[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """Nested dictionaries of tensors as dotted names."""
    out: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def assert_same_tensors(a: Path, b: Path) -> None:
    """Two steps hold bitwise the same."""
    left, right = stored_tensors(a), stored_tensors(b)
    assert left.keys() == right.keys()
    assert len(left) > 10
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
