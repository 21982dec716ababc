"""`reflow compare`: what differs is said key by key, and numbers that may not be compared never share a column unmarked."""

import copy
import json

import numpy as np
import pytest
from PIL import Image

from comparisons import Page, interval, report, row, several
from reflow.errors import UserError
from reflow.evaluation.comparison import page as comparison_page
from reflow.evaluation.comparison import page_grid
from reflow.evaluation.comparison.page_grid import Chosen
from reflow.evaluation.comparison.samples import Cell
from reflow.evaluation.sides import opened, page, rows, terms, text
from reflow.recipes import reading

DIGITS = {
    "format": 1, "command": "reflow evaluate", "recipe": "digits", "training_seed": 0, "real_scans": 100, "sampling_seeds": [1, 2],
    "settings": {"samples": 100, "seeds": 2, "teacher_steps": 32, "unequal": False, "guidance": None},
    "classifier": {"features": 64, "held_out_accuracy": 0.98}, "timing": {"batch": 64, "device": "cpu", "threads": 1},
    "machine": {"processor": "a processor", "cores": 2, "memory_gib": 8.0, "system": "Linux"}, "versions": {"torch": "2"},
    "methods": [
        {"method": "teacher", "steps": 32, "frechet": interval(1.0), "diversity": interval(1.0), "prompt_accuracy": interval(0.9), "milliseconds_per_image": 20.0},
        {"method": "student, 2 windows", "steps": 2, "frechet": interval(2.0), "diversity": interval(1.0), "prompt_accuracy": None,
         "paired_images": interval(0.1, 0.01), "milliseconds_per_image": 2.0},
    ],
}  # fmt: skip


def written(folder, found, name="report.json"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(found), encoding="utf-8")
    return folder


def trained(folder, *overrides, log=()):
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(reading.dump(reading.load("digits-quick", overrides)), encoding="utf-8")
    if log:
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")
    return folder


def sides_of(tmp_path, *reports):
    return opened.open_sides([str(written(tmp_path / f"side{i}", found)) for i, found in enumerate(reports)])


def marks(sides):
    found = terms.entries(sides)
    return {column["name"]: terms.marked(found, column).marks for column in (*terms.all_columns(found), terms.TIME)}


FEATURES = {name: {"implementation": name, "digest": f"{name}-1"} for name in ("inception", "clip", "dinov2")}
SAME = ("", "")
APART = ("a", "b")


@pytest.mark.parametrize("change, apart, said", [
    ({}, (), ""),
    ({"digest": "other"}, ("paired_pixels", "fid", "clip_score"), "protocol (a: coco30k abc0; b: coco30k other)"),
    ({"prompts": "other"}, ("paired_pixels", "fid", "clip_score"), "prompts (a: 4 of digest def0; b: 4 of digest other)"),
    ({"dtype": "fp16"}, ("paired_pixels", "fid", "clip_score", "seconds"), "dtype (a: fp32; b: fp16)"),
    ({"features": {**FEATURES, "inception": {"implementation": "i", "digest": "inception-2"}}}, ("fid",), "features of inception (a: inception-1; b: inception-2)"),
    ({"features": {**FEATURES, "dinov2": {"implementation": "d", "digest": "dinov2-2"}}}, (), ""),
], ids=["the same", "protocol", "prompts", "dtype", "a network", "a network of no column"])  # fmt: skip
def test_what_may_not_be_compared_is_marked(tmp_path, change, apart, said):
    sides = sides_of(tmp_path, several(features=FEATURES), several(**{"features": FEATURES, **change}))
    assert marks(sides) == {name: APART if name in apart else SAME for name in ("paired_pixels", "fid", "clip_score", "seconds")}
    told, html = text.quality(sides), page.render(sides, "reflow compare")
    assert (said in told and said in Page(html).text) and told.count("may not be compared") == bool(apart)
    assert ("[b]" in told) == ('<sup class="mark">b</sup>' in html) == bool(apart)
    # All numbers of a marked column have a letter, in both tables.
    for name in apart:
        shown = sum(name in r["measures"] for side in sides for result in side.results for r in result.rows) if name != "seconds" else 2 * 8
        assert shown and html.count('class="mark"') >= shown


