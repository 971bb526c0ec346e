"""Greedy text is that of `transformers.generate`, with keys and values kept and without, alone and in a batch."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import regrow
from regrow.models.base import LanguageModel
from tests.interop.hf_models import KINDS, make
from tests.runs import train
from tests.support import ONE_THREAD, REPO

pytestmark = pytest.mark.slow

NEW = 200


@dataclass(frozen=True)
class Trained:
    """A model of ours and theirs, from one folder, in float64."""

    folder: Path
    ours: LanguageModel
    theirs: Any
    tokenizer: Tokenizer
    prompts: list[list[int]]


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model that was trained for 200 steps on a text that it learns by heart, and beginnings of several lengths."""
    folder = tmp_path_factory.mktemp(request.param)
    text = (REPO / "LICENSE").read_text()[:5000]
    (folder / "text.txt").write_text(text)
    make(request.param, folder / "hf", max_position_embeddings=512)
    overrides = [
        "model=from_hf", f"model.path={folder / 'hf'}", "data=text", f"data.files=[{folder / 'text.txt'}]", "data.txt_document_bytes=0", "data.validation_fraction=0.0",
        "data.tokenizer_vocab_size=300", "data.seq_len=64", "data.global_batch_size=8", "data.micro_batch_size=8",
        "train.steps=200", "optimizer.lr=3e-3", "scheduler.warmup_steps=10", "hooks=none", *ONE_THREAD,
        "checkpoint.interval=1000", "checkpoint.last_save_in_hf=true",
    ]  # fmt: skip
    train(overrides, folder / "run")
    export = folder / "run/export/step-200"
    ours, tokenizer = regrow.load_model(export, dtype=torch.float64, tokenizer=folder / "run")
    theirs = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float64, experts_implementation="eager").eval()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return Trained(
        export,
        ours,
        theirs,
        tokenizer,
        [ids[at : at + n] for at, n in ((0, 31), (9, 1), (400, 17), (700, 2), (1000, 24))],
    )


def their_text(trained: Trained, prompts: list[list[int]]) -> list[list[int]]:
    """Theirs, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = trained.theirs.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return [row[longest:].tolist() for row in out]


def test_greedy_text_is_theirs(trained: Trained) -> None:
    theirs = their_text(trained, trained.prompts)
    ours = trained.ours.generate(trained.prompts, max_tokens=NEW, temperature=0)
    assert [c.ids for c in ours] == theirs
    assert len({i for c in ours for i in c.ids}) >= 50
    assert all(len(c.ids) == NEW for c in ours)


def test_a_row_is_what_it_is_alone_and_without_kept_keys(trained: Trained) -> None:
    together = trained.ours.generate(trained.prompts, max_tokens=40, temperature=0, logprobs=3)
    for prompt, made in zip(trained.prompts, together, strict=True):
        (alone,) = trained.ours.generate([prompt], max_tokens=40, temperature=0)
        assert alone.ids == made.ids
        with torch.no_grad():
            # Each token from the whole text before it.
            logits = trained.ours(torch.tensor([prompt + made.ids]))[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == made.ids
        logprobs = logits.log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(made.ids)[:, None])[:, 0].tolist()
        assert made.logprobs == pytest.approx(expected, rel=1e-10)
        assert [[i for i, _ in place] for place in made.alternatives] == logprobs.topk(3).indices.tolist()


def test_in_float32_texts_part_only_where_two_tokens_are_as_likely(trained: Trained) -> None:
    ours, _ = regrow.load_model(trained.folder, dtype=torch.float32, tokenizer=trained.folder.parent.parent)
    theirs = AutoModelForCausalLM.from_pretrained(
        trained.folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    in_float32 = replace(trained, ours=ours, theirs=theirs)
    compared = 0
    made = ours.generate(trained.prompts, max_tokens=NEW, temperature=0, logprobs=2)
    for of_row, of_theirs in zip(made, their_text(in_float32, trained.prompts), strict=True):
        for one, other, places in zip(of_row.ids, of_theirs, of_row.alternatives, strict=True):
            if places[0][1] - places[1][1] <= 1e-4:
                break  # what follows need not be the same
            assert one == other
            compared += 1
    assert compared >= NEW


def test_drawn_text_does_not_depend_on_the_batch(trained: Trained) -> None:
    options: dict[str, Any] = {
        "max_tokens": 40, "temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1,
        "seed": 5,
    }  # fmt: skip
    prompts = [*trained.prompts, trained.prompts[1]]
    together = [c.ids for c in trained.ours.generate(prompts, **options)]
    assert [c.ids for c in trained.ours.generate(prompts, **options, batch_size=2)] == together
    for prompt, made in zip(trained.prompts, together, strict=False):
        assert trained.ours.generate([prompt], **options)[0].ids == made
    # The same prompt a second time is another draw, and another seed too.
    assert together[-1] != together[1]
    assert [c.ids for c in trained.ours.generate(prompts, **{**options, "seed": 6})] != together
