"""Stochastic rounding: right on average, and a function of seed, name, step and place alone."""

import hashlib
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from regrow.trainer.config import AdamWConfig
from regrow.trainer.rounded_adamw import RoundedAdamW, _update, compiled_update
from regrow.trainer.rounding import coordinates_of, random_words, round_to_bfloat16, words_of_name
from tests.pool import run_distributed

CPU = torch.device("cpu")
ZERO, ONE = torch.zeros(()), torch.ones((), dtype=torch.float64)


def words(shape: tuple[int, ...], *, seed: int = 0, name: str = "w", step: int = 1) -> tuple[Tensor, Tensor]:
    at = coordinates_of(shape, (0,) * len(shape), shape, CPU)
    return random_words(at, words_of_name(seed, name, CPU), torch.tensor(step, dtype=torch.int32))


def pcg4d(x: int, y: int, z: int, w: int) -> tuple[int, int]:
    """The paper's listing, in Python's integers; its last two words."""
    v = [(n * 1664525 + 1013904223) & 0xFFFFFFFF for n in (x, y, z, w)]
    for half in (0, 1):
        for i, j, k in ((0, 1, 3), (1, 2, 0), (2, 0, 1), (3, 1, 2)):
            v[i] = (v[i] + v[j] * v[k]) & 0xFFFFFFFF
        if half == 0:
            v = [n ^ (n >> 16) for n in v]
    return v[2], v[3]


def test_the_bits_are_those_of_the_paper_and_stay_so() -> None:
    """A run goes on bitwise with a later version."""
    digest = hashlib.blake2b(b"7\0layers.0.attention.wq.weight\0rounding", digest_size=8).digest()
    names = [int.from_bytes(digest[i : i + 4], "little") for i in (0, 4)]
    first, second = words((20, 30), seed=7, name="layers.0.attention.wq.weight", step=3)
    for row, column in ((0, 0), (19, 29), (4, 17)):
        expected = pcg4d(row, column, 3 ^ names[0], names[1])
        assert (int(first[row, column]) % 2**32, int(second[row, column]) % 2**32) == expected
    assert first[0, :3].tolist() == [-548900522, 161569209, 1004006317]


@given(data=st.data(), dims=st.integers(1, 4))
def test_a_shard_has_the_bits_of_its_part_of_the_whole(data: st.DataObject, dims: int) -> None:
    whole = tuple(data.draw(st.integers(1, 5)) for _ in range(dims))
    box = [sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in whole]
    name = words_of_name(1, "w", CPU)
    step = torch.tensor(5, dtype=torch.int32)
    full = coordinates_of(whole, (0,) * dims, whole, CPU)
    part = coordinates_of([b - a for a, b in box], [a for a, _ in box], whole, CPU)
    expected = random_words(full, name, step)[0].view(whole)[tuple(slice(a, b) for a, b in box)]
    assert torch.equal(random_words(part, name, step)[0].reshape(expected.shape), expected)


def test_seeds_names_steps_and_places_have_bits_of_their_own() -> None:
    """Correlations of uniform numbers stay within five standard deviations."""
    shape = (300, 300)
    base = words(shape)
    others = [
        *words(shape, seed=1),
        *words(shape, name="v"),
        *words(shape, step=2),
        base[0].roll(1, 0),
        base[0].roll(1, 1),
    ]
    columns = []
    for word in (*base, *others):
        columns += [(word & 0xFFFF).flatten().double(), (word >> 16 & 0xFFFF).flatten().double()]
    matrix = torch.corrcoef(torch.stack(columns)) - torch.eye(len(columns))
    assert float(matrix.abs().max()) < 5 / 300
    means = torch.stack(columns).mean(1) / 0x10000
    assert float((means - 0.5).abs().max()) < 5 * 12**-0.5 / 300


