"""The page of a comparison: what it says follows the intervals, it holds all that it shows, and names do not become markup."""

import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from comparisons import Page, interval, report, row, several
from reflow.evaluation.comparison import page, page_curves, page_grid, page_style, page_table, verdicts
from reflow.evaluation.comparison.page_grid import Chosen, Grid
from reflow.evaluation.comparison.samples import Cell

HOSTILE = '</script><script>alert(1)</script>"\'><img src=x onerror=alert(2)>'
STRAIGHT = [{"model": "A", "windows": 2, "guidance": 1.0, "steps": 32, "path": interval(3.0), "window_deviation": [interval(0.5), interval(0.1)]}]


def column(name, found=None):
    return next(c for c in (found or several())["columns"] if c["name"] == name)


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """Pictures of the cells of `several`, of noise, which hardly shrinks."""
    folder, files, draw = tmp_path_factory.mktemp("pictures"), {}, np.random.default_rng(0)
    for n, r in enumerate(several()["rows"]):
        cell = Cell(r["model"], r["steps"], r["guidance"])
        files[cell] = tuple(folder / f"{n}-{i}.png" for i in range(2))
        for path in files[cell]:
            Image.fromarray(draw.integers(0, 255, (200, 160, 3), dtype=np.uint8)).save(path)
    return Chosen(("a cat", HOSTILE), (5, 7), files)


