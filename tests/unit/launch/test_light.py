"""Help, explanations and refusals of what cannot be composed wait for nothing that training needs."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HEAVY = {"torch", "numpy", "pyarrow", "wandb", "transformers", "matplotlib"}
COMMANDS = {
    "help": (["--help"], 0, "Groups: choose with GROUP=CHOICE"),
    "explain": (["explain"], 0, "checkpoint.interval = 500"),
    "explain nothing": (["explain", "optimizer.lrr"], 2, "did you mean optimizer.lr?"),
    "misspelt field": (["optimizer.lrr=3"], 2, "optimizer.lrr is not a field; did you mean optimizer.lr?"),
    "unknown choice": (["model=llama3_9b"], 2, "did you mean model=llama3_8b?"),
    "misspelt in a hook": (["hooks.sample.tokenz=3"], 2, "did you mean hooks.sample.tokens?"),
    "wrong value": (["train.steps=many"], 2, "train.steps must be a whole number, but is 'many'"),
}
# Those that Hydra has to compose first.
COMPOSED = {
    "in an experiment": (["experiment=demo", "optimizer.lrr=3"], 2, "did you mean optimizer.lr?"),
    "missing value": (["data=tokens"], 2, "data.path must be set, but is missing"),
}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", *arguments]


@pytest.mark.parametrize("case", [*COMMANDS, *COMPOSED])
def test_nothing_heavy_is_imported(case: str, tmp_path: Path) -> None:
    arguments, code, words = (COMMANDS | COMPOSED)[case]
    done = subprocess.run(
        command("-X", "importtime", "-m", "regrow", *arguments),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert words in done.stdout + done.stderr
    imported = {m.partition(".")[0] for m in re.findall(r"^import time:.*\| +([\w.]+)$", done.stderr, re.MULTILINE)}
    assert "regrow" in imported
    assert not imported & HEAVY


def cpu_s(arguments: list[str], folder: Path) -> float:
    """The least of the process' own times, user and system, over two starts."""
    times = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command(*arguments), cwd=folder, capture_output=True, check=False, env=dict(os.environ))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def test_an_answer_takes_less_than_four_times_the_import_of_hydra(tmp_path: Path) -> None:
    limit = 4 * cpu_s(["-c", "import hydra"], tmp_path)
    taken = {name: cpu_s(["-m", "regrow", *COMMANDS[name][0]], tmp_path) for name in ("help", "misspelt field")}
    print({name: f"{seconds:.2f} s of {limit:.2f} s" for name, seconds in taken.items()})
    assert all(seconds < limit for seconds in taken.values()), taken
