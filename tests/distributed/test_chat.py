"""Runs on conversations: packed they train as one by one, under every layout, and they are cut and continued."""

import json
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from regrow.launch.run.build import build_model
from regrow.launch.run.compose_data import compose_windows
from regrow.trainer.data.config import ChatConfig
from regrow.trainer.data.corpus import Corpus
from tests.runs import first_weights, spec_of, train
from tests.support import ONE_THREAD, TINY_MODEL, assert_same_tensors, curve, metrics, samples, typed_config
from tests.unit.trainer.data.chat.families import FAMILIES, save_family

pytestmark = pytest.mark.slow

WORDS = [
    "the",
    "weather",
    "in",
    "Paris",
    "is",
    "sunny",
    "and",
    "a",
    "line",
    "of",
    "text",
    "goes",
    "on",
    "to",
    "say",
    "so",
]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a corpus of conversations of several lengths, none longer than a window."""
    folder = tmp_path_factory.mktemp("chats")
    save_family(folder / "tokenizer", FAMILIES["marks"])
    rng = random.Random(5)
    with (folder / "chats.jsonl").open("w") as out:
        for _ in range(40):
            turns = [
                {"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))}
                for _ in range(rng.randint(1, 3))
                for role in ("user", "assistant")
            ]
            out.write(json.dumps({"messages": turns}) + "\n")
    sizes = [o for o in TINY_MODEL if "vocab" not in o]
    return [
        *sizes, *ONE_THREAD, "model.vocab_size=432", "data=chat", f"data.files=[{folder / 'chats.jsonl'}]",
        f"data.tokenizer={folder / 'tokenizer'}", "data.seq_len=192", "data.validation_fraction=0.0",
        "data.log_samples=true", "hooks=none", "scheduler.warmup_steps=0",
    ]  # fmt: skip


def one_by_one(overrides: list[str], folder: Path) -> float:
    """The mean loss of the first weights over all conversations, each by itself, in float64."""
    config = typed_config(overrides)
    model = build_model(config).double()
    model.init_buffers(torch.device("cpu"), 192)
    weights = first_weights(overrides, folder, 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    tokenizer = AutoTokenizer.from_pretrained(config.data.tokenizer)
    total, count = 0.0, 0
    assert isinstance(config.data, ChatConfig)
    for line in Path(config.data.files[0]).read_text().splitlines():
        encoded = tokenizer.apply_chat_template(
            json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["assistant_masks"]).bool()
        with torch.no_grad():
            losses = F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none")
        total += float(losses[mask[1:]].sum())
        count += int(mask[1:].sum())
    return total / count


LAYOUTS = {
    "one rank": (1, []),
    "fsdp": (2, ["parallel.dp_shard=2"]),
    "tp": (2, ["parallel.tp=2"]),
    "pp": (2, ["parallel.pp=2", "data.micro_batch_size=1"]),
    "cp": (2, ["parallel.cp=2"]),
    "positions of their own": (
        4,
        ["parallel.cp=2", "parallel.pp=2", "data.micro_batch_size=1", "data.reset_positions=true"],
    ),
    "ring": (2, ["parallel.cp=2", "parallel.cp_method=ring", "data.reset_positions=true"]),
}


def test_packed_they_train_as_one_by_one(chats: list[str], tmp_path: Path) -> None:
    """In float64, under every layout: the loss, and with it what its gradient is divided by."""
    # As many sequences as there are, so that a step reads all conversations once.
    probe = [*chats, "data.global_batch_size=1", "data.micro_batch_size=4", "precision=fp64", "checkpoint=disabled"]
    spec = spec_of(probe, tmp_path, 1)
    windows = len(compose_windows(spec.config, Corpus(spec.data_folders), validation=False)[""])
    assert windows > 4
    expected = one_by_one([*probe, "train.steps=1"], tmp_path / "weights")
    norms = []
    for name, (world, layout) in LAYOUTS.items():
        settings = [*probe, f"data.global_batch_size={windows}", "train.steps=1", *layout]
        train(settings, tmp_path / name, world)
        (row,) = metrics(tmp_path / name)
        assert row["loss"] == pytest.approx(expected, rel=1e-12), name
        norms.append(row["grad_norm"])
    assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-10)


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_that_was_cut_goes_on_bitwise(chats: list[str], tmp_path: Path, world: int) -> None:
    layout = ["parallel.dp_shard=2"] if world == 2 else []
    settings = [
        *chats, "data.global_batch_size=3", "data.micro_batch_size=1", "checkpoint.interval=2",
        "scheduler.total_steps=6", *layout,
    ]  # fmt: skip
    train([*settings, "train.steps=6"], tmp_path / "whole", world)
    for steps in (2, 4, 6):
        train([*settings, f"train.steps={steps}"], tmp_path / "cut", world)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert samples(tmp_path / "cut") == samples(tmp_path / "whole")
    assert_same_tensors(tmp_path / "cut/checkpoint/step-6", tmp_path / "whole/checkpoint/step-6")
