"""The page of recipes says what the recipes say."""

import pathlib
import re

import pytest

from reflow.recipes import reading
from reflow.training import plan

PAGE = (pathlib.Path(reading.__file__).parent / "README.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.search(r"training:start -->\n(.*?)<!-- training:end", PAGE, re.S)[1].splitlines()[2:]]


@pytest.fixture(scope="module")
def counted_once():
    """The same UNet is counted once, whatever is trained of it."""
    made, count = {}, plan.counts_of

    def counts_of(recipe, base, latent, passes=True):
        key = (recipe.model.family, recipe.model.lora_rank, recipe.train.precision, latent)
        made[key] = made.get(key) or count(recipe, base, latent, passes)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "counts_of", counts_of)
        yield


def test_every_recipe_of_a_real_model_has_its_row():
    assert [row[0].strip("`") for row in ROWS] == [name for name in reading.available() if not name.startswith("digits")]


LARGE = ("flux", "qwen", "sd35")  # seconds each


@pytest.mark.parametrize("row", [pytest.param(row, marks=[pytest.mark.slow] * row[0].strip("`").startswith(LARGE)) for row in ROWS],
                         ids=lambda row: row[0].strip("`"))  # fmt: skip
def test_a_row_is_counted_from_its_recipe(row, counted_once):
    recipe = reading.load(row[0].strip("`"))
    steps = [stage.samples / recipe.train.batch_size for stage in recipe.stages]
    moved = sum(recipe.of_stage(i).train.learning_rate * n for i, n in enumerate(steps))
    assert row[1:6] == [f"{recipe.train.batch_size:,}", " + ".join(f"{n:,.0f}" for n in steps), f"{recipe.train.learning_rate:g}", f"{moved:g}",
                        f"{sum(s.samples for s in recipe.stages) / 1e6:.2f}"]
    hours = re.search(r"the run: [\d.]+ EFLOP, ([\d.]+) hours", plan.describe(recipe))[1]
    assert row[6] == hours
