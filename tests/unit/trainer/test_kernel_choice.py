"""Which kernels a CPU uses: measured within its time, shared by a machine's runs, kept by a run."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regrow.launch.run.build import build_model
from regrow.models.cpu import Case, Kind, decide, has_kernel, is_used, measure, use
from regrow.models.cpu.measure import reduced
from regrow.models.kernels import cases_of
from regrow.trainer.kernels import CHOICE, choose_kernels, ratios_file
from regrow.trainer.parallel.context import ParallelContext, close_parallel, open_parallel
from regrow.trainer.parallel.layout import Layout
from tests.runs import train
from tests.support import curve, tiny, typed_config

NORM = Case(Kind.norm, torch.float32, (64, 32))
OTHER = Case(Kind.norm, torch.float32, (64, 48))
LARGE = [
    Case(Kind.attention, torch.float32, (8, 2048, 32, 8, 128)),
    Case(Kind.product, torch.float32, (16_384, 4096, 128_256)),
    Case(Kind.norm, torch.float32, (16_384, 4096)),
    Case(Kind.norm, torch.bfloat16, (1, 1_000_003)),
]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where this machine's measurements go, empty; afterwards nothing is chosen."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = ratios_file()
    assert path is not None
    yield path
    use([])


@pytest.fixture
def context() -> Iterator[ParallelContext]:
    yield open_parallel(Layout(), "cpu", 30.0)
    close_parallel()


def measured(path: Path, **ratios: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"format": 1, "ratios": ratios}))


def test_a_kernel_must_win_by_a_tenth_and_the_run_keeps_what_it_used() -> None:
    cases = [NORM, OTHER]
    assert decide(cases, {}, {}) == {str(NORM): False, str(OTHER): False}
    assert decide(cases, {}, {str(NORM): 1.09, str(OTHER): 1.1}) == {str(NORM): False, str(OTHER): True}
    assert decide(cases, {str(NORM): True}, {str(NORM): 0.5, str(OTHER): 2.0}) == {str(NORM): True, str(OTHER): True}
    assert decide(cases, {str(NORM): False}, {str(NORM): 2.0})[str(NORM)] is False


def test_measuring_takes_the_time_that_it_is_given() -> None:
    """Shapes of a large model are measured by smaller ones; of what does not fit nothing is said."""
    state, started = torch.get_rng_state(), time.process_time()
    found = measure([c for c in LARGE if has_kernel(c)], 1.0)
    # Other users of the machine can stretch the last pair, but not what it computes.
    assert time.process_time() - started < 2.0
    assert set(found) <= set(map(str, LARGE))
    assert all(0 < r < 1e4 for r in found.values())
    assert torch.equal(torch.get_rng_state(), state)
    assert measure(LARGE, 0.0) == {}


@given(
    kind=st.sampled_from(list(Kind)),
    sizes=st.tuples(*[st.integers(1, 5000)] * 3),
    heads=st.sampled_from([(1, 1), (12, 4), (16, 16), (6, 3), (7, 1), (32, 8)]),
    threads=st.integers(1, 128),
)
def test_reduced_cases_are_of_the_same_kind(
    kind: Kind, sizes: tuple[int, ...], heads: tuple[int, int], threads: int
) -> None:
    given_sizes = {
        Kind.norm: sizes[:2], Kind.product: sizes, Kind.attention: (*sizes[:2], *heads, sizes[2]),
    }[kind]  # fmt: skip
    small = reduced(Case(kind, torch.float32, given_sizes), threads).sizes
    assert all(1 <= a <= b for a, b in zip(small, given_sizes, strict=True))
    if kind is Kind.norm:
        assert small[1] == given_sizes[1]
    if kind is Kind.attention:
        assert small[4] == given_sizes[4]
        assert small[2] % small[3] == 0


def test_runs_of_a_machine_share_one_measurement(machine: Path, context: ParallelContext, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    choose_kernels([NORM], context, tmp_path / "a")
    first = json.loads(machine.read_text())["ratios"]
    assert set(first) == {str(NORM)}
    choose_kernels([NORM, OTHER], context, tmp_path / "b")
    second = json.loads(machine.read_text())["ratios"]
    assert second[str(NORM)] == first[str(NORM)]
    assert set(second) == {str(NORM), str(OTHER)}
    for name, cases in (("a", {str(NORM)}), ("b", {str(NORM), str(OTHER)})):
        used = json.loads((tmp_path / name / CHOICE).read_text())["used"]
        assert used == {n: second[n] >= 1.1 for n in cases}


@pytest.mark.parametrize(
    "body", ["", "[]", "{", '{"format": 2, "ratios": {}}', '{"format": 1, "ratios": {"x": "y"}}']
)
def test_damaged_files_are_measured_and_chosen_anew(
    machine: Path, context: ParallelContext, tmp_path: Path, body: str
) -> None:
    machine.parent.mkdir(parents=True)
    for path in (machine, tmp_path / CHOICE):
        path.write_text(body)
    choose_kernels([NORM], context, tmp_path)
    used = json.loads((tmp_path / CHOICE).read_text())["used"]
    assert used == {str(NORM): json.loads(machine.read_text())["ratios"][str(NORM)] >= 1.1}


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path)])
def test_what_is_no_file_is_neither_waited_for_nor_in_the_way(
    machine: Path, context: ParallelContext, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    machine.parent.mkdir(parents=True)
    for path in (machine, tmp_path / CHOICE):
        make(path)
    choose_kernels([NORM], context, tmp_path)
    use([])
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_cache_that_cannot_be_written_costs_the_measurement_alone(
    machine: Path, context: ParallelContext, tmp_path: Path
) -> None:
    machine.parent.parent.mkdir(parents=True, exist_ok=True)
    machine.parent.write_text("a file where the folder would be")
    choose_kernels([NORM], context, tmp_path)
    assert str(NORM) in json.loads((tmp_path / CHOICE).read_text())["used"]


def test_the_runs_choice_wins_and_the_log_says_when_it_is_slow(
    machine: Path, context: ParallelContext, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    measured(machine, **{str(NORM): 2.0, str(OTHER): 0.5})
    choose_kernels([NORM, OTHER], context, tmp_path)
    assert is_used(NORM.kind, NORM.sizes, torch.ones(NORM.sizes))
    assert not is_used(OTHER.kind, OTHER.sizes, torch.ones(OTHER.sizes))
    assert "the other choice is faster" not in caplog.text
    measured(machine, **{str(NORM): 0.5, str(OTHER): 2.0})
    choose_kernels([NORM, OTHER], context, tmp_path)
    assert is_used(NORM.kind, NORM.sizes, torch.ones(NORM.sizes))
    assert not is_used(OTHER.kind, OTHER.sizes, torch.ones(OTHER.sizes))
    assert f"the other choice is faster for: {NORM}, {OTHER}" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_resuming_is_bitwise_with_kernels_whatever_the_machine_would_choose(
    tmp_path: Path, corpus: Path, world: int
) -> None:
    layout = [f"parallel.dp_shard={world}", "checkpoint=sync", "launch.kernels=auto", "hooks=none"]
    command = [*tiny(corpus, *layout), "data.global_batch_size=8", "scheduler.total_steps=4"]
    config = typed_config(command)
    cases = cases_of(build_model(config), 4, 32, torch.float32)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    for run_dir in (straight, broken):
        run_dir.mkdir()
        (run_dir / CHOICE).write_text(json.dumps({"format": 1, "used": {str(c): True for c in cases}}))
    assert train([*command, "train.steps=4"], straight, world).kind == "finished"
    for steps in (2, 4):
        train([*command, f"train.steps={steps}"], broken, world)
    assert curve(broken) == curve(straight)
    plain = tmp_path / "plain"
    train([*command, "launch.kernels=plain", "train.steps=4"], plain, world)
    assert not (plain / CHOICE).exists()
    assert [row[1] for row in curve(plain)] == pytest.approx([row[1] for row in curve(straight)], rel=1e-5)
    assert curve(plain) != curve(straight), "the kernels were not used"
