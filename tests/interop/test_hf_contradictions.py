"""Hugging Face folders whose files contradict each other, or hold what is no model of ours."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.load.initial_load import LoadRules, check_load
from regrow.checkpoint.policy.lineage import StartKind, StartPoint
from regrow.checkpoint.storage.opening import as_storage
from regrow.launch.commands.identify_model import model_of
from regrow.launch.run.preflight import check_initial_load
from regrow.launch.run.prepare import convert_config
from regrow.launch.run.weights import open_weights, shapes_of
from regrow.models.config import DecoderConfig
from regrow.models.hf import families, from_folder
from regrow.models.llama3.config import Llama3Config, RopeScalingConfig
from regrow.models.qwen3.config import Qwen3Config, Qwen3MoeConfig
from regrow.trainer.hf_folder import HfExport, export_hf
from tests.interop.hf_models import make, ours, tokens
from tests.interop.test_torchtitan import Held
from tests.support import compose_config, typed_config

pytestmark = pytest.mark.slow


def one_file(folder: Path) -> dict[str, Tensor]:
    """The folder's weights."""
    return {n: t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}


def rewrite(folder: Path, weights: dict[str, Tensor], **fields: Any) -> None:
    """Puts other weights, in one file, and other fields into a folder."""
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


HEADS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], bool]] = {
    # Weights by their change, whether the model is tied then.
    "another head": (lambda w: {**w, "lm_head.weight": w["model.embed_tokens.weight"] * 2}, False),
    "one value differs": (lambda w: {**w, "lm_head.weight": _nudged(w["model.embed_tokens.weight"])}, False),
    "a copy": (lambda w: {**w, "lm_head.weight": w["model.embed_tokens.weight"].clone()}, True),
    "the head alone": (
        lambda w: {
            **{n: t for n, t in w.items() if n != "model.embed_tokens.weight"},
            "lm_head.weight": w["model.embed_tokens.weight"],
        },
        True,
    ),
    "no head": (lambda w: w, True),
}


