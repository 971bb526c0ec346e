"""What a `_target_` may name."""

# mypy: disable-error-code="type-abstract"

import pytest

from regrow.checkpoint.config import MinutesConfig
from regrow.checkpoint.policy.retention import RetentionRule
from regrow.checkpoint.policy.save import EveryMinutes, SavePolicy
from regrow.errors import ConfigError
from regrow.launch.config.errors import describe
from regrow.launch.config.resolve import checking, construct, resolve
from regrow.launch.run.preflight import check_config
from regrow.models.base import LanguageModel
from regrow.models.llama3.model import Llama3
from regrow.trainer.data.source import Source
from regrow.trainer.hook import Hook
from regrow.trainer.optimizer import Optimizer
from regrow.trainer.schedules.base import Schedule
from tests.support import typed_config

KINDS = (LanguageModel, Optimizer, Schedule, Source, Hook, SavePolicy, RetentionRule)


def test_a_class_of_the_right_kind_is_found_under_both_of_its_names() -> None:
    assert resolve("regrow.models.llama3.model.Llama3", "model", LanguageModel) is Llama3
    assert resolve("models.llama3.model.Llama3", "model", LanguageModel) is Llama3
    assert resolve("regrow.checkpoint.policy.save.EveryMinutes", "x", SavePolicy) is EveryMinutes


@pytest.mark.parametrize("base", KINDS, ids=lambda k: k.__name__)
def test_another_kind_is_refused_for_every_field(base: type[object]) -> None:
    other = "regrow.models.llama3.model.Llama3" if base is not LanguageModel else "regrow.trainer.optimizer.AdamW"
    with pytest.raises(ConfigError, match=rf"^x._target_ must name a class that extends \S+\.{base.__name__}, but "):
        resolve(other, "x", base)


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("os.system", r"x._target_ must begin with one of .*, but is os.system; if the package is your own, name it"),
        ("regrow.launch.app.Application", r"x._target_ must begin with one of .*, but is regrow.launch.app"),
        (
            "regrow.trainer.nothing.X",
            r"x._target_ must name a class, but .* cannot be imported \(ModuleNotFoundError: No module named",
        ),
        (
            "regrow.trainer.hook.Nothing",
            r"x._target_ must name a class, but .* cannot be imported \(AttributeError: module",
        ),
        ("regrow.models.", r"x._target_ must name a class, but regrow.models. cannot be imported"),
        ("regrow.models.hf.from_folder", r"x._target_ must name a class .*, but \S+ is no class; name another one"),
        ("regrow.models.base.LanguageModel", r"x._target_ must name a class with all methods .* lacks \w+"),
    ],
)
def test_a_target_that_cannot_be_used_is_one_sentence(target: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as refused:
        resolve(target, "x", LanguageModel)
    assert "\n" not in str(refused.value)
    assert describe(refused.value) == str(refused.value)


@pytest.mark.parametrize(
    "override",
    ["model._target_", "data._target_", "optimizer._target_", "scheduler._target_", "hooks.validation._target_"],
)
def test_the_command_refuses_another_kind_before_anything_is_read(override: str) -> None:
    wrong = "regrow.checkpoint.policy.save.OnStop"
    with pytest.raises(ConfigError, match=rf"^{override} must name a class .*, but {wrong} extends "):
        check_config(typed_config([f"{override}={wrong}"]))


def test_a_plain_value_error_about_a_config_is_a_refusal() -> None:
    config = MinutesConfig(minutes=0)
    with pytest.raises(ConfigError, match=r"checkpoint.save_policies.\*.minutes must be above 0"):
        construct(config._target_, "checkpoint.save_policies.mine", SavePolicy, config)
    with pytest.raises(ConfigError, match="rho must be below 1"), checking():
        raise ValueError("rho must be below 1, but is 2; use 0.9")


def test_other_errors_of_a_class_stay_what_they_are() -> None:
    with pytest.raises(TypeError), checking():
        raise TypeError("a bug")
