"""Windows against PeRFlow's own scanning rule: half-open, boundary times start a window."""

import pytest
import torch

from reflow.flow import Windows, snap


def scan(windows, t):
    """PeRFlow's lookup: from noise to data, the first window with t_end < t - 0.1/1000."""
    for k, end in enumerate(windows.t_end):
        if end < t - 1e-4:
            return k
    return len(windows) - 1


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 16])
def test_uniform_windows_and_lookup(count, device):
    windows = Windows.uniform(count)
    assert len(windows) == count and windows.boundaries[0] == 1.0 and windows.boundaries[-1] == 0.0
    assert windows.t_start == pytest.approx([1 - k / count for k in range(count)])
    assert windows.t_end == pytest.approx([1 - (k + 1) / count for k in range(count)])
    times = [k / 1000 for k in range(1001)] + list(windows.boundaries)
    found = windows.lookup(torch.tensor(times, device=device))
    assert found.dtype == torch.int64 and found.device.type == device.type
    assert found.tolist() == [scan(windows, t) for t in times]
    # a boundary belongs to the window that it starts, in fp32 as in fp64
    for dtype in (torch.float32, torch.float64):
        starts = torch.tensor(windows.t_start, dtype=dtype, device=device)
        assert windows.lookup(starts).tolist() == list(range(count))


def test_lookup_is_half_open():
    windows = Windows((1, 0.75, 0.5, 0.25, 0))
    t = torch.tensor([[1.0, 0.7502, 0.75], [0.75005, 0.7499, 0.0]])
    assert windows.lookup(t).tolist() == [[0, 0, 1], [1, 1, 3]]


def test_lookup_outside_takes_the_nearest_window():
    windows = Windows.uniform(2, t_noise=0.8, t_clean=0.2)
    assert windows.boundaries == pytest.approx((0.8, 0.5, 0.2))
    assert windows.lookup(torch.tensor([1.0, 0.1])).tolist() == [0, 1]


def test_merging_halves_until_one_is_left():
    windows = Windows.uniform(8)
    for count in (4, 2, 1):
        windows = windows.merge()
        assert windows == Windows.uniform(count)
    assert Windows.uniform(6).merge(3) == Windows.uniform(2)
    assert Windows((1, 0.9, 0.5, 0.2, 0)).merge().boundaries == (1, 0.5, 0)
    with pytest.raises(ValueError, match="3 windows cannot be merged by 2"):
        Windows.uniform(3).merge()


def test_halves():
    windows = Windows((1, 0.75, 0.5, 0.2, 0))
    assert windows.half("noisy") == (0, 1) and windows.half("clean") == (2, 3)
    assert Windows((1, 0.5)).half("clean") == ()
    with pytest.raises(ValueError, match="Window 1 runs from 0.6.* across"):
        Windows.uniform(3).half("noisy")
    with pytest.raises(ValueError, match="noisy"):
        windows.half("left")


@pytest.mark.parametrize("boundaries", [(1.0,), (0.0, 1.0), (1.0, 0.5, 0.5, 0.0), (1.2, 0.0), (1.0, float("nan"), 0.0)])
def test_bad_boundaries_are_refused(boundaries):
    with pytest.raises(ValueError, match="[Bb]oundaries"):
        Windows(boundaries)
    with pytest.raises(ValueError):
        Windows.uniform(0)


@pytest.mark.parametrize("grid", [1000, 200])
def test_snap_is_perflows_grid(grid, device):
    u = torch.rand(4000, generator=torch.Generator().manual_seed(0)).to(device)
    t = 1 - u
    snapped = snap(t, grid)
    assert snapped.dtype == t.dtype
    # away from the grid points, where PeRFlow's floor depends on rounding
    inside = ((u * grid) % 1 - 0.5).abs() < 0.49
    torch.testing.assert_close(snapped[inside], (1 - torch.floor(u * grid) / grid)[inside], rtol=0, atol=2e-6)
    assert float(snapped.min()) == pytest.approx(1 / grid) and float(snapped.max()) == 1.0
    assert torch.equal(snap(snapped, grid), snapped)


@pytest.mark.parametrize("count", [4, 3])
def test_snap_stays_in_the_half_open_window(count, device):
    # also a time that rounding has put on the window's clean end, which is the start of the next window
    windows = Windows.uniform(count)
    start, end = (torch.tensor(values, device=device) for values in (windows.t_start, windows.t_end))
    for place in (0.0, 1e-7, 0.3, 0.9999, 1 - 2**-24, 1.0):
        t = torch.lerp(start, end, torch.full_like(start, place))
        snapped = snap(t, 1000, start, end)
        assert bool((snapped > end).all()) and bool((snapped <= start).all())
        assert float((snapped - t).abs().max()) < 1.01e-3
        assert windows.lookup(snapped).tolist() == list(range(count))


def test_snap_stops_at_a_start_off_the_grid():
    t = torch.tensor([0.6663, 0.31])
    assert snap(t, 1000, torch.tensor([2 / 3, 1 / 3])).tolist() == pytest.approx([2 / 3, 0.31])
