"""Schema of the hook that writes a run's report."""

from dataclasses import dataclass
from typing import ClassVar

from regrow.trainer.config import HookConfig, HookStage

__all__ = ["ReportConfig"]


@dataclass(kw_only=True, slots=True)
class ReportConfig(HookConfig):
    """A page on the run, `report.html`, when it ends, however it ends."""

    SCHEMA: ClassVar[tuple[str, str]] = ("hook", "report_schema")
    _target_: str = "regrow.trainer.hooks.report.ReportHook"
    stage: HookStage = HookStage.end
