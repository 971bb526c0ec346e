"""The run that is attacked: a tiny model with sound steps, made once; each case works on a copy."""

import json
import os
import random
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from tests.attack.command import run_command
from tests.support import tiny

__all__ = ["Base", "make_base"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """A run's folder and the command that continues it.

    Attributes:
        root: holds the run's folder, `run`.
        arguments: of the command but for `train.steps`, `run.root` and what a case adds.
        environ: of the command.
    """

    root: Path
    arguments: tuple[str, ...]
    environ: dict[str, str]

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.root / "run"

    @property
    def steps(self) -> Path:
        """The checkpoint folder."""
        return self.run / "checkpoint"

    def command(self, *more: str) -> list[str]:
        """The command line."""
        return [*self.arguments, f"run.root={self.root}", "run.name=run", *more]

    def empty_at(self, root: Path) -> "Base":
        """A run elsewhere that the same command has still to make."""
        root.mkdir(parents=True)
        return replace(self, root=root)

    def copy_to(self, root: Path) -> "Base":
        """The same run elsewhere; nothing is shared."""
        copy = self.empty_at(root)
        subprocess.run(["cp", "-a", "--reflink=auto", str(self.run), str(root)], check=True)
        return copy


def make_base(folder: Path, *, steps: int, more: tuple[str, ...] = ()) -> Base:
    """Trains the run with a save every third step.

    Args:
        folder: receives the corpus, its cache and the run; need not exist.
        steps: to train.
        more: further overrides.

    Raises:
        AssertionError: the command failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    corpus = _write_corpus(folder / "text.jsonl")
    arguments = tiny(
        corpus, "data.global_batch_size=8", "hooks=none", "scheduler.total_steps=60", "checkpoint.interval=3",
        "checkpoint.keep_latest_k=0", "checkpoint.lease_timeout_s=3", *more,
    )  # fmt: skip
    environ = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    base = Base(root=folder / "base", arguments=tuple(arguments), environ=environ)
    base.root.mkdir()
    ended = run_command(base.command(f"train.steps={steps}"), folder / "made", cwd=folder, environ=environ)
    assert ended.code == 0, ended.output
    return base


def _write_corpus(path: Path) -> Path:
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randint(2, 7))) for _ in range(400)]
    with path.open("w") as out:
        for _ in range(700):
            out.write(json.dumps({"text": " ".join(rng.choices(words, k=rng.randint(20, 50))) + "."}) + "\n")
    return path
