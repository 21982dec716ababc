"""Every loss field of the log against values computed here in fp64 from the network's output and its target."""

import copy
import json
import time
import types

import pytest
import torch

import tiny
from reflow.training import engine, progress, run, telemetry, validation
from reflow_kernels import aligned_v_loss

WEIGHT = 0.7


def samples(seed, count=6):
    """(window, output, target) whose directions nearly agree, as in a healthy run: 1 - cosine is about 1e-3, far from the cosine."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(count, 4, 8, 8, generator=generator)
    return torch.arange(count) % 2, 1.1 * target + 0.05 * torch.randn(target.shape, generator=generator), target


def expected(output, target):
    """Averages over the samples, in fp64 and without any of the package's code."""
    p, v = (x.double().flatten(1) for x in (output, target))
    mse, magnitude = (p - v).square().mean(1), (p.norm(dim=1) - v.norm(dim=1)).square() / p.shape[1]
    turn = 1 - (p * v).sum(1) / (p.norm(dim=1) * v.norm(dim=1))
    rows = {"mse": mse, "magnitude": magnitude, "direction": mse - magnitude, "one_minus_cosine": turn, "loss": mse + WEIGHT * turn}
    return {name: pytest.approx(float(row.mean()), rel=1e-3) for name, row in rows.items()}


def test_every_logged_loss_field_is_what_its_name_says(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    device = engine.init_distributed()
    meter, batches = telemetry.Meter(3, device), [samples(0), samples(1, 4)]
    for step, batch in enumerate(batches):
        window, output, target = (x.to(device) for x in batch)
        result = aligned_v_loss(output, target, direction_weight=WEIGHT)
        meter.add(window, result.loss, result.mse, result.magnitude, result.cosine, torch.ones_like(window, dtype=torch.bool), step)
    log = telemetry.Log(tmp_path, 0)
    log.write("train", 10, meter.read())
    log.close()
    record = json.loads((tmp_path / "log.jsonl").read_text())
    window, output, target = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert record["loss"] == expected(output, target)["loss"]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [w["window"] for w in record["windows"]] == [0, 1]
    for found in record["windows"]:
        k = found["window"]
        truth = expected(output[window == k], target[window == k])
        del truth["loss"]
        assert {name: found[name] for name in truth} == truth and set(found) == {*truth, "window", "samples"}
        assert {name: board.Scalars(f"train/windows/{k}/{name}")[0].value for name in truth} == truth


def test_a_sample_that_does_not_count_is_in_no_field():
    device = engine.init_distributed()
    meter, (window, output, target) = telemetry.Meter(2, device), (x.to(device) for x in samples(2))
    good = torch.arange(len(window), device=device) != 3
    result = aligned_v_loss(torch.where(good.view(-1, 1, 1, 1), output, 0.0), target, direction_weight=WEIGHT)
    meter.add(window, result.loss, result.mse, result.magnitude, result.cosine, good, 0)
    for found in meter.read()["windows"]:
        here = good & (window == found["window"])
        truth = expected(output[here], target[here])
        del truth["loss"]
        assert {name: found[name] for name in truth} == truth and found["samples"] == int(here.sum())


def test_every_field_of_the_validation_is_what_its_name_says():
    parts = [samples(3), samples(4, 4)]
    solved = [types.SimpleNamespace(window=window, output=output, target=target) for window, output, target in parts]
    fake = types.SimpleNamespace(flow=types.SimpleNamespace(active=torch.tensor([0, 1])), fixed=solved,
                                 errors=lambda unet, s, tau: aligned_v_loss((1 + tau) * s.output, s.target, direction_weight=0.0))
    records = validation.Validation.fixed_losses(fake, None)
    window, output, target = (torch.cat(part) for part in zip(*parts, strict=True))
    assert [(r["tau"], r["window"]) for r in records] == [(tau, k) for tau in validation.TAUS for k in (0, 1)]
    for found in records:
        here = window == found["window"]
        truth = expected((1 + found["tau"]) * output[here], target[here])
        del truth["loss"]
        assert {name: found[name] for name in truth} == truth and set(found) == {*truth, "window", "tau"}


@pytest.mark.parametrize("clip", [0.0, 0.01, 1e6])
@pytest.mark.parametrize("zero, precision, rel", [(0, "fp32", 1e-5), (2, "fp32", 1e-5), (0, "bf16", 0.02)])
def test_the_gradient_norm_is_that_of_the_whole_batch_before_clipping(tmp_path, clip, zero, precision, rel):
    device = engine.init_distributed()
    settings = tiny.recipe(tmp_path, f"train.clip={clip}", f"train.zero_stage={zero}", f"train.precision={precision}", "train.batch_size=8").train
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.Linear(7, 5)).to(device)
    plain, data = copy.deepcopy(network).double(), [torch.randn(8, 6, device=device) for _ in range(2)]
    trained = engine.Engine(network, settings, accumulation=2)
    for x in (part for whole in data for part in whole.split(4)):
        trained.backward(trained(x.to(next(network.parameters()).dtype)).float().square().mean())
        trained.step(0.0)  # so that both steps have the same weights
        assert (trained.gradient_norm() or 0) >= 0
    plain(data[1].double()).square().mean().backward()
    assert trained.gradient_norm() == pytest.approx(float(torch.cat([p.grad.flatten() for p in plain.parameters()]).norm()), rel=rel)
    trained.destroy()


