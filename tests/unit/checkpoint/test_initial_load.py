"""Starting from weights in part: names, shapes, types."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from regrow.checkpoint.config import CheckpointConfig
from regrow.checkpoint.errors import CheckpointError
from regrow.checkpoint.format.tensor_source import segments, whole
from regrow.checkpoint.load.initial_load import LoadRules, RenamedSource, check_load, load_from
from regrow.checkpoint.load.open_source import open_source

SHAPES = {"tok_embeddings.weight": (6, 4), "layers.0.w.weight": (4, 4), "output.weight": (6, 4)}
VOCABULARY = ("tok_embeddings.weight", "output.weight")


def stored(folder: Path, **changes: Tensor | None) -> Path:
    """A file with the tensors of `SHAPES`, changed."""
    tensors = {n: torch.arange(float(torch.Size(s).numel())).view(s) for n, s in SHAPES.items()}
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, folder / "a.safetensors")
    return folder / "a.safetensors"


def targets() -> dict[str, Tensor]:
    """A model's tensors, all -1."""
    return {n: torch.full(s, -1.0) for n, s in SHAPES.items()}


def test_strict_wants_every_name_and_no_more(tmp_path: Path) -> None:
    with open_source(stored(tmp_path, layers__0__w__weight=None)) as source:
        with pytest.raises(
            CheckpointError, match=r"must hold layers.0.w.weight, but does not \(1 of 3 .* checkpoint.load_strict"
        ):
            check_load(source, SHAPES, LoadRules())
        plan = check_load(source, SHAPES, LoadRules(strict=False))
        assert (plan.missing, plan.unused) == (("layers.0.w.weight",), ())
        into = targets()
        load_from(source, into, LoadRules(strict=False))
        assert (into["layers.0.w.weight"] == -1).all()
        assert (into["output.weight"] >= 0).all()
    with open_source(stored(tmp_path, layers__1__w__weight=torch.zeros(2))) as source:
        with pytest.raises(CheckpointError, match=r"holds layers.1.w.weight, which the model does not have \(1 such"):
            check_load(source, SHAPES, LoadRules())
        assert check_load(source, SHAPES, LoadRules(strict=False)).lines() == [
            "1 tensors not used: layers.1.w.weight"
        ]


def test_what_is_no_weight_may_lie_beside(tmp_path: Path) -> None:
    beside = {"optimizer__state__w__exp_avg": torch.zeros(1), "train_state__step": torch.zeros(1)}
    with open_source(stored(tmp_path, **beside)) as source:
        assert check_load(source, SHAPES, LoadRules()).unused == ()


def test_renaming_rules(tmp_path: Path) -> None:
    config = CheckpointConfig(load_rename=[r"^blocks\.(\d+)\.lin=>layers.\1.w", "x=>y"])
    rules = LoadRules.from_config(config, ())
    path = stored(tmp_path, layers__0__w__weight=None, blocks__0__lin__weight=torch.ones(4, 4))
    with RenamedSource(open_source(path), rules.rename) as source:
        assert check_load(source, SHAPES, rules).missing == ()
        into = targets()
        load_from(source, into, rules)
        assert (into["layers.0.w.weight"] == 1).all()
    with pytest.raises(CheckpointError, match="must keep names apart, but .* both become same; narrow the pattern"):
        RenamedSource(open_source(path), [("^.*$", "same")])
    for wrong in ("a", "=>b", "(=>b", r"a=>\1"):
        with pytest.raises(ValueError, match=r"^checkpoint.load_rename must hold rules PATTERN=>REPLACEMENT, but"):
            LoadRules.from_config(CheckpointConfig(load_rename=[wrong]), ())


def test_a_resized_vocabulary_must_be_allowed(tmp_path: Path) -> None:
    larger = {n: torch.full((8, 4), 2.0) for n in ("tok_embeddings__weight", "output__weight")}
    with open_source(stored(tmp_path, **larger)) as source:
        message = (
            r"has shape (8, 4), but the model's has (6, 4); use model.vocab_size=8, or checkpoint.load_resized=true"
        )
        with pytest.raises(CheckpointError, match=re.escape(message)):
            check_load(source, SHAPES, LoadRules(vocabulary=VOCABULARY))
        rules = LoadRules(vocabulary=VOCABULARY, resized=True)
        assert check_load(source, SHAPES, rules).resized == ("tok_embeddings.weight", "output.weight")
        into = targets()
        load_from(source, into, rules)
        assert (into["output.weight"] == 2).all()
        grown = {"output.weight": torch.full((10, 4), -1.0)}
        load_from(source, grown, rules)
        assert grown["output.weight"][:, 0].tolist() == [2.0] * 8 + [-1.0] * 2
    with (
        open_source(stored(tmp_path, layers__0__w__weight=torch.zeros(6, 4))) as source,
        pytest.raises(CheckpointError, match=r"layers.0.w.weight .* has shape \(6, 4\), .* that it was saved with"),
    ):
        check_load(source, SHAPES, LoadRules(vocabulary=VOCABULARY, resized=True))


def test_types_are_cast(tmp_path: Path) -> None:
    with open_source(stored(tmp_path, output__weight=torch.full((6, 4), 1.5, dtype=torch.bfloat16))) as source:
        into = targets()
        load_from(source, into, LoadRules())
        assert (into["output.weight"] == 1.5).all()


@pytest.mark.parametrize("shape", [(), (5,), (7, 3), (3, 4, 5), (1, 1, 40)])
@pytest.mark.parametrize("limit", [4, 12, 60, 10_000])
def test_pieces_are_the_box_in_order(shape: tuple[int, ...], limit: int) -> None:
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    box = tuple((n // 3, n) for n in shape)
    pieces = list(segments(box, 4, limit))
    found = torch.cat([tensor[tuple(slice(*d) for d in p)].reshape(-1) for p in pieces])
    assert torch.equal(found, tensor[tuple(slice(*d) for d in box)].reshape(-1))
    assert all(torch.Size([b - a for a, b in p]).numel() * 4 <= max(limit, 4) for p in pieces)
    assert list(segments(whole(shape), 4, 1 << 30)) == [whole(shape)]
