"""Recipes: what is accepted, what is refused and what the sentence says."""

import pathlib
import re

import pytest

from reflow.errors import UserError
from reflow.recipes import keys, reading
from reflow.recipes.settings import STAGE_SECTIONS

PLACES = [(name,) for name in reading.fields_at(()) if name not in ("name", "stages")] + [("stages", 0)]
DIGITS = (pathlib.Path(reading.__file__).parent / "digits.toml").read_text()


def recipe_text(extra: str = "", stage: str = "windows = 4\nsolver_steps = 2\nsamples = 1000") -> str:
    return f'name = "t"\n{extra}\n[[stages]]\n{stage}\n'


def load(tmp_path, text, overrides=()):
    path = tmp_path / "r.toml"
    path.write_text(text)
    return reading.load(str(path), list(overrides))


@pytest.mark.parametrize("name", reading.available())
def test_every_recipe_of_the_package_loads_and_survives_a_round_trip(name, tmp_path):
    recipe = reading.load(name)
    path = tmp_path / "again.toml"
    path.write_text(reading.dump(recipe))
    assert reading.load(str(path)) == recipe


@pytest.mark.parametrize("text, words", [
    (recipe_text("[train]\nlearning_rat = 1"), ["train.learning_rat", "learning_rate"]),
    (recipe_text("[trian]\nseed = 1"), ["trian", "'train'"]),
    (recipe_text(stage="windows = 0\nsolver_steps = 2\nsamples = 1000"), ["stages.0.windows", "0"]),
    (recipe_text(stage="windows = 4\nsolver_step = 2\nsamples = 1000"), ["solver_step", "solver_steps"]),
    (recipe_text(stage="windows = 4\nsolver_steps = 300\nsamples = 1000"), ["solver_steps", "300", "250"]),
    (recipe_text(stage='windows = 4\nsolver_steps = 2\nsamples = 1000\nteacher = "previous"'), ["teacher", "root"]),
    (recipe_text(stage="windows = 4\nsolver_steps = 2\nsamples = 100"), ["stages.0.samples", "batch_size"]),
    (recipe_text(stage="solver_steps = 2\nsamples = 1000"), ["windows", "boundaries"]),
    (recipe_text(stage="boundaries = [1.0, 0.2, 0.6, 0.0]\nsolver_steps = 2\nsamples = 1000"), ["boundaries", "fall"]),
    (recipe_text(stage="boundaries = []\nsolver_steps = 2\nsamples = 1000"), ["stages.0.boundaries", "fall"]),
    (recipe_text(stage="boundaries = [1.0, nan, 0.0]\nsolver_steps = 2\nsamples = 1000"), ["stages.0.boundaries", "finite"]),
    (recipe_text(stage="windows = 1000000000\nsolver_steps = 2\nsamples = 1000"), ["stages.0.windows", "1000"]),
    (recipe_text("[train]\neps = inf"), ["train.eps", "finite"]),
    (recipe_text("[train]\nlearning_rate = nan"), ["train.learning_rate"]),
    (recipe_text("[train]\nbetas = [1, 1]"), ["train.betas", "less than 1"]),
    (recipe_text("[train]\nbatch_size = 100"), ["micro_batch", "batch_size"]),
    (recipe_text('[objective]\nloss = "alignedv"'), ["objective.loss", "aligned_v"]),
    (recipe_text('[objective]\npoints = "schedule"\nloss = "mse"\n[student]\nprediction_type = "velocity"'), ["points", "ddim_eps"]),
    (recipe_text('[objective]\npoints = "schedule"'), ["aligned_v", "pseudo_huber"]),
    ('name = "t"\n', ["stages"]),
    ("name = \n", ["TOML"]),
])
def test_a_bad_recipe_is_one_sentence_with_the_key_and_the_remedy(tmp_path, text, words):
    with pytest.raises(UserError) as error:
        load(tmp_path, text)
    for word in words:
        assert word in str(error.value)


def test_a_misspelt_recipe_offers_the_nearest(tmp_path):
    with pytest.raises(UserError, match="digits-quick"):
        reading.load("digit-quick")


def test_previous_needs_boundaries_of_the_stage_before(tmp_path):
    second = "[[stages]]\nwindows = 3\nsolver_steps = 2\nsamples = 1000\nteacher = \"previous\"\n"
    with pytest.raises(UserError, match="stages.1 merges windows of stage 0"):
        load(tmp_path, recipe_text() + second)


