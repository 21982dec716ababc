"""The table of tests/README.md is what the soak's summaries say, each of them whole and without a failure."""

import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import page
import soak


def test_the_table_is_up_to_date():
    text = page.PAGE.read_text()
    assert page.page(text) == text, "python tests/soak/page.py writes it"
    assert set(page.ROWS) == set(soak.ROWS)


@pytest.mark.parametrize("name", page.ROWS)
def test_a_summary_is_of_a_whole_soak(name):
    found = json.loads((page.RESULTS / f"{name}.json").read_text())
    assert found["row"] == name and found["cases"] == found["of"] == soak.row(name).CASES and found["failed"] == []
    least = {"kills": ("kills", 100), "inputs": ("inputs", 10_000), "recipes": ("resolved", 1000), "weights": ("refused", 200), "mutants": ("killed", 270)}
    key, count = least.get(name, ("steps", 35_000))
    assert found["totals"][key] >= count
