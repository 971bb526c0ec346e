"""A package of a user's own with one hook that does something bad."""

from pathlib import Path

__all__ = ["write_hook"]

_CONFIG = '''
import threading
from dataclasses import dataclass
from typing import ClassVar

from regrow.trainer.config import HookConfig
from regrow.trainer.hook import Hook


@dataclass(kw_only=True, slots=True)
class BadConfig(HookConfig):
    """Does something bad."""

    SCHEMA: ClassVar[tuple[str, str]] = ("hook", "bad_schema")
    _target_: str = "NAME.config.BadHook"


class BadHook(Hook):
    def __init__(self, config):
        pass

    def before_step(self, trainer):
        if trainer.state.step == STEP and trainer.context.rank == RANK:
            ACT
'''


def write_hook(folder: Path, name: str, *, step: int, rank: int, act: str) -> None:
    """Writes a project whose `hook/bad` acts once; commands given in its folder may use it.

    Args:
        folder: of the project.
        name: of the package, used once in all tests.
        step: after which it acts, before the one that follows.
        rank: that acts.
        act: a statement, with `trainer` and `threading`.
    """
    (folder / name / "conf/hook").mkdir(parents=True)
    (folder / name / "__init__.py").write_text("")
    (folder / name / "conf/hook/bad.yaml").write_text("defaults: [bad_schema, _self_]\n")
    text = _CONFIG.replace("NAME", name).replace("STEP", str(step)).replace("RANK", str(rank)).replace("ACT", act)
    (folder / name / "config.py").write_text(text)
    (folder / "pyproject.toml").write_text(f'[tool.regrow]\npackages = ["{name}"]\n')
