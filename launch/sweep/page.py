"""The page of a sweep, when its command ends: Hydra tells of it, whichever launcher ran it here."""

import logging
from pathlib import Path
from typing import Any, final

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from regrow.launch.sweep.members import runs_of_command
from regrow.trainer.report.write import write_report
from regrow.trainer.run_files import METRICS, REPORT

__all__ = ["SweepPage"]

log = logging.getLogger(__name__)


@final
class SweepPage(Callback):
    """Writes `run.root/report.html` with the runs of the command; its failure is not the sweep's."""

    def on_multirun_end(self, config: DictConfig, **_more: Any) -> None:
        folder = Path(str(config.hydra.sweep.dir)).absolute()
        try:
            # A sweep that was submitted has no rows yet, and a run by itself has a page of its own.
            begun = [run for run in runs_of_command(folder) if (run / METRICS).is_file()]
            if len(begun) < 2:
                return
            runs = [(run, str(run.relative_to(folder))) for run in begun]
            write_report(runs, folder / REPORT, folder.name)
        except Exception as error:
            log.warning("the sweep's report was not made: %s", error)
        else:
            log.info("report of %d runs: %s", len(begun), folder / REPORT)