def test_overrides_reach_sections_and_stages(tmp_path):
    recipe = load(tmp_path, recipe_text(), ["stages.0.samples=20000", "train.seed=7", "objective.loss=mse", "train.betas=[0.8, 0.9]"])
    assert recipe.stages[0].samples == 20000 and recipe.train.seed == 7
    assert recipe.objective.loss == "mse" and recipe.train.betas == (0.8, 0.9)


@pytest.mark.parametrize("override", ["stages.5.samples=1", "nothing", "train.seed.deep=1", "stages.x.samples=2"])
def test_an_override_without_a_place_is_refused(tmp_path, override):
    with pytest.raises(UserError, match="--set|train.seed"):
        load(tmp_path, recipe_text(), [override])


def test_changed_keys_are_named_and_free_keys_are_not(tmp_path):
    old = load(tmp_path, recipe_text())
    new = load(tmp_path, recipe_text(), ["train.seed=3", "log.every=5", "validate.every=100", "stages.0.samples=2000"])
    assert [c.split(":")[0] for c in reading.changed_keys(old, new)] == ["stages.0.samples", "train.seed"]


@pytest.mark.parametrize("old, share", [("true", 0.1), ("false", 0.0), ("0.25", 0.25)])
def test_the_switch_of_older_recipes_is_the_default_share(tmp_path, old, share):
    assert load(tmp_path, recipe_text(), [f"train.ema_warmup={old}"]).train.ema_warmup == share
    with pytest.raises(UserError, match="train.ema_warmup"):
        load(tmp_path, recipe_text(), ["train.ema_warmup=1.5"])


@pytest.mark.parametrize("name", [n for n in reading.available() if not n.startswith("digits")])
def test_what_a_recipe_says_of_cards_is_a_recipe(name):
    """Each line of the table at the top, as --set would take it."""
    text = (pathlib.Path(reading.__file__).parent / f"{name}.toml").read_text()
    rows = re.findall(r"^# +\d+ GB.*/s +(.+)$", text, re.M)
    known = {key: section for section in ("model", "train") for key in reading.load(name).resolved()[section]}
    assert len(rows) >= (4 if name.startswith(("sd15", "sdxl")) else 2)
    for row in rows:
        pairs = [] if row == "as it is" else [part.split(" = ") for part in row.split(", ")]
        reading.load(name, [f"{known[key]}.{key}={value}" for key, value in pairs])


def test_the_page_of_keys_is_what_the_settings_say():
    """After a change of settings.py: python -m reflow.recipes.keys."""
    assert keys.PAGE.read_text() == keys.page()
    # A row of everything that a recipe may hold, each with a meaning.
    rows = [line.split(" | ") for line in keys.page().splitlines() if line.startswith("| `")]
    assert len(rows) == sum(len(reading.fields_at(place)) for place in PLACES) + 1
    assert all(len(row) == 4 and len(row[3].strip(" |")) > 5 for row in rows)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[0])
def test_the_digits_recipe_shows_every_key(place):
    bodies = re.split(r"^\[+(\w+)\]+$", DIGITS, flags=re.M)
    body = "".join(body for name, body in zip(bodies[1::2], bodies[2::2]) if name == place[0])
    others = {key for name in (STAGE_SECTIONS if place == ("stages", 0) else ()) for key in reading.fields_at((name,))}  # a line says that they may
    assert [key for key in reading.fields_at(place) if key not in others and not re.search(rf"^(# )?{key} = ", body, re.M)] == []


@pytest.mark.parametrize("line", re.findall(r"^# (\w+ = .*)$", DIGITS, re.M), ids=lambda line: line.split(" = ")[0])
def test_a_key_that_the_digits_recipe_shows_as_a_comment_can_be_used_as_it_stands(line, tmp_path):
    text = DIGITS.replace(f"# {line}", line)
    if line.startswith("self_share"):  # counts beside the line above it alone, as that line says
        text = text.replace("# merges = 1", "merges = 1")
    recipe = load(tmp_path, text.replace("windows = 8\n", "") if line.startswith("boundaries") else text)
    assert getattr(recipe.stages[0], line.split(" = ")[0]) is not None and recipe != reading.load("digits")
