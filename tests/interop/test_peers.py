"""Stock PyTorch Distributed Checkpoint and torchtune, each with its own code."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from regrow.checkpoint.format.manifest import read_manifest
from regrow.checkpoint.load.open_source import open_source, read_whole
from tests.runs import train
from tests.support import REPO, TINY_DATA, tiny, typed_config

TORCHTUNE = REPO / ".venv-torchtune"


@pytest.fixture(scope="session")
def torchtune() -> Path:
    """torchtune's Python; its environment is made where `make test` has not made it yet."""
    python = TORCHTUNE / "bin/python"
    if not (TORCHTUNE / ".installed").exists():
        command = ["make", ".venv-torchtune/.installed", f"PYTHON={sys.executable}"]
        subprocess.run(command, cwd=REPO, check=True, timeout=280)
    return python


@pytest.mark.slow
def test_torchtune_loads_a_model_only_checkpoint(torchtune: Path, corpus: Path, tmp_path: Path) -> None:
    dims = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 96, "vocab_size": 320}
    model = [f"model.{k}={v}" for k, v in dims.items()]
    overrides = [*model, *TINY_DATA, f"data.files=[{corpus}]", "hooks=none", "train.steps=3"]
    overrides += ["checkpoint.last_save_model_only=true", "checkpoint.export_dtype=bfloat16"]
    train([*overrides, "parallel=fsdp", "parallel.dp_shard=2"], tmp_path / "run", world_size=2)
    step = tmp_path / "run/checkpoint/step-3"
    assert read_manifest(step).kind == "model"
    # Ours, and stock PyTorch's, of the same step.
    files = {"ours.pt": "regrow.launch.commands.checkpoint", "stock.pt": "torch.distributed.checkpoint.format_utils"}
    meta = tmp_path / "meta"
    meta.mkdir()
    for file, module in files.items():
        arguments = ["dcp_to_torch", str(step), str(meta / file)]
        if file == "ours.pt":
            arguments = ["export", str(step), str(meta / file), "--format", "torch"]
        subprocess.run([sys.executable, "-W", "ignore", "-m", module, *arguments], check=True, capture_output=True)
    theirs = {
        "vocab_size": 320, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 64, "max_seq_len": 128,
        "intermediate_dim": 96, "rope_base": 500_000, "norm_eps": 1e-5,
    }  # fmt: skip
    (tmp_path / "dims.json").write_text(json.dumps(theirs))
    tokens = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(3))
    torch.save(tokens, tmp_path / "tokens.pt")
    expected = _logits(overrides, step, tokens)
    script = REPO / "tests/interop/torchtune_side.py"
    for file in files:
        arguments = [
            str(meta),
            file,
            str(tmp_path / "dims.json"),
            str(tmp_path / "tokens.pt"),
            str(tmp_path / "o"),
        ]
        command = [str(torchtune), "-W", "ignore", str(script), *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": ""}
        )
        assert done.returncode == 0, done.stderr
        answer = torch.load(tmp_path / "o")
        assert answer["dtypes"] == ["torch.bfloat16"]
        assert (answer["logits"] - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def _logits(overrides: list[str], step: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Our model's, in float32, with a step's weights."""
    from regrow.launch.run.build import build_model

    model = build_model(typed_config(overrides))
    model.init_buffers(torch.device("cpu"), 128)
    with open_source(step) as source:
        for name, parameter in model.named_parameters():
            parameter.copy_(read_whole(source, name))
    logits: torch.Tensor = model(tokens)
    return logits


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_stock_readers_open_ours(corpus: Path, tmp_path: Path) -> None:
    overrides = tiny(corpus, "hooks=none", "train.steps=2", "parallel=fsdp", "parallel.dp_shard=2")
    train(overrides, tmp_path / "run", world_size=2)
    step = tmp_path / "run/checkpoint/step-2"
    with open_source(step) as source:
        ours = {name: read_whole(source, name) for name in source.infos}
    # dcp.load with torchtitan's names: the model's at the top level, the optimizer's beside them.
    wanted = {n: torch.full_like(t, -1) for n, t in ours.items()}
    assert "layers.1.attention.wq.weight" in wanted
    assert "optimizer.state.layers.1.attention.wq.weight.exp_avg" in wanted
    dcp.load(wanted, checkpoint_id=step, no_dist=True)
    assert all(torch.equal(wanted[n], ours[n]) for n in ours)
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.checkpoint.format_utils"]
    subprocess.run([*command, "dcp_to_torch", str(step), str(tmp_path / "one.pt")], check=True, capture_output=True)
    one: dict[str, Any] = torch.load(tmp_path / "one.pt", weights_only=True)
    assert torch.equal(one["output.weight"], ours["output.weight"])
