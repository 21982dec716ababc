"""Starts from noise: a trajectory of the teacher gives a pair for every trained window, whoever asks for which of them."""

import json
import pathlib
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tiny
import watch
from reflow.data.shapes import Group
from reflow.errors import UserError
from reflow.flow import DiscreteVP
from reflow.models.conditioning import denoise
from reflow.recipes import reading
from reflow.training import draws, loop, plan, run, solve_pairs, solves, stages

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "soak"))

import nursery

NOISE = ("objective.starts=noise",)


class Counting(torch.nn.Module):
    """The teacher, and the rows that it was asked for."""

    def __init__(self, unet):
        super().__init__()
        self.unet, self.rows = unet, 0

    def forward(self, sample, *args, **kwargs):
        self.rows += len(sample)
        return self.unet(sample, *args, **kwargs)


def solver(tmp_path, *overrides):
    recipe = tiny.recipe(tmp_path, *NOISE, *overrides)
    device, base, data = run.begin(recipe)
    flow = stages.build(recipe, 0, DiscreteVP.from_config(base.scheduler_config), base.prediction_type, device)
    return solves.Solver(recipe, flow, data, Counting(base.unet.eval().to(device)), device)


@torch.no_grad()
def trajectory(made, number):
    """All points of a trajectory, window by window, and its item, by the solver of one window alone."""
    items, dropped, noise = made.inputs([number * made.share])
    rows = made.data.conditioning(items, dropped)
    points, dtype = [noise], made.dtype
    taught = rows if made.flow.solver.guidance_scale is None else made.data.null_rows(items).cat(rows)
    for k in range(max(made.active) + 1):
        points.append(made.flow.solver.solve(lambda x, t: denoise(made.teacher, x, t, taught), points[-1], torch.tensor([k]), input_dtype=dtype))
    return torch.cat(points), int(items), rows


