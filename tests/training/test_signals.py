"""When several ranks ask each other whether to leave: together, a second apart."""

import json
import os
import pathlib
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

import tiny
from reflow.lines import read_lines
from reflow.training import engine, pulse, signals

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "soak"))

import nursery


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


def test_a_signal_to_one_rank_takes_both_out_after_the_same_step_with_a_checkpoint(tmp_path):
    """Quick steps, so that most of them ask nobody, and no checkpoint that is planned."""
    (tmp_path / "tiny.toml").write_text(tiny.TINY)
    run_dir, said = tmp_path / "run", []
    sets = ("stages.0.samples=160000", "checkpoint.every=0", "log.every=16", "validate.every=0")
    words = ["train", "--recipe", str(tmp_path / "tiny.toml"), "--run-dir", str(run_dir), *(w for s in sets for w in ("--set", s))]
    worker = threading.Thread(target=lambda: said.append(nursery.run(words, tmp_path, ranks=2)))
    worker.start()

    def steps():
        return [r["samples"] for r in map(json.loads, read_lines(run_dir / "log.jsonl")) if r["event"] == "train"] if run_dir.exists() else []

    while not (run_dir / "log.jsonl").exists() or len(steps()) < 12:
        assert worker.is_alive(), said
        time.sleep(0.05)
    os.kill(json.loads((run_dir / pulse.FOLDER / "1").read_text())["process"], signal.SIGTERM)
    worker.join(60)
    assert said and said[0].codes == (signals.LEFT_EARLY,) * 2, said
    state = json.loads((run_dir / "checkpoints" / (run_dir / "checkpoints" / "latest").read_text() / "state.json").read_text())
    assert state["ranks"] == 2 and steps() == list(range(16, state["samples"] + 1, 16))
