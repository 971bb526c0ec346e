"""What is written of a step that hangs: stacks of all ranks, what the flight recorder has, and who is missing."""

import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from regrow.trainer.phase import Phase
from regrow.trainer.watch.notes import Member, Note
from regrow.trainer.watch.stacks import Stacks, phase_of, place_of, stacks_of, state_of
from regrow.trainer.watch.verdict import Finding, blamed, sentence

__all__ = ["find", "phase_in_words", "write_report", "write_text"]

log = logging.getLogger(__name__)


def write_text(path: Path, text: str) -> None:
    """Writes a file of the report; one that the disk does not take is left out."""
    try:
        path.write_text(text)
    except OSError as error:
        log.warning("%s cannot be written (%s)", path, error.strerror or error)


def phase_in_words(name: str) -> str:
    """Of a note's phase."""
    return Phase[name].value if name in Phase.__members__ else name


def find(
    members: Sequence[Member], notes: Mapping[int, Note], answering: Sequence[int], folder: Path, timeout_s: float
) -> list[Finding]:
    """What there is to know of each rank; writes the stacks of this host's, all at once.

    Args:
        members: all ranks.
        notes: by rank, this one's included.
        answering: ranks that have written a note lately, this one included.
        folder: of the report.
        timeout_s: for py-spy.
    """
    here = [m for m in members if m.is_here]
    with ThreadPoolExecutor(max_workers=min(16, max(1, len(here)))) as pool:
        read = list(pool.map(lambda m: stacks_of(m.pid, timeout_s), here))
    stacks = dict(zip((m.rank for m in here), read, strict=True))
    for rank, found in stacks.items():
        write_text(folder / f"rank-{rank}.stacks.txt", found.text)
    return [_finding(m, notes.get(m.rank), stacks.get(m.rank), answers=m.rank in answering) for m in members]


def _finding(member: Member, note: Note | None, stacks: Stacks | None, *, answers: bool) -> Finding:
    state = state_of(member.pid) if member.is_here else ""
    if answers and note is not None:
        phase, collective, place = phase_in_words(note.phase), note.collective, note.place
    elif stacks is not None and stacks.main:
        phase = phase_of(stacks.main).value
        collective, place = place_of(stacks.main)
    else:
        phase, (collective, place) = "a phase that is not known", place_of(())
    return Finding(member=member, answers=answers, phase=phase, collective=collective, place=place, state=state)


def write_report(folder: Path, name: str, findings: Sequence[Finding], step: int, waited_s: float) -> str:
    """Writes `NAME.txt` for a person and then `NAME.json`; returns the sentence."""
    told = sentence(findings, step, waited_s)
    rows = [
        {
            "rank": f.member.rank, "host": f.member.host, "pid": f.member.pid, "answers": f.answers,
            "phase": f.phase, "collective": f.collective or None, "place": f.place, "state": f.state or None,
        }
        for f in findings
    ]  # fmt: skip
    missing = [f.member.rank for f in blamed(findings)]
    body = {"step": step, "waited_s": round(waited_s, 1), "missing": missing, "sentence": told, "ranks": rows}
    stacks = []
    for finding in findings:
        path = folder / f"rank-{finding.member.rank}.stacks.txt"
        with suppress(OSError):
            stacks.append(f"rank {finding.member.rank}\n{path.read_text()}")
    write_text(folder / f"{name}.txt", "\n".join([told, "", *stacks]))
    write_text(folder / f"{name}.json", json.dumps(body, indent=1) + "\n")
    return told
