"""A seeded sample of the mutations of `mutate_data`; `make fuzz` runs more."""

import itertools
import random
import resource
import time
from collections import Counter
from pathlib import Path

from tests.attack.mutate_data import make_samples, mutations


def test_mutated_data_is_read_or_refused_in_one_sentence(tmp_path: Path) -> None:
    samples, work = tmp_path / "samples", tmp_path / "work"
    make_samples(samples)
    work.mkdir()
    seen: Counter[tuple[str, bool]] = Counter()
    for name, read in itertools.islice(mutations(random.Random(12), samples, work), 150):
        started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result = read()  # anything but the one type of error is a fault of `name`
        assert time.monotonic() - started < 10, name
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10, name
        seen[name.split()[0], result.startswith("refused: ")] += 1
    kinds = ("tokenizer", "store", "corpus")
    assert all(seen[kind, True] >= 20 for kind in kinds), seen
    # A store that was altered is refused but for what no reader can see.
    assert all(seen[kind, False] >= 5 for kind in ("tokenizer", "corpus")), seen
    assert not list(work.iterdir())
