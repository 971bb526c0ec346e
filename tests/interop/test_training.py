"""Through training: weights in from Hugging Face, folders out, seed checkpoints, extending after weights alone."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from regrow.checkpoint.format.manifest import read_manifest
from regrow.checkpoint.load.open_source import open_source, read_whole
from tests.interop.hf_models import KINDS, make
from tests.runs import train
from tests.support import TINY_DATA, metrics, record, stored_tensors, tiny

pytestmark = pytest.mark.slow

FSDP = ["parallel=fsdp", "parallel.dp_shard=2"]


def from_hf(folder: Path, corpus: Path, *overrides: str) -> list[str]:
    """Overrides for a tiny run of the model in a folder."""
    return [
        "model=from_hf",
        f"model.path={folder}",
        *TINY_DATA,
        f"data.files=[{corpus}]",
        "hooks=none",
        "launch.threads_per_rank=1",
        "launch.kernels=plain",
        *overrides,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_from_hf_through_two_ranks_to_generated_text(kind: str, corpus: Path, tmp_path: Path) -> None:
    make(kind, tmp_path / "hf")
    overrides = from_hf(
        tmp_path / "hf",
        corpus,
        *FSDP,
        "train.steps=5",
        "checkpoint=export_hf",
        "checkpoint.export.max_shard_size=60KB",
    )
    result = train(overrides, tmp_path / "run", world_size=2)
    assert (result.kind, result.step) == ("finished", 5)
    out = tmp_path / "run/export/step-5"
    assert sorted(p.name for p in (tmp_path / "run/export").iterdir()) == ["step-5"]
    names = {p.name for p in out.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"} < names
    assert len(list(out.glob("*.safetensors"))) > 2
    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values()), loading
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("the words", return_tensors="pt").input_ids
    generated = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(generated[0])
    assert generated.shape[1] > ids.shape[1]
    # The same command again finds the run finished.
    assert train(overrides, tmp_path / "run", world_size=2).kind == "finished"
    assert len(record(tmp_path / "run")["attempts"]) == 1


@pytest.mark.slow
def test_weights_arrive_under_every_layout(corpus: Path, tmp_path: Path) -> None:
    """Bitwise: step 1 with a learning rate of 0 holds what the folder holds."""
    theirs = make("llama3", tmp_path / "hf")
    for name, layout, ranks in (
        ("one", [], 1),
        ("two", FSDP, 2),
        ("four", ["parallel=fsdp", "parallel.dp_shard=4"], 4),
    ):
        overrides = from_hf(tmp_path / "hf", corpus, *layout, "train.steps=1", "optimizer.lr=0.0")
        train(overrides, tmp_path / name, world_size=ranks)
        stored = stored_tensors(tmp_path / name / "checkpoint/step-1")
        expected = theirs.model.state_dict()
        assert torch.equal(stored["tok_embeddings.weight"], expected["model.embed_tokens.weight"])
        assert torch.equal(stored["layers.2.feed_forward.w2.weight"], expected["model.layers.2.mlp.down_proj.weight"])
        q, k = stored["layers.1.attention.wq.weight"], expected["model.layers.1.self_attn.q_proj.weight"]
        assert not torch.equal(q, k)
        assert torch.equal(q.view(4, 8, 2, -1).transpose(1, 2).reshape(k.shape), k)
    one, four = (metrics(tmp_path / n)[0]["loss"] for n in ("one", "four"))
    assert one == pytest.approx(four, rel=5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama3_tied", "qwen3_moe"])
def test_weights_go_in_and_out_of_a_pipeline_with_tensor_parts(kind: str, corpus: Path, tmp_path: Path) -> None:
    """Bitwise, the embedding at both ends of the pipeline and experts on different ranks included."""
    theirs = make(kind, tmp_path / "hf")
    layout = ["parallel.pp=2", "parallel.tp=2", *(["parallel.ep=2"] if kind == "qwen3_moe" else [])]
    still = ["train.steps=1", "optimizer.lr=0.0", "data.global_batch_size=4", "data.micro_batch_size=1"]
    out = ["checkpoint.last_save_in_hf=true", "checkpoint.export_dtype=float32"]
    train(from_hf(tmp_path / "hf", corpus, *layout, *still, *out), tmp_path / "run", world_size=4)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "run/export/step-1", output_loading_info=True)
    assert not any(loading.values()), loading
    found, expected = model.state_dict(), theirs.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_exports_while_training_and_after_a_kill(corpus: Path, tmp_path: Path) -> None:
    overrides = tiny(corpus, "hooks=none", "train.steps=6", "checkpoint.interval=3", "checkpoint.keep_latest_k=1")
    exporting = [*overrides, "checkpoint.export.every_n=2", "checkpoint.export_dtype=bfloat16"]
    train(exporting, tmp_path / "run")
    folder = tmp_path / "run/export"
    assert sorted(p.name for p in folder.iterdir()) == ["step-2", "step-4", "step-6"]
    # With its step still there an export that is missing is made at the next start.
    shutil.rmtree(folder / "step-6")
    (folder / ".step-6.new.partial-convert").mkdir()
    train([*exporting, "train.steps=8", "run.extend=hold"], tmp_path / "run")
    assert sorted(p.name for p in folder.iterdir()) == ["step-2", "step-4", "step-6", "step-8"]
    plain = train(overrides, tmp_path / "plain")
    assert plain.kind == "finished"
    full = stored_tensors(tmp_path / "plain/checkpoint/step-6")
    with open_source(folder / "step-6") as export:
        norm = read_whole(export, "model.layers.1.mlp.up_proj.weight")
    assert torch.equal(norm, full["layers.1.feed_forward.w3.weight"].bfloat16())


@pytest.mark.slow
@pytest.mark.parametrize("last", ["checkpoint.last_save_in_hf=true", "checkpoint.last_save_model_only=true"])
def test_extending_after_weights_alone(last: str, corpus: Path, tmp_path: Path) -> None:
    common = tiny(
        corpus, "hooks=none", "checkpoint.interval=4", "scheduler.total_steps=12", "checkpoint.keep_latest_k=1"
    )
    first = [*common, "train.steps=6", last, "checkpoint.export_dtype=bfloat16"]
    run = tmp_path / "run"
    assert train(first, run).kind == "finished"
    assert read_manifest(run / "checkpoint/step-4").kind == "full"
    assert train(first, run).kind == "finished"
    assert len(record(run)["attempts"]) == 1
    extended = train([*common, "train.steps=10"], run)
    assert (extended.kind, extended.step) == ("finished", 10)
    log = (run / "logs/rank-0.log").read_text()
    assert "the last full checkpoint is of step 4" in log
    assert "continuing after step 4" in log
    train([*common, "train.steps=10"], tmp_path / "undisturbed")
    left, right = (stored_tensors(r / "checkpoint/step-10") for r in (run, tmp_path / "undisturbed"))
    assert all(torch.equal(left[name], right[name]) for name in right)
    assert any(name.startswith("optimizer.") for name in right)
    assert [m["step"] for m in metrics(run)] == list(range(1, 11))


def test_extending_without_a_full_checkpoint_is_refused(corpus: Path, tmp_path: Path) -> None:
    common = tiny(corpus, "hooks=none")
    train([*common, "train.steps=2", "checkpoint.last_save_in_hf=true"], tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"train.steps must not be raised .* the Hugging Face folder of step 2 alone"
    ):
        train([*common, "train.steps=4"], tmp_path / "run")


def test_a_folder_is_made_of_a_finished_run(corpus: Path, tmp_path: Path) -> None:
    common = tiny(corpus, "hooks=none", "train.steps=2")
    train(common, tmp_path / "run")
    train([*common, "checkpoint.last_save_in_hf=true"], tmp_path / "run")
    assert [p.name for p in (tmp_path / "run/export").iterdir()] == ["step-2"]
    assert (tmp_path / "run/checkpoint/step-2").is_dir()


def test_a_type_too_small_keeps_the_full_state(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    theirs = make("qwen3", tmp_path / "hf")
    with torch.no_grad():
        theirs.model.get_parameter("model.norm.weight").fill_(1e6)
    theirs.model.save_pretrained(tmp_path / "hf")
    overrides = from_hf(
        tmp_path / "hf", corpus, "train.steps=1", "optimizer.lr=0.0", "checkpoint.last_save_in_hf=true"
    )
    failed = train([*overrides, "checkpoint.export_dtype=float16"], tmp_path / "run")
    assert failed.kind == "failed"
    assert "export_dtype must be able to hold every value, but norm.weight" in failed.message
    assert read_manifest(tmp_path / "run/checkpoint/step-1").kind == "full"
    assert not list((tmp_path / "run").rglob("*.safetensors"))
    train([*overrides, "checkpoint.export_dtype=bfloat16"], tmp_path / "run")
    assert (tmp_path / "run/export/step-1/config.json").is_file()
