"""The page's content: the numbers of `regrow.read_metrics`, and nothing that a name could smuggle in."""

import base64
import html
import json
import re
import zlib
from pathlib import Path
from typing import Any

import pytest

import regrow
from regrow.errors import ConfigError
from regrow.trainer.report.page import LIMIT_BYTES
from regrow.trainer.report.write import find_runs, state_of_files, write_report
from tests.report.made_runs import make_run, make_sweep

HOSTILE = "</script><script>document.title='owned'</script>\"'><img src=x onerror=alert(1)>{0}&lt;"


def data_of(page: str) -> dict[str, Any]:
    """What a page holds, unpacked as its script does it."""
    found = re.search(r'<script type="application/octet-stream" id="data">([\w+/=]*)</script>', page)
    assert found is not None
    data: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(found[1])))
    return data


def steps_of(differences: list[int]) -> list[int]:
    return [sum(differences[: n + 1]) for n in range(len(differences))]


def test_the_numbers_are_those_of_read_metrics(tmp_path: Path) -> None:
    make_sweep(tmp_path / "s", runs=3, steps=900)
    write_report(find_runs([tmp_path / "s"]), tmp_path / "page.html", "s")
    data = data_of((tmp_path / "page.html").read_text())
    table = regrow.read_metrics(tmp_path / "s").to_pylist()
    assert [run["name"] for run in data["runs"]] == sorted({row["run"] for row in table})
    for run in data["runs"]:
        rows = {row["step"]: row for row in table if row["run"] == run["name"]}
        names = {name for row in rows.values() for name, v in row.items() if v is not None} - {
            "run",
            "step",
            "tokens",
        }
        assert set(run["curves"]) == names
        for name, (differences, values) in run["curves"].items():
            known = {step: row[name] for step, row in rows.items() if row[name] is not None}
            steps = steps_of(differences)
            assert steps == sorted(set(steps))
            assert values == pytest.approx([known[step] for step in steps], rel=5e-6)
            assert min(values) == pytest.approx(min(known.values()), rel=5e-6)
            assert max(values) == pytest.approx(max(known.values()), rel=5e-6)
            # Of tables and of "the best run" every digit counts.
            assert run["last"][name] == known[max(known)]
        axis = steps_of(run["axis"]["step"])
        assert run["axis"]["tokens"] == [rows[step]["tokens"] for step in axis]
        took = sum(row["step_time_s"] for row in rows.values())
        assert run["axis"]["time"][-1] == pytest.approx(took, rel=5e-6)


def test_swept_fields_and_life_lines_are_on_it(tmp_path: Path) -> None:
    make_sweep(tmp_path / "s", runs=12, steps=3)
    write_report(find_runs([tmp_path / "s"]), tmp_path / "page.html", "s")
    data = data_of((tmp_path / "page.html").read_text())
    assert data["fields"] == ["optimizer.lr", "seed"]
    assert {run["fields"]["seed"] for run in data["runs"]} == {1, 2}
    first = data["runs"][0]
    assert (first["status"], first["life"]["starts"][0]["layout"]) == ("finished", "dp_shard 2")
    assert first["flops"] > 0


def test_a_page_of_many_rows_stays_small(tmp_path: Path) -> None:
    make_sweep(tmp_path / "s", runs=4, steps=2000)
    size = write_report(find_runs([tmp_path / "s"]), tmp_path / "page.html", "s")
    text = (tmp_path / "page.html").read_text()
    assert size == len(text.encode()) <= LIMIT_BYTES
    assert data_of(text)["points"] == 0


def test_names_hold_no_markup(tmp_path: Path) -> None:
    run = tmp_path / "r"
    make_run(
        run,
        [{"step": 1, "loss": 1.0, HOSTILE: 2.0}],
        overrides=[f"data.name={HOSTILE}"],
        record={
            "format": 1,
            "run_id": "a",
            "lineages": [{"id": "0"}],
            "attempts": [{"host": HOSTILE, "error": HOSTILE}],
        },
    )
    write_report([(run, HOSTILE)], tmp_path / "page.html", HOSTILE)
    page = (tmp_path / "page.html").read_text()
    assert "owned" not in page.replace(html.escape(HOSTILE), "")
    assert page.count("<script") == page.count("</script") == 2
    run_data = data_of(page)["runs"][0]
    assert (run_data["name"], run_data["life"]["starts"][0]["host"]) == (HOSTILE, HOSTILE)
    assert run_data["last"][HOSTILE] == 2.0
    assert "default-src 'none'" in page


@pytest.mark.parametrize(
    "name", ["run.json", "config.yaml", "metrics.jsonl", ".hydra/overrides.yaml", "evaluations.jsonl"]
)
def test_what_cannot_be_read_is_left_out(tmp_path: Path, name: str) -> None:
    make_sweep(tmp_path / "s", runs=1, steps=5)
    (run,) = (tmp_path / "s").iterdir()
    (run / name).write_bytes(b"\x00\xff{[: nonsense\n")
    write_report([(run, "r")], tmp_path / "page.html", "r")
    (found,) = data_of((tmp_path / "page.html").read_text())["runs"]
    assert found["status"] == ("damaged" if name == "run.json" else "finished")
    assert ("loss" in found["curves"]) == (name != "metrics.jsonl")


def test_runs_are_found_once_each(tmp_path: Path) -> None:
    make_sweep(tmp_path / "s", runs=2, steps=2)
    first, second = sorted((tmp_path / "s").iterdir())
    assert find_runs([tmp_path / "s", first]) == [(first, f"s/{first.name}"), (second, f"s/{second.name}")]
    assert find_runs([second, first]) == [(second, second.name), (first, first.name)]
    assert find_runs([tmp_path / "s"]) == [(first, first.name), (second, second.name)]
    with pytest.raises(ConfigError, match="must be a run or a folder with runs in it"):
        find_runs([tmp_path / "nowhere"])


def test_a_change_of_a_file_is_seen(tmp_path: Path) -> None:
    make_sweep(tmp_path / "s", runs=1, steps=2)
    runs = find_runs([tmp_path / "s"])
    before = state_of_files(runs)
    assert state_of_files(runs) == before
    with (runs[0][0] / "metrics.jsonl").open("a") as out:
        out.write('{"step": 3, "loss": 1.0}\n')
    assert state_of_files(runs) != before
