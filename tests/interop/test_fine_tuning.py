"""From a Hugging Face folder through chats, a SIGKILL and an export to what transformers generates."""

import importlib
import inspect
import itertools
import json
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from tests.runs import train
from tests.support import curve, samples, wait_until
from tests.unit.trainer.data.chat.families import FAMILIES, save_family
from tests.warm import regrow, start

pytestmark = pytest.mark.slow

MODULES = [
    "json",
    "pathlib",
    "re",
    "string",
    "textwrap",
    "collections",
    "itertools",
    "functools",
    "random",
    "statistics",
]


def write_chats(path: Path) -> None:
    """Questions on what Python's own documentation says, with its first paragraph as the answer."""
    chats = []
    for name in MODULES:
        module = importlib.import_module(name)
        for item, value in sorted(vars(module).items()):
            text = inspect.getdoc(value) if callable(value) and not item.startswith("_") else None
            if text and len(text.split("\n\n")[0]) > 30:
                question = {"role": "user", "content": f"What does {name}.{item} do?"}
                chats.append([question, {"role": "assistant", "content": text.split("\n\n")[0]}])
    assert len(chats) > 60
    # Some with more than one turn.
    rows = [{"messages": [*a, *b] if i % 3 == 0 else a} for i, (a, b) in enumerate(itertools.pairwise(chats))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_killed_run_ends_as_a_model_that_transformers_talks_to(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = Qwen3Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=448, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen3ForCausalLM(theirs).save_pretrained(tmp_path / "hf")
    save_family(tmp_path / "hf", FAMILIES["chatml"])
    write_chats(tmp_path / "chats.jsonl")
    overrides = [
        "model=from_hf", f"model.path={tmp_path / 'hf'}", "data=chat", f"data.files=[{tmp_path / 'chats.jsonl'}]",
        f"data.tokenizer={tmp_path / 'hf'}", "data.seq_len=256", "data.global_batch_size=4", "data.micro_batch_size=2",
        "data.log_samples=true", "hooks=none", "launch.threads_per_rank=1", "launch.kernels=plain", "launch.device=cpu",
        "train.steps=40", "optimizer.lr=3e-3", "checkpoint.interval=5", "checkpoint.last_save_model_only=true",
        "checkpoint.last_save_in_hf=true",
    ]  # fmt: skip
    train(overrides, tmp_path / "whole")
    command = [*overrides, "run.name=killed", f"run.root={tmp_path}"]
    process = start(command, tmp_path)
    wait_until(lambda: (tmp_path / "killed/checkpoint/step-10").exists(), timeout_s=120.0)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed/export").exists()
    code, output = regrow(command, tmp_path)
    assert code == 0, output
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert samples(tmp_path / "killed") == samples(tmp_path / "whole")
    rows = curve(tmp_path / "whole")
    assert rows[-1][1] < 0.8 * rows[0][1]
    # What came of it speaks through its own template, and is the same model.
    (out,) = (tmp_path / "killed/export").iterdir()
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole/export" / out.name)
    question = [{"role": "user", "content": "What does json.dumps do?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert torch.equal(model(**ids).logits, whole(**ids).logits)
    generated = model.generate(**ids, max_new_tokens=16, do_sample=False)
    assert generated.shape[1] > ids["input_ids"].shape[1]
