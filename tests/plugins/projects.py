"""Two projects: what `regrow-new` writes, and one whose packages are named as Regrow's folders are."""

import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path

from regrow.launch.commands.new import write_project

__all__ = ["PROJECTS", "bare_names", "written"]

POLICY = '''
    """When to save: at each third of the run."""

    from typing import final

    from checkpoint.config import ThirdsConfig
    from regrow.checkpoint.policy.save import SaveContext, SavePolicy


    @final
    class Thirds(SavePolicy):
        def __init__(self, config: ThirdsConfig) -> None:
            self.name, self._after = "thirds", config.after

        def due(self, context: SaveContext) -> bool:
            return context.step > self._after and context.step % (context.last_step // 3) == 0
'''
POLICY_CONFIG = '''
    """Its settings."""

    from dataclasses import dataclass
    from typing import ClassVar

    from regrow.checkpoint.config import SavePolicyConfig


    @dataclass(kw_only=True, slots=True)
    class ThirdsConfig(SavePolicyConfig):
        SCHEMA: ClassVar[tuple[str, str]] = ("save_policy", "thirds_schema")
        _target_: str = "checkpoint.policy.Thirds"
        after: int = 0
'''
LOGGER = '''
    """A logger: the losses as a table."""

    from typing import final

    from regrow.trainer.hook import Hook


    @final
    class TableHook(Hook):
        def __init__(self, config):
            self._file = None

        def before_fit(self, trainer):
            if trainer.context.is_main:
                self._file = (trainer.resources.run_dir / "losses.csv").open("a")

        def after_metrics(self, trainer, row):
            if self._file is not None:
                self._file.write(f"{row['step']},{row['loss']}\\n")

        def close(self, trainer):
            if self._file is not None:
                self._file.close()
'''
LOGGER_CONFIG = '''
    """Its settings."""

    from dataclasses import dataclass
    from typing import ClassVar

    from regrow.trainer.config import HookConfig, HookStage


    @dataclass(kw_only=True, slots=True)
    class TableConfig(HookConfig):
        SCHEMA: ClassVar[tuple[str, str]] = ("hook", "table_schema")
        _target_: str = "trainer.table.TableHook"
        stage: HookStage = HookStage.log
'''


def written(root: Path) -> Path:
    """As `regrow-new lab` writes it."""
    write_project(root / "lab")
    return root / "lab"


def bare_names(root: Path) -> Path:
    """`models`, `trainer` and `checkpoint` hold the project's own model, optimizer, hook, logger and save policy; `conf`, and a
    module that bears a name of the standard library, are something else altogether.
    """
    write_project(root / "new", "mylab")
    made, project = root / "new/mylab", root / "project"
    moves = {
        "model": "models", "optimizer": "trainer/optimizer", "hook": "trainer/hook", "conf/model": "models/conf/model",
        "conf/optimizer": "trainer/conf/optimizer", "conf/hook": "trainer/conf/hook",
        "conf/experiment": "trainer/conf/experiment",
    }  # fmt: skip
    for inside, place in moves.items():
        shutil.copytree(made / inside, project / place, dirs_exist_ok=True)
    for path in project.rglob("*.py"):
        text = path.read_text().replace("mylab.model.", "models.")
        path.write_text(
            text.replace("mylab.optimizer.", "trainer.optimizer.").replace("mylab.hook.", "trainer.hook.")
        )
    names = '["models", "trainer", "checkpoint"]'
    for name, text in {
        "pyproject.toml": f"[tool.regrow]\npackages = {names}\n",
        "trainer/__init__.py": "",
        "trainer/table.py": LOGGER,
        "trainer/table_config.py": LOGGER_CONFIG,
        "trainer/conf/hook/table.yaml": "defaults: [table_schema, _self_]\n",
        "trainer/conf/logger/table.yaml": "# @package _global_\ndefaults:\n  - /hook@hooks.table: table\n",
        "checkpoint/__init__.py": "",
        "checkpoint/config.py": POLICY_CONFIG,
        "checkpoint/policy.py": POLICY,
        "checkpoint/conf/save_policy/thirds.yaml": "defaults: [thirds_schema, _self_]\n",
        "conf/__init__.py": "raise ImportError('not what anybody looks for')\n",
        "token.py": "raise ImportError('not what anybody looks for')\n",
    }.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(textwrap.dedent(text))
    return project


PROJECTS: dict[str, Callable[[Path], Path]] = {"bare_names": bare_names, "written": written}