@pytest.fixture(scope="module")
def whole(chosen, tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    found = several(straightness=STRAIGHT, notes=["a note <b>"], limit=4, count=30_000, command="reflow evaluate --pipeline /home/me/secret/x")
    return page.write(found, chosen, out).read_text(encoding="utf-8")


def test_a_page_is_whole_and_keeps_to_itself(whole):
    read = Page(whole)
    assert read.faults == []
    assert len(read.all("img")) == 8 + 1 and len(read.all("svg")) > 3
    assert all(a["src"].startswith("data:image/webp;base64,") and a["loading"] == "lazy" for a in read.all("img") if "data-model" in a)
    heads = [re.sub(r"\W+$", "", h) for h in re.findall(r"<h2>(.*?)</h2>", whole)]
    assert heads == ["The protocol", "All models, steps and guidance", "Quality against steps", "Straightness", "The same prompts and seeds",
                     "What was not measured", "How it was measured"]  # fmt: skip
    assert "http" not in whole.replace("http-equiv", "")


def test_everything_that_changes_a_number_is_said(whole):
    text = Page(whole).text
    for said in ("Only the first 4 prompts: a first answer, not the numbers of the protocol coco30k", "captions.json: the first 30,000 images shuffled by seed 7",
                 "the caption of the lowest id", "arXiv 0000.00000", "shorter side to 256 pixels by bicubic, then the centre", "9 of val2014/, all of the folder",
                 "noise of seed 5 + i", "4 prompts x 2", "abc0", "def0", "1 x a card", "fp32", "1,234 network evaluations, 0.50 device hours",
                 "the whole protocol's 30,000 prompts would take about 3,750.0 device hours", "Vendi, DINOv2: needs --features dinov2=PATH; the protocol wants",
                 "a note <b>", "--pipeline .../x", "path .../0", "weights unet eeeeeeeeeeeeeeee", "intervals over seeds"):  # fmt: skip
        assert said in text, said
    assert "/home/me" not in whole and "secret" not in whole


def test_names_stay_names(chosen):
    found = report([row(HOSTILE, 4, reference=False, fid=interval(3.0)), row("ok", 4, reference=False, fid=interval(4.0))], notes=[HOSTILE])
    found["protocol"] |= {"about": HOSTILE, "source": HOSTILE, "name": HOSTILE, "title": HOSTILE}
    found["not_measured"] = {"clip_score": HOSTILE}
    found["command"] = f"reflow {HOSTILE}"
    found["models"][0] |= {HOSTILE: HOSTILE}
    found["columns"] = [{**c, "title": HOSTILE} for c in found["columns"]]
    pictures = page_grid.grid(Chosen(chosen.prompts, chosen.seeds, {Cell(HOSTILE, 4, 1.0): next(iter(chosen.files.values()))}))
    read = Page(page.render(found, pictures))
    assert read.faults == [] and len(read.all("script")) == 1 and len(read.all("img")) == 3
    assert read.text.count("alert(1)") > 8


@pytest.mark.parametrize("found", [
    report([row("A", 4, reference=False)]),
    report([row("A", 1, reference=False, seconds=False, vendi=interval(3.0, None))]),
    report([row("teacher", 32, reference=None, clip_score=interval(1.0))]),
    report([row("teacher", 32, reference=None), row("A", 4, paired_pixels=interval(0.0, 0.0))]),
    report([row(f"model {i}", s, g, reference=False, fid=interval(i + s)) for i in range(9) for s in (1, 2) for g in (1.0, 7.5)]),
], ids=["nothing measured", "no interval, no seconds", "a reference alone", "an error of nothing", "nine models at two guidances"])  # fmt: skip
def test_other_shapes(found):
    read = Page(page.render(found, Grid(())))
    assert read.faults == [] and not read.all("dialog") and "nan" not in read.text
    assert len(read.all("tr")) == len(found["rows"]) + 1


def test_the_best_is_marked_where_intervals_are_apart():
    found = several()
    named = {c["name"]: [(r["model"], r["steps"]) for r in verdicts.best(found["rows"], c)] for c in found["columns"]}
    assert named == {"paired_pixels": [("A", 4)], "fid": [], "clip_score": [], "vendi": []}
    html = page_table.whole(found, found["columns"])
    assert re.findall(r"class=best>([\d.]+)", html) == ["0.5000"] and html.count("class=reference") == 1
    alone = report([row("A", 4, reference=False, fid=interval(1.0))])
    assert verdicts.best(alone["rows"], column("fid")) == []
    bare = report([row("A", 4, reference=False, vendi=interval(9.0, None)), row("B", 4, reference=False, vendi=interval(1.0))])
    assert verdicts.best(bare["rows"], column("vendi")) == []
    third = report([row(m, 4, reference=False, fid=interval(v, h)) for m, v, h in (("A", 1.0, 0.1), ("B", 2.0, 0.1), ("C", 3.0, 2.5))])
    assert verdicts.best(third["rows"], column("fid")) == []  # the third's interval holds the first


def test_errors_to_other_references_are_not_ranked_together():
    rows = [row(m, 4, g, paired_pixels=interval(v, 0.01), fid=interval(v)) for m, g, v in (("A", 1.0, 0.5), ("B", 1.0, 0.6), ("A", 4.0, 0.2), ("B", 4.0, 0.1))]
    assert [(r["model"], r["guidance"]) for r in verdicts.best(rows, column("paired_pixels"))] == [("A", 1.0), ("B", 4.0)]
    assert len(verdicts.groups(rows, "fid")) == 1 and len(verdicts.groups(rows, "paired_pixels")) == 2


def test_the_outcome_follows_the_intervals():
    found = several()
    assert verdicts.main_column(found)["name"] == "fid"  # what the protocol wants first
    assert verdicts.summary(found) == (
        "By FID (lower is better) no best of 3 can be told: the interval of A at 4 steps, guidance 1 (12.00 ± 0.10) touches that of B at 4 steps,"
        " guidance 1 (12.10 ± 0.10)."
    )
    assert verdicts.at_equal_steps(found) == ["4 steps, guidance 1: intervals of A and B touch."]
    found["rows"][3]["measures"]["fid"] = interval(11.0)
    assert verdicts.summary(found).startswith("By FID (lower is better) B at 4 steps, guidance 1 is the best of 3 (11.00 ± 0.10), its interval apart from that of the next, A at 4")
    assert verdicts.at_equal_steps(found) == ["4 steps, guidance 1: B is ahead of A."]
    for r in found["rows"]:
        r["measures"] = {k: {**v, "low": None, "high": None} for k, v in r["measures"].items() if k == "clip_score"}
    assert "without intervals that says no more" in verdicts.summary(found)
    assert "with no other to rank it against" in verdicts.summary(report([row("A", 1, reference=False, fid=interval(1.0))]))
    assert verdicts.summary(report([row("A", 1, reference=False)])).startswith("Nothing was measured")


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.0123, 0.0457), (21.0, 21.9), (3.0, 3.0), (0.0, 0.0), (-2.0, 400.0), (1e-6, 3e-6), (29_000.0, 31_000.0)])
def test_ticks_are_round_and_hold_the_data(low, high):
    found = page_curves.ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 8
    assert len({page_curves.written(t, found) for t in found}) == len(found)
    steps = np.diff(found)
    assert np.allclose(steps, steps[0], rtol=1e-6)


