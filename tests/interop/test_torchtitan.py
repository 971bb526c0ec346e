"""torchtitan's checkpoints of two generations, in and out, weights and optimizer; and its Hugging Face folders."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from regrow.checkpoint.format.tensor_source import Box, TensorInfo, TensorSource
from regrow.checkpoint.load.open_source import open_source, read_whole
from regrow.checkpoint.sources.hf_mapping import FromHfSource, ToHfSource
from regrow.checkpoint.storage.opening import as_storage
from regrow.launch.run.weights import open_weights
from regrow.models.llama3.config import Llama3Config
from regrow.models.torchtitan import fused_keys, our_name, todays_keys, todays_name
from regrow.trainer.parallel.context import close_parallel
from tests.interop import titan_side
from tests.interop.test_command import one_sentence
from tests.pool import run_distributed
from tests.runs import train
from tests.support import record, stored_tensors, tiny, typed_config

pytestmark = pytest.mark.slow


def config_of(**changes: Any) -> Llama3Config:
    """The tests' tiny model."""
    dims = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 64, "vocab_size": 320}
    return Llama3Config(name="titan", max_seq_len=128, **{**dims, **changes})


class Held(TensorSource):
    """Tensors in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.place, self.tensors = "memory", tensors
        self.infos = {n: TensorInfo(dtype=t.dtype, shape=tuple(t.shape)) for n, t in tensors.items()}

    def read(self, name: str, box: Box) -> Tensor:
        return self.tensors[name][tuple(slice(*d) for d in box)].contiguous()


@settings(max_examples=60, deadline=None)
@given(
    heads=st.integers(1, 4).flatmap(lambda kv: st.tuples(st.just(kv), st.integers(1, 4))),
    width=st.integers(1, 3).map(lambda n: 2 * n),
    data=st.data(),
)
def test_any_rows_of_a_fused_matrix_are_read_and_written(
    heads: tuple[int, int], width: int, data: st.DataObject
) -> None:
    kv, queries = heads
    config = config_of(n_heads=kv * queries, n_kv_heads=kv, dim=kv * queries * width, n_layers=1)
    fused = titan_side.FusedQkv(config)
    name = "optimizer.state.layers.0.attention.qkv_linear.wqkv.weight.exp_avg"
    stored = Held({name: fused.wqkv.weight.detach(), name.replace("exp_avg", "step"): torch.tensor(3.0)})
    keys = fused_keys(config, stored.infos.keys())
    ours = FromHfSource(stored, keys)
    back = ToHfSource(ours, todays_keys(config, ours.infos))
    assert back.infos == stored.infos
    parts = dict(zip(("wq", "wk", "wv"), fused.split(fused.wqkv.weight.detach()), strict=True))
    whole: dict[str, tuple[TensorSource, Tensor]]
    whole = {f"optimizer.state.layers.0.attention.{w}.weight.exp_avg": (ours, p) for w, p in parts.items()}
    whole[name] = (back, fused.wqkv.weight.detach())
    for wanted, (source, expected) in whole.items():
        assert source.infos[wanted].shape == tuple(expected.shape)
        rows = sorted(data.draw(st.lists(st.integers(0, expected.shape[0]), min_size=2, max_size=2, unique=True)))
        found = source.read(wanted, ((rows[0], rows[1]), (0, 2)))
        assert torch.equal(found, expected[rows[0] : rows[1], :2])
    assert read_whole(back, name.replace("exp_avg", "step")) == 3.0


@pytest.mark.parametrize("prefix", ["", "optimizer.state."])
def test_names_of_every_generation(prefix: str) -> None:
    """Ours on the right; the first is today's."""
    generations = {
        "output.weight": ["lm_head.weight"],
        "layers.3.attention.wk.weight": ["layers.3.attention.qkv_linear.wk.weight"],
        "layers.3.feed_forward.w2.weight": ["layers.3.feed_forward.w2.weight"],
        "layers.3.moe.experts.w2": [
            "layers.3.moe.routed_experts.inner_experts.w2_EDF",
            "layers.3.moe.experts.w2_EDF",
            "layers.3._checkpoint_wrapped_module.moe.experts.w2",
        ],
        "layers.3.moe.expert_bias": ["layers.3.moe.expert_bias_E"],
    }
    for ours, theirs in generations.items():
        assert todays_name(prefix + ours) == prefix + theirs[0]
        assert {our_name(prefix + n) for n in [*theirs, ours]} == {prefix + ours}


