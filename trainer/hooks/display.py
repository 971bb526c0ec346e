"""What a run is doing, drawn on a terminal below the lines of its log."""

import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, final

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from regrow.checkpoint.save.progress import SaveProgress, SaveStage
from regrow.trainer.wording import duration

__all__ = ["Display"]

_REFRESHES_PER_S = 4
# Speed and time left are of so many steps.
_WINDOW = 50
# Where a terminal is wider, lines stay as long as an eye takes in; where it is narrower, they break between cells.
_WIDEST = 100
_GAP = "   "


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measured:
    """Results of a step."""

    step: int
    values: Mapping[str, float]


@final
class Display:
    """Of one run. Its methods only note things; a thread of its own draws, so that a step waits for no terminal.

    Args:
        console: to draw on.
        name: of the run.
        steps: in all.
        step: done before.
        save: how far the save in flight is; None for a run that is not saved.
    """

    def __init__(self, console: Console, *, name: str, steps: int, step: int, save: SaveProgress | None) -> None:
        self._name, self._steps, self._first, self._save = name, steps, step, save
        self._step = step
        self._row: Mapping[str, Any] | None = None
        self._validated: _Measured | None = None
        self._evaluated: _Measured | None = None
        self._committed: int | None = None
        # When each of the last rows came, and how long it waited for data.
        self._times: deque[tuple[float, int]] = deque(maxlen=_WINDOW)
        self._live = Live(
            self,
            console=console,
            refresh_per_second=_REFRESHES_PER_S,
            # What is sent elsewhere stays there.
            redirect_stdout=sys.stdout.isatty(),
        )

    def start(self) -> None:
        """Begins to draw."""
        with suppress(OSError):
            self._live.start(refresh=True)

    def stop(self) -> None:
        """Draws a last time, which stays."""
        with suppress(OSError):
            self._live.stop()

    def note_row(self, row: Mapping[str, Any]) -> None:
        """A step's results are known."""
        self._times.append((time.monotonic(), int(row["step"])))
        self._step, self._row = int(row["step"]), row
        losses = {name: value for name, value in row.items() if name.startswith("val_loss")}
        tasks = {name: value for name, value in row.items() if name.startswith("eval/")}
        if losses:
            self._validated = _Measured(step=self._step, values=losses)
        if tasks:
            self._evaluated = _Measured(step=self._step, values=tasks)

    def note_commit(self, step: int) -> None:
        """A step is durable."""
        self._committed = step

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # One column is left free: a terminal that breaks a full line would move everything below it.
        width = max(10, min(options.max_width - 1, _WIDEST))
        yield Text()
        yield Text(self._name, style="bold", no_wrap=True, overflow="ellipsis")
        yield from self._bar(width, ascii_only=options.ascii_only)
        for cells in (self._training(), self._speed(), self._results(), self._checkpoint()):
            yield from flow(cells, width)

    def _bar(self, width: int, *, ascii_only: bool) -> list[Text]:
        """How far the run is; the bar takes what the words leave of a third of the line."""
        part = self._step / max(1, self._steps)
        words = f"step {self._step:,} of {self._steps:,}  {part:.0%}"
        length = min(width // 3, width - len(words) - 2)
        if length < 4:
            return flow([Text(words)], width)
        full, empty = "=-" if ascii_only else "━─"
        done = round(part * length)
        return [Text.assemble((full * done, "cyan"), (empty * (length - done), "dim"), f"  {words}", no_wrap=True)]

    def _training(self) -> list[Text]:
        row = self._row
        if row is None:
            return [cell("the first step is under way")]
        norm = "not finite" if row["grad_norm"] is None else f"{row['grad_norm']:.3f}"
        cells = [cell("loss", f"{row['loss']:.4f}"), cell("grad norm", norm), cell("lr", f"{row['lr']:.2e}")]
        return [*cells, cell("time left", self._time_left())] if self._step < self._steps else cells

    def _time_left(self) -> str:
        if len(self._times) < 2:
            return "not known yet"
        (began, first), (ended, last) = self._times[0], self._times[-1]
        return duration((self._steps - self._step) * (ended - began) / max(1, last - first))

    def _speed(self) -> list[Text]:
        row = self._row
        if row is None:
            return []
        wait = row["data_wait_s"] / max(row["step_time_s"], 1e-9)
        cells = [cell("tokens/s", f"{row['tokens_per_s']:,.0f}")]
        if row.get("mfu") is not None:
            cells.append(cell("MFU", f"{row['mfu']:.1%}"))
        return [*cells, cell("data wait", f"{wait:.0%}"), cell("memory", f"{row['memory_gib']:.1f} GiB")]

    def _results(self) -> list[Text]:
        cells: list[Text] = []
        for title, found in (("validation", self._validated), ("evaluation", self._evaluated)):
            if found is not None:
                cells.append(cell(f"{title} at step {found.step:,}"))
                cells += [cell(_short(name), f"{value:.4f}") for name, value in found.values.items()]
        return cells

    def _checkpoint(self) -> list[Text]:
        save = self._save
        if save is None:
            return [cell("checkpoint", "none is saved")]
        cells = [] if self._committed is None else [cell("committed step", f"{self._committed:,}", "green")]
        if save.stage in (SaveStage.none, SaveStage.saved):
            return [cell("checkpoint"), *(cells or [cell("none yet")])]
        if save.stage is SaveStage.failed:
            return [cell("checkpoint"), cell("", f"step {save.step:,} was not saved", "yellow"), *cells]
        words = save.stage.value
        if save.stage is SaveStage.writing:
            words += f" {save.written_bytes / max(1, save.total_bytes):.0%}"
        return [cell("checkpoint"), cell(f"step {save.step:,}", words, "cyan"), *cells]


def cell(label: str, value: str = "", style: str = "bold") -> Text:
    """A number and what it is of."""
    parts = [(label, "dim"), (value, style)]
    return Text(" ").join([Text(words, style=kind) for words, kind in parts if words])


def flow(cells: Sequence[Text], width: int) -> list[Text]:
    """Cells one after another, in as many lines as the width asks for; a longer cell is cut."""
    lines: list[Text] = []
    for each in cells:
        if lines and lines[-1].cell_len + len(_GAP) + each.cell_len <= width:
            lines[-1].append(_GAP).append_text(each)
        else:
            lines.append(each.copy())
    for line in lines:
        line.truncate(width, overflow="ellipsis")
        line.no_wrap = True
    return lines


def _short(name: str) -> str:
    """`val_loss/news` as `news`, `eval/arc/accuracy` as `arc/accuracy`."""
    return "loss" if name == "val_loss" else name.split("/", 1)[1]
