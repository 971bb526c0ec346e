"""Pages in a real Chromium: they draw themselves, say nothing on the console, ask for nothing, and do what is clicked."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from regrow.trainer.report.page import LIMIT_BYTES
from regrow.trainer.report.write import find_runs, write_report
from tests.report.chromium import Browser, Tab, open_browser
from tests.report.made_runs import make_run, make_sweep

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    make_sweep(folder / "s", runs=12, steps=250)
    write_report(find_runs([folder / "s"]), folder / "page.html", "s")
    return folder / "page.html"


@pytest.fixture
def tab(browser: Browser, page: Path) -> Iterator[Tab]:
    tab = browser.open(page)
    yield tab
    tab.close()


def picture(tab: Tab) -> str:
    """What the curves look like."""
    drawn = tab.evaluate("document.querySelector('#curves canvas').toDataURL()")
    assert isinstance(drawn, str)
    return drawn


def colours_drawn(tab: Tab) -> int:
    """Pixels of the curves that are not empty."""
    found = tab.evaluate(
        "(() => { const c = document.querySelector('#curves canvas'); const d = c.getContext('2d')"
        ".getImageData(0, 0, c.width, c.height).data; let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0;"
        " return n; })()"
    )
    assert isinstance(found, int)
    return found


def test_everything_is_drawn_and_nothing_is_asked_for(tab: Tab) -> None:
    assert tab.texts("h1") == ["s"]
    assert tab.texts("h2") == ["Curves", "Runs", "Fields and last val_loss", "Throughput", "Life lines"]
    assert len(tab.texts("#runs tbody tr")) == 12
    assert colours_drawn(tab) > 5000
    assert tab.evaluate("document.querySelectorAll('[data-chart=parallel] polyline').length") == 12
    assert tab.evaluate("document.querySelectorAll('[data-effect] circle').length") == 12
    assert tab.evaluate("document.querySelectorAll('.bars .fill').length") == 12
    assert tab.evaluate("document.querySelectorAll('.life-row .start').length") == 12
    assert tab.complaints() == []


def test_the_best_run_is_marked(tab: Tab, page: Path) -> None:
    found = tab.evaluate(
        "(() => { const r = [...page.data.runs].sort((a, b) => a.last.get('val_loss') - b.last.get('val_loss'))[0];"
        " return r.name; })()"
    )
    assert tab.evaluate("document.querySelector('tr.best').dataset.run") == found
    assert tab.evaluate("document.querySelectorAll('tr.best').length") == 1


@pytest.mark.parametrize(
    "selector",
    ["[data-choice=axis] [data-value=tokens]", "[data-choice=axis] [data-value=time]",
     "[data-choice=axis] [data-value=flops]", "[data-toggle=x]", "[data-toggle=y]"],
)  # fmt: skip
def test_switches_change_the_curves(tab: Tab, selector: str) -> None:
    before = picture(tab)
    tab.click(selector)
    assert picture(tab) != before
    assert tab.evaluate(f"document.querySelector({json.dumps(selector)}).getAttribute('aria-pressed')") == "true"
    assert tab.complaints() == []


def test_measures_smoothing_and_colours(tab: Tab) -> None:
    seen = [picture(tab)]
    for change in (
        "{ const s = document.querySelector('[data-select=measure]'); s.value = 'tokens_per_s'; s.dispatchEvent(new Event('change')); }",
        "{ const r = document.querySelector('[data-range=smoothing]'); r.value = 80; r.dispatchEvent(new Event('input')); }",
        "{ const s = document.querySelector('[data-select=\"colour by\"]'); s.value = 'seed'; s.dispatchEvent(new Event('change')); }",
    ):
        tab.evaluate(change)
        seen.append(picture(tab))
    assert len(set(seen)) == 4
    assert "tokens_per_s" in tab.texts("#runs th")
    assert "Fields and last tokens_per_s" in tab.texts("h2")
    assert tab.complaints() == []


def test_tables_are_sorted_both_ways(tab: Tab) -> None:
    def column(key: str) -> list[float]:
        number = tab.evaluate(
            f"[...document.querySelectorAll('#runs th')].findIndex((h) => h.dataset.key === {json.dumps(key)})"
        )
        return [float(t) for t in tab.texts(f"#runs tbody td:nth-child({number + 1})")]

    for key in ("field:optimizer.lr", "last:loss", "last:val_loss"):
        assert tab.evaluate(f"document.querySelector('th[data-key=\"{key}\"]') !== null")
        tab.click(f"th[data-key='{key}'] button")
        if tab.evaluate(f"document.querySelector('th[data-key=\"{key}\"]').ariaSort") == "descending":
            tab.click(f"th[data-key='{key}'] button")
        rising = column(key)
        assert rising == sorted(rising)
        assert len(set(rising)) > 3
        tab.click(f"th[data-key='{key}'] button")
        assert column(key) == sorted(rising, reverse=True)


def test_a_value_is_read_under_the_mouse(tab: Tab) -> None:
    box = tab.evaluate(
        "(() => { const b = document.querySelector('.plot').getBoundingClientRect(); return [b.x, b.y, b.width, b.height]; })()"
    )
    tab.move(box[0] + box[2] / 2, box[1] + box[3] / 2)
    tab.wait_for("getComputedStyle(document.querySelector('.tip')).display === 'block'")
    (title, *_), values = tab.texts(".tip > div"), tab.texts(".tip .value")
    assert title.startswith("loss at step 1")
    assert len(values) == 8
    assert all(2.0 < float(v) < 9.0 for v in values)
    assert len(tab.texts(".tip .near")) == 1


def test_a_curve_is_hidden_and_the_address_remembers_it(tab: Tab, browser: Browser, page: Path) -> None:
    before = colours_drawn(tab)
    tab.click("#runs tbody .dot")
    tab.click("[data-toggle=y]")
    assert colours_drawn(tab) != before
    again = browser.open(page, hash_=tab.evaluate("location.hash"))
    assert len(again.texts("tr.hidden-run")) == 1
    assert again.evaluate("document.querySelector('[data-toggle=y]').getAttribute('aria-pressed')") == "true"


def test_light_and_dark(browser: Browser, page: Path) -> None:
    def background(tab: Tab) -> int:
        colour = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in colour.removeprefix("rgb(").rstrip(")").split(","))

    dark, light = browser.open(page, dark=True), browser.open(page)
    assert background(dark) < 150 < 600 < background(light)
    dark.click("[data-choice=theme] [data-value=light]")
    light.click("[data-choice=theme] [data-value=dark]")
    assert background(light) < 150 < 600 < background(dark)


def test_a_run_is_opened(tab: Tab) -> None:
    assert tab.texts(".detail") == []
    tab.click(".life-row")
    assert len(tab.texts(".detail tbody tr")) == 1
    assert "dp_shard 2 (2 ranks), start 1" in tab.texts(".detail")[0]
    assert tab.texts(".ranks div") == ["0: dp_shard 0", "1: dp_shard 1"]
    assert tab.complaints() == []


def test_names_of_files_run_nothing(browser: Browser, tmp_path: Path) -> None:
    bad = "</script><script>globalThis.owned = 1</script><img src=x onerror='globalThis.owned = 1'>"
    record = {
        "format": 1, "run_id": "a", "lineages": [{"id": "0"}],
        "attempts": [{"host": bad, "job": bad, "error": bad, "end": "failed", "to_step": 2, "layout": {bad: 2}}],
    }  # fmt: skip
    for name in ("a", "b"):
        rows = [{"step": s, "loss": 1.0 / s, bad: 2.0, "__proto__": 3.0, "constructor": 4.0} for s in (1, 2)]
        make_run(tmp_path / "s" / name, rows, overrides=[f"data.name={name}{bad}", f"{bad}={name}"], record=record)
    runs = [(folder, bad + name) for folder, name in find_runs([tmp_path / "s"])]
    write_report(runs, tmp_path / "page.html", bad)
    tab = browser.open(tmp_path / "page.html")
    for measure in tab.texts("[data-select=measure] option"):
        tab.evaluate(
            f"{{ const s = document.querySelector('[data-select=measure]'); s.value = {json.dumps(measure)}; s.dispatchEvent(new Event('change')); }}"
        )
    tab.evaluate("document.querySelectorAll('.life-row').forEach((row) => row.click())")
    assert tab.evaluate("globalThis.owned") is None
    assert tab.texts("h1") == [bad]
    assert tab.evaluate("document.querySelectorAll('img').length") == 0
    assert {"__proto__", "constructor", bad} <= set(tab.texts("[data-select=measure] option"))
    assert tab.complaints() == []


def test_a_run_without_rows_has_a_page(browser: Browser, tmp_path: Path) -> None:
    make_run(tmp_path / "r", [])
    write_report([(tmp_path / "r", "r")], tmp_path / "page.html", "r")
    tab = browser.open(tmp_path / "page.html")
    assert len(tab.texts("#runs tbody tr")) == 1
    assert tab.complaints() == []


def test_fifty_runs_of_ten_thousand_steps(browser: Browser, tmp_path: Path) -> None:
    make_sweep(tmp_path / "s", runs=50, steps=10_000)
    size = write_report(find_runs([tmp_path / "s"]), tmp_path / "page.html", "s")
    assert size < LIMIT_BYTES
    # Cores that other tests use too say nothing of the page.
    tries = 0
    while (tab := browser.open(tmp_path / "page.html")).shown_s >= 3.0:
        tries += 1
        assert tries < 4, tab.shown_s
        tab.close()
    assert tab.evaluate("page.data.runs.length") == 50
    assert tab.evaluate("page.data.points") > 200
    assert "points are drawn at most" in tab.texts("#curves")[0]
    assert colours_drawn(tab) > 20_000
    tab.screenshot(tmp_path / "page.png")
    width, height = struct.unpack(">II", (tmp_path / "page.png").read_bytes()[16:24])
    assert (width, height) == (1280, 900)
    assert tab.complaints() == []
