"""The choice of a run's CPU kernels: measured once on a machine, the same on all ranks, kept by the run.

A kernel rounds otherwise than torch's operator, so results repeat bitwise only with the same choice: it is written to
`kernels.json` in the run's folder, and what is written there wins over what this machine would choose.
"""

import hashlib
import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar, final

import torch
import torch.distributed as dist
from msgspec import Meta

from regrow.checkpoint.documents import DocumentError, read_document
from regrow.checkpoint.files import read_regular, write_json
from regrow.models.cpu import WINS_BY, Case, decide, measure, use
from regrow.trainer.parallel.context import ParallelContext
from regrow.trainer.places import user_cache

__all__ = ["CHOICE", "choose_kernels", "processor_name", "ratios_file", "use_plain_operators"]

log = logging.getLogger(__name__)

T = TypeVar("T")

CHOICE = "kernels.json"
# Of the start, for what the machine's file does not hold.
_MEASURE_S = 1.0
# Raised where a kernel changes: what was measured before says nothing then.
_REVISION = 1
_FORMAT = 1
_LIMIT_BYTES = 1 << 20

_CaseName = Annotated[str, Meta(max_length=200)]


@final
@dataclass(kw_only=True, slots=True)
class _Choice:
    """`kernels.json`: by case whether the kernel is used, and where that was decided."""

    format: Annotated[int, Meta(ge=_FORMAT, le=_FORMAT)] = _FORMAT
    processor: Annotated[str, Meta(max_length=1000)] = ""
    used: Annotated[dict[_CaseName, bool], Meta(max_length=10_000)] = field(default_factory=dict)


@final
@dataclass(kw_only=True, slots=True)
class _Ratios:
    """A machine's file: by case the time of torch's operator through the kernel's."""

    format: Annotated[int, Meta(ge=_FORMAT, le=_FORMAT)] = _FORMAT
    machine: Annotated[str, Meta(max_length=1000)] = ""
    ratios: Annotated[dict[_CaseName, Annotated[float, Meta(ge=0, le=1e9)]], Meta(max_length=100_000)] = field(
        default_factory=dict
    )


def processor_name() -> str:
    """As the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def ratios_file() -> Path | None:
    """This machine's, for this torch and number of threads; None where the user has no folder for it."""
    machine = _machine()
    try:
        cache = user_cache()
    except OSError:
        return None
    digest = hashlib.blake2b(f"{_REVISION} {machine}".encode(), digest_size=8).hexdigest()
    return cache / "kernels" / f"{digest}.json"


def _machine() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{processor_name()}, {capability}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def _read(path: Path, schema: type[T], otherwise: T, doing: str) -> T:
    """A file of this module's; `otherwise` where it is not there, or cannot be read."""
    try:
        return read_document(read_regular(path, _LIMIT_BYTES), schema)
    except FileNotFoundError:
        return otherwise
    except (OSError, DocumentError) as error:
        log.warning("%s cannot be read (%s); %s", path, error, doing)
        return otherwise


def _ratios(cases: Sequence[Case]) -> dict[str, float]:
    """What this machine's file holds, and what is measured now and put there; earlier measurements stay."""
    path, names = ratios_file(), {str(c): c for c in cases}
    again = "the CPU's kernels are measured again"
    known = _read(path, _Ratios, _Ratios(), again).ratios if path is not None else {}
    measured = measure([c for n, c in names.items() if n not in known], _MEASURE_S)
    if measured and path is not None:
        # Others may have measured meanwhile: all runs of the machine go by what came first.
        known = _read(path, _Ratios, _Ratios(), again).ratios
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            body = {"format": _FORMAT, "machine": _machine(), "ratios": measured | known}
            write_json(path, body)
        except OSError as error:
            log.info("%s cannot be written (%s); the next start measures again", path, error.strerror)
    both = measured | known
    return {n: both[n] for n in names if n in both}


def _on_main(cases: Sequence[Case], run_dir: Path) -> dict[str, bool]:
    path = run_dir / CHOICE
    fresh = _Choice(processor=processor_name())
    recorded = _read(path, _Choice, fresh, "the kernels are chosen anew, and results may differ in their rounding")
    ratios = _ratios(cases)
    chosen = decide(cases, recorded.used, ratios)
    if chosen.items() - recorded.used.items():
        body = {"format": _FORMAT, "processor": recorded.processor, "used": recorded.used | chosen}
        try:
            write_json(path, body)
        except OSError as error:
            log.warning("%s cannot be written (%s); a resumed run may round otherwise", path, error.strerror)
    _say(chosen, decide(cases, {}, ratios), ratios, recorded.processor)
    return chosen


def _say(chosen: Mapping[str, bool], better: Mapping[str, bool], ratios: Mapping[str, float], origin: str) -> None:
    used = [f"{n} ({ratios[n]:.2f})" if n in ratios else n for n, is_used in chosen.items() if is_used]
    what = ", ".join(used) or "none"
    log.info("CPU kernels, with the time of torch's operator through theirs: %s; %d cases in all", what, len(chosen))
    # Only what would be faster the other way by the margin: at the border either is right.
    kept = [n for n, is_used in chosen.items() if n in ratios and is_used and ratios[n] < 1 / WINS_BY]
    kept += [n for n, is_used in chosen.items() if not is_used and better[n]]
    if kept:
        log.warning(
            "the run keeps the CPU kernels that it chose on %s, so that its results repeat bitwise; here the other "
            "choice is faster for: %s (launch.kernels=plain takes torch's operators everywhere)",
            origin,
            ", ".join(kept),
        )


def use_plain_operators() -> None:
    """No kernel is used in this process."""
    use([])


def choose_kernels(cases: Sequence[Case], context: ParallelContext, run_dir: Path) -> None:
    """Rank 0 decides, from the run's record, the machine's file or a measurement; all ranks use what it says.

    Args:
        cases: of the model, the same on every rank.
        context: this rank's place, on a CPU.
        run_dir: the run's directory.
    """
    said: list[dict[str, bool]] = [_on_main(cases, run_dir) if context.is_main else {}]
    if context.world_size > 1:
        dist.broadcast_object_list(said, group=context.cpu_group, group_src=0)
    use(c for c in cases if said[0][str(c)])
