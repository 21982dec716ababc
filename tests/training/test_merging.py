"""Windows that merge within a stage: the teacher's part, then the steps of the stage's own average, whoever makes the pairs."""

import json

import pytest
import torch
from safetensors.torch import load_file

import tiny
import watch
from reflow.errors import UserError
from reflow.flow import DiscreteVP, network_time
from reflow.models.conditioning import denoise
from reflow.training import loop, merged, plan, run, solve_pairs, solves, stages

ONE = ("stages.0.windows=1", "stages.0.merges=2", "stages.1.teacher=root")


def recipe(folder, *overrides):
    """The tiny recipe's first stage, which learns four parts and ends with one window."""
    whole = tiny.recipe(folder, "validate.images=1", "stages.0.samples=48", *ONE, *overrides)
    return whole.model_copy(update={"stages": whole.stages[:1]})


def solver(settings):
    device, base, data = run.begin(settings)
    flow = stages.build(settings, 0, DiscreteVP.from_config(base.scheduler_config), base.prediction_type, device)
    return solves.Solver(settings, flow, data, base.unet.eval().to(device), device)


@torch.no_grad()
@pytest.mark.parametrize("overrides", [(), ("train.precision=bf16",), ("model.lora_rank=2", "teacher.precision=bf16")], ids=["fp32", "bf16", "lora"])
def test_chords_are_finished_by_the_average_as_it_stands(tmp_path, monkeypatch, overrides):
    seen, networks = [], []
    follow, call = merged.Merged.follow, merged.Merged.__call__

    def following(self, engine, ema):
        follow(self, engine, ema)
        held = self.networks.adapters.get("average") if "model.lora_rank=2" in overrides else dict(self.network.named_parameters())
        average = engine.state(ema.average)
        assert average and all(torch.equal(held[name], value.to(held[name].dtype)) for name, value in average.items())
        networks.append({name: value.clone() for name, value in average.items()})

    def calling(self, indices):
        raw, solved = self.source(indices), call(self, indices)
        table, z, asked = tables[0], raw.z_end.clone(), []
        for b, part in enumerate(raw.window.tolist()):
            for n in range({0: 2, 2: 1}.get(part, 0)):
                k = torch.tensor([part + 2**n])
                t = table.t_start[k]
                output = denoise(self.network, z[b:b + 1].to(self.dtype), network_time(t), raw.conditioning.select(slice(b, b + 1)).to("cpu", self.dtype))
                a, c = table.velocity_coefficients(k, t)
                z[b] = z[b] + float(table.dt[k]) * (float(a) * z[b] + float(c) * output[0].float())
                asked.append(part)
        exact = "fp32" if self.dtype == torch.float32 and "model.lora_rank=2" not in overrides else "bf16"
        torch.testing.assert_close(solved.z_end, z, rtol=1e-4 if exact == "fp32" else 0.05, atol=1e-4 if exact == "fp32" else 0.05)
        assert torch.equal(solved.z_start, raw.z_start) and torch.equal(solved.window, raw.window)
        assert asked.count(0) == 2 * raw.window.tolist().count(0) and asked.count(2) == raw.window.tolist().count(2)
        seen.append(solved.window.tolist())
        return solved

    tables, build = [], stages.build

    def building(*args):
        tables.append(build(*args).table)
        return build(*args)

    monkeypatch.setattr(merged.Merged, "follow", following)
    monkeypatch.setattr(merged.Merged, "__call__", calling)
    monkeypatch.setattr(stages, "build", building)
    with torch.enable_grad():
        assert run.train(recipe(tmp_path, "validate.every=16", *overrides), tmp_path / "run") == 0
    assert len(networks) == 3 and len(seen) == 12 and all(part == [0, 1, 2, 3] for part in seen)
    assert any(not torch.equal(networks[0][name], networks[2][name]) for name in networks[0])
    # The student that is left is of the merged window, and its log speaks of the parts.
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {len(r["windows"]) for r in records if r["event"] == "train"} == {4}
    assert [r["steps"] for r in records if r["event"] == "paired"] == [1] * 4


