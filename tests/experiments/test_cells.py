"""Experiments as cells: one row each, nothing made twice, intervals over seeds."""

import json

import pytest

from reflow.errors import UserError
from reflow.experiments import cells


def work(calls):
    def make(cell):
        calls.append(cell)
        return {"error": cell["x"] + 0.1 * cell["seed"]}

    return make


def test_a_row_a_cell_and_the_same_command_goes_on(tmp_path, capsys):
    calls, asked, path = [], cells.seeded([{"x": 1}, {"x": 2}], 3), tmp_path / "new" / "rows.jsonl"
    assert [cell["seed"] for cell in asked] == [0, 1, 2, 0, 1, 2]

    def stops(cell):
        if len(calls) == 4:
            raise KeyboardInterrupt
        return work(calls)(cell)

    with pytest.raises(KeyboardInterrupt):
        cells.make(path, asked, stops, "v1")
    assert len(cells.read(path)) == 4
    rows = cells.make(path, asked, work(calls), "v1")
    assert len(calls) == 6 and [row["cell"] for row in rows] == asked and rows[5]["result"]["error"] == pytest.approx(2.2)
    assert "[2/2] x=2 seed=2" in capsys.readouterr().out
    assert cells.make(path, asked[:2], work(calls), "v1") == rows[:2] and len(calls) == 6
    cells.make(path, asked[:1], work(calls), "v2")  # other sources, another row
    assert len(calls) == 7 and len(cells.read(path)) == 7 and len(cells.make(path, asked, work(calls), "v1")) == 6


@pytest.mark.parametrize("text", ["{\n", '{"cell": {}}\n', "[]\n"])
def test_what_is_no_row_is_a_sentence(tmp_path, text):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(UserError, match="is not made of rows of an experiment"):
        cells.read(tmp_path / "rows.jsonl")


def rows_of(values, **cell):
    return [{"cell": {**cell, "seed": seed}, "result": {"error": value}, "version": "v", "cpu_seconds": 1.0} for seed, value in enumerate(values)]


def test_differences_are_paired_by_seed():
    mine, other = rows_of([1.0, 2.0, 4.0], arm="a"), rows_of([0.5, 1.4, 3.6], arm="b")
    rows = [*reversed(mine), *other]
    assert [row["cell"]["seed"] for row in cells.select(rows, arm="a")] == [0, 1, 2]
    found = cells.paired(cells.select(rows, arm="a"), other, lambda r: r["error"])
    assert found.mean == pytest.approx(0.5) and found.half_width == pytest.approx(4.302652729911275 * 0.1 / 3**0.5)
    assert found.excludes_zero and cells.over_seeds(mine, lambda r: r["error"]).half_width > 3
    with pytest.raises(AssertionError, match="seeds"):
        cells.paired(mine, other[:2], lambda r: r["error"])
    assert cells.told(found, 2, sign=True) == "+0.50 ± 0.25"
    assert cells.told(cells.over_seeds(mine[:1], lambda r: r["error"])) == "1.0000"


def test_what_is_written_at_the_end(tmp_path, capsys):
    cells.finish(tmp_path / "name.json", "name", "exact", rows_of([1.0, 2.0], arm="a"), cells.table(["a", "b"], [[1, "x"]]), {"answer": 1})
    summary = json.loads((tmp_path / "name.json").read_text())
    assert summary["seeds"] == [0, 1] and summary["found"] == {"answer": 1} and summary["cpu_seconds"] == 2.0
    assert {"revision", "machine", "versions", "command"} <= summary.keys()
    assert (tmp_path / "name.md").read_text() == "| a | b |\n| --- | --- |\n| 1 | x |\n" and "| 1 | x |" in capsys.readouterr().out
