"""What a run does not load."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tiny

_SCRIPT = """
import json, sys
import regrow

regrow.train(regrow.compose(json.loads(sys.argv[1])))
print(sorted(n for n in sys.modules if n in ("torch._dynamo", "torch._inductor", "torch.onnx", "networkx")))
"""


@pytest.mark.slow
def test_a_run_on_one_rank_that_compiles_nothing_does_not_load_the_compiler(corpus: Path, tmp_path: Path) -> None:
    """It takes a second of the processor. Saves and the sample at the end included."""
    arguments = json.dumps(tiny(corpus, "train.steps=2", f"run.root={tmp_path}"))
    found = subprocess.run(
        [sys.executable, "-c", _SCRIPT, arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert found.stdout.splitlines()[-1] == "[]"