@pytest.mark.parametrize("value", [1.001, -1.001, 3.3e-39, 1e30, -0.3333])
def test_values_go_to_a_neighbour_and_are_right_on_average(value: float) -> None:
    bits = words((300, 300))[0]
    rounded = round_to_bfloat16(torch.full(bits.shape, value), bits).double()
    exact = float(torch.tensor(value))
    low, high = float(rounded.min()), float(rounded.max())
    assert low < exact < high
    assert {low, high} == set(rounded.flatten().tolist())
    near = {torch.tensor(v).bfloat16().view(torch.int16).item() for v in (low, high)}
    assert max(near) - min(near) == 1
    assert float(rounded.mean()) == pytest.approx(exact, abs=5 * (high - low) / 2 / 300)


def test_what_needs_no_rounding_stays() -> None:
    exact = torch.tensor([0.0, -0.0, 1.0, -1.5, 3e-39, float("inf"), -float("inf"), float("nan")]).bfloat16()
    nans = torch.tensor([-1, 0x7FFFFFFF, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    for bits in (0, 1, 0xFFFF, -1):
        out = round_to_bfloat16(exact.float(), torch.full(exact.shape, bits, dtype=torch.int32))
        assert torch.equal(out.view(torch.int16)[:-1], exact.view(torch.int16)[:-1])
        assert out[-1].isnan()
        assert round_to_bfloat16(nans, torch.full(nans.shape, bits, dtype=torch.int32)).isnan().all()


def updated(
    config: AdamWConfig, parameter: Tensor, grads: list[Tensor], *, skip: Tensor = ZERO, scale: Tensor = ONE
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A parameter after some steps, its moments, and how many steps it counts."""
    own = nn.Parameter(parameter.clone())
    moments, steps = [torch.zeros_like(parameter) for _ in range(2)], torch.zeros(())
    optimizer = RoundedAdamW(config, {"w": own}, 3)
    for grad in grads:
        given = [(own.detach(), *moments, grad)]
        optimizer.step(["w"], given, [steps], lr=config.lr, weight_decay=0.1, grad_scale=scale, skip=skip)
    return own.detach(), moments[0], moments[1], steps


def test_small_updates_arrive_that_rounding_to_the_nearest_would_lose() -> None:
    """A hundred steps of 1e-4 each, where the numbers beside 1 are 4e-3 and 8e-3 away."""
    config = AdamWConfig(lr=1e-4, weight_decay=0.0, beta2=0.999)
    whole = torch.ones(64, 64)
    torch.manual_seed(0)
    grads = [1.0 + torch.randn(64, 64) * 0.1 for _ in range(100)]
    exact = nn.Parameter(whole.clone())
    reference = torch.optim.AdamW([exact], lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1)
    for grad in grads:
        exact.grad = grad
        reference.step()
    parameter, first, second, steps = updated(config, whole.bfloat16(), [g.bfloat16() for g in grads])
    assert float(steps) == 100.0
    moved = 1.0 - float(exact.detach().mean())
    assert 1.0 - float(parameter.double().mean()) == pytest.approx(moved, rel=0.02)
    state = reference.state[exact]
    assert float(first.double().mean()) == pytest.approx(float(state["exp_avg"].mean()), rel=0.01)
    # What is there after 100 steps is a tenth of the mean square; to the nearest it would have stopped growing.
    assert float(second.double().mean()) == pytest.approx(float(state["exp_avg_sq"].mean()), rel=0.01)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 1000), data=st.data())
def test_a_shard_is_updated_as_its_part_of_the_whole(rows: int, columns: int, data: st.DataObject) -> None:
    """Bitwise, wherever chunks and vectors end."""
    torch.manual_seed(rows * columns)
    tensors = [torch.randn(rows, columns).bfloat16() for _ in range(4)]
    tensors[2].abs_()
    (a, b), (c, d) = (sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in (rows, columns))
    numbers = (torch.tensor(4, dtype=torch.int32), ZERO, *(torch.tensor(v) for v in (0.5, 0.01, 0.999, 0.3)))
    name = words_of_name(0, "w", CPU)
    parts = [t[a:b, c:d].contiguous() for t in tensors]
    for own, shape, offset in ((tensors, (rows, columns), (0, 0)), (parts, (b - a, d - c), (a, c))):
        at = coordinates_of(shape, offset, (rows, columns), CPU)
        _update(own, at.rows, at.columns, name, numbers, 0.9, 0.95, 1e-8)
    for whole, part in zip(tensors[:3], parts[:3], strict=True):
        assert torch.equal(whole[a:b, c:d], part)


def test_a_step_that_is_skipped_changes_nothing_and_clipping_divides() -> None:
    config = AdamWConfig(lr=0.1)
    whole = torch.randn(3, 5).bfloat16()
    bad = [torch.full((3, 5), float("nan")).bfloat16()]
    parameter, first, second, steps = updated(config, whole, bad, skip=torch.ones(()))
    assert torch.equal(parameter, whole)
    assert not first.any()
    assert not second.any()
    assert float(steps) == 0.0
    grads = [torch.full((3, 5), 4.0).bfloat16()]
    _, first, _, _ = updated(config, whole, grads, scale=torch.tensor(4.0, dtype=torch.float64))
    torch.testing.assert_close(first.float(), torch.full((3, 5), 0.1), rtol=1 / 128, atol=0.0)


@pytest.mark.parametrize("shape", [(), (0, 4), (7,), (3, 4, 5)])
def test_parameters_have_any_shape(shape: tuple[int, ...]) -> None:
    whole = torch.ones(shape).bfloat16()
    parameter = updated(AdamWConfig(lr=0.5), whole, [torch.ones(shape)])[0]
    assert parameter.shape == whole.shape
    assert not parameter.numel() or float(parameter.float().max()) < 0.6


@pytest.mark.slow
def test_compiled_it_is_one_kernel_that_does_the_same() -> None:
    """As on a GPU, whatever the matrix' shape; fused operations may round the last bit of float32 otherwise."""
    differing = run_distributed(_compare_compiled, world_size=1, timeout_s=240.0)[0]
    assert max(differing) < 1e-2


def _compare_compiled() -> list[float]:
    compiled: Any = torch.compile(_update, dynamic=True, fullgraph=True)
    differing = []
    for shape in ((40, 64), (33, 65), (1, 97)):
        torch.manual_seed(1)
        tensors = [torch.randn(shape).bfloat16() for _ in range(4)]
        tensors[2].abs_()
        at = coordinates_of(shape, (2, 3), (100, 100), CPU)
        numbers = (torch.tensor(4, dtype=torch.int32), ZERO, *(torch.tensor(v) for v in (0.5, 0.01, 0.999, 0.3)))
        results = []
        for update in (_update, compiled):
            own = [t.clone() for t in tensors]
            update(own, at.rows, at.columns, words_of_name(0, "w", CPU), numbers, 0.9, 0.95, 1e-8)
            results.append(own)
        for eager, fused in zip(*results, strict=True):
            torch.testing.assert_close(eager, fused, rtol=1 / 64, atol=1e-6)
            differing.append(float((eager != fused).double().mean()))
    return differing


def test_a_compiled_update_takes_parameters_whose_gradients_are_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does, by a backend that needs none: the same bits as without a compiler."""
    torch.manual_seed(0)
    first, gradient, found = torch.randn(6, 10).bfloat16(), torch.randn(6, 10), []
    for update in (None, compiled_update("aot_eager")):
        parameter = nn.Parameter(first.clone())
        parameter.grad_dtype = None
        parameter.grad = gradient.clone()
        moments = [torch.zeros_like(first) for _ in range(2)]
        if update is not None:
            monkeypatch.setattr("regrow.trainer.rounded_adamw._in_chunks", update)
        with torch.no_grad():
            RoundedAdamW(AdamWConfig(), {"w": parameter}, 3).step(
                ["w"], [[parameter, *moments, parameter.grad]], [torch.zeros(())],
                lr=0.1, weight_decay=0.1, grad_scale=ONE, skip=ZERO,
            )  # fmt: skip
        found.append([parameter.detach(), *moments])
    assert not torch.equal(found[0][0], first)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
