"""`run.json`: what a run is and what happened to it."""

import secrets
import time
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from regrow.checkpoint.documents import Count, DocumentError, Token, convert_document, parse_json
from regrow.checkpoint.files import read_regular, write_json
from regrow.checkpoint.policy.lineage import Lineage, check_lineages, is_visible
from regrow.errors import ConfigError
from regrow.trainer.run_files import RECORD

__all__ = ["Attempt", "Extend", "Extension", "RunRecord", "RunRecordError", "new_id"]

FORMAT = 1
_LIMIT_BYTES = 256 << 20


class RunRecordError(ConfigError):
    """A run's record is there, but cannot be read."""


def new_id() -> str:
    """Eight random letters and digits, as W&B likes its run ids."""
    alphabet = "abcdefghijklmnopqrstuvwxyz0123456789"
    return "".join(secrets.choice(alphabet) for _ in range(8))


@dataclass(kw_only=True, slots=True)
class Attempt:
    """One start of the ranks.

    Attributes:
        started_at: seconds since 1970, for people.
        lineage: the lineage it worked on.
        job: the scheduler's job id, if any.
        host: of rank 0.
        layout: degrees.
        threads: per rank; results are bitwise the same only with the same number.
        from_step: continued from here.
        to_step: reached, as far as it could tell.
        saved_step: the newest step that it made durable.
        end: `finished`, `terminated`, `preempted`, `failed`, or None while it runs or when it was killed.
        error: the failure's message.
        versions: of the software.
    """

    started_at: float = field(default_factory=time.time)
    lineage: str = ""
    job: str | None = None
    host: str = ""
    layout: dict[str, Count] = field(default_factory=dict)
    threads: Count = 0
    from_step: Count = 0
    to_step: Count = 0
    saved_step: Count = 0
    end: str | None = None
    error: str | None = None
    versions: dict[str, str] = field(default_factory=dict)


class Extend(Enum):
    """What becomes of the learning-rate schedule where a run is to go on beyond its end.

    Attributes:
        refuse: the run is refused.
        stretch: the schedule is stretched over all steps.
        hold: the schedule's last value holds.
    """

    refuse = "refuse"
    stretch = "stretch"
    hold = "hold"


@dataclass(frozen=True, kw_only=True, slots=True)
class Extension:
    """How a run went on beyond its schedule; it acts on the line of steps that it was given for.

    Attributes:
        lineage: the lineage that it was given for.
        after_step: the first step that it acts on is the one after this.
        mode: `stretch` or `hold`.
        origin: the step at which the schedule began.
        total: the steps that the schedule spans from here on.
        steps: `train.steps` of the command.
    """

    lineage: Token
    after_step: Count
    mode: Extend
    origin: Count
    total: Count
    steps: Count

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "mode": self.mode.value}


@dataclass(kw_only=True, slots=True)
class RunRecord:
    """The file's content.

    Attributes:
        run_id: also Weights & Biases' id.
        lineages: oldest first; the last is the current one.
        attempts: oldest first.
        changes: hyperparameters changed on resume, with the step.
        extensions: how the run went on beyond its schedule, oldest first.
        data_fingerprint: of the corpus and its tokenizer.
        wandb_step: Weights & Biases has taken every row up to this step, as former versions noted it; loggers have
            notes of their own now.
    """

    run_id: Annotated[Token, Meta(min_length=1)] = field(default_factory=new_id)
    lineages: list[Lineage] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)
    extensions: list[Extension] = field(default_factory=list)
    data_fingerprint: str = ""
    wandb_step: Count = 0

    def as_json(self) -> dict[str, Any]:
        """Plain values, in the order of the file."""
        return {
            "format": FORMAT,
            "run_id": self.run_id,
            "data_fingerprint": self.data_fingerprint,
            "wandb_step": self.wandb_step,
            "lineages": [x.as_json() for x in self.lineages],
            "attempts": [asdict(a) for a in self.attempts],
            "changes": self.changes,
            "extensions": [e.as_json() for e in self.extensions],
        }

    @classmethod
    def from_json(cls, values: Any) -> "RunRecord":
        """The inverse of `as_json`.

        Raises:
            DocumentError: a field is missing, of another type or out of its bounds.
        """
        if not isinstance(values, dict) or not {"run_id", "lineages", "attempts"} <= values.keys():
            raise DocumentError("it is no run's record")
        record = convert_document(values, cls)
        check_lineages(record.lineages)
        return record

    def save(self, run_dir: Path) -> None:
        """Replaces the file, durably."""
        write_json(run_dir / RECORD, self.as_json())

    def visible_extensions(self) -> list[Extension]:
        """Those that act on the newest lineage's line, oldest first."""
        return [e for e in self.extensions if is_visible(self.lineages, e.after_step, e.lineage)]

    def stretched(self) -> list[tuple[int, int, int]]:
        """What the newest lineage's schedules were stretched to, oldest first.

        Each is the step at which the schedule began, the step after which it was stretched, and the steps it spans.
        """
        return [(e.origin, e.after_step, e.total) for e in self.visible_extensions() if e.mode is Extend.stretch]

    @classmethod
    def load(cls, run_dir: Path) -> "RunRecord | None":
        """Reads the file; None where there is no run yet.

        Raises:
            RunRecordError: it is damaged, cannot be read, or another version wrote it.
        """
        path = run_dir / RECORD
        try:
            values = parse_json(read_regular(path, _LIMIT_BYTES))
            if isinstance(values, dict) and values.get("format") != FORMAT:
                raise RunRecordError(
                    f"{path} must have format {FORMAT}, which this version reads, but has {values.get('format')!r}; "
                    "use the version of regrow that wrote it"
                )
            return cls.from_json(values)
        except FileNotFoundError:
            return None
        except (DocumentError, OSError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise RunRecordError(
                f"{path} must be the run's record, but cannot be read ({reason}); restore it, or move it away: the "
                "same command then makes it anew from the newest step"
            ) from error
