"""Folders of the user's, also for users that have none. Standard library only; used before torch is imported.

A container's user often has no entry in /etc/passwd, and no HOME or one that cannot be written.
"""

import logging
import os
import pwd
import stat
import tempfile
from pathlib import Path

__all__ = ["ensure_home", "user_cache"]

log = logging.getLogger(__name__)


def ensure_home() -> None:
    """Gives this process and its children a HOME and a user's name where the system has none for them.

    Torch's, matplotlib's and other libraries' caches ask for both.
    """
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        # Before it asks for the entry, Python's `getpass` looks at these.
        if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
            os.environ["LOGNAME"] = f"uid-{os.getuid()}"
        if not os.environ.get("HOME"):
            os.environ["HOME"] = str(_private_folder())
    if os.environ.get("HOME") == "":
        # The entry's own counts then.
        del os.environ["HOME"]


def user_cache() -> Path:
    """Regrow's folder in the user's cache, made if it is not there; where that is not possible, a temporary one.

    Raises:
        OSError: there is no room for that either.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "regrow"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        folder = _private_folder() / "cache"
        folder.mkdir(exist_ok=True)
        log.warning("there is no folder for caches (%s): using %s; data.cache says another one", error, folder)
    return folder


def _private_folder() -> Path:
    """A folder in the temporary directory that belongs to this user alone, the same at every start."""
    folder = Path(tempfile.gettempdir()) / f"regrow-user-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            return Path(tempfile.mkdtemp(prefix="regrow-user-"))
    return folder