def test_a_run_logs_the_gradient_norm_and_the_rate_since_the_last_line_and_says_what_it_waits_for(tmp_path, monkeypatch, capfd):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    norms, real = [], engine.Engine.gradient_norm
    monkeypatch.setattr(engine.Engine, "gradient_norm", lambda self: (norms.append(real(self)), norms[-1])[1])
    assert run.train(tiny.short(tmp_path, "log.every=16"), tmp_path / "run") == 0
    records = [r for r in map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines()) if r["event"] == "train"]
    assert [r["grad_norm"] for r in records] == norms and len(set(norms)) == 3 and all(n > 0 for n in norms)
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [e.value for e in board.Scalars("train/grad_norm")] == pytest.approx(norms)
    # The first line pays for the start, which the others do not carry along.
    spans = [b["elapsed"] - a["elapsed"] for a, b in zip(records, records[1:])]
    assert [r["samples_per_second"] for r in records[1:]] == pytest.approx([16 / s for s in spans], rel=0.3)
    said = capfd.readouterr().err
    for what in ("importing DeepSpeed and joining 1 rank", "loading the base builtin", "encoding the data (digits)", "stage 1: making teacher",
                 "stage 1: checking the untrained student", "stage 1: solving the first batch"):
        assert sum(line.startswith("[") and f" s] {what}" in line for line in said.splitlines()) == 1, what


def test_a_pause_is_no_training():
    pace = progress.Rate()
    time.sleep(0.05)
    with pace.pause():
        time.sleep(0.3)
    pace.add(10)
    assert 60 < pace.read() < 201 and pace.read() == 0.0


def test_the_log_is_json_where_a_number_is_not_finite(tmp_path):
    engine.init_distributed()
    log = telemetry.Log(tmp_path, 0)
    log.write("train", 10, {"loss": float("nan"), "windows": [{"window": 0, "mse": float("inf")}], "samples": 10})
    log.close()

    def refuse(word):
        raise ValueError(word)

    found = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=refuse)
    assert found["loss"] is None and found["windows"][0]["mse"] is None and found["samples"] == 10


def test_tensorboard_shows_each_point_once_after_a_stage_starts_over(tmp_path):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    engine.init_distributed()
    picture = torch.zeros(4, 4, 3, dtype=torch.uint8).numpy()
    (tmp_path / "validation").mkdir()
    for attempt in (None, 1):  # the second stage starts again where the first one ended
        log = telemetry.Log(tmp_path, 0 if attempt is None else 32, restarted=attempt)
        if attempt is None:
            log.write("start", 0, {"stage": 0, "distance_to_own_ddim": 0.5})
            log.write("train", 32, {"stage": 0, "loss": 1.0})
            log.image("validation", picture, 32)
            Image.fromarray(picture).save(tmp_path / "validation" / "000000032.png")
        log.write("start", 32, {"stage": 1, "distance_to_own_ddim": 0.25})
        log.image("validation/untrained", picture, 32)
        log.write("train", 48, {"stage": 1, "loss": 2.0})
        log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"] if not tag.endswith("stage")}
    assert shown == {"start/distance_to_own_ddim": [(0, 0.5), (32, 0.25)], "train/loss": [(32, 1.0), (48, 2.0)]}
    assert {tag: [e.step for e in board.Images(tag)] for tag in board.Tags()["images"]} == {"validation": [32], "validation/untrained": [32]}
