"""Samples while a run trains: the same text under every layout and from the checkpoint, each step's once."""

from pathlib import Path

import pytest
import torch

from regrow.launch.commands.loaded_model import open_on
from regrow.models.generation.generate import Request, generate, next_logits_of
from regrow.models.generation.sampling import Sampling
from regrow.trainer.jsonlines import read_rows
from tests.distributed.test_parallel import base, degrees
from tests.runs import train

pytestmark = pytest.mark.slow

PROMPTS = ["abc def", "ghi"]
SAMPLED = ["hooks=none", "+hook@hooks.sample=sample", "hooks.sample.prompts=['abc def',ghi]", "hooks.sample.tokens=12",
           "hooks.sample.every=2", "hooks.sample.top_k=40"]  # fmt: skip


def test_the_same_text_everywhere(corpus: Path, tmp_path: Path) -> None:
    settings = [*base(corpus, "dense", "precision=fp64", "train.steps=4"), *SAMPLED, "checkpoint=debug",
                "hooks.sample.temperature=0.8", "model.n_layers=2"]  # fmt: skip
    train([*settings, "train.steps=3", "scheduler.total_steps=4"], tmp_path / "one")
    assert [r["step"] for r in read_rows(tmp_path / "one/generated.jsonl")] == [2]
    # The last saved step is 3, so that step 2 is not sampled again, and 4 is.
    assert train([*settings, "scheduler.total_steps=4"], tmp_path / "one").kind == "finished"
    rows = list(read_rows(tmp_path / "one/generated.jsonl"))
    assert [r["step"] for r in rows] == [2, 4]
    assert (tmp_path / "one/generated.txt").read_text() == "\n\n---\n\n".join(rows[-1]["texts"]) + "\n"
    for layout in ("tp=2", "pp=2", "dp_shard=2"):
        run_dir = tmp_path / layout
        more = ["checkpoint=disabled", "scheduler.total_steps=4", *degrees(layout)]
        assert train([*settings, *more], run_dir, 2).kind == "finished"
        assert list(read_rows(run_dir / "generated.jsonl")) == rows, layout
    loaded = open_on(str(tmp_path / "one"), device="cpu", dtype="float64", tokenizer=None)
    ids = [loaded.tokenizer.encode(p, add_special_tokens=False).ids for p in PROMPTS]
    request = Request(max_tokens=12, sampling=Sampling(temperature=0.8, top_k=40))
    with torch.inference_mode():
        made = generate(next_logits_of(loaded.model), ids, request, context=2048, device=torch.device("cpu"))
    texts = [loaded.tokenizer.decode(p + m.ids) for p, m in zip(ids, made, strict=True)]
    assert texts == rows[-1]["texts"]
