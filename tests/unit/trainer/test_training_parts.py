"""Schedules, optimizer, gradient norm, state, logs, layout."""

import json
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from regrow.models.llama3.config import Llama3Config
from regrow.models.llama3.model import Llama3
from regrow.trainer.config import AdamWConfig, ParallelConfig
from regrow.trainer.jsonlines import StepLog, read_rows
from regrow.trainer.optimizer import AdamW, global_grad_norm
from regrow.trainer.parallel.layout import resolve_layout
from regrow.trainer.run_record import Attempt, RunRecord
from regrow.trainer.schedules.base import Schedule
from regrow.trainer.schedules.config import CosineConfig, LinearConfig, WSDConfig
from regrow.trainer.schedules.shapes import Cosine, Linear, WarmupStableDecay
from regrow.trainer.state import TrainState
from tests.support import TINY_MODEL, typed_config

SCHEDULES = [
    WarmupStableDecay(WSDConfig(warmup_steps=10)),
    Cosine(CosineConfig(warmup_steps=10)),
    Linear(LinearConfig(warmup_steps=10)),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_warm_up_fall_and_hold(schedule: Schedule) -> None:
    values = [schedule.factor(s, 100) for s in range(1, 151)]
    assert values[0] == pytest.approx(0.1)
    assert max(values) == pytest.approx(1.0)
    assert values[9] == pytest.approx(1.0)
    assert values[9:] == sorted(values[9:], reverse=True)
    assert values[99] == pytest.approx(0.1)
    assert values[149] == pytest.approx(0.1)


def test_wsd_is_flat_until_the_decay() -> None:
    assert [SCHEDULES[0].factor(s, 100) for s in (10, 50, 80)] == [1.0, 1.0, 1.0]
    assert SCHEDULES[0].factor(90, 100) == pytest.approx(0.55)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(step=st.integers(1, 500), total=st.integers(1, 300))
def test_schedules_stay_within_bounds(schedule: Schedule, step: int, total: int) -> None:
    assert 0.0 < schedule.factor(step, total) <= 1.0


@pytest.mark.parametrize(
    ("config", "field"),
    [(WSDConfig(warmup_steps=-1), "warmup_steps"), (WSDConfig(min_lr_ratio=2), "min_lr_ratio"),
     (WSDConfig(total_steps=0), "total_steps"), (WSDConfig(decay_ratio=1.5), "decay_ratio")],
)  # fmt: skip
def test_bad_schedules_are_refused(config: WSDConfig, field: str) -> None:
    with pytest.raises(ValueError, match=f"scheduler.{field} must be"):
        WarmupStableDecay(config)


def small_model() -> Llama3:
    config = typed_config(TINY_MODEL).model
    assert isinstance(config, Llama3Config)
    torch.manual_seed(0)
    model = Llama3(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    model.init_buffers(torch.device("cpu"), 16)
    return model


def test_adamw_matches_torchs() -> None:
    ours, theirs = small_model(), small_model()
    optimizer = AdamW(AdamWConfig(lr=1e-2, weight_decay=0.1), ours)
    groups = [
        {"params": [p for n, p in theirs.named_parameters() if theirs.decays(n) is d], "weight_decay": 0.1 * d}
        for d in (True, False)
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for step in range(3):
        for model in (ours, theirs):
            torch.manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
        optimizer.step(1e-2, torch.ones(()), torch.zeros(()))
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_norms_and_embeddings_do_not_decay() -> None:
    model = small_model()
    decayed = {n for n, _ in model.named_parameters() if model.decays(n)}
    assert "tok_embeddings.weight" not in decayed
    assert not any("norm" in n for n in decayed)
    assert {"output.weight", "layers.0.attention.wq.weight"} <= decayed


def test_clipping_divides_and_skipping_changes_nothing() -> None:
    model = small_model()
    optimizer = AdamW(AdamWConfig(lr=1e-2), model)
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step(1e-2, torch.ones(()), torch.ones(()))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    state = optimizer.state_tensors()
    assert all(float(t.abs().sum()) == 0.0 for t in state.values())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 4.0)
    optimizer.step(1e-2, torch.tensor(4.0), torch.zeros(()))
    first = optimizer.state_tensors()["state.norm.weight.exp_avg"]
    torch.testing.assert_close(first, torch.full_like(first, 0.1))


def test_optimizer_state_is_named_by_parameter() -> None:
    model = small_model()
    names = AdamW(AdamWConfig(lr=1.0), model).state_tensors().keys()
    assert {
        f"state.{n}.{part}" for n, _ in model.named_parameters() for part in ("exp_avg", "exp_avg_sq", "step")
    } == names


GRADIENTS = {
    "normal": lambda: torch.randn(32000, 512) * 1e-3,
    "all the same": lambda: torch.full((4_000_000,), 0.1),
    "squares below float32": lambda: torch.randn(3000, 1000) * 1e-30,
    "squares above float32": lambda: torch.randn(3000, 1000) * 1e30,
    "one large among many small": lambda: torch.cat([torch.full((1,), 1e3), torch.full((3_000_000,), 1e-2)]),
    "bfloat16": lambda: torch.randn(3000, 1000).bfloat16(),
    "float64": lambda: torch.randn(300, 1000, dtype=torch.float64),
    "transposed": lambda: torch.randn(1000, 3000).t(),
    "experts": lambda: torch.randn(4, 300, 500),
}


def with_gradient(gradient: torch.Tensor) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.empty_like(gradient))
    parameter.grad = gradient
    return parameter


@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradient_norm_is_exact_at_any_size_and_in_any_shards(kind: str) -> None:
    torch.manual_seed(0)
    gradient = GRADIENTS[kind]()
    exact = float(gradient.double().square().sum().sqrt())
    for pieces in (1, 2, 7):
        norm = global_grad_norm([with_gradient(g) for g in gradient.chunk(pieces)])
        assert norm.dtype == torch.float64
        assert float(norm) == pytest.approx(exact, rel=1e-11), pieces


@given(st.lists(st.integers(0, 70_000), min_size=1, max_size=12))
def test_gradient_norm_takes_tensors_of_any_length(lengths: list[int]) -> None:
    parameters = [with_gradient(torch.randn(n)) for n in lengths]
    exact = torch.cat([p.grad.double() for p in parameters if p.grad is not None]).square().sum().sqrt()
    assert float(global_grad_norm(parameters)) == pytest.approx(float(exact), rel=1e-12)


def test_gradient_norm_copies_no_gradient_whole() -> None:
    parameter = with_gradient(torch.ones(4 << 20))
    with torch.profiler.profile(profile_memory=True) as profile:
        global_grad_norm([parameter])
    allocated = sum(e.self_cpu_memory_usage for e in profile.key_averages() if e.self_cpu_memory_usage > 0)
    assert 0 < allocated <= 1 << 20


def test_excluded_parts_of_the_state_start_anew() -> None:
    saved = TrainState(step=40, samples_consumed=400, tokens=9, schedule_origin=0, schedule_total=100)
    assert saved.without((), schedule_total=7) == saved
    fresh = saved.without(("lr_scheduler", "data_loader"), schedule_total=7)
    assert (fresh.schedule_origin, fresh.schedule_total, fresh.samples_consumed, fresh.step) == (40, 7, 0, 40)
    assert TrainState.from_json(json.loads(json.dumps(saved.as_json()))) == saved


def test_step_logs_drop_what_is_beyond_and_what_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in (1, 2, 3)) + '{"step": 4, "lo')
    assert [r["step"] for r in read_rows(path)] == [1, 2, 3]
    log = StepLog(path, 2)
    log.append({"step": 3, "again": True})
    log.make_durable()
    log.close()
    assert list(read_rows(path)) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
    assert list(read_rows(tmp_path / "none")) == []


