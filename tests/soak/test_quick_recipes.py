"""The quick form of the soak of recipes, and the kinds of input that it once found."""

import pathlib
import sys

import pytest

from reflow.errors import UserError, quote, short
from reflow.recipes import reading

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import soak

recipes = soak.row("recipes")
STAGE = "name = 'x'\n[[stages]]\nwindows = 2\nsolver_steps = 2\nsamples = 500\n"


def test_generated_recipes_resolve_or_are_refused_in_a_sentence(tmp_path):
    found = [soak.one(recipes, index) for index in range(170)]
    assert not [case for case in found if case["failed"]]
    assert sum(case["resolved"] for case in found) > 20 and sum(case["refused"] for case in found) > 20
    assert {case["kind"] for case in found} >= {"shipped", "text, mutated", "--set", "bytes", "too large"}


def test_the_verdict_of_a_case_can_fail(tmp_path):
    assert recipes.verdict(1, "", "reflow: an error\n", None, tmp_path) and recipes.verdict(0, "", "", 2, tmp_path)
    assert recipes.verdict(2, "", "Traceback\n  x\n", None, tmp_path) and recipes.verdict(2, "", f"reflow: {'x' * 9999}\n", None, tmp_path)
    assert recipes.verdict(0, "name = 1\n", "", None, tmp_path) and recipes.verdict(0, STAGE, "", None, tmp_path)
    assert recipes.verdict(2, "", "reflow: No.\n", None, tmp_path) is None


@pytest.mark.parametrize("content, words", [
    (b"name = 'x'\n\xff", "line 2 is not UTF-8"),
    (b"x = " + b"[" * 5000, "nests tables or lists"),
    (b"a." * 200_000 + b"a = 1", "nests tables or lists"),
    (b"x = " + b"9" * 5000, "a number in it has thousands of digits"),
    (b"#" * 2**20 + b"\n", "more than 1,048,576 bytes"),
    (STAGE.encode() + b"[train]\nseed = 0x" + b"f" * 5000, "'train.seed' cannot be used: the number has more than 64 bits"),
    (STAGE.encode() + b"[train]\nseed = '" + b"9" * 30 + b"'", "'train.seed' cannot be used: the number has more than 64 bits"),
    (STAGE.encode() + b'[model]\nbase = "a\\u0000b"', r"'model.base' cannot be used: it holds the character U\+0000"),
    (STAGE.encode().replace(b"windows = 2", b"boundaries = [1.0, nan, 0.0]"), "stages.0.boundaries.1' = nan cannot be used"),
    (STAGE.encode().replace(b"'x'", b'"a\\nb"'), "write a name of one line"),
    (STAGE.encode() + b"[x]\n" + b"\n".join(b"k%d = 1" % i for i in range(99)), "unknown key 'x'"),
    ((STAGE + "\n".join(f"k{i} = 1" for i in range(99))).encode(), "; and 94 more"),
])  # fmt: skip
def test_a_recipe_that_cannot_be_kept_is_refused(content, words, tmp_path):
    (tmp_path / "x.toml").write_bytes(content)
    with pytest.raises(UserError, match=words) as refused:
        reading.load(str(tmp_path / "x.toml"))
    assert len(str(refused.value)) < 2200 and str(refused.value).isprintable()


@pytest.mark.parametrize("override, words", [
    ("train.seed=" + "[" * 5000, "nests tables or lists"),
    ("train.seed=" + "9" * 5000, "thousands of digits"),
    ("a." * 5000 + "b=1", "nests tables or lists"),
    ("stages.-1.samples=64", "there is no place 'stages.-1.samples'"),
    ("name=\udcff", r"U\+DCFF"),
    ("x" * 5000, "x ... x"),
])  # fmt: skip
def test_an_override_that_cannot_be_kept_is_refused(override, words):
    with pytest.raises(UserError, match=words) as refused:
        reading.load("digits", [override])
    assert len(str(refused.value)) < 1000


def test_a_second_line_in_an_override_is_no_other_key():
    with pytest.raises(UserError, match="'train.seed' = '1.nname = 2' cannot be used"):
        reading.load("digits", ["train.seed=1\nname = 2"])


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    (tmp_path / "x.toml").write_bytes(STAGE.replace("\n", "\r\n").encode("utf-8-sig"))
    assert reading.load(str(tmp_path / "x.toml")).stages[0].samples == 500


def test_a_name_that_leads_elsewhere_makes_no_folder(reflow, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("../x", "/tmp/x", ".."):
        with pytest.raises(UserError, match="would lead out of runs/"):
            reflow("train", "--recipe", "digits", "--set", f"name='{name}'")
    assert not list(tmp_path.iterdir())


def test_a_quote_is_at_most_a_line_of_the_input():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in ("x" * 10**6, deep, 10**5000, ["a\n"] * 999, "\x1b[2J"):
        assert len(quote(value)) < 120 and quote(value).isprintable()
    assert short("abc") == "abc" and quote("a'b") == repr("a'b")
    assert str(UserError("a\nb\x1b" + "c" * 9999)).startswith("a\\nb\\x1bc") and len(str(UserError("c" * 9999))) < 2100
