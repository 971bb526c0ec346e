"""What a check says, and running checks within their time."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

__all__ = ["Check", "State", "Verdict", "run_checks"]


class State(Enum):
    """`broken` keeps runs from working; `warning` makes them worse; `absent` is not there, and need not be."""

    ok = "ok"
    warning = "warning"
    broken = "broken"
    absent = "absent"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """One line.

    Attributes:
        name: of the check.
        state: see `State`.
        found: what is there, in words.
        remedy: what to do where it is a warning or broken; empty elsewhere.
    """

    name: str
    state: State
    found: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """A check to be.

    Attributes:
        name: of its verdict.
        look: makes the verdict; an error that it raises is one too.
        limit_s: the longest that it may take.
    """

    name: str
    look: Callable[[], Verdict]
    limit_s: float = 20.0


def run_checks(checks: Sequence[Check]) -> list[Verdict]:
    """The verdicts, in order. All begin at once; one that takes too long is left behind, and is broken."""
    found: dict[int, Verdict] = {}

    def run(number: int, check: Check) -> None:
        try:
            found[number] = check.look()
        except Exception as error:
            found[number] = Verdict(
                name=check.name,
                state=State.broken,
                found=f"cannot be looked at: {type(error).__name__}: {error}",
                remedy="see whether the path or the program of the message can be used",
            )

    began = time.monotonic()
    threads = [threading.Thread(target=run, args=item, daemon=True) for item in enumerate(checks)]
    for thread in threads:
        thread.start()
    for number, (thread, check) in enumerate(zip(threads, checks, strict=True)):
        thread.join(max(0.0, began + check.limit_s - time.monotonic()))
        if thread.is_alive():
            found.setdefault(number, _late(check))
    return [found[number] for number in range(len(checks))]


def _late(check: Check) -> Verdict:
    return Verdict(
        name=check.name,
        state=State.broken,
        found=f"no answer within {check.limit_s:g} s",
        remedy="see why: a storage or a server that does not answer, or a machine with too much to do",
    )
