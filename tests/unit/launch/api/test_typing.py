"""What a user's own script sees of the types: `mypy --strict` passes, and finds what is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import REPO

SCRIPT = """
from pathlib import Path

import regrow


def main() -> None:
    config: regrow.Config = regrow.compose(["train.steps=20", "model=llama3_debug"])
    config.train.log_every = 5
    result: regrow.TrainResult = regrow.train(config)
    where: Path = result.run_dir
    model, tokenizer = regrow.load_model(where, device="cpu")
    print(model.training, sum(p.numel() for p in model.parameters()), tokenizer.encode("x").ids)
    print(regrow.read_metrics(where).num_rows, regrow.__version__)
    for run in regrow.runs("outputs"):
        print(run.name, run.status, run.step, run.config["optimizer"])


main()
"""


@pytest.mark.slow
def test_a_users_script_is_checked(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    options = ["--strict", f"--cache-dir={tmp_path / 'cache'}", "--no-color-output", str(script)]

    def check(text: str) -> str:
        script.write_text(text)
        # As an installation is found: by the interpreter, not as sources to be checked.
        environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPO / "src")}
        done = subprocess.run(
            [sys.executable, "-P", "-m", "mypy", *options], cwd=tmp_path, env=environ, capture_output=True, text=True
        )
        return done.stdout + done.stderr

    assert check(SCRIPT) == "Success: no issues found in 1 source file\n"
    found = check(SCRIPT.replace("steps=20", 'steps=20", 3, "seed=1').replace("result.run_dir", "result.run_folder"))
    assert 'incompatible type "int"' in found
    assert '"TrainResult" has no attribute "run_folder"' in found
    assert "Found 2 errors" in found
