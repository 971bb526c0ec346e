"""The repository that a run is started from: its revision, and what is not committed in it."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["UserProject", "read_user_project"]


@dataclass(frozen=True, kw_only=True, slots=True)
class UserProject:
    """A checkout.

    Attributes:
        root: its top folder.
        revision: the commit that is checked out.
        diff: the tracked files' changes to it, none of them committed.
        is_cut: whether the diff is longer than was asked for, of which this is the beginning.
    """

    root: Path
    revision: str
    diff: str
    is_cut: bool


def read_user_project(folder: Path, limit: int) -> UserProject | None:
    """The checkout that a folder is in; None where it is in none, or has no commit yet.

    Args:
        folder: anywhere in it.
        limit: bytes of the diff, 0 for none of it.
    """
    try:
        lines = _git(folder, 4096, "rev-parse", "--show-toplevel", "HEAD").decode(errors="replace").splitlines()
        root, revision = Path(lines[0]), lines[1]
        diff = _git(root, limit + 1, "diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD") if limit else b""
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
    text = diff[:limit].decode(errors="replace")
    return UserProject(root=root, revision=revision, diff=text, is_cut=len(diff) > limit)


def _git(folder: Path, limit: int, *arguments: str) -> bytes:
    """What git prints, of which no more is read than asked for.

    Raises:
        OSError: there is no git.
        subprocess.SubprocessError: it failed.
    """
    environ = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-C", str(folder), *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, env=environ
    ) as git:
        assert git.stdout is not None
        out = git.stdout.read(limit)
        if len(out) == limit:
            git.kill()
        elif git.wait() != 0:
            raise subprocess.CalledProcessError(git.returncode, command)
    return out
