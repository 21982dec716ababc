"""When several ranks ask each other whether to leave: together, a second apart."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from reflow.training import engine, signals


@pytest.mark.parametrize("seconds, apart", [((0.01, 0.01), signals.MOST), ((0.01, 0.3), 3), ((0.6, 0.01), 1), ((40.0, 40.0), 1)])
def test_ranks_ask_after_the_steps_that_the_slowest_makes_in_a_second_and_leave_after_the_same(monkeypatch, seconds, apart):
    """Two ranks by turns in one process, each with a clock of its own."""
    engine.init_distributed()
    clock, turn, told, asked, left = [0.0, 0.0], 0, None, [[], []], []
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[turn])
    both = [signals.Signals(), signals.Signals()]
    for each in both:
        each.join(0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda flags, **_: flags.copy_(torch.stack([flags, told]).amax(0)))
    for step in range(40):
        both[0].asked |= step == 21
        for turn in (0, 1):
            clock[turn] += seconds[turn]
            told = torch.tensor([both[1 - turn].asked, False, seconds[1 - turn]], dtype=torch.float64)  # by the other one
            before = both[turn].agreed_at
            if both[turn].after_step(False)[0]:
                left.append((turn, step))
            if both[turn].agreed_at != before:
                asked[turn].append(step)
        if left:
            break
    assert asked[0] == asked[1] and asked[0][0] == 0 and set(np.diff(asked[0])) == {apart}
    assert [rank for rank, _ in left] == [0, 1] and 21 <= left[0][1] == left[1][1] < 21 + apart


def test_what_is_planned_asks_at_once(monkeypatch):
    engine.init_distributed()
    run = signals.Signals()
    run.join(0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    run.every, run.asked = signals.MOST, True
    assert run.after_step(False) == (False, False) and run.after_step(True) == (True, False)