def _nudged(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed[-1, -1] += 1.0
    return changed


@torch.no_grad()
@pytest.mark.parametrize("case", HEADS)
def test_a_tied_config_with_a_head_is_what_transformers_makes_of_it(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, tied = HEADS[case]
    make("llama3_tied", tmp_path / "hf")
    rewrite(tmp_path / "hf", change(one_file(tmp_path / "hf")))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    config = model_of(str(tmp_path / "hf"), None)
    assert isinstance(config, DecoderConfig)
    assert config.tied_embeddings is tied
    assert ("holds an lm_head.weight that is not the embedding" in caplog.text) is not tied
    opened = open_weights(as_storage(tmp_path / "hf"), config)
    with opened.source as source:
        check_load(source, shapes_of(config), LoadRules(), unused=opened.unused, beside=opened.same)
        logits = ours(config, source)(tokens())
    expected = theirs(tokens()).logits
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    # The same through the command's config, which a run stores.
    run = convert_config(compose_config(["model=from_hf", f"model.path={tmp_path / 'hf'}"]))[0].model
    assert isinstance(run, DecoderConfig)
    assert run.tied_embeddings is tied


def start(folder: Path, **changes: Any) -> StartPoint:
    """An initial load from Hugging Face."""
    values: dict[str, Any] = {"kind": StartKind.initial, "path": str(folder), "in_hf": True, "model_only": True}
    return StartPoint(**{**values, **changes})


VARIANT = [
    "model.dim=64", "model.n_layers=3", "model.n_heads=4", "model.n_kv_heads=2", "model.ffn_dim=96",
    "model.vocab_size=320",
]  # fmt: skip


def test_a_flavour_that_is_tied_otherwise_names_the_field(tmp_path: Path) -> None:
    """And the remedy of each sentence works."""
    for kind, given in (("llama3", "true"), ("llama3_tied", "false")):
        make(kind, tmp_path / kind)
        other = "false" if given == "true" else "true"
        tied = f"model.tied_embeddings={given}"
        with pytest.raises(CheckpointError, match=f"use model.tied_embeddings={other}, or checkpoint.load_strict"):
            check_initial_load(typed_config([*VARIANT, tied]), start(tmp_path / kind))
        remedied = typed_config([*VARIANT, f"model.tied_embeddings={other}"])
        assert check_initial_load(remedied, start(tmp_path / kind)).lines() == []
        left_out = check_initial_load(
            typed_config([*VARIANT, tied, "checkpoint.load_strict=false"]), start(tmp_path / kind)
        )
        assert left_out.unused == (("lm_head.weight",) if given == "true" else ())
        assert left_out.missing == (() if given == "true" else ("output.weight",))


def test_a_flavour_of_other_numbers_and_the_same_shapes_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make("llama3_tied", tmp_path / "hf")
    variant = [*VARIANT, "model.tied_embeddings=true", "model.norm_eps=1e-6"]
    check_initial_load(typed_config([*variant, "model.rope_theta=10000"]), start(tmp_path / "hf"))
    assert not caplog.records
    check_initial_load(typed_config([*variant, "model.rope_theta=20000"]), start(tmp_path / "hf"))
    (record,) = caplog.records
    assert "rope_parameters in" in record.getMessage()
    assert "'rope_theta': 10000.0" in record.getMessage()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            ("quantization_config", {"quant_method": method})
            for method in ("fp8", "gptq", "awq", "bitsandbytes", "compressed-tensors", "mxfp4")
        ),
        ("compression_config", {"format": "int-quantized"}),
        ("quantization_config", "unreadable"),
    ],
)
def test_a_quantised_folder_is_refused(field: str, value: Any, tmp_path: Path) -> None:
    make("llama3", tmp_path / "hf")
    rewrite(tmp_path / "hf", one_file(tmp_path / "hf"), **{field: value})
    message = f"{field} in .* must not be set, .* use the folder of the model in bfloat16"
    with pytest.raises(ValueError, match=message):
        model_of(str(tmp_path / "hf"), None)
    # Also where the model is a variant of ours and config.json is not needed.
    with pytest.raises(ValueError, match=message):
        check_initial_load(typed_config(VARIANT), start(tmp_path / "hf"))
    rewrite(tmp_path / "hf", one_file(tmp_path / "hf"), **{field: None})
    assert model_of(str(tmp_path / "hf"), None).vocab_size == 320


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("strict", ["true", "false"])
def test_weights_that_are_codes_are_refused_without_a_config_that_says_so(
    dtype: torch.dtype, strict: str, tmp_path: Path
) -> None:
    make("llama3", tmp_path / "hf")
    weights = one_file(tmp_path / "hf")
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(tmp_path / "hf", {**weights, name: weights[name].to(dtype)})
    config = typed_config([*VARIANT, f"checkpoint.load_strict={strict}"])
    with pytest.raises(
        CheckpointError, match=r"layers.1.feed_forward.w3.weight in .* quantised weights are not supp"
    ):
        check_initial_load(config, start(tmp_path / "hf"))


