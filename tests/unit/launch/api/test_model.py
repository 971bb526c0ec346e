"""A model for a notebook: out of a run, a step and Hugging Face's folders, verified, in the dtype asked for."""

import shutil
from pathlib import Path

import pytest
import torch

import regrow
from tests.interop.hf_models import KINDS, make, tokens
from tests.runs import train
from tests.support import stored_tensors, tiny


@pytest.fixture(scope="module")
def run_dir(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 2 and 3 of a model with tied embeddings, saved by two ranks."""
    folder = tmp_path_factory.mktemp("runs") / "r"
    overrides = ["model.tied_embeddings=true", "train.steps=3", "checkpoint.interval=2", "hooks.sample.enabled=false"]
    named = [f"run.root={folder.parent}", "run.name=r", "parallel=fsdp", "parallel.dp_shard=2"]
    assert train(tiny(corpus, *overrides, *named), folder, 2).kind == "finished"
    return folder


@pytest.mark.slow
def test_the_newest_step_of_a_run(run_dir: Path) -> None:
    model, tokenizer = regrow.load_model(run_dir)
    assert not model.training
    stored = stored_tensors(run_dir / "checkpoint/step-3")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert parameters["output.weight"] is parameters["tok_embeddings.weight"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[name]), name
    ids = tokenizer.encode("some text.").ids
    assert tokenizer.decode(ids) == "some text."
    with torch.no_grad():
        logits = model(torch.tensor([ids]))
    assert logits.shape == (1, len(ids), 320)
    assert logits.isfinite().all()
    assert not list((run_dir / "checkpoint/step-3").glob("reader-*"))


def test_a_step_and_a_dtype(run_dir: Path) -> None:
    model, _ = regrow.load_model(str(run_dir / "checkpoint/step-2"), dtype=torch.bfloat16)
    stored = stored_tensors(run_dir / "checkpoint/step-2")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[name].bfloat16()), name
    assert model(torch.zeros(1, 4, dtype=torch.int64)).dtype is torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_a_hugging_face_folder_computes_what_transformers_computes(kind: str, run_dir: Path, tmp_path: Path) -> None:
    theirs = make(kind, tmp_path / "hf")
    with pytest.raises(ValueError, match="give tokenizer=PATH"):
        regrow.load_model(tmp_path / "hf")
    model, tokenizer = regrow.load_model(tmp_path / "hf", tokenizer=run_dir)
    assert tokenizer.get_vocab_size() == 300
    with torch.no_grad():
        expected = theirs.model(tokens()).logits
        assert (model(tokens()) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_without_a_dtype_it_is_the_stored_one(run_dir: Path, tmp_path: Path) -> None:
    make("qwen3", tmp_path / "hf", torch.bfloat16)
    model, _ = regrow.load_model(tmp_path / "hf", tokenizer=run_dir)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_damage_is_found(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "r")
    file = tmp_path / "r/checkpoint/step-3/__0_0.distcp"
    body = bytearray(file.read_bytes())
    for position in range(1000, len(body), 1000):
        body[position] ^= 1
    file.write_bytes(body)
    with pytest.raises(ValueError, match="damaged|hash"):
        regrow.load_model(tmp_path / "r")


def test_what_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist or is empty|must be a checkpoint"):
        regrow.load_model(tmp_path / "nothing")
