"""`regrow-data mix`: what a run will take of each source, by stage."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from regrow.launch.commands.data_run import RunData, prepare_run_data
from regrow.launch.config.schema import Config
from regrow.trainer.data.mixture_limits import Use, use_of

__all__ = ["RunUse", "mix_of", "mix_text"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunUse:
    """What a run takes.

    Attributes:
        steps: of the run.
        global_batch_size: samples a step.
        seq_len: tokens a sample.
        uses: by stage and source.
        used_up: sources that are used up where a stage begins, by its number.
        windows: samples an epoch, by source.
    """

    steps: int
    global_batch_size: int
    seq_len: int
    uses: list[Use]
    used_up: dict[int, list[str]]
    windows: dict[str, int]

    def totals(self) -> dict[str, tuple[int, float]]:
        """Samples and epochs of the whole run, by source."""
        samples: dict[str, int] = {}
        for use in self.uses:
            samples[use.source] = samples.get(use.source, 0) + use.samples
        return {name: (count, count / self.windows[name]) for name, count in samples.items()}

    def as_json(self) -> dict[str, Any]:
        """As JSON has it."""
        stages: dict[int, dict[str, Any]] = {}
        for use in self.uses:
            stage = stages.setdefault(
                use.stage,
                {
                    "stage": use.stage,
                    "first_sample": use.first_sample,
                    "last_sample": use.last_sample,
                    "used_up": self.used_up.get(use.stage, []),
                    "sources": [],
                },
            )
            stage["sources"].append(
                {
                    "source": use.source,
                    "weight": float(use.weight),
                    "samples": use.samples,
                    "tokens": use.tokens,
                    "epochs": use.epochs,
                    "epochs_so_far": use.epochs_so_far,
                }
            )
        return {
            "steps": self.steps,
            "samples": self.steps * self.global_batch_size,
            "tokens": self.steps * self.global_batch_size * self.seq_len,
            "stages": list(stages.values()),
            "in_all": [
                {"source": name, "samples": count, "tokens": count * self.seq_len, "epochs": epochs}
                for name, (count, epochs) in self.totals().items()
            ],
        }


def mix_of(config: Config) -> RunUse:
    """What a run takes from its beginning to its end; its data is prepared for it.

    Raises:
        Refused: in the sentence that the run would give.
    """
    run = prepare_run_data(config)
    data = config.data
    windows = {name: len(of_source) for name, of_source in run.windows.items()}
    uses = use_of(run.mixture, run.count, windows, data.seq_len)
    return RunUse(
        steps=config.train.steps,
        global_batch_size=data.global_batch_size,
        seq_len=data.seq_len,
        uses=uses,
        used_up=_used_up(run),
        windows=windows,
    )


def _used_up(run: RunData) -> dict[int, list[str]]:
    """By the number of the stage that begins there: sources that have weight as declared, and none any more."""
    found: dict[int, list[str]] = {}
    before: set[str] = set()
    for number, stage in enumerate(run.mixture.stages):
        declared = run.declared.stages[run.declared.stage_at(stage.first_sample)]
        pairs = zip(run.mixture.names, declared.weights, stage.weights, strict=True)
        gone = {name for name, wanted, left in pairs if wanted > 0 and left == 0}
        if gone - before and stage.first_sample < run.count:
            found[number] = sorted(gone - before)
        before |= gone
    return found


def mix_text(run: RunUse) -> list[str]:
    """The table, and which sources are used up on the way."""
    rows = [["stage", "from step", "source", "weight", "samples", "tokens", "epochs", "epochs so far"]]
    for use in run.uses:
        rows.append(
            [
                str(use.stage),
                _step(use.first_sample, run.global_batch_size),
                use.source,
                f"{float(use.weight):.4g}",
                f"{use.samples:,}",
                f"{use.tokens:,}",
                f"{use.epochs:.3f}",
                f"{use.epochs_so_far:.3f}",
            ]
        )
    for name, (count, epochs) in run.totals().items():
        rows.append(["all", "", name, "", f"{count:,}", f"{count * run.seq_len:,}", f"{epochs:.3f}", f"{epochs:.3f}"])
    firsts = {use.stage: use.first_sample for use in run.uses}
    return [
        f"{run.steps:,} steps of {run.global_batch_size:,} samples of {run.seq_len:,} tokens: "
        f"{run.steps * run.global_batch_size * run.seq_len:,} tokens",
        *_aligned(rows),
        *(
            f"used up at step {_step(firsts[stage], run.global_batch_size)}, where stage {stage} begins: "
            f"{', '.join(names)}"
            for stage, names in run.used_up.items()
        ),
    ]


def _step(sample: int, global_batch_size: int) -> str:
    """Steps before a sample; a source may end within one."""
    return f"{float(Fraction(sample, global_batch_size)):,.2f}".rstrip("0").rstrip(".")


def _aligned(rows: list[list[str]]) -> list[str]:
    """Columns as wide as their widest cell, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