def _save(state: dict[str, Any], folder: Path) -> None:
    """On two ranks by stock `dcp.save`, sharded as FSDP2 shards."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))

    def shard(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: shard(v) for k, v in value.items()}
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        return distribute_tensor(value.detach(), mesh, [Shard(0) if value.shape[0] % 2 == 0 else Replicate()])

    dcp.save(shard(state), checkpoint_id=folder)
    dist.barrier()
    close_parallel()


@pytest.fixture(scope="module", params=["today", "before", "tied"])
def titan(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Tensor], Llama3Config]:
    """The folder of step 7 of a run, and what is in it under our names."""
    config = config_of(tied_embeddings=request.param == "tied")
    model, optimizer = titan_side.make(config, today=request.param != "before")
    folder = tmp_path_factory.mktemp(request.param)
    step = folder / "checkpoint/step-7"
    state = titan_side.checkpoint(model, optimizer)
    if request.param == "today":
        run_distributed(_save, state, step, world_size=2)
    else:
        with warnings.catch_warnings(action="ignore"):
            dcp.save(state, checkpoint_id=step, no_dist=True)
    return step, titan_side.in_our_names(model, optimizer), config


@pytest.mark.slow
def test_every_tensor_is_found_by_itself(titan: tuple[Path, dict[str, Tensor], Llama3Config]) -> None:
    folder, expected, config = titan
    opened = open_weights(as_storage(folder), config)
    assert opened.same == (("output.weight",) if config.tied_embeddings else ())
    with opened.source as source:
        assert set(source.infos) == {*expected, *opened.same}
        assert all(torch.equal(read_whole(source, name), tensor) for name, tensor in expected.items())


def test_a_run_goes_on_with_its_optimizer(
    titan: tuple[Path, dict[str, Tensor], Llama3Config], corpus: Path, tmp_path: Path
) -> None:
    folder, expected, config = titan
    ranks = 2 if folder.parent.parent.name.startswith("today") else 1
    overrides = tiny(
        corpus,
        "hooks=none",
        f"model.tied_embeddings={str(config.tied_embeddings).lower()}",
        "optimizer.lr=0.0",
        # So that one step leaves the moments as they were, but for rounding.
        "optimizer.beta1=0.99999999",
        "optimizer.beta2=0.99999999",
        f"checkpoint.initial_load_path={folder}",
        "checkpoint.initial_load_model_only=false",
        *(["parallel=fsdp", "parallel.dp_shard=2"] if ranks == 2 else []),
    )
    assert train([*overrides, "train.steps=8"], tmp_path / "run", world_size=ranks).step == 8
    stored = stored_tensors(tmp_path / "run/checkpoint/step-8")
    assert set(expected) <= set(stored)
    for name, tensor in expected.items():
        wanted = torch.tensor(8.0) if name.endswith(".step") else tensor
        torch.testing.assert_close(stored[name], wanted, rtol=1e-5, atol=1e-7)
    log = (tmp_path / "run/logs/rank-0.log").read_text()
    assert f"initial load from {folder}, unverified; continuing after step 7" in log
    assert [a["from_step"] for a in record(tmp_path / "run")["attempts"]] == [7]
    with pytest.raises(
        ValueError, match=r"train.steps must be above the step of .* \(7\) to go on from it, but is 7"
    ):
        train([*overrides, "train.steps=7"], tmp_path / "short", world_size=ranks)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("tied", [False, True])
def test_out_and_back_bitwise(tied: bool, corpus: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Stock DCP fills torchtitan's model and optimizer of today from the folder; they go back into a run."""
    overrides = tiny(corpus, "hooks=none", "train.steps=3", f"model.tied_embeddings={str(tied).lower()}")
    train(overrides, tmp_path / "run")
    export = ["export", tmp_path / "run", tmp_path / "titan", "--format", "torchtitan"]
    assert run_ckpt(export, monkeypatch, capsys)[0] == 0
    model, optimizer = titan_side.make(config_of(tied_embeddings=tied), seed=5)
    state = titan_side.checkpoint(model, optimizer)
    del state["dataloader"]
    dcp.load(state, checkpoint_id=tmp_path / "titan", no_dist=True)
    model.load_state_dict({n: t for n, t in state.items() if isinstance(t, Tensor)})
    titan_side.load_optimizer(optimizer, state["optimizer"])
    assert state["train_state"]["step"] == state["lr_scheduler"]["last_epoch"] == 3
    assert state["train_state"]["ntokens_seen"] == 3 * 16 * 32
    (group,) = optimizer.param_groups
    config = typed_config(overrides).optimizer
    assert (group["lr"], group["weight_decay"]) == (config.lr, config.weight_decay)
    stored = stored_tensors(tmp_path / "run/checkpoint/step-3")
    found = titan_side.in_our_names(model, optimizer)
    assert set(found) == {n for n in stored if not n.startswith("train_state.")}
    assert all(torch.equal(found[n], stored[n]) for n in found)
    # Ours read it back, verified; a run that starts from it goes on as the first one would.
    assert run_ckpt(["verify", tmp_path / "titan"], monkeypatch, capsys)[0] == 0
    assert run_ckpt(["diff", tmp_path / "titan", tmp_path / "run"], monkeypatch, capsys)[0] == 0
    if tied:
        return
    loading = [f"checkpoint.initial_load_path={tmp_path}/titan", "checkpoint.initial_load_model_only=false"]
    longer = [o.replace("train.steps=3", "train.steps=5") for o in overrides]
    schedule = ["scheduler.total_steps=5", "run.allow_change=[scheduler.total_steps]"]
    train([*longer, *schedule, *loading], tmp_path / "again")
    train([*longer, *schedule], tmp_path / "run")
    left, right = (stored_tensors(tmp_path / r / "checkpoint/step-5") for r in ("again", "run"))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[n], right[n]) for n in right)


