"""Numbers that are none, or too large, wherever they come in: the sample or the step is left out and counted, or the run stops, by recipe."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import tiny
from reflow.data import latents, sampler
from reflow.errors import UserError
from reflow.training import loop, run, solves

NAN, INF, HUGE = math.nan, math.inf, 1e25  # whose square is no fp32 number
SAMPLE = 21  # of the second step


def in_latents(monkeypatch, value):
    encode = latents.encode_digits

    def spoiled(base, **options):
        data = encode(base, **options)
        data.latents[sampler.item_of(0, 0, SAMPLE, len(data))] = value
        return data

    monkeypatch.setattr(run, "encode_digits", spoiled)


def in_solved(monkeypatch, value, spoil):
    """`spoil` what the solver gives for the micro-batch that holds the sample, at its row."""
    solve = solves.Solver.__call__

    def spoiled(self, samples):
        solved = solve(self, samples)
        if SAMPLE in samples and len(samples) == 4:  # of training; validation solves others
            spoil(solved, samples.index(SAMPLE), value)
        return solved

    monkeypatch.setattr(solves.Solver, "__call__", spoiled)


def in_embedding(monkeypatch, value):
    def spoil(solved, row, value):
        states = solved.conditioning.encoder_hidden_states.clone()
        states[row, 1] = value
        solved.conditioning = solved.conditioning.with_rows(encoder_hidden_states=states)

    in_solved(monkeypatch, value, spoil)


def in_teacher(monkeypatch, value):
    def spoil(solved, row, value):
        solved.z_end[row] = value

    in_solved(monkeypatch, value, spoil)


def in_output(monkeypatch, value):
    """The student's own output, as an overflow in its precision leaves it; which sample it is no one tells, so the first of a step."""
    denoise, seen = loop.denoise, []

    def spoiled(network, sample, *rest):
        output = denoise(network, sample, *rest)
        if output.requires_grad:
            seen.append(1)
            if len(seen) == 6:  # the second step's second micro-batch
                mask = torch.arange(len(output)).view(-1, 1, 1, 1) == 1
                output = torch.where(mask, torch.full_like(output, value), output)
        return output

    monkeypatch.setattr(loop, "denoise", spoiled)


PLACES = {"latent": in_latents, "embedding": in_embedding, "teacher": in_teacher, "output": in_output}
CASES = [("latent", NAN, 0, "fp32"), ("latent", HUGE, 2, "bf16"), ("embedding", INF, 1, "bf16"), ("embedding", NAN, 0, "bf16"),
         ("teacher", NAN, 3, "fp32"), ("teacher", HUGE, 0, "fp32"), ("output", INF, 2, "bf16"), ("output", HUGE, 1, "fp32")]


@pytest.mark.parametrize("place, value, zero, precision", CASES)
def test_a_sample_that_is_no_number_is_left_out_and_counted(tmp_path, monkeypatch, place, value, zero, precision):
    PLACES[place](monkeypatch, value)
    recipe = tiny.short(tmp_path, f"train.zero_stage={zero}", f"train.precision={precision}", "log.every=16", "validate.every=0",
                        "train.max_nonfinite=1", "checkpoint.every=16")
    assert run.train(recipe, tmp_path / "run") == 0
    records = [r for r in map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines()) if r["event"] == "train"]
    assert [r["excluded"] for r in records] == [0, 1, 0] and [r["skipped_steps"] for r in records] == [0, 0, 0]
    assert all(r["loss"] < 100 and r["grad_norm"] is not None for r in records)
    files = [*(tmp_path / "run").rglob("*.safetensors")]
    assert len(files) >= 4 and all(t.isfinite().all() for file in files for t in load_file(file).values() if t.is_floating_point())


@pytest.mark.parametrize("place", PLACES)
def test_a_recipe_that_allows_none_stops_there(tmp_path, monkeypatch, place):
    PLACES[place](monkeypatch, HUGE)
    with pytest.raises(UserError, match=r"stage 1, step 1 \(samples 16 to 31\): 1 samples so far, train.max_nonfinite allows 0"):
        run.train(tiny.short(tmp_path, "log.every=16", "validate.every=0"), tmp_path / "run")
    assert not list((tmp_path / "run").rglob("stage-1/*.safetensors"))


def test_a_row_can_be_used_where_its_square_is_a_number():
    rows = torch.ones(5, 4, 4, 4)
    rows[1:, 0, 0, 0] = torch.tensor([NAN, -INF, HUGE, 1e18])
    assert solves.usable(rows).tolist() == [True, False, False, False, True]
    rows[3:] = 7e4  # an infinity in fp16
    assert solves.usable(rows.half()).tolist() == [True, False, False, False, False]
    assert solves.usable(rows.bfloat16()).tolist() == [True, False, False, True, True]
