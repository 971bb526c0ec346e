"""Manifests with right checksums that say what cannot be: damage, in one sentence, before anything is done."""

import json
import math
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from regrow.checkpoint.documents import DocumentError
from regrow.checkpoint.errors import CheckpointError, DamagedStepError, OtherFormatError
from regrow.checkpoint.format.hashing import item_hash
from regrow.checkpoint.format.manifest import FORMAT, MANIFEST
from regrow.checkpoint.format.rank_manifest import parse_rank_manifest
from regrow.checkpoint.format.tensor_source import Box
from regrow.checkpoint.format.tiling import tiles_exactly
from regrow.checkpoint.inspect import maintenance as care
from regrow.checkpoint.load.locate import resolve_foreign
from regrow.checkpoint.load.open_source import open_source, read_whole
from regrow.checkpoint.policy.lineage import Lineage
from regrow.checkpoint.run.catalog import Catalog
from regrow.checkpoint.storage.local import LocalStorage
from tests.forging import Edit, forge, sound_step

LINE = [Lineage(id="0-8yhu")]
# Deeper than Python's recursion goes.
DEEP: Any = []
for _ in range(900):
    DEEP = [DEEP]


def assign(**fields: Any) -> Edit:
    return lambda document: document.update(fields)


ROOTS: dict[str, Edit] = {
    "lineage leaves the folder": assign(lineage="../../../escape"),
    "lineage is absolute": assign(lineage="/tmp/escape"),
    "lineage is a list": assign(lineage=["a"]),
    "step is text": assign(step="8"),
    "step is below 0": assign(step=-8),
    "step is a fraction": assign(step=8.5),
    "step is huge": assign(step=10**30),
    "state of another step": lambda d: d["train_state"].update(step=7),
    "ranks are none": assign(ranks=0),
    "ranks are very many": assign(ranks=10**12),
    "a file leaves the folder": lambda d: d["files"].update({"../../x": 1}),
    "a file is a folder": lambda d: d["files"].update({"..": 1}),
    "a size is text": lambda d: d["files"].update({"__0_0.distcp": "1"}),
    "a hash is a number": lambda d: d["hashes"].update({"rank-0.json": 7}),
    "files are a list": assign(files=[]),
    "kind is unknown": assign(kind="half"),
    "writer leaves the folder": assign(writer="../x"),
    "a metric is text": assign(metrics={"val_loss": "low"}),
    "the model is a list": assign(model=[1]),
    "a lineage stands twice": assign(lineages=[{"id": "0-8yhu"}, {"id": "0-8yhu"}]),
    "a lineage has no parent": assign(lineages=[{"id": "0-8yhu", "origin": "step", "parent": "z"}]),
    "lineages without its own": assign(lineages=[{"id": "b"}]),
    "a lineage leaves the folder": assign(lineages=[{"id": "../x"}, {"id": "0-8yhu"}]),
}


@pytest.mark.parametrize("edit", ROOTS.values(), ids=ROOTS.keys())
def test_a_forged_manifest_is_damage_and_nothing_leaves_the_folder(tmp_path: Path, edit: Edit) -> None:
    folder = tmp_path / "run/checkpoint"
    folder.mkdir(parents=True)
    forge(sound_step(folder), root=edit)
    with pytest.raises(DamagedStepError) as caught:
        Catalog(folder).open(8)
    assert "\n" not in str(caught.value)
    assert len(Catalog(folder).clean_up(LINE)) == 1
    assert sorted(p.name for p in tmp_path.rglob("step-*")) == ["step-8"]
    assert (folder / "set-aside/damaged/step-8").is_dir()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_a_document_nested_too_deeply_is_damage(tmp_path: Path) -> None:
    step = sound_step(tmp_path)
    (step / MANIFEST).write_text('{"checksum": ' + "[" * 200_000 + "]" * 200_000 + "}")
    with pytest.raises(DamagedStepError, match="nested too deeply"):
        Catalog(tmp_path).open(8)
    (step / MANIFEST).unlink()
    forge(sound_step(tmp_path, 9), root=assign(step=9, model={"deep": DEEP}))
    with pytest.raises(DamagedStepError):
        Catalog(tmp_path).open(9)