@pytest.mark.parametrize("overrides", [
    (), ("objective.starts=noise", "stages.0.pairs=18", "stages.0.self_share=0.8"), ("model.lora_rank=2", "stages.0.chords_per_solve=2"),
], ids=["data", "stored trajectories", "lora"])
def test_a_cut_run_ends_bit_equal(tmp_path, overrides):
    settings = recipe(tmp_path, "log.every=16", "checkpoint.every=16", *overrides)
    run.train(settings, tmp_path / "whole")
    with watch.leaving_after(2):
        assert run.train(settings, tmp_path / "cut") == loop.LEFT_EARLY
    assert run.train(settings, tmp_path / "cut") == 0
    a, b = (load_file(next((tmp_path / x / "stage-1").glob("*_ema.safetensors"))) for x in ("whole", "cut"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    first, second = ([r["loss"] for r in map(json.loads, (tmp_path / x / "log.jsonl").read_text().splitlines()) if r["event"] == "train"]
                     for x in ("whole", "cut"))
    assert first == second


@torch.no_grad()
def test_validation_compares_with_chords_of_the_teacher_alone(tmp_path):
    made = solver(recipe(tmp_path, "teacher.guidance_scale=2.0"))
    indices = [0, 1, 2, 3, 6, 4]
    solved, begun = made.whole(indices), made(indices)
    items, dropped, _ = made.inputs(indices)
    rows = made.data.null_rows(items).cat(made.data.conditioning(items, dropped))
    assert solved.window.tolist() == [0, 1, 2, 3, 2, 0]
    for b, (first, last) in enumerate([(0, 3), (1, 1), (2, 3), (3, 3), (2, 3), (0, 3)]):
        z, mine = solved.z_start[b:b + 1], rows.select(torch.tensor([b, b + len(indices)]))
        for k in range(first, last + 1):
            z = made.flow.solver.solve(lambda x, t, mine=mine: denoise(made.teacher, x, t, mine), z, torch.tensor([k]))
        torch.testing.assert_close(solved.z_end[b:b + 1], z, rtol=1e-4, atol=1e-4)
        assert torch.equal(solved.z_end[b], begun.z_end[b]) == (first == last)


def test_pairs_of_ordinary_windows_serve_a_stage_that_merges_them(tmp_path):
    ordinary = tiny.recipe(tmp_path)
    assert solve_pairs.solve(ordinary, 1, 16, tmp_path / "pairs") == 16
    assert run.train(recipe(tmp_path, f"stages.0.pairs_from={tmp_path / 'pairs'}", "stages.0.samples=32"), tmp_path / "run") == 0
    with pytest.raises(UserError, match="boundaries"):
        run.train(recipe(tmp_path, f"stages.0.pairs_from={tmp_path / 'pairs'}", "stages.0.merges=1"), tmp_path / "other")


def test_the_plan_counts_the_students_own_evaluations(tmp_path):
    said = plan.describe(recipe(tmp_path))
    # One solver step a part, and 2 + 0 + 1 + 0 evaluations of the average in four.
    assert "stage 1: 4 windows that merge into 1 x 1 solver steps" in said and "48 windows solved as it goes: 1.75 teacher evaluations and " in said
    assert "the average that finishes chords" in said
    assert "finishes chords" not in plan.describe(tiny.recipe(tmp_path))
    assert "finishes chords" not in plan.describe(recipe(tmp_path, "model.lora_rank=2"))  # an adapter more


@pytest.mark.parametrize("overrides, said", [
    (["stages.0.self_share=0.5"], r"stages.0.self_share counts where the stage merges windows itself; write stages.0.merges = 1 or more"),
    (["stages.0.merges=9"], r"stages.0 has 4 windows of 2\^9 parts each .merges., and all of time has 1000"),
    (["stages.0.merges=10"], r"'stages.0.merges' = 10 cannot be used"),
    (["stages.0.merges=1", "stages.0.self_share=1.0"], r"'stages.0.self_share' = 1.0 cannot be used"),
    (["stages.0.merges=2", "stages.0.solver_steps=100"], "its smallest part spans only 62 schedule indices"),
    (["stages.1.merges=2"], "each of the boundaries of its parts must be one of that stage's"),
    (["stages.0.merges=2", "stages.0.boundaries=[1.0, 0.4, 0.0]", "stages.0.half=noisy"], "either 'windows'"),
])
def test_what_makes_no_sense_is_refused(tmp_path, overrides, said):
    with pytest.raises(UserError, match=said):
        tiny.recipe(tmp_path, *overrides)


def test_one_half_merges_alone(tmp_path):
    settings = recipe(tmp_path, "stages.0.windows=2", "stages.0.merges=1", "stages.0.half=clean")
    made = solver(settings)
    assert made.active == [2, 3] and made.flow.merger.levels[made.flow.active].tolist() == [1, 0]
    assert run.train(settings, tmp_path / "run") == 0
