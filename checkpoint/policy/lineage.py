"""Lineages: lines of steps that descend from each other, and what a start command makes of them.

Load options act once. They start a lineage, which records them; the same command given again continues that
lineage from its newest step and loads everything. Pure: values in, values out.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Annotated, Any

from msgspec import Meta

from regrow.checkpoint.config import CheckpointConfig
from regrow.checkpoint.documents import Count, DocumentError
from regrow.checkpoint.errors import CheckpointError, StepNotFoundError
from regrow.errors import ConfigError

__all__ = [
    "EXCLUDABLE",
    "Lineage",
    "LoadRequest",
    "Resume",
    "StartKind",
    "StartPoint",
    "check_lineages",
    "choose_lineage",
    "is_visible",
    "start_point",
]

EXCLUDABLE = ("optimizer", "lr_scheduler", "data_loader")
# Ends up in the name of a folder.
LineageId = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+\Z")]


class Resume(Enum):
    """Whether a run goes on from what its directory holds.

    Attributes:
        auto: it goes on from what is there, and starts where nothing is.
        must: it goes on, and is refused where nothing is there.
        never: it starts a new line of steps from step 0; what was there is set aside, not removed.
    """

    auto = "auto"
    must = "must"
    never = "never"


class StartKind(Enum):
    """Where a lineage, or a process of it, takes its first state from."""

    fresh = "fresh"
    step = "step"
    initial = "initial"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadRequest:
    """The load options of one command."""

    load_step: Annotated[int, Meta(ge=-1, le=2**62)] = -1
    exclude: tuple[str, ...] = ()
    initial_load_path: str | None = None
    initial_load_model_only: bool = True
    initial_load_in_hf: bool = False

    @property
    def is_default(self) -> bool:
        """Whether the command asked for nothing in particular."""
        return self.load_step == -1 and not self.exclude and self.initial_load_path is None

    @classmethod
    def from_config(cls, config: CheckpointConfig) -> "LoadRequest":
        """Reads the options; names in `exclude_from_loading` are brought to one spelling.

        Raises:
            ConfigError: an unknown name in `exclude_from_loading`.
        """
        names = {"dataloader": "data_loader", **{name: name for name in EXCLUDABLE}}
        for name in config.exclude_from_loading:
            if name not in names:
                raise ConfigError(
                    f"checkpoint.exclude_from_loading must hold names out of {', '.join(EXCLUDABLE)}, "
                    f"but holds {name!r}; remove it"
                )
        exclude = tuple(sorted({names[name] for name in config.exclude_from_loading}))
        if config.initial_load_path is None:
            return cls(load_step=config.load_step, exclude=exclude)
        return cls(
            load_step=config.load_step,
            exclude=exclude,
            initial_load_path=config.initial_load_path,
            initial_load_model_only=config.initial_load_model_only,
            initial_load_in_hf=config.initial_load_in_hf,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """One line of steps.

    Attributes:
        id: unique in the run.
        origin: what it began with.
        origin_step: the parent's step that it continues from (`StartKind.step`), else 0.
        parent: the lineage of that step.
        request: the load options that started it.
    """

    id: LineageId
    origin: StartKind = StartKind.fresh
    origin_step: Count = 0
    parent: LineageId | None = None
    request: LoadRequest = field(default_factory=LoadRequest)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "origin": self.origin.value}


def check_lineages(lineages: Sequence[Lineage]) -> None:
    """Whether lineages read from a document descend from each other.

    Raises:
        DocumentError: an id stands twice, or a lineage continues one that does not stand before it.
    """
    known: set[str] = set()
    for lineage in lineages:
        if lineage.id in known:
            raise DocumentError(f"the lineage {lineage.id!r} stands in it twice")
        if lineage.origin is StartKind.step and lineage.parent not in known:
            raise DocumentError(f"the lineage {lineage.id!r} must stand behind its parent {lineage.parent!r}")
        known.add(lineage.id)


@dataclass(frozen=True, kw_only=True, slots=True)
class StartPoint:
    """Where the first state comes from.

    Attributes:
        kind: fresh weights, a step of this run, or a checkpoint elsewhere.
        step: the step to load (`StartKind.step`), else 0.
        path: the checkpoint elsewhere (`StartKind.initial`).
        exclude: parts of the state to leave as they start.
        model_only: load the weights alone.
        in_hf: `path` is a Hugging Face folder.
    """

    kind: StartKind
    step: int = 0
    path: str | None = None
    exclude: tuple[str, ...] = ()
    model_only: bool = False
    in_hf: bool = False


def _ceilings(lineages: Sequence[Lineage]) -> dict[str, float]:
    """For the newest lineage and its ancestors: the highest step of each that is part of the line."""
    by_id = {lineage.id: lineage for lineage in lineages}
    current, ceiling = lineages[-1], float("inf")
    ceilings = {current.id: ceiling}
    while current.origin is StartKind.step and current.parent is not None:
        ceiling = min(ceiling, current.origin_step)
        ceilings[current.parent] = ceiling
        current = by_id[current.parent]
    return ceilings


def is_visible(lineages: Sequence[Lineage], step: int, lineage_id: str) -> bool:
    """Whether a stored step belongs to the newest lineage's line."""
    return bool(lineages) and step <= _ceilings(lineages).get(lineage_id, -1)