def test_a_point_stands_where_its_value_is():
    """Two steps, two values: the first point is the lower of a falling line, and its bar reaches from low to high."""
    found = report([row("A", 2, reference=False, fid=interval(10.0, 1.0)), row("A", 4, reference=False, fid=interval(5.0, 1.0))])
    svg = page_curves.curves(found, [column("fid")])
    points = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)][1:]  # the first is the legend's
    (x1, y1), (x2, y2) = points
    assert x1 < x2 and y1 < y2
    bars = [(float(top), float(end)) for top, end in re.findall(r'<path d="M[\d.]+ ([\d.]+)V([\d.]+)M', svg)]
    scale = (y2 - y1) / 5.0
    assert bars[0] == pytest.approx((y1 - scale, y1 + scale), abs=0.2)
    assert page_curves.curves(report([row("teacher", 32, reference=None, fid=interval(1.0))]), [column("fid")]) == ""


def test_pictures_are_made_smaller_until_they_fit(chosen):
    large, small = page_grid.grid(chosen), page_grid.grid(chosen, budget=20_000)
    assert {(p.width, p.height) for r in large.rows for p in r} == {(160, 200)} and large.full == (160, 200)
    sizes = {(p.width, p.height) for r in small.rows for p in r}
    assert len(sizes) == 1 and max(sizes.pop()) < 200
    assert sum(len(p.src) for r in small.rows for p in r) < 20_000 * 4 / 3 + 500
    assert "made smaller from 160 x 200" in page_grid.note(small) and "made smaller" not in page_grid.note(large)


def test_pictures_are_read_back_from_a_page(whole, chosen, tmp_path):
    (tmp_path / "index.html").write_text(whole, encoding="utf-8")
    assert page_grid.read_back(tmp_path / "index.html").rows == page_grid.grid(chosen).rows
    assert page_grid.read_back(tmp_path / "none.html").rows == ()
    (tmp_path / "other.html").write_text('<img data-model="a" data-steps="1" data-guidance="1" data-prompt="" data-seed="0" width="1" height="1" src="http://x/y">')
    assert page_grid.read_back(tmp_path / "other.html").rows == ()


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return sum(w * (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4) for w, p in zip((0.2126, 0.7152, 0.0722), parts))


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_and_lines_stand_out():
    colours = dict(re.findall(r"--(\w+): (#\w{6})", page_style.STYLE)) | {"ink": "#1c2430", "blue": "#1f6fb4", "warn": "#b4441f"}
    for name, ground in itertools.product(("ink", "muted", "blue", "warn", "good"), ("#ffffff", "#f3f5f8")):
        assert contrast(colours[name], ground) >= 4.5, name
    assert all(contrast(colour, "#ffffff") >= 4.5 for colour in page_curves.COLOURS)


