"""Where the threads of a process are: of this one, and by py-spy of one that may be stopped."""

import json
import shutil
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from regrow.checkpoint.processes import process_stat
from regrow.trainer.phase import Phase

__all__ = ["Frame", "Stacks", "is_compiling", "own_frames", "phase_of", "place_of", "stacks_of", "state_of"]

_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "waiting for a disk or a device, where no signal reaches it",
    "T": "stopped by a signal",
    "t": "stopped by a debugger",
    "Z": "dead",
    "X": "dead",
    "": "gone",
}
# Of the loop: what a rank is in, seen from outside.
_METHODS = {
    "_wait_for_data": Phase.data,
    "_forward_backward": Phase.forward_backward,
    "_update": Phase.update,
    "_start_reduction": Phase.reduction,
    "_settle": Phase.reduction,
}


@dataclass(frozen=True, slots=True)
class Frame:
    """A call."""

    function: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.function} ({_short(self.file)}:{self.line})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stacks:
    """Of another process.

    Attributes:
        text: for a person, all threads.
        main: the main thread's calls, innermost first; empty where they are not known.
    """

    text: str
    main: tuple[Frame, ...] = ()


def _short(file: str) -> str:
    """From the package on."""
    parts = Path(file).parts
    for top in ("regrow", "torch"):
        if top in parts:
            return "/".join(parts[len(parts) - 1 - parts[::-1].index(top) :])
    return Path(file).name


def own_frames() -> list[Frame]:
    """The calls of this process' main thread, innermost first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)  # noqa: SLF001 (there is no other way)
    return [Frame(f.f_code.co_name, f.f_code.co_filename, line) for f, line in traceback.walk_stack(frame)]


_COMPILER = ("torch/_dynamo/convert_frame.py", "torch/_inductor/compile_fx.py")


def is_compiling() -> bool:
    """Whether a thread of this process is in torch's compiler, which may take minutes."""
    for frame in sys._current_frames().values():  # noqa: SLF001
        for inner, _ in traceback.walk_stack(frame):
            file, name = inner.f_code.co_filename, inner.f_code.co_name
            if file.endswith(_COMPILER) and "compile" in name:
                return True
    return False


def place_of(frames: Sequence[Frame]) -> tuple[str, str]:
    """The collective that a thread waits in, empty where it is in none; and where it is, in words.

    Args:
        frames: innermost first.
    """
    collective = ""
    for frame in frames:
        if frame.file.endswith(("distributed_c10d.py", "_functional_collectives.py")):
            collective = frame.function
    ours = next((f for f in frames if "regrow" in Path(f.file).parts), None)
    if not frames:
        return "", "a place that is not known"
    inner = f"{collective}, called by" if collective else ""
    if ours is None or (ours == frames[0] and not collective):
        return collective, f"{inner} {frames[0]}".strip()
    return collective, f"{inner or f'{frames[0]}, called by'} {ours}"


def phase_of(frames: Sequence[Frame]) -> Phase:
    """What part of the loop a main thread is in, by its calls, innermost first."""
    for frame in frames:
        if frame.file.endswith("trainer/loop.py"):
            return _METHODS.get(frame.function, Phase.hooks)
    return Phase.outside


def state_of(pid: int) -> str:
    """What the kernel says of a process of this host, in words."""
    letter = process_stat(pid)[0]
    return _STATES.get(letter, f"in the state {letter}")


def stacks_of(pid: int, timeout_s: float) -> Stacks:
    """The stacks of a process of this host, by py-spy, which reads its memory and needs no answer.

    Args:
        pid: the process.
        timeout_s: for py-spy.
    """
    beside = Path(sys.executable).with_name("py-spy")
    tool = str(beside) if beside.is_file() else shutil.which("py-spy")
    if tool is None:
        return Stacks(text="py-spy, which reads the stacks of processes that do not answer, is not there\n")
    command = [tool, "dump", "--nonblocking", "--json", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        if done.returncode != 0:
            return Stacks(text=f"py-spy cannot read the process: {done.stderr.strip()}\n")
        return _parse(done.stdout, pid)
    except (OSError, ValueError, KeyError, TypeError, subprocess.TimeoutExpired) as error:
        return Stacks(text=f"py-spy cannot read the process: {error}\n")


def _parse(text: str, pid: int) -> Stacks:
    lines: list[str] = []
    main: tuple[Frame, ...] = ()
    for thread in json.loads(text):
        # Newer Pythons give `Class.method`.
        frames = tuple(
            Frame(str(f["name"]).rpartition(".")[2], str(f["filename"]), int(f["line"])) for f in thread["frames"]
        )
        is_main = thread["os_thread_id"] == pid
        main = frames if is_main else main
        name = "main thread" if is_main else f"thread {thread['os_thread_id']} {thread['thread_name'] or ''}".strip()
        lines += [f"{name}:", *(f'  File "{f.file}", line {f.line} in {f.function}' for f in frames), ""]
    return Stacks(text="\n".join(lines) + "\n", main=main)
