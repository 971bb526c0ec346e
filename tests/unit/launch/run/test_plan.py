"""`mode=plan`: what it says, and that it refuses what a run refuses."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks.gpu_runs import write_corpus
from benchmarks.plan import Comparison, summary
from benchmarks.plan_runs import measured_peak, overrides_of, planned_peaks, spec_of
from regrow.errors import ConfigError
from regrow.launch.config.refusals import Refused
from regrow.launch.run.plan import fit_layouts, plan_config, plan_of, step_of
from regrow.launch.run.prepare import prepare_run
from tests.pool import run_distributed
from tests.support import compose_config, typed_config
from tests.warm import regrow

SMALL = ["model.n_layers=2", "data.seq_len=128", "run.name=planned"]
# A part of the table in docs/plan.md, which has all.
SOME = [
    "dense fp32",
    "dense fp32, vocabulary 32,000, tied",
    "dense bf16, selective",
    "dense bf16_params, 2 micro-batches",
    "experts bf16",
]
ON_RANKS = ["dense fp32, PP 2", "dense fp32, TP 2", "dense bf16, FSDP 2, selective"]


def test_a_plan_leaves_nothing_behind(tmp_path: Path) -> None:
    code, said = regrow(["mode=plan", *SMALL], tmp_path)
    assert code == 0, said
    assert "live at the peak" in said
    assert "a step:" in said
    assert list(tmp_path.iterdir()) == []


def test_json_has_what_the_text_has() -> None:
    said = json.loads(
        plan_config(compose_config([*SMALL, "parallel.dp_shard=16", "data.global_batch_size=16", "plan.json=true"]))
    )
    (rank,) = said["ranks"]
    assert sum(rank["kinds"].values()) == rank["live"]
    assert said["axes"][0]["links"] == "network"
    assert said["checkpoint"]["bytes"] > 3 * 4 * said["parameters"]
    assert said["time"]["tokens"] == 16 * 128


@pytest.mark.parametrize(
    "bad",
    [
        ["parallel.tp=3"],
        ["parallel.pp=4", "model.n_layers=2"],
        ["data.seq_len=100000"],
        ["optimizer.beta1=2"],
        ["parallel.dp_shard=2", "parallel.reshard_after_forward=3"],
    ],
)
def test_it_refuses_what_a_run_refuses_in_the_same_words(bad: list[str], tmp_path: Path) -> None:
    overrides = [*bad, "launch.device=cpu", "run.name=planned"]
    with pytest.raises(Refused) as of_run:
        prepare_run(compose_config(overrides), tmp_path / "run")
    with pytest.raises(Refused) as of_plan:
        plan_config(compose_config(overrides))
    assert str(of_plan.value) == str(of_run.value)


@pytest.mark.parametrize("field", ["plan.mfu=0", "plan.nodes=0", "plan.memory_gib=0", "plan.allocator_slack=-1"])
def test_fields_of_the_plan_are_checked(field: str) -> None:
    with pytest.raises(Refused, match=field.split("=")[0].replace(".", r"\.")):
        plan_config(compose_config([*SMALL, field]))


def test_the_plan_is_in_no_name() -> None:
    named, other = (compose_config(more).run.name for more in ([], ["plan.memory_gib=40", "mode=plan"]))
    assert named == other


def test_deep_models_are_planned_from_shallow_ones() -> None:
    """The line through two shallow models is where the deep one is."""
    overrides = ["model.n_layers=9", "data.seq_len=128", "run.name=planned", "parallel.dp_shard=2", "precision=bf16"]
    from regrow.launch.run.plan import _Makers
    from regrow.trainer.plan.extrapolate import dry_run_of_all_layers

    config = typed_config(overrides)
    step, makers = step_of(config), _Makers(config)
    line, whole = (dry_run_of_all_layers(step, 0, makers.model, makers.optimizer, whole=w) for w in (False, True))
    assert line.peak.size == pytest.approx(whole.peak.size, rel=2e-3)
    assert line.parameters == whole.parameters


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_plans_are_close_to_what_runs_hold(tmp_path: Path) -> None:
    """Against the profiler's events of real steps; the whole table is made by `python -m benchmarks.plan`."""
    corpus = tmp_path / "text.jsonl"
    write_corpus(corpus, 60)
    rows = []
    for number, name in enumerate([*SOME, *ON_RANKS]):
        overrides = overrides_of(name, corpus)
        ranks = 2 if name in ON_RANKS else 1
        spec = spec_of(overrides, tmp_path / f"run-{number}", ranks)
        measured = run_distributed(measured_peak, spec, world_size=ranks)
        rows.append(Comparison(name=name, planned=max(planned_peaks(overrides)), measured=max(measured)))
        print(rows[-1], f"{rows[-1].error:+.1%}")
    median, worst = summary(rows)
    assert median <= 0.03
    assert worst <= 0.08


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_layouts_that_fit_may_run() -> None:
    """Each passes the checks of a run, and its own plan says that it fits."""
    overrides = ["model=llama3_1b", "precision=bf16", "data.seq_len=4096", "data.global_batch_size=32",
                 "data.micro_batch_size=2", "run.name=planned"]  # fmt: skip
    config = typed_config([*overrides, "plan.fit=1x8x80"])
    fits = fit_layouts(config)
    assert 1 <= len(fits) <= 5
    assert [f.estimate.seconds for f in fits] == sorted(f.estimate.seconds for f in fits)
    for fit in fits:
        assert fit.layout.world_size == 8
        assert fit.memory.total <= 80 * 2**30
        assert fit.estimate.reasons
        step_of(typed_config([*overrides, *fit.overrides]))
    best = plan_of(typed_config([*overrides, *fits[0].overrides]))
    assert max(r.live for r in best.ranks) == fits[0].memory.live


def test_a_cluster_that_is_none_is_refused() -> None:
    config = typed_config([*SMALL, "plan.fit=8x80"])
    with pytest.raises(ConfigError, match="NODESxGPUSxGIB"):
        fit_layouts(dataclasses.replace(config))
