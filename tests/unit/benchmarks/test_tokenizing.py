"""The benchmark of tokenising compares like with like."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tokenizing import BARE, MAP, OURS, Measured, make_corpus, run, summary
from tests.support import REPO

pytestmark = pytest.mark.slow


def test_the_corpus_has_the_size_that_was_asked_for(tmp_path: Path) -> None:
    make_corpus(tmp_path, 0.5, files=3, vocab_size=300)
    files = sorted(tmp_path.glob("*.jsonl"))
    texts = [json.loads(line)["text"] for file in files for line in file.read_text().splitlines()]
    assert len(files) == 3
    assert 0.5e6 <= sum(len(text.encode()) for text in texts) < 0.6e6
    assert all(texts)
    assert (tmp_path / "tokenizer.json").stat().st_size


def test_ratios_are_taken_within_rounds() -> None:
    rounds = [
        {OURS: Measured(1.0 * n, 2.0, 7, 100.0, 90.0), MAP: Measured(3.0 * n, 1.0, 7, 900.0 * n, 80.0)}
        for n in (1, 10)
    ]
    found = summary(rounds, 20.0)
    assert found["ratios"] == {
        f"{MAP} / {OURS}": {
            "wall": {"median": 3.0, "low": 3.0, "high": 3.0, "rounds": 2},
            "cpu": {"median": 0.5, "low": 0.5, "high": 0.5, "rounds": 2},
        }
    }
    assert found["mb_per_s"][OURS]["median"] == 11.0
    assert found["peak_mib"] == {OURS: 100.0, MAP: 9000.0}
    assert BARE not in found["mb_per_s"]


def test_other_tokens_are_no_comparison() -> None:
    one = Measured(1.0, 1.0, 7, 1.0, 1.0)
    with pytest.raises(ValueError, match="same tokens"):
        summary([{OURS: one, BARE: one._replace(tokens=8)}], 1.0)


@pytest.mark.slow
def test_all_make_the_same_tokens(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.tokenizing", "--mb", "1", "--rounds", "1", "--vocab-size", "300"]
    command += ["--folder", str(tmp_path), "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert {OURS, MAP, BARE} == set(found["each"][0])
    assert found["machine"] in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.slow
def test_memory_is_that_of_few_documents_not_of_the_corpus(tmp_path: Path) -> None:
    make_corpus(tmp_path, 200, files=8, vocab_size=300)
    found = run(OURS, tmp_path, workers=2)
    assert found.peak_mib < 1536
    assert found.peak_mib < found.peak_first_half_mib * 1.1 + 16, "flat from 100 MB on"
