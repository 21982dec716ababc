"""The step and sample benchmarks: the published-style loop is ours in maths, every peer has a row."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from bench import flops, published, record, scenes, step, step_cells, timing
from bench.__main__ import main
from bench.rig import Rig
from reflow.flow.captured import CapturedSolves

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import tiny_pipelines

NOT_HERE = ("on a GPU", "need a GPU", "left out of a quick run")


@pytest.fixture(scope="module")
def rig(device):
    return Rig("digits", device, quick=True)


def test_the_published_step_is_ours_in_maths(rig):
    errors = step.same_maths(rig)
    assert set(errors) == {"window", "velocity", "window guided", "velocity guided", "loss", "gradient"}
    assert max(errors.values()) < step.GATE


def test_a_published_step_that_differs_is_never_timed(rig, monkeypatch, tmp_path, capsys):
    right = published.velocity_of
    monkeypatch.setattr(published, "velocity_of", lambda *given: right(*given) * 1.001)
    monkeypatch.setattr(step, "Rig", lambda *_: rig)
    assert main(["step", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 1
    assert "differs from ours" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_row_says_how_the_solves_of_its_step_ran(device):
    """A step whose graph is recorded and never replayed would be another step than the row's name says."""
    rig = Rig("digits", device, quick=True)
    made = rig.ours(windows=4, solver_steps=1, batch=2)
    times = timing.Times(10.0)
    assert "solves" not in rig.step(made, samples=2, tflop=1.0).facts(times)

    def record(solver, network, z_start, window, *inputs, input_dtype):
        return lambda z, w, *rows: solver.solve(lambda x, t: network(x, t, *rows), z, w, input_dtype=input_dtype)

    made.solver.captured = CapturedSolves(made.solver.ask, capture=record)
    facts = rig.step(made, samples=2, tflop=1.0).facts
    for _ in range(4):
        made()
    assert facts(times)["solves"] == {"captured": 1, "replayed": 2, "plain": 1}
    assert rig.window(made, made, dict(windows=4, solver_steps=1, batch=2)).facts(times)["solves"]["captured"] == 1


@pytest.mark.slow
def test_a_quick_run_has_a_row_for_every_peer(rig, monkeypatch, tmp_path):
    monkeypatch.setattr(step, "Rig", lambda *_: rig)
    monkeypatch.setattr(record, "revision", lambda: "one")  # a commit in between would make it another run
    arguments = ["step", "--device", "cpu", "--quick", "--out", str(tmp_path)]
    assert main(arguments) == 0
    rows = record.read(tmp_path / "step.jsonl")
    wanted = {
        (cell.case, name) for cell in step_cells.plan(rig.device, True, list(scenes.FAMILIES)) for name in cell.entries
    }
    assert {(row["case"], row["peer"]) for row in rows} == wanted
    for row in rows:
        assert row["note"].startswith(record.NOT_A_NUMBER)
        assert row["median_us"] or any(reason in row["note"] for reason in NOT_HERE), row["note"]
        if row["median_us"]:
            assert row["samples_per_second"] == pytest.approx(row["samples"] / row["median_us"] * 1e6)
    loop = {row["peer"]: row for row in rows if " loop: " in row["case"]}
    # With one solver step the teacher's forward is a quarter of a step's work, the unconditional half as much again.
    always = loop["published, unconditional half always"]["network_tflop"]
    assert always / loop["published"]["network_tflop"] == pytest.approx(1.25, abs=0.01)
    assert main(arguments) == 0
    assert len(record.read(tmp_path / "step.jsonl")) == len(rows)