# What other folders of a family say; true of their weights, not of ours.
HOSTILE: dict[str, Any] = {
    "num_hidden_layers": 31,
    "head_dim": 80,
    "layer_types": ["sliding_attention"] * 31,
    "use_sliding_window": True,
    "sliding_window": 4,
    "max_window_layers": 0,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 7.0},
    "partial_rotary_factor": 0.5,
    "num_nextn_predict_layers": 1,
    "mtp_num_hidden_layers": 1,
    "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"},
    "mlp_only_layers": [0, 1],
    "decoder_sparse_step": 2,
    "num_experts": 77,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
    "pretraining_tp": 2,
    "initializer_range": "wide",
    "torch_dtype": "int8",
    "dtype": "float16",
    "attn_implementation": "flash_attention_3",
    "bos_token_id": 128_000,
    "eos_token_id": [7, 128_001],
    "pad_token_id": -1,
    "vocab_size": 128_256,
    "logits_to_keep": 1,
}
_COMMON: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 320}
_ROPE = RopeScalingConfig(factor=8.0, original_max_seq_len=64)
MODELS: dict[str, DecoderConfig] = {
    "llama3": Llama3Config(name="a", max_seq_len=128, ffn_dim=96, **_COMMON),
    "llama3.1": Llama3Config(name="a", max_seq_len=128, ffn_dim=96, rope_scaling=_ROPE, **_COMMON),
    "llama3 tied": Llama3Config(name="a", max_seq_len=128, ffn_dim=96, tied_embeddings=True, **_COMMON),
    "qwen3": Qwen3Config(name="a", max_seq_len=128, ffn_dim=96, head_dim=32, **_COMMON),
    "qwen3 tied": Qwen3Config(name="a", max_seq_len=128, ffn_dim=96, head_dim=16, tied_embeddings=True, **_COMMON),
    "qwen3 moe": Qwen3MoeConfig(
        name="a", max_seq_len=128, head_dim=32, n_experts=4, experts_per_token=2, expert_ffn_dim=48, **_COMMON
    ),
    "qwen3 moe as they are": Qwen3MoeConfig(
        name="a", max_seq_len=128, head_dim=16, n_experts=4, experts_per_token=1, expert_ffn_dim=48,
        norm_topk_prob=False, **_COMMON,
    ),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("model", MODELS)
def test_an_export_says_nothing_of_other_weights(model: str, tmp_path: Path) -> None:
    """Whatever the assets' config says: transformers opens the folder, and its logits are ours."""
    config = MODELS[model]
    family = next(f for f in families() if f.config_class is type(config))
    assets = tmp_path / "assets"
    assets.mkdir()
    named = {"architectures": [family.architecture, "Other"], "model_type": family.model_type}
    (assets / "config.json").write_text(json.dumps({**HOSTILE, **named}))
    sampling = {"do_sample": False, "temperature": -1.0, "eos_token_id": 128_001, "cache_implementation": "none"}
    (assets / "generation_config.json").write_text(json.dumps(sampling))
    source = by_chance(config)
    export = HfExport(config=config, dtype=None, max_shard_bytes=80_000, assets=assets, tokenizer=None)
    export_hf(source, tmp_path / "out", export)
    theirs, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    assert theirs.dtype == torch.float32
    expected = ours(config, source)(tokens())
    found = theirs.eval()(tokens()).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"], written["pad_token_id"]) == (None, [7], None)
    assert not written.keys() & {"quantization_config", "auto_map", "layer_types", "mtp_num_hidden_layers"}
    theirs.generate(tokens()[:, :4], max_new_tokens=2)
    # And it comes back as what it was.
    again = from_folder(tmp_path / "out", "a")[1]
    assert again == config


def by_chance(config: DecoderConfig) -> Held:
    """A model's parameters under our names."""
    generator = torch.Generator().manual_seed(3)

    def values(shape: tuple[int, ...]) -> Tensor:
        return (
            torch.rand(shape, generator=generator) + 0.5
            if len(shape) == 1
            else torch.randn(shape, generator=generator) * 0.1
        )

    return Held({name: values(shape) for name, shape in shapes_of(config).items()})


def test_a_config_of_wrong_numbers_is_one_sentence(tmp_path: Path) -> None:
    make("qwen3_moe", tmp_path / "hf")
    path = tmp_path / "hf/config.json"
    fields = json.loads(path.read_text())
    wrong: dict[str, tuple[Any, str]] = {
        "num_hidden_layers": (10**9, "num_hidden_layers in config.json must be a whole number from 1 to 4096"),
        "hidden_size": ("64", "hidden_size in config.json must be a whole number"),
        "num_attention_heads": (True, "num_attention_heads in config.json must be a whole number"),
        "rms_norm_eps": (float("nan"), "rms_norm_eps in config.json must be a number above 0"),
        "rope_parameters": ({"full_attention": {"rope_theta": 1.0}}, "must be those of all layers alike"),
        "partial_rotary_factor": (0.25, "partial_rotary_factor in config.json must be 1.0"),
        "layer_types": (["full_attention", "linear_attention"], "'linear_attention'; it is not supported"),
        "architectures": ({"a": 1}, "architectures in .* must be a list of names"),
        "num_key_value_heads": (3, "must describe a model that can be built, but model.n_kv_heads must divide"),
    }
    for name, (value, message) in wrong.items():
        path.write_text(json.dumps({**fields, name: value}))
        with pytest.raises(ValueError, match=message) as caught:
            model_of(str(tmp_path / "hf"), None)
        assert len(str(caught.value).splitlines()) == 1
    for body in ("[" * 100_000, "[]", "{", '{"a": \xff'):
        path.write_bytes(body.encode("latin-1"))
        with pytest.raises(ValueError, match=r"config.json must be (JSON|a JSON object), but is"):
            from_folder(tmp_path / "hf")
