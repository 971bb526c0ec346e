"""`regrow-report`: one self-contained HTML page on a run, a sweep, or several of them."""

import argparse
import logging
import time
from pathlib import Path

from regrow.launch.commands.ending import end_with
from regrow.launch.config.errors import UserError
from regrow.launch.run.logs import log_to_console
from regrow.launch.run.versions import own_version
from regrow.trainer.report.write import find_runs, state_of_files, write_report
from regrow.trainer.run_files import REPORT

__all__ = ["main"]

log = logging.getLogger(__name__)


def main() -> None:
    """The command's entry; exit code 2 for bad input."""
    arguments = _parser().parse_args()
    log_to_console()
    end_with(lambda: _run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="regrow-report", description=__doc__)
    parser.add_argument("--version", action="version", version=f"regrow {own_version()}")
    parser.add_argument(
        "places", nargs="+", type=Path, metavar="RUN|SWEEP", help="runs, or folders with runs in them"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="PAGE",
        help=f"default: {REPORT} in the folder given, or here for several",
    )
    parser.add_argument("--watch", action="store_true", help="make it again whenever the runs' files change")
    parser.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="between looks, with --watch")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    places: list[Path] = [place.expanduser() for place in arguments.places]
    runs = find_runs(places)
    out = arguments.output or (places[0] / REPORT if len(places) == 1 else Path(REPORT))
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"-o must be a file in a folder that is there, but is {out}; give for instance -o {REPORT}")
    if not arguments.every >= 0.1:
        raise UserError(f"--every must be at least 0.1 seconds, but is {arguments.every:g}; use 5")
    title = ", ".join(place.resolve().name for place in places)
    if arguments.watch:
        _watch(places, out, title, arguments.every)
        return 0
    size = write_report(runs, out, title)
    print(f"{out}: {_count(len(runs))}, {size / 1000:.0f} kB")
    return 0


def _watch(places: list[Path], out: Path, title: str, every_s: float) -> None:
    """Makes the page, and makes it again after changes, until it is interrupted; new runs of a folder join in."""
    before: object = None
    try:
        while True:
            runs = find_runs(places)
            now = state_of_files(runs)
            if now != before:
                size = write_report(runs, out, title, reload_s=every_s)
                log.info("%s: %s, %.0f kB", out, _count(len(runs)), size / 1000)
                before = now
            time.sleep(every_s)
    except KeyboardInterrupt:
        # A page that nobody renews need not load itself again.
        write_report(find_runs(places), out, title)


def _count(runs: int) -> str:
    return f"{runs} run" if runs == 1 else f"{runs} runs"


if __name__ == "__main__":
    main()
