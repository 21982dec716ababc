"""The bed whose students are runs of the trainer: the same students as data, and what is measured of them."""

import json

import pytest
import torch

from reflow.errors import UserError
from reflow.experiments import parameterisations
from reflow.experiments.ablation import student_of
from reflow.experiments.beds import digits
from reflow.experiments.beds.students import Stage, Student
from reflow.experiments.store import Store


@pytest.fixture(scope="module")
def bed():
    small = digits.DigitsBed(quick=True)
    small.samples, small.fine_steps = 10, 12
    return small


def test_a_student_is_a_recipe_of_its_settings():
    cell = {"density": "near start", "loss": "aligned_v", "weight": 3.0, "norm": "none", "steps": 200, "arm": "progressive", "pairs": 8192, "seed": 2}
    recipe = digits.recipe_of(student_of(cell))
    first, second = (recipe.of_stage(i) for i in (0, 1))
    assert [(s.windows, s.samples, s.pairs, s.solver_steps) for s in recipe.stages] == [(8, 12800, 8192, 4), (4, 12800, 8192, 8)]
    for stage in (first, second):
        assert (stage.objective.loss, stage.objective.direction_weight, stage.objective.direction_norm) == ("aligned_v", 3.0, "none")
        assert (stage.objective.time_density, stage.objective.time_share, stage.objective.time_upper) == ("window_start", 0.8, 0.5)
    assert (recipe.train.seed, recipe.train.batch_size, recipe.train.learning_rate, recipe.validate_.every) == (2, 128, 1e-3, 0)
    plain = digits.recipe_of(Student((Stage(4, 10), Stage((1.0, 0.5, 0.0), 6, (("time_density", "uniform"),), teacher="previous")), guidance=3.0))
    assert plain.objective.loss == "mse" and plain.of_stage(1).objective.time_density == "uniform"
    assert (plain.stages[1].teacher, plain.teacher.guidance_scale, plain.teacher.drops_captions) == ("previous", 3.0, False)
    with pytest.raises(UserError, match="trained in some of their windows alone"):
        digits.recipe_of(Student((Stage(2, 8, active=(0,)),)))


def test_an_untrained_student_is_its_teacher_and_nothing_is_nearer_than_itself(bed, tmp_path):
    store = Store(tmp_path)
    found, own = bed.of_student(Student((Stage(4, 0),)), store, (1,))["4"], bed.of_teacher(store, 4)
    assert found["paired"] == pytest.approx(own["paired"], rel=1e-3) and found["paired_latents"] == pytest.approx(own["paired_latents"], rel=1e-3)
    assert own["paired"] > bed.of_teacher(store, 12)["paired"] > 0
    fine = bed.fine(store)
    same = bed.of_samples(fine, fine)
    assert same["paired"] == same["paired_latents"] == 0 and same["frechet"] == pytest.approx(0, abs=1e-3) and store.made == 1


def test_a_student_is_trained_once_and_its_run_is_not_kept(bed, tmp_path):
    spec, store = Student((Stage(4, 2),), pairs=64, batch=64), Store(tmp_path)
    first = digits.weights(spec, store)
    base = bed.base.unet.state_dict()
    assert first.keys() == base.keys() and any(not torch.equal(first[k], base[k]) for k in first)
    assert [p.suffix for p in tmp_path.iterdir()] == [".safetensors"] and digits.weights(spec, Store(tmp_path)).keys() == first.keys()


@pytest.mark.slow
def test_an_experiment_on_it(tmp_path):
    for _ in range(2):
        parameterisations.run(tmp_path / "p", bed="digits", seeds=2, quick=True)
    found = json.loads((tmp_path / "p" / "parameterisations-digits.json").read_text())
    begins = {line["kind"]: line["paired"]["mean"] for line in found["found"]["kinds"] if line["steps"] == 0}
    assert begins["ddim_eps"] == pytest.approx(found["found"]["teacher_4"]["paired"], rel=1e-3) and begins["velocity"] > 1.5 * begins["ddim_eps"]
    assert found["command"] == "reflow experiment parameterisations --bed digits --seeds 2"
