"""The one list of hooks: what is in it, in which order, and what switches its hooks on."""

import re
from pathlib import Path

import pytest

from regrow.launch.config.identity import config_hash
from regrow.launch.run.build import build_hooks
from regrow.launch.run.hook_order import hook_order
from regrow.trainer.hooks.config import WandbHookConfig
from tests.support import settings_of, typed_config

ALWAYS = ["begin", "metrics", "progress", "record", "checkpoint", "startup"]
OPTIONAL = ["validation", "sample", "garbage"]


def names(*overrides: str) -> list[str]:
    return [name for name, _ in hook_order(typed_config(overrides))]


def test_none_leaves_what_a_run_cannot_do_without() -> None:
    assert names("hooks=none") == ALWAYS


def test_everything_stands_in_its_place() -> None:
    given = ["logger=wandb", "data.log_samples=true", "checkpoint.export.every_n=5", "+hook@hooks.mine=throttle"]
    assert names(*given) == [
        "begin", *OPTIONAL, "mine", "metrics", "samples", "progress", "wandb", "record", "export", "checkpoint",
        "startup", "report",
    ]  # fmt: skip
    kinds = [type(h).__name__ for h in build_hooks(typed_config(given))]
    assert len(kinds) == len(set(kinds)) == 14


@pytest.mark.parametrize(
    ("override", "without"),
    [
        ("checkpoint=disabled", {"checkpoint"}),
        ("hooks.sample.enabled=false", {"sample"}),
        ("hooks.progress.enabled=false", {"progress"}),
        ("~hooks.startup", {"startup"}),
    ],
)
def test_fields_switch_hooks_off(override: str, without: set[str]) -> None:
    assert set(names()) - set(names(override)) == without


def test_sections_reach_their_hooks() -> None:
    config = typed_config(["logger=wandb", "wandb.project=mine", "train.log_every=7"])
    hook = config.hooks["wandb"]
    assert isinstance(hook, WandbHookConfig)
    assert hook.settings == config.wandb
    assert settings_of(["train.log_every=7"])["hooks"]["progress"]["every"] == 7


def test_a_stage_can_be_chosen() -> None:
    assert names("+hook@hooks.mine=throttle", "hooks.mine.stage=end")[-3:] == ["startup", "report", "mine"]


@pytest.mark.parametrize("name", ["begin", "metrics", "record"])
@pytest.mark.parametrize("how", ["hooks.{}.enabled=false", "~hooks.{}"])
def test_what_a_run_needs_is_not_left_out(name: str, how: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"hooks.{name}.enabled must be true")):
        names(how.format(name))


def test_checkpoints_are_not_saved_by_a_run_without_them() -> None:
    with pytest.raises(ValueError, match=r"hooks.checkpoint.enabled must be false with checkpoint.enable=false"):
        names("checkpoint=disabled", "hooks.checkpoint.enabled=true")


@pytest.mark.parametrize("override", ["hooks.checkpoint.enabled=false", "~hooks.checkpoint"])
def test_checkpoints_are_saved_where_they_are_asked_for(override: str) -> None:
    with pytest.raises(ValueError, match=r"hooks.checkpoint.enabled must be true with checkpoint.enable=true"):
        names(override)
    assert "checkpoint" not in names(override, "checkpoint.load_only=true")


def test_a_new_logger_is_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "logger").mkdir()
    text = "# @package _global_\ndefaults:\n  - /hook@hooks.slow: throttle\nhooks:\n  slow:\n    stage: log\nlogger: slow\n"
    (tmp_path / "logger/slow.yaml").write_text(text)
    given = [f"hydra.searchpath=[file://{tmp_path}]", "logger=slow"]
    assert names(*given)[-5:] == ["slow", "record", "checkpoint", "startup", "report"]
    # Where metrics go makes no other run.
    assert config_hash(settings_of(given)) == config_hash(settings_of([]))
