"""What an initial load refuses: every remedy that a sentence names is carried out, as a shell would, and works."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.load.initial_load import LoadPlan
from regrow.checkpoint.policy.lineage import LoadRequest, StartKind, StartPoint
from regrow.launch.run.preflight import check_config, check_initial_load
from regrow.launch.run.weights import shapes_of
from tests.runs import train
from tests.support import stored_tensors, tiny, typed_config

pytestmark = pytest.mark.slow

TINY = [
    "model.dim=32",
    "model.n_layers=2",
    "model.n_heads=4",
    "model.n_kv_heads=2",
    "model.ffn_dim=64",
    "model.vocab_size=320",
]


def weights(*overrides: str) -> dict[str, Tensor]:
    """Of the tiny model, all different."""
    generator = torch.Generator().manual_seed(9)
    shapes = shapes_of(typed_config([*TINY, *overrides]).model)
    return {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}


def in_hf(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same names as there; rows are as they are, which nobody looks at here."""
    rules = {
        "tok_embeddings": "model.embed_tokens", "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm", "output": "lm_head",
    }  # fmt: skip
    named = {}
    for name, tensor in tensors.items():
        theirs = name
        for ours, other in rules.items():
            theirs = theirs.replace(f"{ours}.weight", f"{other}.weight")
        named[theirs if theirs.startswith(("model.", "lm_head")) else f"model.{theirs}"] = tensor
    return named


def without(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    """Some tensors left out."""
    return {n: t for n, t in tensors.items() if n not in names}


def check(overrides: list[str]) -> LoadPlan:
    """The preflight of a command's initial load."""
    # The last of a field counts, as a user who edits the command would have it.
    given = {o.partition("=")[0]: o for o in [*TINY, *overrides]}
    config = typed_config(list(given.values()))
    check_config(config)
    request = LoadRequest.from_config(config.checkpoint)
    start = StartPoint(
        kind=StartKind.initial,
        path=request.initial_load_path,
        exclude=request.exclude,
        model_only=request.initial_load_model_only or request.initial_load_in_hf,
        in_hf=request.initial_load_in_hf,
    )
    return check_initial_load(config, start)


def remedies(sentence: str) -> list[list[str]]:
    """The overrides of each alternative, as a shell hands them on."""
    found = []
    for alternative in re.split(r", or |; ", sentence):
        words = re.findall(
            r"'(?:checkpoint|model|train)\.[a-z_]+=[^']*'|\b(?:checkpoint|model|train)\.[a-z_]+=\S+", alternative
        )
        if words:
            command = ["bash", "-c", f"printf '%s\\n' {' '.join(w.rstrip(',;') for w in words)}"]
            found.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines())
    return found