def run_ckpt(arguments: list[Any], monkeypatch: Any, capsys: Any) -> tuple[int, str]:
    """`regrow-ckpt`; its exit code and error output."""
    from regrow.launch.commands.checkpoint import main

    monkeypatch.setattr("sys.argv", ["regrow-ckpt", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0), capsys.readouterr().err


def test_its_hugging_face_folders_have_no_config(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Names are the format's mark: rows are Hugging Face's, and must fit the model that is given."""
    from tests.interop.hf_models import make, ours, tokens

    theirs = make("llama3", tmp_path / "hf")
    for name in ("config.json", "generation_config.json"):
        (tmp_path / "hf" / name).unlink()
    into = ["import", tmp_path / "hf", tmp_path / "step"]
    code, err = run_ckpt(into, monkeypatch, capsys)
    assert code == 2
    assert "--model must be given for" in one_sentence(err)
    code, err = run_ckpt([*into, "--model", "llama3_8b"], monkeypatch, capsys)
    assert code == 2
    assert "must hold layers.3.attention.wq.weight, but does not" in one_sentence(err)
    assert not list(tmp_path.glob("step*"))
    dims = {
        "dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 320, "ffn_dim": 96, "rope_theta": 10000.0,
        "rope_scaling.factor": 8.0, "rope_scaling.original_max_seq_len": 64, "norm_eps": 1e-6,
    }  # fmt: skip
    known = ["--model", "llama3_debug", *(x for k, v in dims.items() for x in ("--override", f"model.{k}={v}"))]
    code, err = run_ckpt([*into, *known, "--override", "model.ffn_dim=64"], monkeypatch, capsys)
    assert code == 2
    assert "has shape (96, 64), but the model's has (64, 64)" in one_sentence(err)
    assert run_ckpt([*into, *known], monkeypatch, capsys)[0] == 0
    with open_source(tmp_path / "step") as source:
        logits = ours(config_of(**_nested(dims)), source)(tokens())
    expected = theirs.model(tokens()).logits
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def _nested(dims: dict[str, Any]) -> dict[str, Any]:
    from regrow.models.llama3.config import RopeScalingConfig

    scaling = {k.partition(".")[2]: v for k, v in dims.items() if "." in k}
    return {**{k: v for k, v in dims.items() if "." not in k}, "rope_scaling": RopeScalingConfig(**scaling)}


def test_experts_go_out_and_back_without_an_optimizer(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    from tests.interop.hf_models import make

    make("qwen3_moe", tmp_path / "hf")
    titan = tmp_path / "titan"
    assert run_ckpt(["export", tmp_path / "hf", titan, "--format", "torchtitan"], monkeypatch, capsys)[0] == 0
    with open_source(titan) as source:
        assert source.infos["layers.1.moe.routed_experts.inner_experts.w2_EDF"].shape == (4, 64, 48)
        assert {n.rpartition(".attention.")[2] for n in source.infos if ".qkv_linear." in n} == {
            f"qkv_linear.{w}.weight" for w in ("wq", "wk", "wv")
        }
    assert run_ckpt(["diff", titan, tmp_path / "hf"], monkeypatch, capsys)[0] == 0
    # From there to any other format, by the names that are found.
    assert run_ckpt(["export", titan, tmp_path / "out"], monkeypatch, capsys)[0] == 0
    assert run_ckpt(["diff", tmp_path / "out", tmp_path / "hf"], monkeypatch, capsys)[0] == 0