@pytest.mark.slow
def test_random_weights_train_in_every_way(monkeypatch, tmp_path, device):
    """A tiny SDXL of the real classes instead of the real size: bf16, encoders in the loop, guided and chained."""
    pipe = tiny_pipelines.sdxl()
    folder = tmp_path / "sdxl"
    shutil.copytree(scenes.CONFIGS / "sdxl", folder)
    parts = dict(unet=pipe.unet, vae=pipe.vae, text_encoder=pipe.text_encoder, text_encoder_2=pipe.text_encoder_2)
    for name, part in parts.items():
        file = next((folder / name).glob("*.json"))
        file.write_text(
            json.dumps(json.loads(part.config.to_json_string() if "text" in name else part.to_json_string()))
        )
    monkeypatch.setattr(scenes, "CONFIGS", tmp_path)
    monkeypatch.setattr(scenes, "TOKENS", tiny_pipelines.TOKENS)
    monkeypatch.setattr(scenes.random_ids, "model_max_length", tiny_pipelines.TOKENS)
    monkeypatch.setattr(scenes, "VOCABULARY", 50)
    monkeypatch.setattr(flops, "_kept", dict)
    rig = Rig("sdxl", device, quick=True)
    assert rig.scene.dtype is torch.bfloat16 and rig.scene.student.conv_out.weight.abs().max() > 0
    before = rig.scene.student.conv_in.weight.detach().clone()
    recipe = step_cells.published_recipe("sdxl", 2, 2)
    _, window, student = step_cells.grid("sdxl", dict(windows=8, solver_steps=1, batch=2))
    wanted = ("published", "ours", "ours, previous student as teacher, 2 steps", "eager unfused")
    for cell in (recipe, window, student):
        cell.entries = {name: make for name, make in cell.entries.items() if name in wanted}
        for name, peer in cell.peers(rig).items():
            if peer.oracle is None:
                peer.run()
            else:
                error = record_error(peer)
                assert error <= (0.5 if name == "published" else 0.05), (cell.case, name, error)
    tail = rig.tail(rig.recipe(batch=2))
    assert tail.masters[0].dtype is torch.float32 and torch.isfinite(tail.masters[0]).all()
    assert not torch.equal(tail.masters[0], before.float())  # the optimizer moved it, however little


def record_error(peer):
    from bench.gate import check

    result = peer.run()
    return check(result if peer.read is None else peer.read(), peer.oracle, float("inf"))


def test_flops_of_the_file_are_those_of_the_networks(rig):
    config = rig.scene.base.configs["unet"]
    tokens = rig.scene.data.captions.encoder_hidden_states.shape[1]
    assert flops.count(config, tokens) == flops.row("digits", config, tokens)
    kept = flops._kept()
    assert kept["sdxl"]["digest"] == flops.digest(scenes.configs_of("sdxl")["unet"], 77)
    assert kept["sd15"]["forward"] / 1e12 == pytest.approx(0.803, abs=0.001)
    assert kept["sdxl"]["forward"] / 1e12 == pytest.approx(6.761, abs=0.001)


def test_a_gpu_run_covers_what_the_suite_promises():
    cells = step_cells.plan(torch.device("cuda"), False, list(scenes.FAMILIES))
    names = {(cell.family, cell.case.split(" ")[1].rstrip(":")) for cell in cells}
    for family in ("sdxl", "sd15", "digits"):
        assert {(family, part) for part in ("window", "student", "step", "loop")} <= names
    grid = next(cell for cell in cells if " step: " in cell.case)
    assert {f"{net} {work}" for net in ("eager", "compiled", "graph") for work in ("unfused", "fused", "no-op")} < set(
        grid.entries
    )
    loop = next(cell for cell in cells if " loop: " in cell.case)
    assert {"published", "ours, 2 chords a solve", "ours, 4 chords a solve", "ours, guidance 7.5"} < set(loop.entries)
    first = cells[0]
    assert first.family == "sdxl" and {"published", "ours", "ours, previous student as teacher, 2 steps"} < set(
        first.entries
    )


def test_sample_times_every_scheduler(tmp_path):
    assert main(["sample", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    rows = record.read(tmp_path / "sample.jsonl")
    timed = {(row["case"], row["peer"]) for row in rows if row["median_us"]}
    for scale in ("1", "7.5"):
        for steps in (2, 4):
            case = f"digits sample: {steps} steps, guidance {scale}"
            assert {peer for other, peer in timed if other == case} == {"stock", "piecewise", "fused"}
    assert {("digits VAE decode", "VAE"), ("digits scheduler step", "fused")} <= timed
    exact = [row["error"] for row in rows if row["peer"] in ("fused", "piecewise") and "sample:" in row["case"]]
    assert len(exact) == 8 and max(exact) < 1e-3
    assert all("seconds_per_image" in row for row in rows if row["median_us"] and "sample:" in row["case"])
