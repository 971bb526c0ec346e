"""Optimizer state on the host: where it lies, how it is cut, and that it changes no bit."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regrow.launch.config.typed import to_config
from regrow.launch.run.build import check_optimizer
from regrow.models.llama3.model import Llama3
from regrow.trainer import offload
from regrow.trainer.config import AdamWConfig
from regrow.trainer.offload import HostState, parts_of
from regrow.trainer.optimizer import AdamW
from tests.runs import train
from tests.support import assert_same_tensors, compose_config, curve, tiny, typed_config

OFFLOADED = "train.offload_optimizer=true"


@settings(max_examples=200, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 30).map(lambda n: 4 * n)), max_size=12),
    limit=st.integers(1, 40).map(lambda n: 64 * n),
)
def test_parts_hold_each_row_once_and_in_order(shapes: list[tuple[int, int]], limit: int) -> None:
    named = {str(i): shape for i, shape in enumerate(shapes)}
    parts, starts = parts_of(named, limit)
    seen: dict[str, int] = dict.fromkeys(named, 0)
    ended, position = [], 0
    for part in parts:
        assert position <= part.start <= part.stop
        position = part.stop
        rows = [p.rows.stop - p.rows.start for p in part.pieces]
        assert part.stop - part.start <= limit or sum(rows) == 1
        for piece in part.pieces:
            count, row_bytes = named[piece.name]
            assert piece.rows.start == seen[piece.name]
            assert piece.size == (piece.rows.stop - piece.rows.start) * row_bytes
            assert part.start + piece.offset == starts[piece.name] + piece.rows.start * row_bytes
            assert part.start + piece.offset + piece.size <= part.stop
            seen[piece.name] = piece.rows.stop
            assert piece.last == (piece.rows.stop == count)
            ended += [piece.name] if piece.last else []
    assert seen == {name: rows for name, (rows, _) in named.items()}
    assert ended == list(named)
    assert all(start % 64 == 0 for start in starts.values())


def model_of(dtype: torch.dtype) -> Llama3:
    config = typed_config(
        [
            "model.dim=32",
            "model.n_layers=2",
            "model.n_heads=4",
            "model.n_kv_heads=2",
            "model.ffn_dim=48",
            "model.vocab_size=331",
        ]
    ).model
    torch.manual_seed(0)
    model = Llama3(config)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.to(dtype)


def stepped(model: Llama3, optimizer: AdamW, steps: int) -> Mapping[str, Tensor]:
    """A few steps, of which one is skipped; the state after them."""
    torch.manual_seed(1)
    for step in range(steps):
        for name, parameter in model.named_parameters():
            # One parameter has no gradient in each other step.
            parameter.grad = None if step % 2 and "wq" in name else torch.randn_like(parameter)
        skip = torch.tensor(float(step == 1))
        optimizer.step(1e-2, torch.tensor(1.7, dtype=torch.float64), skip)
        optimizer.zero_grad()
    return {**dict(model.named_parameters()), **optimizer.state_tensors()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("part_bytes", [64, 1024, 1 << 26])
def test_no_bit_depends_on_where_the_state_lies(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, part_bytes: int
) -> None:
    monkeypatch.setattr(offload, "_PART_BYTES", part_bytes)
    results = []
    for offloaded in (False, True):
        model = model_of(dtype)
        optimizer = AdamW(AdamWConfig(lr=1e-2), model, offload=offloaded)
        results.append(stepped(model, optimizer, 4))
        optimizer.reset()
        assert not any(t.count_nonzero() for t in optimizer.state_tensors().values())
    assert results[0].keys() == results[1].keys()
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


def test_it_is_the_memory_on_the_device_that_is_worked_on() -> None:
    """What the update is given is another tensor than the one that lies on the host, on a CPU too."""
    parameters = {"a": torch.ones(5, 3), "b": torch.ones(7)}
    state = HostState(parameters, ("m", "v"), part_bytes=64)
    held = {t.data_ptr() for kind in state.tensors.values() for t in kind.values()}
    given_: set[int] = set()

    def work(pieces: object, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        for kind in tensors.values():
            for tensor in kind.values():
                given_.add(tensor.data_ptr())
                tensor += 1

    state.update(work)
    state.update(work)
    assert not held & given_
    # Two buffers of each kind, whatever the number of parts.
    assert all(torch.equal(t, torch.full_like(t, 2)) for kind in state.tensors.values() for t in kind.values())


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_continues_bit_for_bit_with_and_without(corpus: Path, tmp_path: Path, world: int) -> None:
    """Whole runs, cut runs, and one that changes the option on the way, end with the same bits and names."""
    degrees = [f"parallel.dp_shard={world}"] if world > 1 else []
    overrides = tiny(
        corpus, "data.global_batch_size=8", "scheduler.total_steps=6", "checkpoint.interval=3", "hooks=none", *degrees
    )
    train([*overrides, "train.steps=6"], tmp_path / "resident", world)
    train([*overrides, OFFLOADED, "train.steps=6"], tmp_path / "offloaded", world)
    for name, options in (
        ("cut", (OFFLOADED, OFFLOADED)),
        ("on", ("seed=0", OFFLOADED)),
        ("off", (OFFLOADED, "seed=0")),
    ):
        for option, steps in zip(options, (3, 6), strict=True):
            assert train([*overrides, option, f"train.steps={steps}"], tmp_path / name, world).step == steps
    for name in ("offloaded", "cut", "on", "off"):
        assert curve(tmp_path / name) == curve(tmp_path / "resident")
        assert_same_tensors(tmp_path / name / "checkpoint/step-6", tmp_path / "resident/checkpoint/step-6")


def test_an_optimizer_that_cannot_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    config = to_config(compose_config([OFFLOADED]))
    check_optimizer(config)
    monkeypatch.setattr(AdamW, "OFFLOADS", False)
    with pytest.raises(ValueError, match=r"train.offload_optimizer must be false with .*AdamW, whose state stays on"):
        check_optimizer(config)