def first(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["items"][0]
    return found


def half_twice(document: dict[str, Any]) -> None:
    """The first half of a tensor as two chunks that both say they are one half."""
    item = first(document)
    rows, width = item["global_shape"]
    block, half = item["block_bytes"], item["data_bytes"] // 2
    assert half <= block
    item.update(shape=[rows // 2, width], data_bytes=half)
    other = {**item, "start": item["data"] + half, "size": item["size"] - (item["data"] - item["start"]) - half}
    item["size"] = item["data"] + half - item["start"]
    other["data"] = item["data"] + half
    document["items"].insert(1, other)


RANKS: dict[str, Edit] = {
    "shape does not fit its bytes": lambda d: first(d).update(shape=[150, 16], global_shape=[150, 16]),
    "more bytes than the shape": lambda d: first(d).update(data_bytes=first(d)["data_bytes"] + 64),
    "beyond the tensor": lambda d: first(d).update(offset=[1, 0]),
    "beyond the file": lambda d: first(d).update(start=10**9, data=10**9 + 704),
    "data outside its stream": lambda d: first(d).update(data=0, start=64),
    "another file": lambda d: first(d).update(file="../../rank-0.json"),
    "a file that is not there": lambda d: (d["files"].update({"x": 10**6}), first(d).update(file="x")),
    "an attribute of torch": lambda d: first(d).update(dtype="load"),
    "another dtype": lambda d: first(d).update(dtype="float64"),
    "dimensions differ": lambda d: first(d).update(offset=[0]),
    "a huge shape": lambda d: first(d).update(shape=[2**61, 2**61], global_shape=[2**61, 2**61]),
    "below 0": lambda d: first(d).update(offset=[-1, 0]),
    "hashes are missing": lambda d: first(d).update(blocks=""),
    "hashes are no hex": lambda d: first(d).update(blocks="z" * len(first(d)["blocks"])),
    "no blocks": lambda d: first(d).update(block_bytes=0),
    "an item is a list": lambda d: d["items"].insert(0, []),
    "items are missing": lambda d: d.pop("items"),
    "two streams share bytes": lambda d: d["items"][1].update({k: first(d)[k] for k in ("start", "size")}),
    "a tensor twice": lambda d: d["items"].append(first(d)),
    "chunks of two shapes": lambda d: d["items"][1].update(name=first(d)["name"]),
    "a half of it alone": lambda d: first(d).update(global_shape=[600, 16]),
}


@pytest.mark.parametrize("edit", RANKS.values(), ids=RANKS.keys())
def test_a_forged_rank_manifest_is_damage(tmp_path: Path, edit: Edit) -> None:
    step = sound_step(tmp_path)
    forge(step, rank=edit)
    with pytest.raises(CheckpointError) as caught, open_source(step) as source:
        read_whole(source, "tok_embeddings.weight")
    assert "\n" not in str(caught.value)
    assert care.verify(LocalStorage(step))[0]["problems"]


def test_chunks_that_cover_one_half_twice_are_damage(tmp_path: Path) -> None:
    """Their elements add up to the whole; the other half would be memory that nobody wrote."""
    step = sound_step(tmp_path)
    document = json.loads((step / "rank-0.json").read_text())
    half_twice(document)
    for item in document["items"][:2]:
        item["blocks"] = item["blocks"][:32]
        item["hash"] = item_hash(item["blocks"])
    items = parse_rank_manifest(json.dumps(document).encode())
    assert sum(math.prod(i.shape) for i in items if i.name == "tok_embeddings.weight") == 300 * 16
    forge(step, rank=lambda d: d.update(document))
    with pytest.raises(DamagedStepError, match="once and whole"), open_source(step) as source:
        read_whole(source, "tok_embeddings.weight")


@given(st.binary(max_size=400))
def test_bytes_that_are_no_rank_manifest_are_refused(body: bytes) -> None:
    with pytest.raises(DocumentError):
        parse_rank_manifest(body)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[list[Box], Box]:
    """A box cut into boxes, again and again, along any dimension."""
    whole: Box = tuple((0, n) for n in draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    boxes = [whole]
    for _ in range(draw(st.integers(0, 6))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(whole) - 1))
        start, stop = box[dim]
        at = draw(st.integers(start, stop))
        boxes += [(*box[:dim], (start, at), *box[dim + 1 :]), (*box[:dim], (at, stop), *box[dim + 1 :])]
    return boxes, whole


@given(cuts(), st.randoms(use_true_random=False))
@settings(max_examples=200)
def test_boxes_tile_a_whole_just_where_each_element_is_in_one(cut: tuple[list[Box], Box], rng: Any) -> None:
    boxes, whole = cut
    shape = [n for _, n in whole]
    assert tiles_exactly(shape, boxes)
    filled = [b for b in boxes if all(a < z for a, z in b)]
    victim = rng.choice(filled)
    without = list(boxes)
    without.remove(victim)
    assert not tiles_exactly(shape, without)
    assert not tiles_exactly(shape, [*boxes, victim])
    moved = tuple((a + 1, z + 1) for a, z in victim)
    assert not tiles_exactly(shape, [*without, moved])


def test_another_format_is_named_and_left_alone(tmp_path: Path) -> None:
    sound_step(tmp_path)
    forge(sound_step(tmp_path, 9), root=assign(format=FORMAT + 1, step=9, later={"a": 1}, versions={"regrow": "7.1"}))
    with pytest.raises(OtherFormatError, match=f"format {FORMAT + 1}, made by version 7.1"):
        Catalog(tmp_path).entries(LINE)
    place = LocalStorage(tmp_path)
    assert {r.step: r.state for r in care.list_steps(place)} == {8: "complete", 9: "other version"}
    assert any("version 7.1" in p for r in care.verify(place) for p in r["problems"])
    assert any("step 9 is of another version" in line for line in care.repair(place))
    assert (tmp_path / "step-9").is_dir()
    assert not (tmp_path / "set-aside").exists()


def test_later_fields_of_a_format_do_not_break_a_reader(tmp_path: Path) -> None:
    step = sound_step(tmp_path)
    forge(step, root=assign(later=1), rank=lambda d: (d.update(later=2), first(d).update(later=3)))
    assert Catalog(tmp_path).open(8).manifest.step == 8
    with open_source(step) as source:
        assert read_whole(source, "tok_embeddings.weight").shape == (300, 16)


@pytest.mark.parametrize("where", ["head", "tail", "gap", "end"])
def test_damage_around_the_data_is_found(tmp_path: Path, where: str) -> None:
    """Our own reader needs no heads and tails; stock readers do."""
    step = sound_step(tmp_path)
    items = json.loads((step / "rank-0.json").read_text())["items"]
    items.sort(key=lambda i: i["start"])
    one, other = items[0], items[1]
    size = (step / "__0_0.distcp").stat().st_size
    at = {
        "head": one["start"] + 10,
        "tail": one["data"] + one["data_bytes"] + 20,
        "gap": other["start"] - 1,
        "end": size - 1,
    }[where]
    assert one["start"] + one["size"] < other["start"]
    assert items[-1]["start"] + items[-1]["size"] < size
    assert care.verify(LocalStorage(step))[0]["problems"] == []
    data = bytearray((step / "__0_0.distcp").read_bytes())
    data[at] ^= 16
    (step / "__0_0.distcp").write_bytes(data)
    (problem,) = care.verify(LocalStorage(step))[0]["problems"]
    assert "__0_0.distcp" in problem


@pytest.mark.parametrize(
    "name", ["step-021", "step-٧٧", "step--1", "step-1e3", "step-" + "9" * 30, "step-7 ", "step-"]
)
def test_names_that_only_look_like_steps_are_none(tmp_path: Path, name: str) -> None:
    sound_step(tmp_path)
    (tmp_path / name).mkdir()
    assert Catalog(tmp_path).candidates() == [8]
    assert Catalog(tmp_path).clean_up(LINE) == []
    assert (tmp_path / name).is_dir()


def test_what_cannot_be_looked_at_is_damage_and_gets_out_of_the_way(tmp_path: Path) -> None:
    sound_step(tmp_path)
    (tmp_path / "step-9").write_text("a file")
    (tmp_path / "step-10").symlink_to("step-10")
    (tmp_path / "step-11").mkdir()
    (tmp_path / "step-11" / MANIFEST).symlink_to(MANIFEST)
    (tmp_path / "step-12" / MANIFEST).mkdir(parents=True)
    complete, damaged = Catalog(tmp_path).scan()
    assert [e.step for e in complete] == [8]
    assert sorted(damaged) == [9, 10, 11, 12]
    assert len(Catalog(tmp_path).clean_up(LINE)) == 4
    assert Catalog(tmp_path).candidates() == [8]


def test_a_step_of_ours_without_a_manifest_is_nobody_elses(tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder = run / "checkpoint"
    folder.mkdir(parents=True)
    sound_step(folder)
    newer = sound_step(folder, 9)
    (newer / MANIFEST).unlink()
    assert resolve_foreign(run).url == str(folder / "step-8")
    with pytest.raises(CheckpointError, match="incomplete"):
        resolve_foreign(newer)
    with pytest.raises(CheckpointError, match="incomplete"):
        resolve_foreign(newer.rename(tmp_path / "moved"))


def test_a_foreign_step_is_taken_where_it_is_named_exactly_and_not_beside_ours(tmp_path: Path) -> None:
    theirs = tmp_path / "outputs/checkpoint/step-10"
    theirs.mkdir(parents=True)
    (theirs / ".metadata").write_bytes(b"theirs")
    assert resolve_foreign(theirs).url == str(theirs)
    with pytest.raises(CheckpointError, match="must name a step exactly.*step-10"):
        resolve_foreign(tmp_path / "outputs")
    sound_step(theirs.parent)
    with pytest.raises(CheckpointError, match="incomplete"):
        resolve_foreign(theirs)
