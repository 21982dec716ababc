"""Ways to need less memory or disk, one rank in this process: CPU offload, a parked or float8 teacher, a full disk."""

import json
import resource
import shutil
import sys
import types

import pytest
import torch
from safetensors.torch import load_file

import tiny
import watch
from reflow.errors import UserError
from reflow.recipes import reading
from reflow.training import loop, run, teachers

SMALL = ("log.every=16",)


def weights(folder):
    return load_file(folder / "stage-1" / "unet_ema.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of three steps, and the same left after one."""
    folder = tmp_path_factory.mktemp("whole")
    assert run.train(tiny.short(folder, *SMALL), folder / "run") == 0
    with watch.leaving_after(1):
        assert run.train(tiny.short(folder, *SMALL), folder / "cut") == loop.LEFT_EARLY
    return folder


@pytest.mark.parametrize("zero, precision", [(2, "fp32"), pytest.param(3, "bf16", marks=pytest.mark.slow)])
def test_offload_resumes_bit_equal_and_without_offload_to_rounding(whole, tmp_path, zero, precision, digits_base):
    settings = [*SMALL, f"train.zero_stage={zero}", f"train.precision={precision}"]
    recipe = tiny.short(tmp_path, *settings, "train.offload=true")
    assert run.train(recipe, tmp_path / "run") == 0
    with watch.watching() as seen:
        with watch.leaving_after(1):
            run.train(recipe, tmp_path / "cut")
        shutil.copytree(tmp_path / "cut", tmp_path / "without")
        assert run.train(recipe, tmp_path / "cut") == 0
        assert seen["how"] == "same layout" and equal(weights(tmp_path / "run"), weights(tmp_path / "cut"))
        if precision == "fp32":
            assert run.train(tiny.short(tmp_path, *settings), tmp_path / "without") == 0
            a, b, start = weights(tmp_path / "without"), weights(whole / "run"), digits_base.unet.state_dict()
            assert sum((a[k] - b[k]).norm() for k in a) < 1e-3 * sum((b[k] - start[k]).norm() for k in a)


def test_a_full_disk_ends_with_a_sentence_and_the_last_checkpoint_goes_on_bit_equal(whole, tmp_path):
    recipe, folder = tiny.short(tmp_path, *SMALL), tmp_path / "run"
    shutil.copytree(whole / "cut", folder)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for steps, words in ((1, r"checkpoint .*stage-1-000000032 could not be written \(rank 0: .*about 0.0064 GB.*goes on from stage-1-000000016"),
                         (9, "weights of stage 1 could not be written .*run the same command")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
        try:
            with watch.leaving_after(steps), pytest.raises(UserError, match=words):
                run.train(recipe, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["latest", "stage-1-000000016"]
        assert not list(folder.glob("stage-1/*"))
    assert run.train(recipe, folder) == 0
    assert equal(weights(folder), weights(whole / "run"))


def test_a_parked_teacher_is_copied_up_where_it_is_used_and_dropped_after(capsys):
    network = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)).requires_grad_(False).eval()
    before, x = {k: v.clone() for k, v in network.state_dict().items()}, torch.randn(2, 3)
    expected = network(x)
    parked = teachers.Parked(network, torch.device("cpu"))  # the CPU stands for the device here: a copy is a copy
    home = {k: v.data_ptr() for k, v in network.state_dict().items()}
    for _ in range(2):
        with parked.here():
            with parked.here():
                pass
            assert all(v.data_ptr() != home[k] for k, v in network.state_dict().items()) and torch.equal(network(x), expected)
            network[0].weight.data.zero_()
        assert {k: v.data_ptr() for k, v in network.state_dict().items()} == home and equal(network.state_dict(), before)
    run.engine.init_distributed()
    assert teachers.park(network, torch.device("cpu")) is None and "nothing to do here" in capsys.readouterr().out


def e4m3(network, device):
    """What torchao's weight-only form stores: every row of a linear layer at its own scale, in real float8."""
    for layer in network.modules():
        if isinstance(layer, torch.nn.Linear):
            scale = layer.weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 448
            layer.weight.data = ((layer.weight / scale).to(torch.float8_e4m3fn).to(layer.weight.dtype) * scale).to(layer.weight.dtype)
    return "rounded"


def test_a_float8_teacher_is_measured_printed_and_bounded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(teachers, "quantise", e4m3)
    settings = [*SMALL, "teacher.precision=fp8"]
    assert run.train(tiny.short(tmp_path, *settings), tmp_path / "run") == 0
    told = next(r for r in map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines()) if r["event"] == "teacher")
    assert 1e-4 < told["relative_error"] < 0.1 and 0 < told["one_minus_cosine"] < told["relative_error"]
    assert f"change by up to {told['relative_error']:.3g} of their length" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"changes its window velocities by 0\.0.* allows 1e-05; write teacher.precision = 'bf16'"):
        run.train(tiny.short(tmp_path, *settings, "teacher.fp8_max_error=1e-5"), tmp_path / "strict")
    # One that says nothing but noise is not let through as "not greater".
    monkeypatch.setattr(teachers, "quantise", lambda n, d: (n.conv_in.weight.data.fill_(float("nan")), "broken")[1])
    with pytest.raises(UserError, match="by nan of their length"):
        run.train(tiny.short(tmp_path, *settings), tmp_path / "broken")


