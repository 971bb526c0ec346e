"""A page on the run when it ends."""

import logging
from typing import final

from regrow.checkpoint.run.lease import LeaseLostError
from regrow.trainer.hook import Hook
from regrow.trainer.hooks.report_config import ReportConfig
from regrow.trainer.loop import Trainer
from regrow.trainer.report.write import write_report
from regrow.trainer.run_files import REPORT

__all__ = ["ReportHook"]

log = logging.getLogger(__name__)


@final
class ReportHook(Hook):
    """See `ReportConfig`. On rank 0, once the record says how the run ended; its failure is not the run's."""

    def __init__(self, config: ReportConfig) -> None:
        self._config = config

    def after_fit(self, trainer: Trainer) -> None:
        self._write(trainer)

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        # A run that another writer has taken over is not this one's to describe.
        if not isinstance(error, LeaseLostError):
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if not trainer.context.is_main:
            return
        resources = trainer.resources
        try:
            write_report([(resources.run_dir, resources.run_name)], resources.run_dir / REPORT, resources.run_name)
        except Exception as error:
            log.warning("the run's report was not made: %s", error)
        else:
            log.info("report: %s", resources.run_dir / REPORT)
