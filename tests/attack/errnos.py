"""Error codes out of file operations of every phase of a run: nothing is lost, and nothing is left behind."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from regrow.checkpoint.inspect.maintenance import verify
from regrow.checkpoint.storage.local import LocalStorage
from regrow.trainer.jsonlines import read_rows
from tests.attack.base import Base, make_base
from tests.attack.cases import Report, choose, run_cases
from tests.attack.command import Ended, run_command
from tests.attack.damages import remove_all
from tests.attack.inject import CODES, Fault, inject

__all__ = ["Injection", "all_injections", "attack", "run_injection"]

# The base has the steps 3 and 6; the command saves 9 and 12, and retention then removes 3 and 6.
BASE_STEP, LAST = 6, 12
KEEP_TWO = ("checkpoint.keep_latest_k=2",)
_WRITING = ("create", "write", "fsync", "rename", "link", "mkdir", "remove")
_LEFT = re.compile(r".*\.tmp|\.direct-.*|.*\.partial-.*|.*\.removing-.*|reader-.*|\.step-.*\.(new|old)|\.weights")


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """Files of one phase, and what is done to them.

    Attributes:
        name: of the phase.
        path: an expression for its files, relative to the run.
        operations: all that occur there.
        fresh: whether the run is still to be made.
        first: which matching call fails first, where another part of the start has the ones before.
        more: overrides of the command.
    """

    name: str
    path: str
    operations: tuple[str, ...]
    fresh: bool = False
    first: int = 1
    more: tuple[str, ...] = ()


_WEIGHTS = ("checkpoint.last_save_model_only=true",)
_HF = (*_WEIGHTS, "checkpoint.last_save_in_hf=true")
_PART = r"\.[^/]+"
_DOCUMENT = ("create", "write", "fsync", "rename")
_SMALL = r"\.?(rank-0\.json|manifest\.json|\.metadata)(\..*tmp)?"
PHASES = (
    Phase(
        name="first start: folders", path=r"checkpoint|logs|\.hydra", operations=("mkdir",), fresh=True
    ),
    Phase(
        name="first start: lease",
        path=r"checkpoint/\.?lease-.*",
        operations=("create", "write", "fsync", "link", "remove"),
        fresh=True,
    ),
    Phase(name="first start: record", path=r"\.?run\.json.*", operations=_DOCUMENT, fresh=True),
    Phase(
        name="first start: config", path=r"(\.hydra/)?\.?(config|overrides)\.yaml.*", operations=_DOCUMENT, fresh=True
    ),
    Phase(name="first start: rows", path=r"metrics\.jsonl", operations=("create", "write", "fsync"), fresh=True),
    Phase(name="start: lease", path=r"checkpoint/\.?lease-.*",
          operations=("create", "write", "fsync", "link", "remove", "open", "read", "stat")),
    Phase(name="start: record", path=r"\.?run\.json.*", operations=(*_DOCUMENT, "open", "read", "stat")),
    Phase(name="start: config", path=r"(\.hydra/)?\.?(config|overrides)\.yaml.*",
          operations=(*_DOCUMENT, "open", "read", "stat")),
    Phase(name="start: rows", path=r"\.?metrics\.jsonl.*", operations=(*_DOCUMENT, "open", "read", "stat")),
    Phase(name="start: logs", path=r"logs/rank-0\.log", operations=("create", "write")),
    Phase(name="start: steps", path=r"checkpoint", operations=("list",)),
    Phase(name="start: newest step", path=r"checkpoint/step-6(/.*)?", operations=("list", "open", "read", "stat")),
    Phase(name="start: reader's lock", path=r"checkpoint/step-6/\.?reader-.*", operations=("create", "rename", "remove")),
    Phase(name="save: files", path=rf"checkpoint/step-9{_PART}(/__0_0\.distcp)?",
          operations=("mkdir", "create", "write", "fsync")),
    Phase(name="save: manifests", path=rf"checkpoint/step-9{_PART}/{_SMALL}", operations=(*_DOCUMENT, "open", "read")),
    Phase(name="save: commit", path=rf"checkpoint/step-9{_PART}", operations=("rename", "fsync", "stat")),
    Phase(name="save: folder", path=r"checkpoint", operations=("fsync",)),
    Phase(name="save: rows", path=r"metrics\.jsonl", operations=("write", "fsync")),
    Phase(name="retention", path=r"checkpoint/step-3(\..*)?(/.*)?", operations=("rename", "remove", "list")),
    Phase(name="last save: files", path=rf"checkpoint/step-12{_PART}(/__0_0\.distcp)?",
          operations=("mkdir", "create", "write", "fsync")),
    Phase(name="last save: manifests", path=rf"checkpoint/step-12{_PART}/{_SMALL}",
          operations=_DOCUMENT),
    Phase(name="last save: commit", path=rf"checkpoint/step-12{_PART}", operations=("rename", "fsync", "stat")),
    Phase(name="last save: weights alone", path=rf"checkpoint/step-12{_PART}(/.*)?",
          operations=("mkdir", "create", "write", "fsync", "rename"), more=_WEIGHTS),
    Phase(name="last save: Hugging Face", path=r"export(/.*)?",
          operations=("mkdir", "create", "write", "fsync", "rename", "list", "read"), more=_HF),
    Phase(name="last save: moved into place", path=r"export/\.step-12\.new", operations=("rename",), more=_HF),
    Phase(name="end: record", path=r"\.?run\.json.*", operations=_DOCUMENT, first=4),
    Phase(name="end: stop record", path=r"\.?stop\.json.*", operations=_DOCUMENT),
    Phase(name="end: lease", path=r"checkpoint/\.?lease-.*", operations=("create", "write", "fsync", "rename"), first=2),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Injection:
    """A fault in a phase."""

    kind: str
    phase: str
    more: tuple[str, ...]
    fault: Fault
    fresh: bool

    @property
    def name(self) -> str:
        """For people."""
        f = self.fault
        return f"{self.phase}: {f.operation} {f.code} {'from then on' if f.lasting else 'once'}"


def all_injections(seed: int) -> list[Injection]:
    """Each code out of each operation of each phase; by the seed once, or from then on.

    What only reads has no quota and needs no room.
    """
    rng = random.Random(seed)
    return [
        Injection(
            kind=phase.name.partition(":")[0],
            phase=phase.name,
            more=phase.more,
            fault=Fault(
                operation=operation, path=phase.path, code=code, first=phase.first, lasting=rng.random() < 0.5
            ),
            fresh=phase.fresh,
        )
        for phase in PHASES
        for operation in phase.operations
        for code in _codes(operation)
    ]


def _codes(operation: str) -> Iterator[str]:
    yield from (c for c in CODES if operation in _WRITING or c in ("EIO", "ESTALE"))


def run_injection(base: Base, injection: Injection, folder: Path) -> list[str]:
    """Runs the command with the fault on a copy of the run, then without; what was wrong.

    Args:
        base: with the steps 3 and 6; its run is not looked at where the injection is into a first start.
        injection: what fails.
        folder: for the copy.
    """
    case = base.copy_to(folder) if not injection.fresh else base.empty_at(folder)
    met = folder / "met"
    ended = _regrow(case, injection, partial(inject, injection.fault, case.run, met))
    problems = [f"with the fault: {p}" for p in _after_fault(case, ended, injection)]
    if not met.exists():
        problems.append("the fault was not met")
    again = _regrow(case, injection)
    problems += [f"the start after it: {p}" for p in [*again.problems(0), *_after_all(case, injection)]]
    if not problems:
        remove_all(folder)
    return problems


def _regrow(case: Base, injection: Injection, prepare: partial[None] | None = None) -> Ended:
    return run_command(
        case.command(f"train.steps={LAST}", *injection.more), case.root / "log" if prepare is None else case.root / "log-fault",
        cwd=case.root, environ=case.environ, prepare=prepare,
    )  # fmt: skip


def _after_fault(case: Base, ended: Ended, injection: Injection) -> list[str]:
    """The exit code must say what is on the disk."""
    rows = [row["step"] for row in read_rows(case.run / "metrics.jsonl")]
    trained = max(rows, default=0) > (0 if injection.fresh else BASE_STEP) or "first step" in ended.output
    if _is_durable(case, injection):
        return ended.problems(0)
    return ended.problems(1 if trained else 2)


def _is_durable(case: Base, injection: Injection) -> bool:
    last = (case.run / "export" if injection.more == _HF else case.steps) / f"step-{LAST}"
    return last.is_dir() and not verify(LocalStorage(last))[0]["problems"]


def _after_all(case: Base, injection: Injection) -> list[str]:
    """What must hold once the command has run without a fault."""
    problems = []
    rows = [row["step"] for row in read_rows(case.run / "metrics.jsonl")]
    if rows != list(range(1, LAST + 1)):
        problems.append(f"metrics.jsonl has the steps {rows}")
    for report in verify(LocalStorage(case.run)):
        problems += report["problems"]
    if not _is_durable(case, injection):
        problems.append(f"step {LAST} is not there")
    left = [str(p.relative_to(case.run)) for p in case.run.rglob("*") if _LEFT.fullmatch(p.name)]
    if left:
        problems.append(f"{', '.join(left)} left behind")
    return problems


def attack(folder: Path, seed: int, share: float, match: str) -> list[Report]:
    """All of them, or a share."""
    injections = [i for i in all_injections(seed) if match in i.name]
    base = make_base(folder / "base", steps=BASE_STEP, more=KEEP_TWO)
    return run_cases(choose(injections, share, seed), lambda i, place: run_injection(base, i, place), folder)
