"""A conversion's memory does not grow with the model: 2 GiB, both ways."""

from pathlib import Path

import pytest

from benchmarks.convert import measure, prepare
from regrow.checkpoint.load.open_source import open_source

# Twice the largest tensor, and 200 MiB.
ALLOWED_MIB = 2 * 128 + 200


@pytest.mark.slow
@pytest.mark.timeout(290)
def test_two_gibibytes_both_ways(tmp_path: Path) -> None:
    step = prepare(tmp_path, layers=7, dim=2048, vocab=16384)
    with open_source(step) as source:
        sizes = [i.nbytes for i in source.infos.values()]
    assert sum(sizes) >= 2 << 30
    assert max(sizes) == 128 << 20
    out = measure(["export", str(step), str(tmp_path / "hf")])
    back = measure(["import", str(tmp_path / "hf"), str(tmp_path / "back")])
    for found in (out, back):
        assert found["peak_mib"] <= ALLOWED_MIB
