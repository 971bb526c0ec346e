"""What does not grow with the number of ranks, shown on simulated ones."""

import math
from pathlib import Path

import pytest

import regrow.checkpoint.save.commit
from benchmarks.scale import chunks_of, coordinates, measure, shapes_of
from regrow.checkpoint.format.layout import place_chunks
from regrow.checkpoint.format.manifest import Manifest
from regrow.checkpoint.format.rank_manifest import rank_manifest_name
from regrow.checkpoint.save.commit import Committer
from regrow.checkpoint.save.coordinator import report_of
from regrow.checkpoint.storage.base import Storage
from regrow.checkpoint.storage.local import LocalStorage


@pytest.mark.slow
def test_every_element_is_written_once_whatever_the_number_of_ranks() -> None:
    shapes = shapes_of("llama3_70b")
    expected = 3 * sum(math.prod(s) for s in shapes.values())
    for ranks in (256, 1024):
        shards = ranks // 256
        chunks = [c for place in coordinates(ranks) for c in chunks_of(shapes, place, shards)]
        assert sum(math.prod(c.shape) for c in chunks) == expected
        assert len({(c.name, c.offset) for c in chunks}) == len(chunks)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_only_the_metadata_grows_with_ranks_times_tensors(tmp_path: Path) -> None:
    small, large = (measure("llama3_70b", ranks, tmp_path / str(ranks)) for ranks in (256, 1024))
    assert large["rank_manifest_bytes"] <= small["rank_manifest_bytes"] * 1.1
    for row in (small, large):
        assert row["root_manifest_bytes"] <= 150 * row["ranks"]
    # Sharding cuts each of the tensors into more pieces: this is the part that stock readers need.
    assert 2.5 < large["metadata_bytes"] / small["metadata_bytes"] < 5


def test_the_metadata_is_made_once_per_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = LocalStorage(tmp_path)
    made: list[int] = []
    committer = Committer(folder, "t", None)
    real = regrow.checkpoint.save.commit.assemble_metadata

    def counted(place: Storage, ranks: int, writer: str) -> bytes:
        made.append(ranks)
        return real(place, ranks, writer)

    monkeypatch.setattr("regrow.checkpoint.save.commit.assemble_metadata", counted)
    for step, plan in ((1, "p"), (2, "p"), (3, "q"), (4, "q")):
        place = committer.working_place(step)
        place.make()
        body = b'{"plan": "%s", "files": {}, "items": []}' % plan.encode()
        place.write(rank_manifest_name(0), body)
        committer.commit(Manifest(step=step, lineage="a"), [report_of(body)])
    assert made == [1, 1]
    assert place_chunks([]).file_bytes == ()