DOM = """
const vm = require("vm"), data = JSON.parse(require("fs").readFileSync(0));
class Node {
  constructor(text, v) { this.text = text; this.dataset = {v}; this.attributes = {}; this.childNodes = [text]; this.listeners = {}; }
  append(...nodes) { this.last = nodes[nodes.length - 1]; }
  setAttribute(k, v) { this.attributes[k] = v; }
  getAttribute(k) { return this.attributes[k]; }
  addEventListener(k, f) { this.listeners[k] = f; }
}
const heads = data.first.map(first => { const n = new Node("h"); n.dataset = {first}; n.attributes["aria-sort"] = "none"; return n; });
const rows = data.rows.map((row, i) => ({cells: row.map(v => new Node("c", v)), name: i}));
let order = rows.map(r => r.name);
const table = {tHead: {rows: [{cells: heads}]}, tBodies: [{rows, append: (...r) => { order = r.map(x => x.name); }}]};
const document = {querySelectorAll: s => s === "table.all" ? [table] : [], querySelector: () => null, createElement: () => new Node("button")};
vm.runInNewContext(data.script, {document, isNaN});
console.log(JSON.stringify(data.clicks.map(i => { heads[i].last.listeners.click(); return [order, heads.map(h => h.attributes["aria-sort"])]; })));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_heads_sort_numbers_names_and_what_is_missing():
    rows = [["b", "10"], ["a", "9"], ["c", ""], ["B", "100"]]
    given = {"script": page_style.SCRIPT, "first": ["ascending", "descending"], "rows": rows, "clicks": [1, 1, 1, 0]}
    done = subprocess.run(["node", "-e", DOM], input=json.dumps(given), capture_output=True, text=True, timeout=30, check=True)
    down, up, as_it_was, names = json.loads(done.stdout)
    assert down == [[3, 0, 1, 2], ["none", "descending"]] and up == [[1, 0, 3, 2], ["none", "ascending"]]
    assert as_it_was == [[0, 1, 2, 3], ["none", "none"]] and names[0][0] == 1 and names[0][-1] == 2 and names[1] == ["ascending", "none"]


BROWSER = """
import os, sys
os.environ |= {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_DISABLE_SANDBOX": "1", "QTWEBENGINE_CHROMIUM_FLAGS": "--no-sandbox --disable-gpu"}
from PyQt6.QtCore import QTimer, QUrl
from PyQt6.QtWebEngineWidgets import QWebEngineView
from PyQt6.QtWidgets import QApplication
app, code = QApplication(["page"]), sys.stdin.read()
view = QWebEngineView()
view.resize(390, 800)
view.show()
view.loadFinished.connect(lambda ok: view.page().runJavaScript(code, lambda found: (print(found, flush=True), app.quit())))
view.load(QUrl.fromLocalFile(sys.argv[1]))
QTimer.singleShot(60000, app.quit)
app.exec()
os._exit(0)
"""
USED = """(() => {
  const found = {fits: document.documentElement.scrollWidth <= innerWidth}, table = document.querySelector("table.all"), heads = table.tHead.rows[0].cells;
  heads[4].querySelector("button").click();
  found.sorted = [...table.tBodies[0].rows].map(row => row.cells[4].dataset.v);
  found.marked = [...heads].filter(head => head.getAttribute("aria-sort") !== "none").length;
  const dialog = document.querySelector("dialog"), shots = document.querySelectorAll("table.grid button"), said = [];
  const tell = () => said.push(dialog.querySelector(".who").textContent + "/" + dialog.querySelector(".asked").textContent.slice(0, 5));
  const press = key => { dialog.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true})); tell(); };
  shots[2].focus(), shots[2].click(), tell(), press("ArrowRight"), press("ArrowDown"), press("ArrowLeft"), press("ArrowLeft"), press("ArrowLeft");
  found.said = said, found.open = dialog.open;
  dialog.close();
  found.back = document.activeElement === shots[2];
  return JSON.stringify(found);
})()"""


@pytest.mark.skipif(importlib.util.find_spec("PyQt6") is None, reason="needs PyQt6-WebEngine, a browser without a screen")
def test_a_browser_sorts_enlarges_and_fits_a_phone(whole, tmp_path):
    (tmp_path / "index.html").write_text(whole, encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", BROWSER, str(tmp_path / "index.html")], input=USED, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip(), done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["fits"] and found["open"] and found["back"] and found["marked"] == 1
    assert found["sorted"] == ["0.5", "0.6", "0.7", ""]  # the reference has none
    first, second, last = "A, 4 steps, guidance 1", "A, 2 steps, guidance 1", "B, 4 steps, guidance 1"
    asked = [line.partition("/")[2] for line in found["said"]]
    assert [line.partition("/")[0] for line in found["said"]] == [first, second, second, first, "teacher, 32 steps, guidance 1", last]
    assert asked[:2] == ["a cat"] * 2 and asked[2:] == [HOSTILE[:5]] * 4


def test_a_table_too_wide_for_paper_is_printed_in_parts():
    many = [{**column("fid"), "name": f"m{i}", "title": f"measure {i}"} for i in range(12)]
    found = report([row("A", 4, reference=False, **{c["name"]: interval(float(i)) for i, c in enumerate(many)}), row("B", 4, reference=False)])
    read = Page(page_table.whole(found, many))
    assert read.faults == [] and len(read.all("div", "screen")) == 1 and len(read.all("div", "paper")) == 2
    for title in ("measure 0", "measure 11", "VAE, seconds"):
        assert read.text.count(title + (" ↓" if "measure" in title else "")) == 2  # on the screen, and on paper once
    assert not Page(page_table.whole(found, many[:5])).all("div", "paper")


def test_the_first_image_of_each_of_the_first_prompts_is_chosen(tmp_path):
    from reflow.evaluation.comparison.drawing import Drawing

    cells = [Cell("A", 2, 1.0), Cell("A", 4, 1.0)]
    drawing = Drawing(tmp_path, (), tuple(f"prompt {i}" for i in range(20)), 3, 100, "fp32", 2, {})
    found = page.chosen_pictures(cells, drawing)
    assert found.prompts == tuple(f"prompt {i}" for i in range(8)) and found.seeds == tuple(range(100, 124, 3))
    assert list(found.files) == cells and found.files[cells[1]][2] == drawing.samples(cells[1]).image(6)