@pytest.mark.parametrize("overrides, active", [((), [0, 1, 2, 3]), (("teacher.guidance_scale=3.0",), [0, 1, 2, 3]), (("stages.0.half=clean",), [2, 3])])
def test_every_part_of_a_trajectory_is_the_same_whoever_solves_it(tmp_path, overrides, active):
    made, share = solver(tmp_path, *overrides), len(active)
    assert made.active == active
    whole = [trajectory(made, n) for n in range(3)]
    # Whole ones, a cut at both ends, a single pair from the middle, and an order of nobody's.
    for indices in (range(2 * share), range(share - 1, 2 * share + 1), [share + 1], [2 * share, 1, 0, share]):
        solved = made(list(indices))
        for b, i in enumerate(indices):
            points, _, rows = whole[i // share]
            k = active[i % share]
            assert int(solved.window[b]) == k
            torch.testing.assert_close(solved.z_start[b], points[k], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(solved.z_end[b], points[k + 1], rtol=1e-4, atol=1e-4)
            assert torch.equal(solved.conditioning.encoder_hidden_states[b], rows.encoder_hidden_states[0])
    assert len({item for _, item, _ in whole}) == 3


MIXED, FORWARD = "objective.starts_share=0.4", "objective.forward_share=0.3"


@torch.no_grad()
@pytest.mark.parametrize("overrides", [(), ("objective.starts=data", "teacher.guidance_scale=2.0"), ("stages.0.half=noisy", MIXED)])
def test_a_share_of_pairs_comes_from_data_up_to_noise_whoever_asks_for_which(tmp_path, overrides):
    made = solver(tmp_path, FORWARD, "stages.1.forward_share=0", *overrides)
    share, table, windows = made.share, made.flow.table, len(made.flow.windows)
    kinds = made.kinds(np.arange(10)).tolist()
    assert share == len(made.active) and [n for n, kind in enumerate(kinds) if kind == draws.FORWARD] == [3, 6, 9]
    whole = made(list(range(7 * share)))
    for indices in ([3 * share + 1], range(3 * share, 7 * share), [6 * share + share - 1, 3 * share, 0]):
        solved = made(list(indices))
        for b, i in enumerate(indices):
            torch.testing.assert_close(solved.z_start[b], whole.z_start[i], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(solved.z_end[b], whole.z_end[i], rtol=1e-4, atol=1e-4)
    for draw in (3, 6):
        items, dropped, noise = made.inputs([draw * share])
        z = table.alpha_end[-1] * made.data.latent(items) + table.sigma_end[-1] * noise
        rows = made.data.conditioning(items, dropped)
        taught = rows if made.flow.solver.guidance_scale is None else made.data.null_rows(items).cat(rows)
        for k in reversed(range(windows)):
            up = made.flow.inverter.solve(lambda x, t, taught=taught: denoise(made.teacher, x, t, taught), z, torch.tensor([k]), input_dtype=made.dtype)
            if k in made.active:
                row = draw * share + made.active.index(k)
                torch.testing.assert_close(whole.z_end[row:row + 1], z, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(whole.z_start[row:row + 1], up, rtol=1e-4, atol=1e-4)
            z = up
        assert 0.5 < float(z.std()) < 2  # near noise where it began at a latent


@torch.no_grad()
def test_a_share_of_windows_starts_at_noised_data_whoever_asks_for_which(tmp_path):
    made, pure = solver(tmp_path, MIXED), solver(tmp_path)
    share, kinds = made.share, (made.kinds(np.arange(5)) == draws.NOISE).tolist()
    assert kinds == [False, False, True, False, True]  # two of five, evenly
    for indices in (range(5 * share), range(share + 1, 3 * share + 2), [2 * share + 1, 0, 4 * share, 3 * share + 2], [2 * share], [1]):
        solved, other = made(list(indices)), pure(list(indices))
        assert torch.equal(solved.window, other.window)
        torch.testing.assert_close(solved.conditioning.encoder_hidden_states, other.conditioning.encoder_hidden_states)  # the draws are the same
        for b, i in enumerate(indices):
            if kinds[i // share]:
                torch.testing.assert_close(solved.z_start[b], other.z_start[b], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(solved.z_end[b], other.z_end[b], rtol=1e-4, atol=1e-4)
                continue
            items, _, noise = made.inputs([i])
            start = made.flow.table.start(made.data.latent(items), noise, solved.window[b:b + 1])
            torch.testing.assert_close(solved.z_start[b:b + 1], start)
            rows = made.data.conditioning(items, made.inputs([i])[1])
            end = made.flow.solver.solve(lambda x, t, rows=rows: denoise(made.teacher, x, t, rows), start, solved.window[b:b + 1], input_dtype=made.dtype)
            torch.testing.assert_close(solved.z_end[b:b + 1], end, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.75, 1.0])
def test_the_share_of_trajectories_is_exact_and_even(share):
    kinds = draws.chosen(np.arange(4000), share)
    assert kinds.sum() == 4000 * share and np.abs(np.convolve(kinds, np.ones(40), "valid") - 40 * share).max() <= 1


@pytest.mark.parametrize("overrides", [(), ("stages.0.half=clean", "stages.0.solver_steps=2"), ("stages.0.windows=5", "stages.1.teacher=root"), (MIXED,),
                                       (FORWARD, "stages.1.forward_share=0"), (FORWARD, MIXED, "stages.1.forward_share=0", "stages.0.half=clean"),
                                       (FORWARD, "stages.1.forward_share=0", "stages.0.half=noisy", "objective.starts=data")])
@pytest.mark.parametrize("part", [1, 3, 4, 8])
def test_the_teacher_is_asked_as_often_as_the_plan_counts(tmp_path, overrides, part):
    made = solver(tmp_path, *overrides)
    for count in (8, 11, 23):
        made.teacher.rows = 0
        for first in range(0, count, part):
            made(list(range(first, min(first + part, count))))
        counted = solves.windows_solved(made.active, len(made.flow.windows), count, part, made.recipe.objective)
        assert made.teacher.rows == counted * made.flow.stage.solver_steps
    if part % made.share == 0 and overrides[:1] not in ((MIXED,), (FORWARD,)):
        assert solves.windows_solved(made.active, len(made.flow.windows), 6 * part, part, made.recipe.objective) == 6 * part // made.share * (max(made.active) + 1)


def test_the_plan_counts_one_solve_a_stored_window_and_says_what_a_cut_costs(tmp_path):
    stored = plan.describe(tiny.recipe(tmp_path, *NOISE, "stages.0.pairs=64", "stages.0.solver_steps=3"))
    assert "64 windows stored pairs: 3 teacher evaluations and " in stored and "cut trajectories" not in stored
    # Parts of 2 in trajectories of 4: 2 windows for the first half, 4 for the second.
    cut = plan.describe(tiny.recipe(tmp_path, *NOISE, "train.micro_batch=2"))
    assert "64 windows solved as it goes: 1.5 teacher evaluations and " in cut
    assert "micro-batches of 2 solves cut trajectories of 4 windows, which costs 1.5 times the solves: make train.micro_batch a multiple of 4" in cut
    assert "cut trajectories" not in plan.describe(tiny.recipe(tmp_path, *NOISE))


def losses(folder):
    records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [r["loss"] for r in records if r["event"] == "train"]


@pytest.mark.parametrize("overrides", [
    (FORWARD, "stages.1.forward_share=0"), ("stages.0.pairs=22", MIXED),
    pytest.param(("stages.0.chords_per_solve=2", "stages.0.windows=2", "stages.1.teacher=root"), marks=pytest.mark.slow),
], ids=lambda o: o[0] if o else "")
def test_a_cut_run_from_noise_ends_bit_equal_and_other_micro_batches_agree_to_rounding(tmp_path, overrides):
    def recipe(micro):
        return tiny.recipe(tmp_path, *NOISE, f"train.micro_batch={micro}", "log.every=16", "stages.0.samples=48", "stages.1.samples=32", *overrides)

    run.train(recipe(4), tmp_path / "whole")
    with watch.leaving_after(2):
        assert run.train(recipe(4), tmp_path / "cut") == loop.LEFT_EARLY
    assert run.train(recipe(4), tmp_path / "cut") == 0
    for i in (0, 1):  # the second stage is solved by the first one's student
        a, b = (load_file(tmp_path / x / f"stage-{i + 1}" / "unet_ema.safetensors") for x in ("whole", "cut"))
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    run.train(recipe(2), tmp_path / "other")
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)


def test_stored_trajectories_are_those_of_the_run_and_chunks_hold_whole_ones(tmp_path, monkeypatch):
    monkeypatch.setattr("reflow.training.pairs.CHUNK", 8)
    settings = (*NOISE, "stages.0.windows=5", "stages.1.teacher=root", "teacher.batch_size=1")
    recipe = tiny.recipe(tmp_path, *settings).model_copy(update={"stages": tiny.recipe(tmp_path, *settings).stages[:1]})
    assert solve_pairs.solve(recipe, 1, 12, tmp_path / "pairs") == 12
    parts = [load_file(path) for path in sorted((tmp_path / "pairs").glob("*.safetensors"))]
    assert [part["window"].tolist() for part in parts] == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1]]
    assert [len(set(part["item"].tolist())) for part in parts] == [1, 1, 1]
    made = solver(tmp_path, *settings)
    for name in ("z_start", "z_end"):
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), getattr(made(list(range(12))), name), rtol=1e-4, atol=1e-4)
    # As an older version described its store: a pair of each trajectory.
    manifest = tmp_path / "pairs" / "pairs.json"
    told = json.loads(manifest.read_text())
    assert told["settings"].pop("pairs of one trajectory") == 5
    manifest.write_text(json.dumps(told))
    with pytest.raises(UserError, match="pairs of one trajectory: None -> 5"):
        run.train(tiny.recipe(tmp_path, *settings, f"stages.0.pairs_from={tmp_path / 'pairs'}", "stages.1.teacher=root"), tmp_path / "run")