def test_run_records_survive_the_disk(tmp_path: Path) -> None:
    from regrow.checkpoint.policy.lineage import Lineage, LoadRequest, StartKind

    record = RunRecord(data_fingerprint="f")
    request = LoadRequest(load_step=3, exclude=("optimizer",))
    record.lineages = [
        Lineage(id="a"),
        Lineage(id="b", origin=StartKind.step, origin_step=3, parent="a", request=request),
    ]
    record.attempts = [Attempt(host="h", from_step=0, to_step=5, end="preempted")]
    record.save(tmp_path)
    assert RunRecord.load(tmp_path) == record
    assert RunRecord.load(tmp_path / "none") is None


def test_the_remaining_ranks_are_inferred() -> None:
    assert resolve_layout(ParallelConfig(dp_shard=-1), 8, ranks_are_given=True).dp_shard == 8
    layout = resolve_layout(ParallelConfig(dp_replicate=2, dp_shard=-1), 8, ranks_are_given=False)
    assert (layout.dp_shard, layout.world_size, layout.data_ranks) == (4, 8, 8)


@pytest.mark.parametrize(
    ("parallel", "ranks", "words"),
    [
        (
            ParallelConfig(dp_replicate=3, dp_shard=-1),
            8,
            "must divide the number of ranks (8), but is 3; use 1, 2, 4 or 8",
        ),
        (ParallelConfig(dp_shard=3), 4, "must be the number of ranks that were started (4), but is 3"),
        (ParallelConfig(dp_shard=0), 4, "parallel.dp_shard must be at least 1 or -1, but is 0"),
        (ParallelConfig(dp_replicate=0), 4, "parallel.dp_replicate must be at least 1, but is 0"),
        (ParallelConfig(tp=0), 2, "parallel.tp must be at least 1, but is 0; use 1"),
        (ParallelConfig(tp=3, pp=2, dp_shard=-1), 8, "parallel.tp · parallel.pp must divide the number of ranks (8)"),
    ],
)
def test_degrees_that_do_not_fit_are_refused(parallel: ParallelConfig, ranks: int, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        resolve_layout(parallel, ranks, ranks_are_given=True)
    assert words in str(caught.value)


def test_a_damaged_row_costs_no_other_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What stands behind it stays, and the file as it was is kept beside."""
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {n}, "loss": 1.0}}\n' for n in range(1, 8)]
    whole = "".join([*lines[:2], '{"step": 3, "lo\x00\n', "[3]\n", "{}\n", *lines[3:], '{"step": 8, "l'])
    path.write_text(whole)
    log = StepLog(path, 6)
    log.append({"step": 7})
    log.close()
    assert [row["step"] for row in read_rows(path)] == [1, 2, 4, 5, 6, 7]
    assert (tmp_path / "metrics.jsonl.damaged").read_text() == whole
    assert "[3, 4, 5]" in caplog.text
