"""A run's history out of its record, its log and its disk."""

import time

from regrow.checkpoint.policy.lineage import Lineage, LoadRequest, StartKind
from regrow.trainer.report.life import DiskStep, life_of_run
from regrow.trainer.report.log_events import LogEvent, parse_log
from regrow.trainer.run_record import Attempt, RunRecord

T0 = time.mktime((2026, 1, 2, 3, 0, 0, 0, 0, -1))


def clock(second: float) -> str:
    at = time.localtime(T0 + second)
    return time.strftime("%Y-%m-%d %H:%M:%S", at) + f",{round(second % 1 * 1000):03d}"


def line(second: float, message: str) -> str:
    return f"{clock(second)} [rank 0] INFO {message}\n"


LOG = (
    line(0.5, "hooks, in order: BeginHook")
    + line(0.6, "state: fresh weights; continuing after step 0")
    + line(3, "step 10/40  loss 5.1  grad_norm 1.0  lr 1.00e-03  9 tokens/s")
    + line(3.25, "saving step 10 (every 10): 2.5 ms")
    + line(3.5, "saved /a b/step-1/run/checkpoint/step-10, durable after 0.25 s")
    + line(6, "step 19/40  loss 4.1  grad_norm 1.0  lr 1.00e-03  9 tokens/s")
    + line(6.5, "saving step 20 (every 10): 2.5 ms")
    # killed here; the next start
    + line(19.5, "state: step 10 of /a b/run/checkpoint; continuing after step 10")
    + "a traceback\n"
    + line(23, "saving step 20 (every 10): 2.5 ms")
    + line(23.5, "saved /run/checkpoint/step-20, durable after 0.50 s")
    + line(24, "removed steps 10, 5")
    + line(25, "step 30/40  loss 3.0  grad_norm 1.0  lr 1.00e-03  9 tokens/s")
    + line(25.5, "step 30 was not saved: no space left; training goes on and the next due save is tried")
)


def test_a_log_is_read() -> None:
    events = parse_log(LOG)
    assert [(e.kind, e.step) for e in events] == [
        ("trained", 10), ("staged", 10), ("committed", 10), ("trained", 19), ("staged", 20), ("staged", 20),
        ("committed", 20), ("pruned", 10), ("pruned", 5), ("trained", 30), ("failed", 30),
    ]  # fmt: skip
    assert (events[1].at - T0, events[1].seconds, events[2].seconds) == (3.25, 0.0025, 0.25)


def record() -> RunRecord:
    return RunRecord(
        lineages=[Lineage(id="0-a")],
        attempts=[
            Attempt(started_at=T0 + 1, lineage="0-a", layout={"dp_shard": 1}, to_step=10, saved_step=10, host="n1"),
            Attempt(started_at=T0 + 20, lineage="0-a", layout={"dp_shard": 2, "tp": 2}, from_step=10, to_step=30,
                    saved_step=20, end="preempted", host="n2", job="7"),
        ],
    )  # fmt: skip


def test_a_kill_and_what_it_cost() -> None:
    life = life_of_run(record(), parse_log(LOG), [DiskStep(step=20, state="kept", lineage="0-a")], "stopped", 0.25)
    first, second = life.starts
    assert (first.how, first.from_step, first.to_step, first.ended - T0) == ("killed", 0, 19, 6.5)
    assert (second.how, second.layout, second.ranks, second.to_step) == ("preempted", "dp_shard 2 × tp 2", 4, 30)
    # From the last sign of life to the next beginning; steps 11 to 19 were trained twice.
    assert (life.lost.down_s, life.lost.again_steps, life.lost.again_s) == (13.5, 9, 2.25)
    assert [(s.start, s.step, s.state, s.resumed) for s in life.snapshots] == [
        (0, 10, "pruned", 1), (0, 20, "incomplete", 0), (1, 20, "kept", 0), (1, 30, "failed", 0),
    ]  # fmt: skip
    assert life.counts == {"pruned": 1, "incomplete": 1, "kept": 1, "failed": 1}
    assert life.snapshots[2].seconds == 0.5


def test_a_run_whose_log_is_gone_tells_what_its_record_and_disk_do() -> None:
    disk = [DiskStep(step=20, state="kept", lineage="0-a", at=T0 + 24), DiskStep(step=25, state="set aside")]
    life = life_of_run(record(), [], disk, "stopped", 0.5)
    assert [s.ended - T0 for s in life.starts] == [1 + 10 * 0.5, 20 + 20 * 0.5]
    assert [(s.step, s.state) for s in life.snapshots] == [(10, "pruned"), (20, "kept"), (25, "set aside")]


def test_lines_of_steps() -> None:
    known = record()
    request = LoadRequest(load_step=10, exclude=("optimizer",))
    known.lineages.append(Lineage(id="1-b", origin=StartKind.step, origin_step=10, parent="0-a", request=request))
    known.attempts.append(Attempt(started_at=T0 + 60, lineage="1-b", from_step=10, to_step=12))
    life = life_of_run(known, parse_log(LOG), [], "running", 0.5)
    assert [(x["id"], x["parent"], x["step"], x["asked"], x["current"]) for x in life.lineages] == [
        ("0-a", None, 0, "", False), ("1-b", "0-a", 10, "load_step=10; without optimizer", True),
    ]  # fmt: skip
    assert [s.how for s in life.starts] == ["killed", "preempted", "running"]
    # Steps that the new line leaves behind were not lost to a stop, and lie aside.
    assert life.lost.again_steps == 9
    assert {s.step: s.state for s in life.snapshots if s.start == 1}[20] == "set aside"


def test_going_on_after_the_end_loses_nothing() -> None:
    attempts = [
        Attempt(started_at=T0, lineage="0-a", to_step=10, end="finished"),
        Attempt(started_at=T0 + 9000, lineage="0-a", from_step=10, to_step=20, end="finished"),
    ]
    life = life_of_run(RunRecord(lineages=[Lineage(id="0-a")], attempts=attempts), [], [], "finished", 0.1)
    assert (life.lost.down_s, life.lost.again_steps) == (0.0, 0)


def test_events_before_any_start_belong_to_none() -> None:
    known = RunRecord(lineages=[Lineage(id="0-a")], attempts=[Attempt(started_at=T0 + 50, lineage="0-a")])
    life = life_of_run(known, [LogEvent(at=T0, kind="staged", step=3)], [], "running", 0.1)
    assert life.snapshots == []
