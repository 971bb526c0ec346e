"""A seeded part of the mutations of what others write: one sentence or the tensors, in bounds, and nothing runs."""

import random
import resource
import sys
import time
from itertools import islice
from pathlib import Path

import pytest

from regrow.launch.commands.checkpoint import main
from tests.attack.mutate_foreign import make_inputs, mutations, read

MUTATIONS = 240
_KINDS = ("dcp", "torch", "old", "safetensors", "index")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:Duplicate name")
def test_mutations_end_in_a_sentence_or_in_tensors(tmp_path: Path) -> None:
    inputs, work, witness = tmp_path / "inputs", tmp_path / "folder/work", tmp_path / "ran"
    make_inputs(inputs)
    work.parent.mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert [read(inputs / kind, kind) for kind in _KINDS] == ["3 tensors"] * 5
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = []
    for name, run in islice(mutations(random.Random(12), inputs, work, witness), MUTATIONS):
        start = time.process_time()
        outcome = run()
        assert time.process_time() - start < 10, name
        assert not witness.exists(), name
        assert "\n" not in outcome, (name, outcome)
        outcome.encode()
        outcomes.append(outcome)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 256 << 10
    assert [p for p in sorted(tmp_path.rglob("*")) if not p.is_relative_to(work)] == before
    refused = [o for o in outcomes if not o.endswith(" tensors")]
    assert len(refused) > MUTATIONS // 2


def _exit_code() -> int:
    try:
        main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:Duplicate name")
@pytest.mark.parametrize("command", ["show", "verify"])
def test_the_command_says_it_in_one_line(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs, work, witness = tmp_path / "inputs", tmp_path / "work", tmp_path / "ran"
    make_inputs(inputs)
    codes = []
    for name, run in islice(mutations(random.Random(7), inputs, work, witness), 40):
        outcome = run()
        place = next(work.glob("*.pt"), work)
        monkeypatch.setattr(sys, "argv", ["regrow-ckpt", command, str(place)])
        capsys.readouterr()
        codes.append(_exit_code())
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err, name
        if not outcome.endswith(" tensors") and command == "show":
            # The header alone may be sound, and the data refused.
            assert codes[-1] == 0 or (codes[-1], err.count("\n"), err[:7]) == (2, 1, "error: "), (name, err)
        assert not witness.exists(), name
    assert set(codes) <= {0, 1, 2}
    assert sum(code > 0 for code in codes) > 20