def choose_lineage(
    lineages: Sequence[Lineage],
    request: LoadRequest,
    *,
    steps: Sequence[int],
    resume: Resume,
    rewind: bool,
    new_id: str,
    folder: str,
) -> Lineage | None:
    """Decides whether this command continues the newest lineage (None) or starts another one (returned).

    Args:
        lineages: the run's lineages, oldest first.
        request: the command's load options.
        steps: the visible committed steps, ascending.
        resume: `run.resume`.
        rewind: apply the load options again although they are the recorded ones.
        new_id: the id for a new lineage.
        folder: the checkpoint folder, for messages.

    Raises:
        StepNotFoundError: the step asked for is not there.
        CheckpointError: `run.resume=must` with nothing to resume.
    """
    if resume is Resume.must and not steps and request.initial_load_path is None:
        raise CheckpointError(
            f"run.resume must not be 'must' where there is nothing to resume, but {folder} holds no complete "
            "step; use run.resume=auto or check run.root and run.name"
        )
    if request.load_step >= 0 and request.initial_load_path is not None:
        raise CheckpointError(
            f"checkpoint.load_step ({request.load_step}) and checkpoint.initial_load_path "
            f"({request.initial_load_path}) must not be given together; remove one of them"
        )
    if resume is Resume.never:
        return _new_lineage(lineages, replace(request, load_step=-1), [], new_id, folder)
    if lineages and not rewind and (request.is_default or request == lineages[-1].request):
        return None
    return _new_lineage(lineages, request, steps, new_id, folder)


def _new_lineage(
    lineages: Sequence[Lineage], request: LoadRequest, steps: Sequence[int], new_id: str, folder: str
) -> Lineage:
    if request.load_step >= 0 and request.load_step not in steps:
        raise StepNotFoundError(request.load_step, steps, folder)
    if request.initial_load_path is not None:
        return Lineage(id=new_id, origin=StartKind.initial, request=request)
    if not lineages or not steps:
        return Lineage(id=new_id, origin=StartKind.fresh, request=request)
    step = request.load_step if request.load_step >= 0 else steps[-1]
    return Lineage(id=new_id, origin=StartKind.step, origin_step=step, parent=lineages[-1].id, request=request)


def start_point(lineages: Sequence[Lineage], steps: Sequence[tuple[int, str]]) -> StartPoint:
    """Where a process of the newest lineage starts, given the visible steps with their lineages, ascending."""
    current = lineages[-1]
    if steps and (steps[-1][1] == current.id):
        return StartPoint(kind=StartKind.step, step=steps[-1][0])
    if current.origin is StartKind.initial:
        return StartPoint(
            kind=StartKind.initial,
            path=current.request.initial_load_path,
            exclude=current.request.exclude,
            model_only=current.request.initial_load_model_only or current.request.initial_load_in_hf,
            in_hf=current.request.initial_load_in_hf,
        )
    if current.origin is StartKind.step:
        return StartPoint(kind=StartKind.step, step=current.origin_step, exclude=current.request.exclude)
    return StartPoint(kind=StartKind.fresh)
