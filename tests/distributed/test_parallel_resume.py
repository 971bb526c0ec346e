"""Runs that go on under the same layout, bit for bit, and under other layouts, and what a dead rank does."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch

from tests.distributed.test_parallel import SCHEDULES, base, degrees
from tests.layouts import observe, relative
from tests.runs import train
from tests.support import assert_same_tensors, curve, metrics, samples, stored_tensors, wait_until
from tests.warm import start

pytestmark = pytest.mark.slow

SAVING = ["checkpoint=debug", "checkpoint.interval=2", "hooks=none", "data.log_samples=true"]


DOCUMENTS = ["data.document_mask=true", "model.window=12"]
SIGMOID = ["model.score_func=sigmoid", "model.n_shared_experts=1", "model.n_expert_groups=2", "model.topk_groups=1"]


@pytest.mark.parametrize(
    ("kind", "layout", "options"),
    [
        ("dense", "dp_shard=2 tp=2", ["train.z_loss=1e-4"]),
        ("dense", f"pp=2 dp_shard=2 pp_schedule={SCHEDULES[-1]}", []),
        ("dense", "tp=2 cp=2", DOCUMENTS),
        ("dense", "tp=4", []),
        ("dense", "dp_replicate=2 cp=2", ["data.document_mask=true", "train.z_loss=1e-4"]),
        ("moe", "dp_shard=2 tp=2 ep=4", SIGMOID),
        ("moe", "pp=2 dp_shard=2 ep=2", DOCUMENTS),
    ],
)
def test_resuming_is_bitwise(corpus: Path, tmp_path: Path, kind: str, layout: str, options: list[str]) -> None:
    world = 4
    # As few forward passes as gradient accumulation needs, and a pipeline.
    micro = 1 if "pp=" in layout else 4
    own = [*SAVING, "scheduler.total_steps=4", f"data.micro_batch_size={micro}", *degrees(layout), *options]
    train([*base(corpus, kind), *own, "train.steps=4"], tmp_path / "whole", world)
    train([*base(corpus, kind), *own, "train.steps=2"], tmp_path / "cut", world)
    assert train([*base(corpus, kind), *own, "train.steps=4"], tmp_path / "cut", world).step == 4
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert_same_tensors(tmp_path / "cut/checkpoint/step-4", tmp_path / "whole/checkpoint/step-4")


CHAINS: dict[str, list[tuple[int, str]]] = {
    "dense": [(2, "dp_shard=2"), (4, "tp=4"), (4, "pp=2 dp_shard=2"), (4, "cp=2 tp=2"), (1, "")],
    "tied": [(2, "pp=2"), (2, "tp=2"), (4, "pp=2 dp_shard=2 pp_schedule=interleaved"), (2, "cp=2"), (1, "")],
    "moe": [(2, "dp_shard=2"), (2, "dp_shard=2 ep=2"), (4, "pp=2 dp_shard=2 ep=2"), (2, "tp=2"), (1, "")],
}


@pytest.mark.parametrize("kind", list(CHAINS))
def test_one_run_through_many_layouts(corpus: Path, tmp_path: Path, kind: str) -> None:
    settings = base(corpus, "moe" if kind == "moe" else "dense", *SAVING, "scheduler.total_steps=10")
    settings += ["model.tied_embeddings=true"] if kind == "tied" else []
    train([*settings, "train.steps=10"], tmp_path / "whole")
    for number, (world, layout) in enumerate(CHAINS[kind], 1):
        steps = f"train.steps={2 * number}"
        assert train([*settings, steps, *degrees(layout)], tmp_path / "chain", world).step == 2 * number
    assert samples(tmp_path / "chain") == samples(tmp_path / "whole")
    rows, expected = metrics(tmp_path / "chain"), metrics(tmp_path / "whole")
    assert len(rows) == 10
    assert max(relative(a["loss"], b["loss"]) for a, b in zip(rows, expected, strict=True)) <= 1e-5
    left, right = (stored_tensors(tmp_path / run / "checkpoint/step-10") for run in ("chain", "whole"))
    assert left.keys() == right.keys()
    assert ("output.weight" in left) == (kind != "tied")


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_checkpoint_keeps_every_bit_through_other_layouts(corpus: Path, tmp_path: Path, kind: str) -> None:
    """With a learning rate of 0 weights stay as they are; the experts' biases, which move of themselves, are held."""
    held = ["optimizer.lr=0.0", "optimizer.weight_decay=0.0", "model.vocab_size=323"]
    held += ["model.bias_update_speed=0.0"] if kind == "moe" else []
    settings = base(
        corpus, kind, *SAVING, "checkpoint.interval=1", "checkpoint.keep_latest_k=0", *held, "scheduler.total_steps=4"
    )
    layouts = {
        "dense": [(4, "dp_shard=2 tp=2"), (4, "pp=2 cp=2"), (4, "tp=4"), (1, "")],
        "moe": [(4, "dp_shard=2 tp=2 ep=2"), (4, "pp=2 dp_shard=2 ep=2"), (2, "tp=2 ep=2"), (1, "")],
    }[kind]
    for step, (world, layout) in enumerate(layouts, 1):
        train([*settings, f"train.steps={step}", *degrees(layout)], tmp_path / "run", world)
    steps = [stored_tensors(tmp_path / f"run/checkpoint/step-{n}") for n in range(1, len(layouts) + 1)]
    names = [n for n in steps[0] if not n.startswith(("optimizer.", "train_state."))]
    assert any(n.endswith("w1.weight" if kind == "dense" else "experts.w1") for n in names)
    assert any("expert_bias" in n for n in names) == (kind == "moe")
    for later in steps[1:]:
        assert later.keys() == steps[0].keys()
        for name in names:
            assert torch.equal(later[name], steps[0][name]), name


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_sixteen_ranks_with_everything(corpus: Path, tmp_path: Path, kind: str) -> None:
    """dp_shard 2 × tp 2 × pp 2 × cp 2, and ep 2 with experts."""
    settings = base(corpus, kind, "train.steps=2")
    recipe = ["parallel=all", *(["parallel.ep=2"] if kind == "moe" else [])]
    (reference,) = observe([settings], tmp_path, 1)
    (seen,) = observe([[*settings, *recipe]], tmp_path, 16)
    assert max(relative(a, b) for a, b in zip(seen.losses, reference.losses, strict=True)) <= 5e-6
    assert max(relative(a, b) for a, b in zip(seen.norms, reference.norms, strict=True)) <= 5e-6
    assert seen.ids == reference.ids
    assert all(torch.equal(seen.first[n], t) for n, t in reference.first.items())


