"""From what ranks say of themselves to who is missing, and to the sentence for it. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from regrow.trainer.watch.notes import Member, Note

__all__ = ["Finding", "blamed", "sentence", "someone_is_busy"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What is known of a rank while a step hangs.

    Attributes:
        member: its process.
        answers: whether it has said something lately.
        phase: what it is in, in words.
        collective: that its main thread waits in; empty: none.
        place: of its main thread.
        state: what the kernel says of it; empty for another host's.
    """

    member: Member
    answers: bool
    phase: str
    collective: str
    place: str
    state: str = ""


def someone_is_busy(notes: Mapping[int, Note], answering: Sequence[int], limit_s: float) -> bool:
    """Whether a rank that answers has moved lately, or does what may take long (a validation, a save, compiling).

    Args:
        notes: of all that have written one.
        answering: those that have lately.
        limit_s: what a part of a step may take.
    """
    return any(not notes[r].is_regular or notes[r].since_s < limit_s / 2 for r in answering if r in notes)


def blamed(findings: Sequence[Finding]) -> list[Finding]:
    """Who is missing: who does not answer; else who is in no collective while others wait in one; else nobody."""
    silent = [f for f in findings if not f.answers]
    if silent:
        return silent
    outside = [f for f in findings if not f.collective]
    return outside if 0 < len(outside) < len(findings) or len(findings) == 1 else []


def sentence(findings: Sequence[Finding], step: int, waited_s: float) -> str:
    """What has happened, for the log and for the command's end.

    Args:
        findings: of all ranks.
        step: that hangs.
        waited_s: how long the rank that tells has been waiting.
    """
    missing = blamed(findings)
    others = [f for f in findings if f not in missing]
    parts = [f"step {step} hangs since {waited_s:.0f} s: "]
    if missing:
        parts.append("; ".join(_told(f) for f in missing))
    else:
        parts.append("no rank is missing, and the collectives do not end")
    if others:
        parts.append(f"; {'; '.join(_waiting(others))}")
    return "".join(parts)


def _told(finding: Finding) -> str:
    member = finding.member
    who = f"rank {member.rank} (process {member.pid} on {member.host})"
    if finding.answers:
        return f"{who} is missing, in {finding.phase} at {finding.place}"
    state = f"; it is {finding.state}" if finding.state else ""
    return f"{who} does not answer{state}; missing in {finding.phase} at {finding.place}"


def _waiting(findings: Sequence[Finding]) -> list[str]:
    """Ranks that are in one place together."""
    together: dict[tuple[str, str], list[int]] = {}
    for finding in findings:
        together.setdefault((finding.phase, finding.place), []).append(finding.member.rank)
    return [
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:8]))}{' …' if len(ranks) > 8 else ''} "
        f"{'wait' if len(ranks) > 1 else 'waits'} in {phase} at {place}"
        for (phase, place), ranks in together.items()
    ]
