"""What killed processes left in a checkpoint folder, removed by the one that holds its lease."""

import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import final

from regrow.checkpoint.format.step_name import is_leftover, parse_step_name
from regrow.checkpoint.processes import tag_is_dead, tag_is_local
from regrow.checkpoint.run.holder import HeartbeatMonitor, Liveness
from regrow.checkpoint.run.reader_lock import is_reader_lock, life_of_reader
from regrow.checkpoint.storage.base import Storage

__all__ = ["Leftovers"]

log = logging.getLogger(__name__)

# A small file before its rename, with its owner (earlier versions' without), and a probe for direct I/O.
_TEMPORARY = re.compile(r"\..+?(?:\.([0-9a-f]{8}-[0-9]+-[0-9]+))?\.[0-9a-f]{8}\.tmp|\.direct-[0-9a-f]{8}")


@final
class Leftovers:
    """Removes what has no owner, and keeps an eye on the readers' locks of which that is not yet clear.

    Args:
        folder: the checkpoint folder, whose lease this process holds.
        watch: sees whether readers' counters move.
        timeout_s: after which a reader on another host whose counter has not moved counts as dead.
    """

    def __init__(self, folder: Storage, watch: HeartbeatMonitor, timeout_s: float) -> None:
        self._folder, self._watch, self._timeout_s = folder, watch, timeout_s
        self._unclear: list[tuple[str, str]] = []

    def clear(self) -> list[str]:
        """Looks through the whole folder; what cannot be removed now stays for the next start.

        Returns:
            One line for each thing removed.
        """
        self._unclear = []
        done = []
        for name in self._folder.names():
            if is_leftover(name) and self._remove(self._folder, name):
                done.append(f"removed the incomplete {name}")
            elif _is_abandoned(name) and self._remove(self._folder, name):
                done.append(f"removed {name}, which a killed process left")
            elif parse_step_name(name) is not None:
                done += self._clear_step(name)
        return done

    def clear_dead_readers(self) -> list[str]:
        """Looks again at the locks of readers that might have been alive."""
        unclear, self._unclear = self._unclear, []
        return [line for step, name in unclear for line in self._clear_lock(step, name)]

    def _clear_step(self, step: str) -> Iterator[str]:
        folder, names = self._folder.child(step), []
        with suppress(OSError):  # a step that cannot be looked into is damage, for others to report
            names = folder.names()
        for name in names:
            if _is_abandoned(name) and self._remove(folder, name):
                yield f"removed {step}/{name}, which a killed process left"
            elif is_reader_lock(name):
                yield from self._clear_lock(step, name)

    def _clear_lock(self, step: str, name: str) -> Iterator[str]:
        folder = self._folder.child(step)
        if life_of_reader(folder, name, self._watch, self._timeout_s) is not Liveness.dead:
            self._unclear.append((step, name))
        elif self._remove(folder, name):
            yield f"removed {step}/{name}, which a killed process left"

    def _remove(self, folder: Storage, name: str) -> bool:
        try:
            folder.remove(name)
        except OSError as error:
            log.warning("%s in %s cannot be removed now (%s); the next start tries again", name, folder.url, error)
            return False
        return True


def _is_abandoned(name: str) -> bool:
    """Whether a name is that of a temporary file without an owner on this host.

    Those on another host cannot be seen; they lose nothing, because a storage writes again what was cleared away.
    """
    match = _TEMPORARY.fullmatch(name)
    if match is None:
        return False
    tag = match[1]
    return tag is None or not tag_is_local(tag) or tag_is_dead(tag)