def test_a_run_from_noise_of_an_older_version_does_not_go_on_in_another_order(tmp_path):
    recipe = tiny.short(tmp_path, *NOISE)
    with watch.leaving_after(1):
        run.train(recipe, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "old")
    (tmp_path / "old" / "rules.json").write_text('{"ema": 2}')
    with pytest.raises(UserError, match="samples come in another order .rule 'noise': version 1 -> 2"):
        run.train(recipe, tmp_path / "old")
    # One window is one trajectory, as it was.
    assert [rule.name for rule in run.rules.RULES if rule.touches(reading.load("digits-rectified"))] == ["ema"]


def test_trajectories_that_micro_batches_of_two_image_sizes_would_share_are_refused(tmp_path):
    class Two:
        groups = (Group(0, 3, (4, 8, 8)), Group(3, 3, (4, 4, 16)))

    run.engine.init_distributed()
    for windows, micro, fits in ((4, 8, True), (8, 4, True), (4, 1, True), (3, 4, False)):
        recipe = tiny.short(tmp_path, *NOISE, f"stages.0.windows={windows}", "stages.1.teacher=root", f"train.micro_batch={micro}")
        if fits:
            run.check_shapes(recipe, Two())
        else:
            with pytest.raises(UserError, match="stages.0 trains 3 windows on 4 solves a micro-batch"):
                run.check_shapes(recipe, Two())


