"""`run.json`: what a run is and what happened to it."""

import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from checkpoint.documents import Count, Token, convert_document
from checkpoint.files import read_json, write_json
from checkpoint.lineage import Lineage, LoadRequest, StartKind, is_visible

__all__ = ["Attempt", "Extend", "Extension", "RunRecord", "new_id"]

FILE = "run.json"
FORMAT = 1


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
    layout: dict[str, int] = field(default_factory=dict)
    threads: int = 0
    from_step: int = 0
    to_step: int = 0
    saved_step: int = 0
    end: str | None = None
    error: str | None = None
    versions: dict[str, str] = field(default_factory=dict)


class Extend(Enum):
    """`run.extend`: what becomes of the learning-rate schedule where a run is to go on beyond its end."""

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
        wandb_step: Weights & Biases has taken every row up to this step.
    """

    run_id: str = field(default_factory=new_id)
    lineages: list[Lineage] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)
    extensions: list[Extension] = field(default_factory=list)
    data_fingerprint: str = ""
    wandb_step: int = 0

    def save(self, run_dir: Path) -> None:
        """Replaces the file, durably."""
        body = {
            "format": FORMAT,
            "run_id": self.run_id,
            "data_fingerprint": self.data_fingerprint,
            "wandb_step": self.wandb_step,
            "lineages": [
                {**asdict(x), "origin": x.origin.value, "request": asdict(x.request)} for x in self.lineages
            ],
            "attempts": [asdict(a) for a in self.attempts],
            "changes": self.changes,
            "extensions": [e.as_json() for e in self.extensions],
        }
        write_json(run_dir / FILE, body)

    def visible_extensions(self) -> list[Extension]:
        """Those that act on the newest lineage's line, oldest first."""
        return [e for e in self.extensions if is_visible(self.lineages, e.after_step, e.lineage)]

    def stretched_totals(self) -> Mapping[int, int]:
        """What the newest lineage's schedules were stretched to: steps by the step at which a schedule began."""
        return {e.origin: e.total for e in self.visible_extensions() if e.mode is Extend.stretch}

    @classmethod
    def load(cls, run_dir: Path) -> "RunRecord | None":
        """Reads the file; None where there is no run yet.

        Raises:
            ValueError: written by another version.
        """
        try:
            body = read_json(run_dir / FILE)
        except FileNotFoundError:
            return None
        if body.get("format") != FORMAT:
            raise ValueError(
                f"{run_dir / FILE} has format {body.get('format')}, but this version reads {FORMAT}; upgrade regrow"
            )
        return cls(
            run_id=body["run_id"],
            lineages=[_lineage(x) for x in body["lineages"]],
            attempts=[Attempt(**a) for a in body["attempts"]],
            changes=body["changes"],
            # Records of versions without `run.extend` lack it.
            extensions=[convert_document(e, Extension) for e in body.get("extensions", [])],
            data_fingerprint=body["data_fingerprint"],
            wandb_step=body["wandb_step"],
        )


def _lineage(values: dict[str, Any]) -> Lineage:
    request = dict(values["request"])
    request["exclude"] = tuple(request["exclude"])
    return Lineage(
        id=values["id"],
        origin=StartKind(values["origin"]),
        origin_step=values["origin_step"],
        parent=values["parent"],
        request=LoadRequest(**request),
    )