def test_float8_without_torchao_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match="teacher.precision = 'fp8'.*pip install torchao"):
        teachers.quantise(torch.nn.Linear(2, 2), torch.device("cpu"))


@pytest.mark.parametrize("overrides, words", [
    (["train.offload=true"], "train.zero_stage is 0; write zero_stage = 1, 2 or 3"),
    (["train.offload=true", "train.zero_stage=2", "train.optimizer=adamw8bit"], "cannot be offloaded"),
    (["teacher.offload=true", "teacher.cuda_graph=true"], "cuda_graph"), (["teacher.offload=true", "teacher.precision=fp8"], "precision = 'fp8'"),
    (["model.lora_rank=4", "teacher.precision=fp8"], "own network without its adapter"),
])
def test_ways_to_save_memory_that_exclude_each_other_are_refused(tmp_path, overrides, words):
    with pytest.raises(UserError, match=words):
        tiny.recipe(tmp_path, *overrides)


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw8bit"])
def test_paged_optimizers_need_a_gpu(tmp_path, name, device):
    if device.type != "cpu":
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=f"'{name}' pages its states through CUDA memory"):
        run.train(tiny.short(tmp_path, *SMALL, f"train.optimizer={name}"), tmp_path / "run")


def test_the_layout_may_change_between_two_starts_and_the_algorithm_not(tmp_path):
    old = tiny.recipe(tmp_path)
    free = tiny.recipe(tmp_path, "train.zero_stage=2", "train.offload=true", "train.micro_batch=8", "teacher.offload=true",
                       "model.gradient_checkpointing=true", "model.compile=true", "model.attention=sdpa", "train.rank_patience=90",
                       "train.check_fit=false")
    assert reading.changed_keys(old, free) == [] and set(reading.free_changes(old, free)) == set(reading.FREE_KEYS)
    assert all(reason for reason in reading.FREE_KEYS.values())
    # None of these changes only rounding, or nothing says so: each stays refused.
    for override in ("model.channels_last=true", "teacher.batch_size=2", "train.precision=bf16", "train.optimizer=adamw8bit", "train.deterministic=false"):
        assert len(reading.changed_keys(old, tiny.recipe(tmp_path, override))) == 1
    assert len(reading.changed_keys(old, tiny.recipe(tmp_path, "train.batch_size=32", "teacher.precision=bf16"))) == 2


def test_the_first_cure_of_a_full_card_needs_no_permission_and_is_said(tmp_path, capsys):
    with watch.leaving_after(1):
        run.train(tiny.short(tmp_path, "log.every=16"), tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    assert run.train(tiny.short(tmp_path, "log.every=16"), tmp_path / "whole") == 0
    capsys.readouterr()
    smaller = tiny.short(tmp_path, "log.every=16", "train.micro_batch=2", "model.gradient_checkpointing=true", "model.attention=sdpa")
    assert run.train(smaller, tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "The run resumes with train.micro_batch = 4 -> 2 (results equal to rounding)." in said
    assert "The run resumes with model.gradient_checkpointing = false -> true (results equal to rounding)." in said
    assert said.count("The run resumes with") == 3
    a, b = ([json.loads(line) for line in (tmp_path / x / "log.jsonl").read_text().splitlines()] for x in ("run", "whole"))
    a, b = ([r["loss"] for r in records if r["event"] == "train"] for records in (a, b))
    assert len(a) == 3 and a == pytest.approx(b, rel=1e-4)
    assert run.train(smaller, tmp_path / "run") == 0 and "The run resumes" not in capsys.readouterr().out


def test_a_micro_batch_that_decides_which_images_come_together_may_not_change(tmp_path):
    two = types.SimpleNamespace(groups=(1, 2))
    run.engine.init_distributed()
    with pytest.raises(UserError, match="train.micro_batch = 4 -> 2: with images of several sizes"):
        run.say_free_changes({"train.micro_batch": "4 -> 2"}, two, False)
    run.say_free_changes({"train.micro_batch": "4 -> 2"}, two, True)
    run.say_free_changes({"train.offload": "true -> false"}, two, False)
