"""Damages that nobody forged, done to a run with the sound steps 3, 6, 9 and 12, and what the command makes of them.

What is right is told by the bytes: a step is sound where its files are those that were saved, apart from bytes of a
stream that no tensor owns.
"""

import contextlib
import json
import os
import random
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from regrow.trainer.jsonlines import read_rows
from tests.attack.base import Base, make_base
from tests.attack.cases import Report, choose, run_cases
from tests.attack.command import Ended, run_command

__all__ = ["Damage", "all_damages", "attack", "run_damage"]

STEPS = (3, 6, 9, 12)
LAST = 14
MANIFEST, RANK, METADATA, DATA = FILES = ("manifest.json", "rank-0.json", ".metadata", "__0_0.distcp")
TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Damage:
    """One of them.

    Attributes:
        kind: what it stands for.
        name: of this one.
        act: does it to a checkpoint folder.
        refused: the step that `checkpoint.load_step` must refuse; None where none is damaged.
        ranks: that the command uses.
        code: the plain command's exit code: 2 where a person must mend something first.
    """

    kind: str
    name: str
    act: Callable[[Path], None]
    refused: int | None
    ranks: int = 1
    code: int = 0


def step(number: int) -> str:
    """The name of a step's folder."""
    return f"step-{number}"


# What is done to one file or folder; `other` is the same file of an older step.


