"""Which fields tell runs apart."""

from regrow.trainer.report.swept import swept_fields


def test_fields_that_somebody_set_and_that_differ() -> None:
    runs = [
        (
            {"optimizer": {"lr": 1e-3}, "train": {"steps": 5}, "seed": 0},
            ["optimizer.lr=1e-3", "train.steps=5", "run.name=a"],
        ),
        (
            {"optimizer": {"lr": 3e-4}, "train": {"steps": 5}, "seed": 1},
            ["seed=1", "optimizer.lr=3e-4", "train.steps=5", "run.name=b"],
        ),
    ]
    assert swept_fields(runs) == {"optimizer.lr": [1e-3, 3e-4], "seed": [0, 1]}


def test_a_group_is_told_by_its_choice_and_a_run_to_come_by_its_command() -> None:
    runs = [
        ({"model": {"name": "a_big"}, "optimizer": {"lr": 0.1}}, ["model=a", "optimizer.lr=1e-1"]),
        ({}, ["model=b", "optimizer.lr=2e-1"]),
    ]
    assert swept_fields(runs) == {"model": ["a", "b"], "optimizer.lr": [0.1, 0.2]}


def test_the_same_value_written_otherwise_is_no_difference() -> None:
    runs = [
        ({"optimizer": {"lr": 1e-3}}, ["optimizer.lr=1e-3"]),
        ({"optimizer": {"lr": 1e-3}}, ["+optimizer.lr=0.001"]),
    ]
    assert swept_fields(runs) == {}
