"""What the maths refuses, and in which words: the name that was wrong, and what may stand there."""

import pytest
import torch

from reflow.flow import ChordTable, DiscreteVP, Rectified, Windows, WindowSolver, chord_loss, schedule_loss
from reflow.flow.windows import MOST, TOLERANCE


@pytest.mark.parametrize("method, kind, words", [
    ("rk4", "epsilon", 'Solver method "rk4".*"heun"'),
    ("ddim", "ddim_eps", 'teacher with prediction_type "ddim_eps" is not known; known are "epsilon"'),
])
def test_a_solver_names_what_it_does_not_know(sd, method, kind, words):
    with pytest.raises(ValueError, match=words):
        WindowSolver(sd, Windows.uniform(4), 2, prediction_type=kind, method=method)


@pytest.mark.parametrize("config", [{}, {"beta_start": 1e-4}, {"beta_end": 0.02}, {"beta_start": None, "beta_end": 0.02}])
def test_half_a_range_of_betas_is_none(config):
    with pytest.raises(ValueError, match="neither beta_start and beta_end nor trained_betas"):
        DiscreteVP.from_config(config)


def test_a_setting_of_the_loss_is_called_what_recipes_call_it(sd):
    table, z, window, t = ChordTable(sd, Windows.uniform(2), "ddim_eps"), torch.ones(1, 2), torch.zeros(1, dtype=torch.long), torch.tensor([0.9])
    for options, words in [({"huber_norm": "row"}, '^huber_norm "row" is not known; known are "element", "sample"'), ({"huber_c": -1.0}, "^huber_c is -1.0"),
                           ({"kind": "l1"}, '"l1" is not known; known are "aligned_v"')]:
        with pytest.raises(ValueError, match=words):
            chord_loss(z, z, z, table, window, t, **{"kind": "pseudo_huber"} | options)


def test_windows_keep_their_boundaries_as_floats_in_a_tuple():
    windows = Windows([1, 0])
    assert windows.boundaries == (1.0, 0.0) and [type(value) for value in windows.boundaries] == [float, float]
    assert hash(windows) == hash(Windows((1.0, 0.0)))


def test_windows_may_be_as_narrow_as_the_tolerance_and_no_narrower():
    Windows((1.0, 1.0 - 2 * TOLERANCE, 0.0))
    with pytest.raises(ValueError, match=f"steps wider than {TOLERANCE}"):
        Windows((1.0, 1.0 - 0.5 * TOLERANCE, 0.0))


def test_the_numbers_at_the_edges_of_what_is_allowed():
    assert len(Windows.uniform(MOST)) == MOST
    with pytest.raises(ValueError, match=f"there are at most {MOST}"):
        Windows(tuple(1 - k / (MOST + 1) for k in range(MOST + 2)))
    with pytest.raises(ValueError, match=f"steps wider than {TOLERANCE}"):
        Windows((1.0, TOLERANCE, 0.0))
    assert len(DiscreteVP(torch.tensor([0.9, 0.1]))) == 2 and len(DiscreteVP.from_config({"trained_betas": [0.1, 0.2]})) == 2
    for table in (torch.full((3, 3), 0.5), torch.tensor([0.5]), torch.tensor(0.5)):
        with pytest.raises(ValueError, match="give one value for each train step"):
            DiscreteVP(table)
    for table in ([1.5, 0.5], [0.5, -0.1], [0.5, 0.5], [0.1, 0.9]):
        with pytest.raises(ValueError, match="must decrease from near 1"):
            DiscreteVP(torch.tensor(table))
    with pytest.raises(ValueError, match="has 1 train steps"):
        DiscreteVP.from_config({"trained_betas": [0.1]})


class ClippedVP(Rectified):
    """A schedule without noise below t = .3, as a table that is clipped there has it."""

    def alpha_sigma(self, t):
        sigma = (t - 0.3).clamp(min=0.0)
        return 1 - sigma, sigma


def test_a_sample_teacher_that_would_step_from_no_noise_is_refused_wherever_that_is():
    WindowSolver(ClippedVP(), Windows((1.0, 0.6, 0.3)), 1, prediction_type="sample")
    for windows, steps in ((Windows((1.0, 0.6, 0.3, 0.0)), 1), (Windows((1.0, 0.0)), 4)):  # a window's start, and a step inside one
        with pytest.raises(ValueError, match="cannot step from sigma = 0"):
            WindowSolver(ClippedVP(), windows, steps, prediction_type="sample")


def test_points_on_the_schedule_have_no_aligned_loss(sd):
    table, z, window, t = ChordTable(sd, Windows.uniform(2), "ddim_eps"), torch.ones(1, 2), torch.zeros(1, dtype=torch.long), torch.tensor([0.9])
    with pytest.raises(ValueError, match='loss "aligned_v" is not known; known are "pseudo_huber", "mse"'):
        schedule_loss(z, z, z, table, window, t, kind="aligned_v")
