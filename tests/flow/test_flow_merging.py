"""Windows that merge while they are learnt: the layout of chords, and that exact chords are what the training settles at."""

import pytest
import torch

from reflow.flow import ChordTable, Merger, Windows
from reflow.flow.exact import GaussianData
from reflow.flow.merging import ends, levels

UNEQUAL = (1.0, 0.9, 0.7, 0.65, 0.5, 0.45, 0.2, 0.1, 0.0)


def test_the_layout_of_chords():
    assert levels(8, 0) == (0,) * 8
    assert levels(8, 1) == (1, 0) * 4
    assert levels(8, 2) == (2, 0, 1, 0) * 2
    assert levels(8, 3) == (3, 0, 1, 0, 2, 0, 1, 0)
    assert ends(Windows.uniform(4), 1) == (0.5, 0.5, 0.0, 0.0)
    assert ends(Windows(UNEQUAL), 2) == (0.5, 0.7, 0.5, 0.5, 0.0, 0.2, 0.0, 0.0)
    assert ends(Windows(UNEQUAL), 0) == UNEQUAL[1:]
    # No chord reaches into a place where a longer one begins, so none is asked for two answers where it is used.
    for merges in (1, 2, 3):
        reach = ends(Windows(UNEQUAL), merges)
        for k, level in enumerate(levels(8, merges)):
            inside = [j for j in range(8) if reach[k] < UNEQUAL[j] < UNEQUAL[k]]
            assert all(levels(8, merges)[j] < level for j in inside)
    with pytest.raises(ValueError, match="6 parts cannot be merged 2 times"):
        levels(6, 2)
    with pytest.raises(ValueError, match="cannot be merged -1 times"):
        levels(6, -1)


def test_a_table_with_ends_of_its_own_reads_outputs_as_that_of_the_wide_window(sd, random, close, dtype, device):
    parts = Windows.uniform(8)
    nested = ChordTable(sd, parts, "ddim_eps", ends=ends(parts, 2), device=device, dtype=dtype)
    wide = ChordTable(sd, Windows.uniform(2), "ddim_eps", device=device, dtype=dtype)
    t = torch.tensor([0.9, 0.3], device=device, dtype=dtype)
    first, window = torch.tensor([0, 4], device=device), torch.tensor([0, 1], device=device)
    for name in ("velocity_coefficients", "end_coefficients", "output_target_coefficients", "alpha_sigma"):
        for got, truth in zip(getattr(nested, name)(first, t), getattr(wide, name)(window, t), strict=True):
            close(got, truth)
    assert nested.to(device, torch.float64).ends == nested.ends
    close(nested.speed[first], wide.speed[window])


@pytest.mark.parametrize("kind", ["ddim_eps", "ddim_v", "diff_eps", "velocity"])
@pytest.mark.parametrize("merges", [1, 2, 3])
def test_with_exact_chords_the_finished_ones_are_the_exact_flow(sd, random, close, dtype, device, kind, merges):
    parts = Windows(UNEQUAL)
    table = ChordTable(sd, parts, kind, ends=ends(parts, merges), device=device, dtype=dtype)
    data = GaussianData(random(4, seed=1), random(4, seed=2).abs() + 0.3)
    merger, rows = Merger(table, merges), []

    def student(z, timestep, here):
        # The part that begins at this time; its exact chord as an output.
        k = torch.tensor([min(range(8), key=lambda j: abs(round(1000 * UNEQUAL[j]) - 1 - float(at))) for at in timestep], device=device)
        t, rows[:] = table.t_start[k], [*rows, *here.tolist()]
        m, n = table.output_target_coefficients(k, t)
        return m[:, None] * z + n[:, None] * data.chord_velocity(z, table, k, t)

    part = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 0, 4])
    here = part.to(device)
    z = random(10, 4, seed=3)
    fine = ChordTable(sd, parts, kind, device=device, dtype=dtype)
    begun = data.solve(z, fine.alpha_start[here], fine.sigma_start[here], fine.alpha_end[here], fine.sigma_end[here])
    before = begun.clone()
    finished = merger.finish(student, begun, part)
    truth = data.solve(z, table.alpha_start[here], table.sigma_start[here], table.alpha_end[here], table.sigma_end[here])
    error = float((finished - truth).norm() / truth.norm())
    assert error < (1e-11 if dtype is torch.float64 else 2e-4)
    assert torch.equal(begun, before)
    own = merger.levels[part] == 0
    assert torch.equal(finished[own], begun[own])
    # Each chord is asked once a doubling.
    assert sorted(rows) == sorted(row for row, level in enumerate(merger.levels[part].tolist()) for _ in range(level))
    assert merger.evaluations(torch.arange(8)) * 8 == sum(levels(8, merges))


def test_training_settles_at_the_exact_chords_and_two_halves_of_the_students_own_do_not(sd, device):
    """On a Gaussian every map is z' = g z: regress each part's factor on its target until nothing changes."""
    parts, merges = Windows.uniform(8), 3
    data = GaussianData(torch.zeros(1, dtype=torch.float64), torch.full((1,), 0.5, dtype=torch.float64))
    alpha, sigma = sd.alpha_sigma(torch.tensor(parts.boundaries, dtype=torch.float64))
    spread = data.spread(alpha, sigma, torch.zeros(9, 1, dtype=torch.float64))[:, 0].tolist()
    truth = [spread[parts.boundaries.index(end)] / spread[k] for k, end in enumerate(ends(parts, merges))]
    own = [spread[k + 1] / spread[k] for k in range(8)]
    table = ChordTable(sd, parts, "velocity", ends=ends(parts, merges), device="cpu", dtype=torch.float64)
    factors = [1.0] * 8
    for _ in range(merges + 1):

        def student(z, timestep, here, factors=tuple(factors)):
            k = [round((1 - (float(t) + 1) / 1000) * 8) for t in timestep]
            return z * torch.tensor([[(factors[j] - 1) / float(table.dt[j])] for j in k], dtype=torch.float64)

        z = torch.tensor([[own[k]] for k in range(8)], dtype=torch.float64)
        factors = Merger(table, merges).finish(student, z, torch.arange(8))[:, 0].tolist()
    assert factors == pytest.approx(truth, rel=1e-12)
    # The literal recipe at one doubling: a share s of targets is the mean of the student's own two velocities, the rest the teacher's part.
    speeds = [(g - 1) * 8 for g in own]
    exact = (own[0] * own[1] - 1) * 4
    for share, right in ((0.6, False), (2 / 3, True), (0.8, False)):
        found = speeds[0]
        for _ in range(500):
            then = speeds[1] * (1 + found / 8)  # of z itself after a step of its own
            found = (1 - share) * speeds[0] + share * (found + then) / 2
        assert (abs(found - exact) < 0.01 * abs(speeds[0] - exact)) == right


def test_the_share_of_the_loss_is_the_finished_chords(sd, device):
    table = ChordTable(sd, Windows.uniform(8), "ddim_eps", ends=ends(Windows.uniform(8), 2), device=device)
    for share in (0.25, 0.5, 0.8):
        merger = Merger(table, 2, share=share)
        weight = merger.weight.cpu()
        assert float(weight.mean()) == pytest.approx(1.0)
        assert float(weight[merger.levels > 0].sum() / weight.sum()) == pytest.approx(share)
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="must lie between 0 and 1"):
            Merger(table, 2, share=share)
