"""Manifests, and what a checkpoint folder looks like after kills and rewinds."""

import json
from pathlib import Path

import pytest

from regrow.checkpoint.errors import CheckpointError, DamagedStepError
from regrow.checkpoint.files import read_json, write_json
from regrow.checkpoint.format.manifest import MANIFEST, Manifest, checksum, read_manifest, write_manifest
from regrow.checkpoint.policy.lineage import Lineage, StartKind
from regrow.checkpoint.policy.retention import KeepLatest
from regrow.checkpoint.run.catalog import Catalog

LINE = [Lineage(id="a")]


def make_step(folder: Path, step: int, lineage: str = "a") -> Path:
    path = folder / f"step-{step}"
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(b"x" * 100)
    write_manifest(path, Manifest(step=step, lineage=lineage, files={"__0_0.distcp": 100}))
    return path


def test_manifest_round_trip(tmp_path: Path) -> None:
    path = make_step(tmp_path, 7)
    assert read_manifest(path).step == 7


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: (p / "__0_0.distcp").write_bytes(b"x" * 99), "must have 100 bytes, but has 99"),
        (lambda p: (p / "__0_0.distcp").unlink(), "is missing"),
        (lambda p: (p / MANIFEST).write_text("{"), "is not JSON"),
        (lambda p: (p / MANIFEST).write_bytes(b"\xff\xfe"), "is damaged"),
        (lambda p: (p / MANIFEST).write_text((p / MANIFEST).read_text().replace('"step": 7', '"step": 8')),
         "does not match its own checksum"),
    ],
)  # fmt: skip
def test_damage_is_named(tmp_path: Path, damage: object, words: str) -> None:
    path = make_step(tmp_path, 7)
    assert callable(damage)
    damage(path)
    with pytest.raises(DamagedStepError) as caught:
        read_manifest(path)
    assert words in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_another_format_is_refused_not_set_aside(tmp_path: Path) -> None:
    path = make_step(tmp_path, 7)
    (path / MANIFEST).write_text(json.dumps({"format": 99, "checksum": checksum({"format": 99})}))
    with pytest.raises(CheckpointError, match="has format 99"):
        Catalog(tmp_path).clean_up(LINE)
    assert path.exists()


def test_only_complete_steps_of_the_line_are_listed(tmp_path: Path) -> None:
    make_step(tmp_path, 10)
    make_step(tmp_path, 20)
    make_step(tmp_path, 30, lineage="old")
    (tmp_path / "step-40").mkdir()
    (tmp_path / "step-50.partial-abc").mkdir()
    catalog = Catalog(tmp_path)
    assert [e.step for e in catalog.entries(LINE)] == [10, 20]
    assert list(catalog.scan()[1]) == [40]


def test_tidy_removes_partials_and_sets_the_rest_aside(tmp_path: Path) -> None:
    make_step(tmp_path, 10)
    make_step(tmp_path, 30, lineage="old")
    (tmp_path / "step-40").mkdir()
    (tmp_path / "step-50.partial-abc").mkdir()
    (tmp_path / "step-5.removing-0").mkdir()
    catalog = Catalog(tmp_path)
    assert len(catalog.clean_up(LINE)) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set-aside", "step-10"]
    assert (tmp_path / "set-aside" / "old" / "step-30" / MANIFEST).exists()
    assert catalog.clean_up(LINE) == []


def test_a_step_under_another_name_is_damage(tmp_path: Path) -> None:
    make_step(tmp_path, 10).rename(tmp_path / "step-20")
    catalog = Catalog(tmp_path)
    assert catalog.entries(LINE) == []
    assert "its manifest is of step 10" in catalog.scan()[1][20]


def test_two_steps_of_one_number_are_set_aside_side_by_side(tmp_path: Path) -> None:
    for _ in range(2):
        make_step(tmp_path, 30, lineage="old")
        Catalog(tmp_path).clean_up(LINE)
    assert sorted(p.name for p in (tmp_path / "set-aside" / "old").iterdir()) == ["step-30", "step-30.2"]


def test_a_rewound_line_sees_its_parents_steps_up_to_the_origin(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        make_step(tmp_path, step)
    line = [*LINE, Lineage(id="b", origin=StartKind.step, origin_step=20, parent="a")]
    assert [e.step for e in Catalog(tmp_path).entries(line)] == [10, 20]


def test_prune_keeps_the_newest_and_pinned(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        make_step(tmp_path, step)
    (tmp_path / "step-10" / "pinned").touch()
    catalog = Catalog(tmp_path)
    assert catalog.prune([KeepLatest(1)], LINE) == [20]
    assert catalog.candidates() == [10, 30]


def test_an_empty_folder_has_nothing(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "none")
    assert catalog.entries(LINE) == []
    assert catalog.clean_up(LINE) == []


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    write_json(path, {"x": 2})
    assert read_json(path) == {"x": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
