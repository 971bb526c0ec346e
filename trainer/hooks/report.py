"""A page on the run when it ends."""

import logging
from typing import final

from regrow.checkpoint.run.lease import LeaseLostError
from regrow.trainer.hook import Hook
from regrow.trainer.hooks.report_config import ReportConfig
from regrow.trainer.loop import StopReason, Trainer
from regrow.trainer.report.write import write_report
from regrow.trainer.run_files import METRICS, REPORT

__all__ = ["ReportHook"]

log = logging.getLogger(__name__)

# Of rows, for which a page takes about ten seconds; and one, where somebody waits for the run to be gone.
_MOST_BYTES, _MOST_BYTES_STOPPED = 64 << 20, 8 << 20


@final
class ReportHook(Hook):
    """See `ReportConfig`. On rank 0, once the record says how the run ended; its failure is not the run's."""

    def __init__(self, config: ReportConfig) -> None:
        self._config = config

    def after_fit(self, trainer: Trainer) -> None:
        stopped = trainer.stop not in (None, StopReason.finished)
        self._write(trainer, _MOST_BYTES_STOPPED if stopped else _MOST_BYTES)

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        # A run that another writer has taken over is not this one's to describe.
        if not isinstance(error, LeaseLostError):
            self._write(trainer, _MOST_BYTES_STOPPED)

    def _write(self, trainer: Trainer, most_bytes: int) -> None:
        if not trainer.context.is_main:
            return
        resources = trainer.resources
        try:
            if (resources.run_dir / METRICS).stat().st_size > most_bytes:
                log.info("no report is made now of so many steps: regrow-report %s", resources.run_dir)
                return
            write_report([(resources.run_dir, resources.run_name)], resources.run_dir / REPORT, resources.run_name)
        except Exception as error:
            log.warning("the run's report was not made: %s", error)
        else:
            log.info("report: %s", resources.run_dir / REPORT)