def test_teachers_machines_and_real_images_count_where_they_matter(tmp_path):
    other = several()
    other["reference"] = {**other["reference"], "steps": 50}
    assert [name for name, found in marks(sides_of(tmp_path / "a", several(), other)).items() if found == APART] == ["paired_pixels"]
    other = several()
    other["real_images"] = 5000
    assert [name for name, found in marks(sides_of(tmp_path / "b", several(), other)).items() if found == APART] == ["fid"]
    other = several()
    other["machine"] = {**other["machine"], "gpu": "1 x another card"}
    assert [name for name, found in marks(sides_of(tmp_path / "c", several(), other)).items() if found == APART] == ["seconds"]


def test_three_results_have_a_letter_for_each_kind(tmp_path):
    sides = sides_of(tmp_path, several(), several(digest="x"), several())
    assert marks(sides)["fid"] == ("a", "b", "a")
    assert "(a: coco30k abc0; b: coco30k x)" in terms.warnings(terms.entries(sides), terms.all_columns(terms.entries(sides)))[0]
    # A result without the column neither has a mark nor makes one.
    lacking = report([row("A", 4, fid=interval(1.0))], digest="y")
    assert marks(sides_of(tmp_path / "more", several(), several(), lacking))["clip_score"] == ("", "", "")


def test_a_report_that_does_not_say_its_networks_is_compared_by_all_of_them(tmp_path):
    one, other = several(features=FEATURES), several(features={**FEATURES, "clip": {"implementation": "c", "digest": "clip-2"}})
    for found in (one, other):
        found["columns"] = [{k: v for k, v in c.items() if k not in ("network", "real")} for c in found["columns"]]
    assert marks(sides_of(tmp_path, one, other))["fid"] == APART


def test_a_best_is_told_across_sides_only_without_marks(tmp_path):
    one, other = several(), several()
    other["rows"] = [r if r["is_reference"] else {**r, "measures": {**r["measures"], "fid": interval(5.0 + r["steps"])}} for r in other["rows"]]
    other["rows"] = other["rows"][:3]
    assert page.quality(sides_of(tmp_path / "a", one, other)).count("<td data-v=\"7.0\" class=best>") == 1
    other["protocol"]["digest"] = "another"
    assert "class=best" not in page.quality(sides_of(tmp_path / "b", one, other))


def test_digits_reports_stand_beside_comparisons_in_columns_of_their_own(tmp_path):
    sides = sides_of(tmp_path, DIGITS, several())
    found = terms.entries(sides)
    digits, others = ({c["name"] for c in result.columns if any(c["name"] in r["measures"] for r in result.rows)} for _, result in found)
    assert digits == {"paired_digits", "frechet_digits", "diversity_digits", "read_digits"} and not digits & others
    assert marks(sides)["seconds"] == APART
    other = copy.deepcopy(DIGITS)
    other["settings"]["samples"] = 50
    assert marks(sides_of(tmp_path / "two", DIGITS, other))["frechet_digits"] == APART


def test_recipes_differ_key_by_key(tmp_path):
    one, two = trained(tmp_path / "one"), trained(tmp_path / "two", "train.learning_rate=0.5", "stages.0.samples=2560", "log.every=256", "name=other")
    sides = opened.open_sides([str(one), str(two)])
    found = {key: (values, learnt) for key, values, learnt in rows.differences(sides)}
    assert set(found) == {"train.learning_rate", "stages.0.samples", "log.every", "name"}
    assert found["train.learning_rate"] == (["0.001", "0.5"], True) and found["log.every"][1] is False and found["name"][0][1] == '"other"'
    assert "train.learning_rate" in text.recipes(sides) and "train.learning_rate" in Page(page.render(sides, "")).text
    assert "are the same, key by key" in text.recipes(opened.open_sides([str(one), str(one)]))
    assert text.recipes(sides[:1]) == ""


