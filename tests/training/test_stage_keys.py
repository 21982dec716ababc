"""Keys that a stage has of its own: in force in that stage alone, and refused where the stage's other values leave them without a meaning."""

import json

import pytest
import torch

import tiny
from reflow.errors import UserError
from reflow.recipes import reading
from reflow.recipes.settings import STAGE_SECTIONS, Recipe, Stage
from reflow.training import run, targets

OWN = {
    "learning_rate": 3e-4, "warmup": 16, "method": "heun", "guidance_scale": 3.0, "drops_captions": False, "loss": "pseudo_huber", "space": "eps",
    "direction_weight": 0.25, "direction_norm": "none", "huber_c": 0.01, "huber_norm": "sample", "normalize": "loss", "time_weight": "reciprocal",
    "window_weight": "speed", "points": "schedule", "starts": "noise", "starts_share": 0.5, "forward_share": 0.1, "time_density": "exponential", "time_share": 0.25,
    "time_upper": 0.5, "time_sharpness": 2.0,
}  # fmt: skip
BESIDE = {"direction_weight": {"loss": "aligned_v"}, "direction_norm": {"loss": "aligned_v"}, "huber_c": {"loss": "pseudo_huber"},
          "huber_norm": {"loss": "pseudo_huber"}, "points": {"loss": "mse"}, "starts_share": {"starts": "noise"},
          "time_sharpness": {"time_density": "u_shaped"}}  # fmt: skip


def test_the_keys_are_those_of_the_sections_with_their_types():
    for section in STAGE_SECTIONS:
        kind = Recipe.model_fields[section].annotation
        for key in kind.model_fields.keys() & Stage.model_fields.keys():
            assert key in OWN
            mine, theirs = Stage.model_json_schema()["properties"][key], kind.model_json_schema()["properties"][key]
            options = [option for option in mine["anyOf"] if option.get("type") != "null"]
            assert all(options[0].get(k) == theirs.get(k) for k in ("type", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")), key
    assert Recipe.model_fields["objective"].annotation.model_fields.keys() - Stage.model_fields.keys() == {"time_grid"}


@pytest.mark.parametrize("key", OWN)
def test_a_stages_own_value_holds_in_that_stage_alone(tmp_path, key):
    sets = [f"stages.1.{k}={json.dumps(v)}" for k, v in {key: OWN[key], **BESIDE.get(key, {})}.items()]
    whole = tiny.recipe(tmp_path, "stages.1.teacher=root", *sets)
    section = next(s for s in STAGE_SECTIONS if key in type(getattr(whole, s)).model_fields)
    assert getattr(getattr(whole.of_stage(1), section), key) == OWN[key] != getattr(getattr(whole, section), key)
    assert whole.of_stage(0).model_copy(update={}) == whole
    assert whole.of_stage(1).of_stage(1) == whole.of_stage(1)
    # Read back from the run directory.
    (tmp_path / "again.toml").write_text(reading.dump(whole))
    assert reading.load(str(tmp_path / "again.toml"), []) == whole


def test_each_stage_trains_by_its_own(tmp_path, monkeypatch):
    """One run that is 2-rectified flow and then a distillation at t = 1, as InstaFlow."""
    seen, original = [], targets.loss

    def loss(output, at, table, settings, **rest):
        seen.append((len(table.t_start), settings.loss, settings.time_density, sorted(set(at.t.tolist()))))
        return original(output, at, table, settings, **rest)

    monkeypatch.setattr(targets, "loss", loss)
    first, second = "stages.0.", "stages.1."
    recipe = tiny.recipe(tmp_path, "validate.every=0", "objective.starts=noise", *(f"{first}{x}" for x in (
        "windows=1", "solver_steps=4", "samples=32", "pairs=16", "time_density=u_shaped", "loss=mse", "guidance_scale=2.0")), *(f"{second}{x}" for x in (
            "windows=1", "solver_steps=2", "samples=32", "pairs=16", "time_share=1.0", "loss=pseudo_huber")))
    run.train(recipe, tmp_path / "run")
    assert {kind[:3] for kind in seen[:8]} == {(1, "mse", "u_shaped")} and len({t for kind in seen[:8] for t in kind[3]}) > 20
    assert {kind[:3] for kind in seen[8:]} == {(1, "pseudo_huber", "window_start")} and {t for kind in seen[8:] for t in kind[3]} == {1.0}
    assert (recipe.guidance_of(0), recipe.guidance_of(1)) == (2.0, 2.0)  # the second stage is solved by the first's student
    assert recipe.of_stage(1).teacher.guidance_scale == 1.0


def test_a_solve_takes_the_stages_own_guidance(tmp_path):
    run.train(tiny.short(tmp_path, "stages.0.guidance_scale=4.0", "stages.0.samples=16"), tmp_path / "guided")
    run.train(tiny.short(tmp_path, "teacher.guidance_scale=4.0", "stages.0.samples=16"), tmp_path / "all")
    run.train(tiny.short(tmp_path, "stages.0.samples=16"), tmp_path / "plain")
    guided, whole, plain = (loss_of(tmp_path / name) for name in ("guided", "all", "plain"))
    assert guided == whole != plain


def loss_of(folder):
    return [line["loss"] for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if line["event"] == "train"]


@pytest.mark.parametrize("sets, words", [
    (["stages.0.time_share=0.3", "stages.0.time_density=uniform"], "stages.0.time_share counts with time_density = 'window_start' only, and the stage has"),
    (["stages.0.time_sharpness=3.0"], "stages.0.time_sharpness counts with time_density = 'u_shaped' or 'exponential' only"),
    (["stages.0.direction_weight=0.3", "objective.loss=mse"], "stages.0.direction_weight counts with loss = 'aligned_v' only"),
    (["stages.0.huber_c=0.3"], "stages.0.huber_c counts with loss = 'pseudo_huber' only"),
    (["stages.0.starts_share=0.3"], "stages.0.starts_share counts with starts = 'noise' only"),
    (["objective.starts_share=0.3"], "objective.starts_share = 0.3 is the share of trajectories from noise, and objective.starts is 'data'"),
    (["objective.starts_share=0.0"], "objective.starts_share' = 0.0 cannot be used"),
    (["stages.0.space=eps", "stages.0.points=schedule", "stages.0.loss=mse"], "stages.0.space counts with points = 'chord' only"),
    (["objective.forward_share=0.1"], "stages.1 has objective.forward_share = 0.1, pairs that only the root can make"),
    (["stages.1.guidance_scale=3.0"], "stages.1.guidance_scale is of the root's solves"),
    (["stages.1.method=heun"], "stages.1.method is of the root's solves"),
    (["stages.1.points=schedule"], "stages.1 has loss 'aligned_v' with objective.points = 'schedule'"),
    (["stages.1.points=schedule", "stages.1.loss=mse", "student.prediction_type=velocity"], "objective.points = 'schedule' needs student.prediction_type"),
])
def test_a_key_without_a_meaning_is_refused(tmp_path, sets, words):
    with pytest.raises(UserError) as error:
        tiny.recipe(tmp_path, *sets)
    assert words in str(error.value)


@torch.no_grad()
def test_the_log_of_a_normalized_loss_is_near_one_and_its_errors_are_as_they_are(tmp_path):
    with torch.enable_grad():
        run.train(tiny.short(tmp_path, "objective.normalize=loss", "objective.window_weight=speed"), tmp_path / "run")
    lines = [line for line in map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines()) if line["event"] == "train"]
    assert all(0.5 < line["loss"] < 4 for line in lines)
