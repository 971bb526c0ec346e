"""Weights from and to `transformers`, the real one."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from regrow.checkpoint.convert.conversion_plan import plan_safetensors, plan_step
from regrow.checkpoint.convert.convert import convert
from regrow.checkpoint.format.manifest import Manifest
from regrow.checkpoint.load.open_source import open_source, read_whole
from regrow.checkpoint.sources.hf_mapping import FromHfSource, ToHfSource
from regrow.models.hf import families, family_of, from_folder
from regrow.models.hf_rows import RopeHalves
from regrow.models.llama3.config import Llama3Config
from tests.configs.test_configs import CHOICES
from tests.interop.hf_models import KINDS, make, ours, tokens
from tests.support import typed_config

pytestmark = pytest.mark.slow

VARIANTS = [c for c in CHOICES["model"] if c != "model=from_hf"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_map_is_a_bijection(variant: str) -> None:
    """Every parameter of ours is filled once, and every tensor of theirs read once, with shapes that fit."""
    from regrow.launch.run.build import build_model

    config = typed_config([variant])
    with torch.device("meta"):
        model = build_model(config)
    parameters = dict(model.named_parameters())
    keys = family_of(config.model).keys(config.model)
    assert len({k.hf_name for k in keys}) == len(keys)
    assert len({(k.name, k.index) for k in keys}) == len(keys)
    assert {k.name for k in keys} == parameters.keys()
    for key in keys:
        if key.index is not None:
            slices = [k.index for k in keys if k.name == key.name] if key.index == 0 else []
            assert slices in ([], list(range(parameters[key.name].shape[0])))
        if isinstance(key.transform, RopeHalves):
            assert parameters[key.name].shape[0] % (2 * key.transform.heads) == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_json_and_back(variant: str) -> None:
    config = typed_config([variant]).model
    family = family_of(config)
    again = family.read(family.describe(config), config.name)
    assert dataclasses.asdict(again) == dataclasses.asdict(config)


def test_every_family_has_names_of_its_own() -> None:
    assert sorted(f.architecture for f in families()) == [
        "LlamaForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_in_and_out_again(kind: str, tmp_path: Path) -> None:
    theirs = make(kind, tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    family, config = from_folder(tmp_path / "hf")
    keys = family.keys(config)
    with FromHfSource(open_source(tmp_path / "hf"), keys) as source:
        assert source.unused == []
        convert(
            source,
            lambda infos, _work: plan_step(infos, Manifest(step=0, lineage="", kind="model"), file_bytes=100_000),
            tmp_path / "step",
            identity={},
        )
    with open_source(tmp_path / "step") as step:
        logits = ours(config, step)(tokens())
        expected = theirs.model(tokens()).logits
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        small = {"config.json": (tmp_path / "hf/config.json").read_bytes()}
        convert(
            ToHfSource(step, keys),
            lambda infos, _work: plan_safetensors(infos, max_shard_bytes=80_000, small=small),
            tmp_path / "out",
            identity={},
        )
    with open_source(tmp_path / "hf") as a, open_source(tmp_path / "out") as b:
        assert a.infos == b.infos
        for name in a.infos:
            assert torch.equal(read_whole(a, name), read_whole(b, name)), name
    again, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    assert torch.equal(again(tokens()).logits, expected)


def _kl(p: Tensor, q: Tensor) -> float:
    """KL(p ‖ q) of two models' predictions, the mean over positions."""
    return float(
        F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean().abs()
    )


@torch.no_grad()
def test_kl_in_fp64_and_that_it_sees_a_missing_permutation(tmp_path: Path) -> None:
    theirs = make("llama3", tmp_path / "hf", torch.float64)
    family, config = from_folder(tmp_path / "hf")
    assert isinstance(config, Llama3Config)
    keys = family.keys(config)
    expected = theirs.model(tokens()).logits
    assert expected.dtype == torch.float64
    with open_source(tmp_path / "hf") as raw:
        right = ours(config, FromHfSource(raw, keys), torch.float64)(tokens())
        assert _kl(expected, right) < 1e-12
        unpermuted = [dataclasses.replace(k, transform=None) for k in keys]
        wrong = ours(config, FromHfSource(raw, unpermuted), torch.float64)(tokens())
        assert _kl(expected, wrong) > 1e-6