def remove(path: Path, other: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def halve(path: Path, other: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def append(path: Path, other: Path) -> None:
    with path.open("ab") as out:
        out.write(b"\0")


def flip_at(share: float) -> Callable[[Path, Path], None]:
    """One bit, so far into the file."""

    def act(path: Path, other: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(share * (len(data) - 1))] ^= 1
        path.write_bytes(data)

    return act


def hole(path: Path, other: Path) -> None:
    """Zeros in the middle, as a file system leaves where a block was never written."""
    data = bytearray(path.read_bytes())
    length = min(4096, len(data) // 2)
    start = (len(data) - length) // 2
    data[start : start + length] = bytes(length)
    path.write_bytes(data)


def swap(path: Path, other: Path) -> None:
    aside = path.with_name("swapped")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


def move_away(path: Path, other: Path) -> None:
    path.rename(path.parent.parent / f"moved{path.name}")


def to_file(path: Path, other: Path) -> None:
    remove(path, other)
    path.write_bytes(b"no step\n")


def to_folder(path: Path, other: Path) -> None:
    remove(path, other)
    path.mkdir()


def to_fifo(path: Path, other: Path) -> None:
    remove(path, other)
    os.mkfifo(path)


def to_socket(path: Path, other: Path) -> None:
    remove(path, other)
    os.mknod(path, stat.S_IFSOCK | 0o644)


def to_loop(path: Path, other: Path) -> None:
    remove(path, other)
    path.symlink_to(path.name)


def to_dangling(path: Path, other: Path) -> None:
    remove(path, other)
    path.symlink_to("nowhere")


def to_endless(path: Path, other: Path) -> None:
    remove(path, other)
    path.symlink_to("/dev/zero")


def to_device(path: Path, other: Path) -> None:
    remove(path, other)
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    except PermissionError:  # only root may; a link to a device is the next best
        path.symlink_to("/dev/full")


def lock(path: Path, other: Path) -> None:
    path.chmod(0)


def to_other(path: Path, other: Path) -> None:
    """A link to an older one."""
    remove(path, other)
    path.symlink_to(other)


FILE_ACTS: dict[str, dict[str, Callable[[Path, Path], None]]] = {
    "content": {
        "missing": remove,
        "empty": empty,
        "cut in half": halve,
        "one byte more": append,
        **{f"bit flipped at {share}": flip_at(share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)},
        "a hole of zeros": hole,
    },
    "exchanged": {"swapped": swap, "moved elsewhere": move_away, "a link to an older one": to_other},
    "special": {
        "a folder": to_folder,
        "a FIFO": to_fifo,
        "a socket": to_socket,
        "a loop": to_loop,
        "a dangling link": to_dangling,
        "a link to /dev/zero": to_endless,
        "a device": to_device,
    },
    "permission": {"mode 000": lock},
}

STEP_ACTS: dict[str, dict[str, Callable[[Path, Path], None]]] = {
    "step": {"missing": remove, "an empty folder": to_folder, "a link to an older one": to_other, "swapped": swap},
    "step special": {"a file": to_file, **FILE_ACTS["special"]},
    "step permission": {"mode 000": lock},
}
del STEP_ACTS["step special"]["a folder"]


def file_damages() -> Iterator[Damage]:
    """Of each file: of the newest step, of the two newest at once, and of one in the middle."""
    for kind, acts in FILE_ACTS.items():
        for what, act in acts.items():
            for name in FILES:
                yield Damage(kind=kind, name=f"{name} {what}", act=on_file(act, name, 12), refused=12)
                if "flipped" not in what or "0.5" in what:
                    both = on_file(act, name, 12, 9)
                    yield Damage(kind=f"{kind}, twice", name=f"{name} {what}, twice", act=both, refused=12)
                if what in ("missing", "bit flipped at 0.5", "a FIFO", "mode 000"):
                    older = on_file(act, name, 6)
                    yield Damage(kind="an older step", name=f"{name} {what}, of step 6", act=older, refused=6)


def on_file(act: Callable[[Path, Path], None], name: str, *numbers: int) -> Callable[[Path], None]:
    """Does it to one file of some steps, the newest first; the older step is never one of them."""

    def do(steps: Path) -> None:
        for number, other in zip(numbers, (3, 3), strict=False):
            act(steps / step(number) / name, steps / step(other) / name)

    return do


def step_damages() -> Iterator[Damage]:
    """Of whole steps."""
    for kind, acts in STEP_ACTS.items():
        for what, act in acts.items():
            yield Damage(kind=kind, name=f"step {what}", act=on_step(act, 12), refused=12)
            yield Damage(kind=kind, name=f"step {what}, twice", act=on_step(act, 12, 9), refused=12)
    for source, target, copied in ((12, 13, False), (12, 999, False), (9, 10, True), (12, 13, True), (9, 12, True)):
        how = "copied" if copied else "renamed"
        act_ = renumber(source, target, copied=copied)
        yield Damage(kind="step renumbered", name=f"step {source} {how} to {target}", act=act_, refused=target)
    yield Damage(kind="step renumbered", name="step 12 renamed to 13, asked for", act=renumber(12, 13), refused=12)


def on_step(act: Callable[[Path, Path], None], *numbers: int) -> Callable[[Path], None]:
    def do(steps: Path) -> None:
        for number, other in zip(numbers, (3, 3), strict=False):
            act(steps / step(number), steps / step(other))

    return do


def renumber(source: int, target: int, *, copied: bool = False) -> Callable[[Path], None]:
    def do(steps: Path) -> None:
        shutil.rmtree(steps / step(target), ignore_errors=True)
        shutil.copytree(steps / step(source), steps / step(target))
        if not copied:
            shutil.rmtree(steps / step(source))

    return do


# Names that only look like a step's, and what is left of saves and removals.
ODD_NAMES = (
    "step-", "step--1", "step-021", "step-013", "step-1e3", "step-0x10", "step-+13", "step-13.0", "step-1_3", "step-٧٧",
    "step-１３", "step-²", f"step-{'9' * 30}", f"step-{'9' * 240}", "step-13 ", " step-13", "step-13\n", "step-\n13",
    "Step-13", "step_13", "step-13.bak", "step-13~", "step-13.tmp", "step-13\udcff", "step-12 (copy)",
)  # fmt: skip
LEFTOVERS = ("step-7.partial-x", "step-7.removing-x", "step-13.partial-0badc0de", "step-12.removing-0badc0de")


def name_damages() -> Iterator[Damage]:
    """What lies beside sound steps: folders and copies of a step under odd names, files under good ones."""
    for n, name in enumerate(ODD_NAMES):
        make = (copy_of_step, empty_folder, small_file)[n % 3]
        yield Damage(kind="odd names", name=f"{make.__name__} {name!a}", act=beside(make, name), refused=None)
    for name in LEFTOVERS:
        for make in (copy_of_step, small_file, fifo, locked_folder):
            yield Damage(kind="leftovers", name=f"{make.__name__} {name}", act=beside(make, name), refused=None)
    for make in (small_file, empty_folder, fifo, loop):
        yield Damage(kind="odd names", name=f"{make.__name__} step-5", act=beside(make, "step-5"), refused=5)
    for make in (small_file, fifo, loop):
        yield Damage(kind="odd names", name=f"{make.__name__} set-aside", act=beside(make, "set-aside"), refused=None)
    for name in (".direct-0badc0de", ".lease-1.json.0badc0de.tmp", ".step-13.0badc0de.tmp"):
        yield Damage(kind="leftovers", name=f"small_file {name}", act=beside(small_file, name), refused=None)


def beside(make: Callable[[Path], None], name: str) -> Callable[[Path], None]:
    return lambda steps: make(steps / name)


def copy_of_step(path: Path) -> None:
    shutil.copytree(path.with_name(step(12)), path)


def empty_folder(path: Path) -> None:
    path.mkdir()


def small_file(path: Path) -> None:
    path.write_bytes(b"{}")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def locked_folder(path: Path) -> None:
    copy_of_step(path)
    path.chmod(0)


LEASES: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"token": "0badc0de", "host": "go',
    "a list": b"[1, 2]",
    "deep": b"[" * 100_000,
    "no UTF-8": b"\xff\xfe{}",
    "zeros": bytes(4096),
    "absurd": b'{"token":"0badc0de","host":"gone","boot":"b","namespace":"n","pid":1,"started":1,"timeout_s":1e300}',
    "negative": b'{"token":"0badc0de","host":"gone","boot":"b","namespace":"n","pid":-1,"started":1,"timeout_s":-1}',
    "not a number": b'{"token":"0badc0de","host":"gone","boot":"b","namespace":"n","pid":1,"started":1,"timeout_s":NaN}',
}


def lease_damages() -> Iterator[Damage]:
    """Of the newest lease, and of a reader's lock; nothing else holds the run."""
    for what, body in LEASES.items():
        yield Damage(kind="leases", name=f"lease {what}", act=write_lease("lease-{}.json", body), refused=None)
    for what, make in FILE_ACTS["special"].items():
        yield Damage(kind="leases", name=f"lease is {what}", act=on_lease(make), refused=None)
    yield Damage(kind="leases", name="lease mode 000", act=on_lease(lock), refused=None, code=2)
    for name in (f"lease-{'9' * 30}.json", "lease-٣.json", "lease--1.json", "lease-007.json", "lease-.json"):
        act = write_lease(name, LEASES["cut"])
        yield Damage(kind="leases", name=f"{name!a}", act=act, refused=None)
    for what, make in {"cut": halve, **FILE_ACTS["special"], "mode 000": lock}.items():
        yield Damage(kind="leases", name=f"reader's lock {what}", act=on_reader(make), refused=None)


def newest_lease(steps: Path) -> Path:
    numbers = [int(m[1]) for m in (re.fullmatch(r"lease-([0-9]+)\.json", p.name) for p in steps.iterdir()) if m]
    return steps / f"lease-{max(numbers)}.json"


def write_lease(name: str, body: bytes) -> Callable[[Path], None]:
    """Under the number after the newest one's, where the name asks for one."""

    def do(steps: Path) -> None:
        number = int(newest_lease(steps).stem.partition("-")[2]) + 1
        (steps / name.format(number)).write_bytes(body)

    return do


def on_lease(act: Callable[[Path, Path], None]) -> Callable[[Path], None]:
    def do(steps: Path) -> None:
        lease = newest_lease(steps)
        act(lease, lease)

    return do


def on_reader(act: Callable[[Path, Path], None]) -> Callable[[Path], None]:
    """A dead reader's lock of step 3, which retention will not ask about."""

    def do(steps: Path) -> None:
        path = steps / "step-3/reader-0badc0de.json"
        path.write_bytes(LEASES["absurd"])
        act(path, path)

    return do


# Files of the run beside its steps: those that are made anew, and those that a person must look at.
_MADE_ANEW = {
    "run.json": ("missing",),
    "config.yaml": ("missing", "empty", "cut in half", "a FIFO", "a loop", "a link to /dev/zero", "mode 000"),
    "tokenizer.json": ("missing", "empty", "cut in half", "a FIFO", "a loop", "a link to /dev/zero"),
    "stop.json": ("missing", "empty", "a FIFO", "a loop", "a dangling link"),
    ".ranks.lock": ("missing", "a FIFO", "a loop"),
    "logs": ("missing", "a FIFO", "a loop"),
    "logs/rank-0.log": ("missing", "a folder", "a FIFO", "a loop", "a dangling link", "mode 000"),
    ".hydra": ("missing",),
}
_REFUSED = {
    "run.json": ("empty", "cut in half", "a folder", "a FIFO", "a loop", "a link to /dev/zero", "mode 000"),
    "config.yaml": ("a folder",),
    "metrics.jsonl": ("a folder", "a FIFO", "a socket", "a loop", "a link to /dev/zero", "mode 000"),
    ".hydra": ("a FIFO", "a loop", "mode 000"),
    "tokenizer.json": ("a folder",),
}


def run_damages() -> Iterator[Damage]:
    """Of the run's own files."""
    acts = {what: act for group in FILE_ACTS.values() for what, act in group.items()}
    for table, code in ((_MADE_ANEW, 0), (_REFUSED, 2)):
        for name, whats in table.items():
            for what in whats:
                act = in_run(acts[what], name)
                yield Damage(kind=f"run files, {code}", name=f"{name} {what}", act=act, refused=None, code=code)
    act = in_run(to_file, ".hydra")
    yield Damage(kind="on two ranks", name=".hydra a file, two ranks", act=act, refused=None, ranks=2, code=2)


def in_run(act: Callable[[Path, Path], None], name: str) -> Callable[[Path], None]:
    return lambda steps: act(steps.parent / name, steps.parent / name)


def all_damages(seed: int, two_ranks: int = 12) -> list[Damage]:
    """The table, and some of its entries once more on two ranks.

    Args:
        seed: chooses those.
        two_ranks: how many.
    """
    table = [*file_damages(), *step_damages(), *name_damages(), *lease_damages(), *run_damages()]
    refusable = [d for d in table if d.refused is not None]
    again = random.Random(seed).sample(refusable, two_ranks)
    return table + [
        Damage(kind="on two ranks", name=f"{d.name}, two ranks", act=d.act, refused=d.refused, ranks=2) for d in again
    ]


def is_sound(base: Base, steps: Path, number: int) -> bool:
    """Whether a step's files are those that were saved, and can be read by somebody who is not root."""
    folder, saved = steps / step(number), base.steps / step(number)
    try:
        if not saved.is_dir() or not folder.is_dir() or not folder.stat().st_mode & 0o500:
            return False
        return all(_same(folder / name, saved / name) for name in FILES)
    except OSError:
        return False


def _same(file: Path, saved: Path) -> bool:
    mode = file.stat().st_mode
    if not stat.S_ISREG(mode) or not mode & 0o400:
        return False
    found, expected = file.read_bytes(), saved.read_bytes()
    if file.name != DATA or len(found) != len(expected):
        return found == expected
    items = json.loads(saved.with_name(RANK).read_text())["items"]
    return all(found[i["data"] :][: i["data_bytes"]] == expected[i["data"] :][: i["data_bytes"]] for i in items)


def run_damage(base: Base, damage: Damage, folder: Path) -> list[str]:
    """Does the damage to a copy of the run, asks for the damaged step, and gives the plain command; what was wrong.

    The refused command must leave the run as it was, so that the plain one after it shows both that it did and
    what automatic resume makes of the damage.
    """
    case = base.copy_to(folder)
    damage.act(case.steps)
    sound = [n for n in STEPS if is_sound(base, case.steps, n)]
    problems = []
    if damage.refused is not None and damage.refused not in sound:
        before = _state(case)
        ended = _regrow(case, damage, f"checkpoint.load_step={damage.refused}")
        problems += [f"load_step={damage.refused}: {p}" for p in ended.problems(2)]
        if _state(case) != before:
            problems.append("the refused command changed the run")
    ended = _regrow(case, damage)
    problems += ended.problems(damage.code)
    if damage.code == 0:
        problems += _after_resume(case, ended, sound)
    if not problems:
        remove_all(folder)
    return problems


def _after_resume(case: Base, ended: Ended, sound: list[int]) -> list[str]:
    """Whether it went on from the newest sound step, and lost no step of its rows."""
    problems = []
    found = re.findall(r"continuing after step (\d+)", ended.output)
    if found != [str(sound[-1])]:
        problems.append(f"continued after step {', '.join(found) or 'none'} instead of {sound[-1]}")
    rows = [row["step"] for row in read_rows(case.run / "metrics.jsonl")]
    if rows != list(range(1, LAST + 1)):
        problems.append(f"metrics.jsonl has the steps {rows}")
    return problems


def _regrow(case: Base, damage: Damage, *more: str) -> Ended:
    ranks = [f"parallel.dp_shard={damage.ranks}"] if damage.ranks > 1 else []
    arguments = case.command(f"train.steps={LAST}", *ranks, *more)
    return run_command(
        arguments, case.root / "log", cwd=case.root, environ=case.environ, timeout_s=TIMEOUT_S, privileged=False
    )


def _state(case: Base) -> tuple[list[str], bytes]:
    """What a refused command must leave alone."""
    return sorted(p.name for p in case.steps.iterdir() if "lease-" not in p.name), (
        case.run / "run.json"
    ).read_bytes()


def remove_all(folder: Path) -> None:
    """Removes a folder, whatever its modes."""
    for path, folders, _ in os.walk(folder):
        for name in folders:
            with contextlib.suppress(OSError):
                Path(path, name).chmod(0o700)
    shutil.rmtree(folder)


def attack(folder: Path, seed: int, share: float, match: str) -> list[Report]:
    """All of them, or a share."""
    damages = [d for d in all_damages(seed) if match in d.kind or match in d.name]
    base = make_base(folder / "base", steps=STEPS[-1])
    return run_cases(choose(damages, share, seed), lambda d, place: run_damage(base, d, place), folder)