def seeded_layouts(kind: str, count: int) -> list[str]:
    """Valid layouts of 4 ranks, drawn from all degrees, schedules and options; the same each time."""
    generator = torch.Generator().manual_seed(31 if kind == "dense" else 32)

    def pick(choices: Sequence[str]) -> str:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    found: list[str] = []
    while len(found) < count:
        sizes = {"dp_replicate": 1, "dp_shard": 1, "tp": 1, "pp": 1, "cp": 1}
        for _ in range(2):
            sizes[pick([n for n, size in sizes.items() if size == 1 or n in ("dp_shard", "cp")])] *= 2
        if sizes["tp"] > 2 or sizes["pp"] > 2:
            continue
        layout = [f"{n}={size}" for n, size in sizes.items()]
        layout.append(f"pp_schedule={pick(SCHEDULES)}")
        layout.append(f"sequence_parallel={pick(['true', 'false'])}")
        layout.append(f"cp_balance={pick(['true', 'false'])}")
        layout.append(f"cp_method={pick(['auto', 'gather', 'ring'])}")
        sharing = sizes["dp_shard"] * sizes["tp"] * sizes["cp"]
        layout.append(f"ep={pick([str(n) for n in (1, 2, 4) if sharing % n == 0]) if kind == 'moe' else 1}")
        found.append(" ".join(layout))
    return found


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_layouts_drawn_at_random_run(corpus: Path, tmp_path: Path, kind: str) -> None:
    every = seeded_layouts(kind, 10)
    # As many micro-batches as stages need, and gradient accumulation elsewhere.
    for size, staged in ((8, True), (4, False)):
        settings = base(corpus, kind, "train.steps=2", f"data.global_batch_size={size}", "data.micro_batch_size=1")
        (reference,) = observe([settings], tmp_path, 1)
        layouts = [o for o in every if ("pp=2" in o.split()) == staged]
        assert layouts
        found = observe([[*settings, *degrees(o)] for o in layouts], tmp_path, 4)
        for layout, seen in zip(layouts, found, strict=True):
            assert max(relative(a, b) for a, b in zip(seen.losses, reference.losses, strict=True)) <= 5e-6, layout


def test_a_dead_rank_stops_the_others(corpus: Path, tmp_path: Path) -> None:
    """Killed in the middle of a pipeline with tensor parallelism; the others end within 30 s, its death is named."""
    settings = base(corpus, "dense", "train.steps=100000", "hooks=none", "checkpoint=disabled", "run.name=r",
                    "parallel.pp=2", "parallel.tp=2", "launch.device=cpu")  # fmt: skip
    process = start(settings, tmp_path)
    rows = tmp_path / "outputs/r/metrics.jsonl"
    wait_until(lambda: rows.exists() and rows.stat().st_size > 0, timeout_s=120, every_s=0.1)
    ranks = [
        c for c in psutil.Process(process.pid).children(recursive=True) if "regrow.launch.run.worker" in c.cmdline()
    ]
    assert len(ranks) == 4
    # They were started in their order.
    victim = sorted(ranks, key=lambda c: c.pid)[2]
    os.kill(victim.pid, signal.SIGKILL)
    killed = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - killed < 30
    assert process.returncode == 1
    assert "rank 2 died (signal SIGKILL)" in output
    assert not any(c.is_running() for c in ranks)