@pytest.mark.slow
def test_two_ranks_agree_with_one_to_rounding_and_go_on_after_a_kill(tmp_path):
    """Trajectories of four windows in micro-batches of two ranks; the second stage's are of the first one's student."""
    sets = (*NOISE, MIXED, "stages.0.samples=64", "stages.1.samples=64", "checkpoint.every=32", "log.every=16", "validate.every=0", "train.zero_stage=1")
    (tmp_path / "tiny.toml").write_text(tiny.TINY)

    def words(name):
        return ["train", "--recipe", str(tmp_path / "tiny.toml"), "--run-dir", str(tmp_path / name), *(w for s in sets for w in ("--set", s))]

    assert nursery.run(words("two"), tmp_path, ranks=2).codes == (0, 0)
    whole = nursery.run(words("cut"), tmp_path, ranks=2, changes=60)
    assert whole.killed
    assert nursery.run(words("cut"), tmp_path, ranks=2).codes == (0, 0)
    run.train(tiny.recipe(tmp_path, *sets), tmp_path / "one")
    assert losses(tmp_path / "cut") == losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    for i in (0, 1):
        a, b = (load_file(tmp_path / x / f"stage-{i + 1}" / "unet_ema.safetensors") for x in ("two", "cut"))
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("overrides", [("train.micro_batch=4",), ("train.micro_batch=4", "stages.0.pairs=24", "teacher.batch_size=2"), (FORWARD, "stages.1.forward_share=0")])
def test_the_loop_replays_what_it_solves_again_and_again(tmp_path, monkeypatch, overrides):
    """With validation before and between, whose solves are of another size; graphs themselves need a GPU."""
    from reflow.flow import captured

    def capture(solver, network, *tensors, input_dtype=None):
        return lambda z, window, *inputs: solver.solve(lambda x, t: network(x, t, *inputs), z, window, input_dtype=input_dtype)

    started, begin = [], solves.Solver.__init__

    def watched(self, *args):
        begin(self, *args)
        self.captured = captured.CapturedSolves(self.ask, input_dtype=self.dtype, capture=capture)
        started.append(self)

    settings = tiny.short(tmp_path, *NOISE, "validate.every=16", "log.every=16", *overrides)
    run.train(settings, tmp_path / "plain")
    monkeypatch.setattr(solves.Solver, "__init__", watched)
    run.train(settings, tmp_path / "graphs")
    counts = started[0].captured.counts
    assert counts["replayed"] > counts["plain"] and 1 <= counts["captured"] <= captured.MOST
    assert losses(tmp_path / "graphs") == losses(tmp_path / "plain")
    records = [json.loads(line) for line in (tmp_path / "graphs" / "log.jsonl").read_text().splitlines()]
    assert [r["solves"] for r in records if r["event"] == "train"][-1] == counts
    assert all("solves" not in json.loads(line) for line in (tmp_path / "plain" / "log.jsonl").read_text().splitlines())