def test_what_a_run_cost_is_counted_and_read_from_its_log(tmp_path):
    log = [{"event": "train", "stage": s, "total_samples": t, "elapsed": e} for s, t, e in ((1, 2560, 10.0), (1, 5120, 20.0), (1, 7680, 5.0), (1, 10240, 15.0), (2, 12800, 7.0))]
    sides = opened.open_sides([str(trained(tmp_path / "one", log=log)), str(trained(tmp_path / "two"))])
    (_, done, teacher, student, time, *_), (_, planned, whole, *_, hours) = rows.cost_rows(sides)
    assert (done, student, time) == ("12,800", "12,800", "42 s")  # 20 until it was cut off, 15 since, 7 of the second stage
    recipe = sides[1].recipe_of
    assert planned == f"{sum(s.samples for s in recipe.stages):,}" and hours == "-"
    assert int(whole.replace(",", "")) == sum(s.pairs * s.solver_steps for s in recipe.stages)  # stored pairs are solved once
    first, second = recipe.stages[:2]
    assert int(teacher.replace(",", "")) == first.pairs * first.solver_steps + round(second.pairs * second.solver_steps * 2560 / second.samples)


def test_labels_tell_sides_apart(tmp_path):
    assert opened.labels([tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "c"]) == ["a/run", "b/run", "c"]
    assert opened.labels([tmp_path / "a", tmp_path / "a"]) == [f"{'/'.join((tmp_path / 'a').parts[1:])} ({n})" for n in (1, 2)]


def test_names_stay_names(tmp_path):
    hostile = '<script>alert(1)</script>"\x1b[31m'
    found = report([row(hostile, 4, reference=False, fid=interval(1.0)), row("B", 4, reference=False, fid=interval(2.0))], digest=hostile, dtype=hostile)
    sides = opened.open_sides([str(written(tmp_path / "<b>&x", found)), str(written(tmp_path / "other", several()))])
    html = page.render(sides, hostile)
    assert Page(html).faults == [] and len(Page(html).all("script")) == 1
    assert "\x1b" not in text.described(sides)


def test_pictures_come_from_where_they_are(tmp_path):
    picture = tmp_path / "0.png"
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(picture)
    one = written(tmp_path / "one", several())
    cells = {Cell(r["model"], r["steps"], r["guidance"]): (picture,) for r in several()["rows"]}
    comparison_page.write(several(), Chosen(("a cat",), (3,), cells), one)
    run = trained(tmp_path / "two")
    (run / "validation").mkdir()
    (run / "validation" / "000000100.png").write_bytes(picture.read_bytes())
    (run / "validation" / "000000200.png").write_bytes(b"no picture")
    read = Page(page.render(opened.open_sides([str(one), str(run)]), ""))
    assert read.faults == [] and len([a for a in read.all("img") if a.get("data-model")]) == 4
    (run / "validation" / "000000200.png").unlink()
    read = Page(page.render(opened.open_sides([str(one), str(run)]), ""))
    assert [a["alt"] for a in read.all("img") if "validation" in a["alt"]] == ["two: the last validation"]
    assert page_grid.read_back(run / "index.html").rows == ()


def test_the_command_prints_and_writes(tmp_path, reflow, capsys):
    one, two = written(tmp_path / "one", several()), written(tmp_path / "two", several(digest="x"))
    assert reflow("compare", one, two / "report.json", "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "Cost" in said and "They differ in protocol" in said and said.rstrip().endswith("out/index.html")
    read = Page((tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
    assert read.faults == [] and str(tmp_path) not in read.text


@pytest.mark.parametrize("spoil, said", [
    (lambda f: (f / "report.json").unlink(), "holds no result"),
    (lambda f: (f / "report.json").write_text("{}"), "is no result"),
    (lambda f: written(f, {**several(), "rows": [{"model": "A"}]}), "no whole result"),
    (lambda f: written(f, {**several(), "protocol": None}), "no whole result"),
], ids=["none", "another file", "rows cut short", "no protocol"])  # fmt: skip
def test_what_cannot_be_compared_is_refused_in_a_sentence(tmp_path, spoil, said):
    one, two = written(tmp_path / "one", several()), written(tmp_path / "two", several())
    spoil(two)
    with pytest.raises(UserError, match=said):
        opened.open_sides([str(one), str(two)])


def test_a_single_path_and_a_place_that_would_be_lost_are_refused(tmp_path, reflow):
    one = written(tmp_path / "one", several())
    with pytest.raises(UserError, match="two or more"):
        reflow("compare", one)
    with pytest.raises(UserError, match="would be lost"):
        reflow("compare", one, one, "--out", one)
    with pytest.raises(UserError, match="There is no"):
        reflow("compare", one, tmp_path / "nothing", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