W = weights()
# By name: the tensors of a file, the command's overrides, what the sentence says, and how many remedies it has.
REFUSED: dict[str, tuple[dict[str, Tensor], list[str], str, int]] = {
    "said to be Hugging Face's": (W, ["checkpoint.initial_load_in_hf=true"], "initial_load_in_hf must be false for", 1),
    "not said to be Hugging Face's": (in_hf(W), [], "initial_load_in_hf must be true for", 1),
    "missing": (without(W, "norm.weight", "output.weight"), [], r"must hold norm.weight, but does not \(2 of 21", 1),
    "no output layer": (without(W, "output.weight"), [], "must hold output.weight, .*; use model.tied_embeddings=true", 2),
    "another output layer": (W, ["model.tied_embeddings=true"], "holds output.weight, .*; use model.tied_embeddings=f", 2),
    "further tensors": ({**W, "layers.2.x": torch.ones(32)}, [], r"holds layers.2.x, .* \(1 such names\)", 1),
    "both": ({**without(W, "norm.weight"), "x": torch.ones(32)}, [], r"what is missing and leave out what is not", 1),
    "another vocabulary": (W, ["model.vocab_size=330"], r"has shape \(320, 32\), .*; use model.vocab_size=320", 2),
    "another vocabulary and missing": (
        without(W, "norm.weight"), ["model.vocab_size=330"], "load_strict=false checkpoint.load_resized=true to start", 1,
    ),
    "another vocabulary, Hugging Face": (
        in_hf(W), ["model.vocab_size=330", "checkpoint.initial_load_in_hf=true"], "or checkpoint.load_resized=true", 2,
    ),
    "a prefix": ({f"net.{n}": t for n, t in W.items()}, [], "holds none of them: it has net.layers.*; add 'check", 1),
    "a prefix, not strict": (
        {f"net.{n}": t for n, t in W.items()}, ["checkpoint.load_strict=false"], r"holds none of them: .* 19 more; add", 1,
    ),
    "nothing": ({"a": W["norm.weight"]}, [], "holds none of them: it has a; use the model it was saved from$", 0),
    "nothing, not strict": ({"a": W["norm.weight"]}, ["checkpoint.load_strict=false"], "holds none of them: it has a;", 0),
    "other dimensions": (W, ["model.ffn_dim=128"], r"has shape \(64, 32\), but the model's has \(128, 32\)", 0),
    "other dimensions, not strict": (
        without(W, "norm.weight"), ["model.ffn_dim=128", "checkpoint.load_strict=false"], "use the model's dimensions", 0,
    ),
    "an idle rule": (W, ["checkpoint.load_rename=['blocks=>layers']"], "'blocks=>layers' matches none of", 0),
    "no optimizer": (W, ["checkpoint.initial_load_model_only=false"], "must hold optimizer.state.tok_embeddings", 1),
    "no optimizer, but a step": (
        {**W, "train_state.step": torch.tensor(5)}, ["checkpoint.initial_load_model_only=false"], "or 'checkpoint.excl", 2,
    ),
    "a step beyond the end": (
        {**W, "train_state.step": torch.tensor(50)},
        ["checkpoint.initial_load_model_only=false", "checkpoint.exclude_from_loading=[optimizer]", "train.steps=50"],
        r"train.steps must be above the step of .* \(50\)", 1,
    ),
    "no step": (
        {**W, "train_state.step": torch.tensor(-2)}, ["checkpoint.initial_load_model_only=false"], "must be a step", 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_every_remedy_works(case: str, tmp_path: Path) -> None:
    tensors, overrides, pattern, count = REFUSED[case]
    form = ("file", "folder")[list(REFUSED).index(case) % 2]
    place = tmp_path / "weights"
    place.mkdir()
    half = len(tensors) // 2 if form == "folder" else 0
    for number, part in enumerate((list(tensors)[:half], list(tensors)[half:])):
        if part:
            save_file({n: tensors[n] for n in part}, place / f"{number}.safetensors")
    path = place if form == "folder" else place / "1.safetensors"
    command = [*overrides, f"checkpoint.initial_load_path={path}"]
    with pytest.raises(CheckpointError) as caught:
        check(command)
    sentence = str(caught.value)
    assert len(sentence.splitlines()) == 1
    assert re.search(pattern, sentence), sentence
    found = remedies(sentence)
    assert len(found) == count, sentence
    for remedy in found:
        check([*command, *remedy])


def test_the_sentences_about_rules_give_an_example_that_a_shell_and_hydra_take() -> None:
    for wrong in ("a", "(=>b"):
        with pytest.raises(ValueError, match="load_rename must hold rules") as caught:
            check([f"checkpoint.load_rename=['{wrong}']", "checkpoint.initial_load_path=x"])
        ((example,),) = remedies(str(caught.value))
        assert typed_config([example]).checkpoint.load_rename == [r"^model\.=>"]


def test_buffers_may_lie_beside_the_parameters(tmp_path: Path) -> None:
    """As in our own steps of a mixture of experts."""
    model = ["model=qwen3_moe_debug", "model.vocab_size=320"]
    shapes = shapes_of(typed_config(model).model)
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_file({**tensors, "layers.0.moe.expert_bias_E": torch.zeros(8)}, tmp_path / "a.safetensors")
    config = typed_config([*model, f"checkpoint.initial_load_path={tmp_path}/a.safetensors"])
    start = StartPoint(kind=StartKind.initial, path=f"{tmp_path}/a.safetensors", model_only=True)
    assert check_initial_load(config, start).lines() == []


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    names = ("norm.weight", "tok_embeddings.weight", "output.weight")
    save_file({n.replace("output", "lm_head"): W[n] for n in names}, tmp_path / "a.safetensors")
    loading = [f"checkpoint.initial_load_path={tmp_path}/a.safetensors", "checkpoint.load_strict=false"]
    rule = "checkpoint.load_rename=['nothing=>x']"
    plan = check([*loading, rule, "model.tied_embeddings=true"])
    assert plan.found == ("tok_embeddings.weight", "norm.weight")
    missing, unused, idle = plan.lines()
    assert missing.startswith("18 tensors missing, keep their initial values: layers.0.")
    assert unused == "1 tensors not used: output.weight"
    assert idle == "the rule nothing=>x of checkpoint.load_rename matches no name"


def test_a_run_starts_from_a_folder_of_safetensors_and_says_how_much_it_found(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    half = len(W) // 2
    save_file(dict(list(W.items())[:half]), tmp_path / "w/a.safetensors")
    common = tiny(corpus, "hooks=none", "train.steps=1", "optimizer.lr=0.0", "checkpoint.load_strict=false")
    loading = f"checkpoint.initial_load_path={tmp_path}/w"
    train([*common, loading], tmp_path / "some")
    log = (tmp_path / "some/logs/rank-0.log").read_text()
    assert f"initial load from {tmp_path}/w, unverified, model only, {half} of 21 tensors; continuing" in log
    save_file(dict(list(W.items())[half:]), tmp_path / "w/b.safetensors")
    train([*common, loading, "parallel=fsdp", "parallel.dp_shard=2"], tmp_path / "all", world_size=2)
    stored = stored_tensors(tmp_path / "all/checkpoint/step-1")
    assert all(torch.equal(stored[n], t) for n, t in W.items())
    log = (tmp_path / "all/logs/rank-0.log").read_text()
    assert f"initial load from {tmp_path}/w, unverified, model only; continuing after step 0" in log
