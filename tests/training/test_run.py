"""One rank in this process: what a run leaves, what it refuses, and that it stops where it must."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import tiny
import watch
from reflow.data import latents
from reflow.errors import UserError
from reflow.flow import DiscreteVP
from reflow.recipes import reading
from reflow.training import engine, loop, optimizers, run, validation
from reflow_kernels import dispatch

ROOT = pathlib.Path(__file__).resolve().parents[2]
ONE = ("stages.1.samples=16", "stages.0.samples=32")


def log(folder, event):
    return [r for r in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if r["event"] == event]


def test_a_run_leaves_weights_log_pictures_and_its_recipe(tmp_path):
    recipe = tiny.recipe(tmp_path, "validate.every=32", "checkpoint.every=32")
    assert run.train(recipe, tmp_path / "run") == 0
    folder = tmp_path / "run"
    assert reading.load(str(folder / "recipe.toml")) == recipe
    train = log(folder, "train")
    assert [r["total_samples"] for r in train] == [32, 64, 96, 128] and [r["stage"] for r in train] == [1, 1, 2, 2]
    for record in train:
        assert {w["window"] for w in record["windows"]} == set(range(4 if record["stage"] == 1 else 2))
        for w in record["windows"]:
            assert w["mse"] == pytest.approx(w["magnitude"] + w["direction"])
        assert set(record["seconds"]) == {"data", "teacher", "student", "optimizer"} and record["samples_per_second"] > 0
    checks = log(folder, "validate")
    assert len(checks) == 4 and {w["tau"] for w in checks[0]["windows"]} == {0.0, 0.25, 0.5, 0.75}
    assert [r["distance_to_own_ddim"] < 1e-3 for r in log(folder, "start")] == [True, True]
    assert sorted(p.stem for p in (folder / "validation").glob("*.png")) == [
        "000000000-untrained", "000000032", "000000064", "000000064-untrained", "000000096", "000000128"]
    assert list((folder / "tensorboard").iterdir())
    assert (folder / "checkpoints" / "latest").read_text() == "stage-2-000000032"
    assert run.train(recipe, folder) == 0
    assert log(folder, "train") == train


def test_the_log_is_the_same_with_and_without_resumption_over_a_kill_of_half_a_line(tmp_path):
    recipe = tiny.recipe(tmp_path, "checkpoint.every=32")
    run.train(recipe, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    # As a kill leaves it: the last stage unfinished, its newest checkpoint in place, half a line in the log.
    (tmp_path / "b" / "stage-2" / "unet_ema.safetensors").unlink()
    with open(tmp_path / "b" / "log.jsonl", "a") as handle:
        handle.write('{"event": "train", "total')
    run.train(recipe, tmp_path / "b")
    a, b = (load_file(tmp_path / x / "stage-2" / "unet_ema.safetensors") for x in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)
    drop = ("seconds", "samples_per_second", "peak_memory", "elapsed")
    strip = [[{k: v for k, v in r.items() if k not in drop} for r in log(tmp_path / x, "train")] for x in "ab"]
    assert strip[0] == strip[1]


@pytest.mark.parametrize("schedule, middle, end", [("constant", 1.0, 1.0), ("linear", 0.5, 0.1), ("cosine", 0.5, 0.0244717)])
def test_learning_rate_curve(schedule, middle, end):
    assert optimizers.learning_rate(1.0, schedule, 0, 100, 50, 10) == pytest.approx(middle)
    assert optimizers.learning_rate(1.0, schedule, 0, 100, 90, 10) == pytest.approx(end, rel=1e-4)
    assert optimizers.learning_rate(1.0, "constant", 40, 100, 0, 10) == pytest.approx(0.25)


def test_stored_pairs_are_solved_once_and_a_missing_chunk_again(tmp_path):
    recipe = tiny.recipe(tmp_path, "stages.0.pairs=24", "stages.1.pairs=16", *ONE)
    run.train(recipe, tmp_path / "a")
    chunk = tmp_path / "a" / "stage-1" / "pairs" / "pairs-00000.safetensors"
    before = load_file(chunk)
    for path in (chunk, *(tmp_path / "a").glob("stage-*/unet_ema.safetensors")):
        path.rename(path.with_suffix(".old"))
    logged = [(r["total_samples"], r["loss"]) for r in log(tmp_path / "a", "train")]
    run.train(recipe, tmp_path / "a")
    # As after a kill before the first checkpoint: the log tells the run once.
    assert [(r["total_samples"], r["loss"]) for r in log(tmp_path / "a", "train")] == logged and len(log(tmp_path / "a", "start")) == 2
    again = load_file(chunk)
    assert all(torch.equal(before[k], again[k]) for k in before)
    for i in (0, 1):
        old, new = (load_file(tmp_path / "a" / f"stage-{i + 1}" / f"unet_ema.{s}") for s in ("old", "safetensors"))
        assert all(torch.equal(old[k], new[k]) for k in old)


@pytest.mark.parametrize("override", [
    ["stages.0.chords_per_solve=4"], ["objective.points=schedule", "objective.loss=pseudo_huber"], ["objective.starts=noise"],
    ["objective.space=eps", "objective.loss=mse"], ["stages.0.half=noisy"], ["train.max_nonfinite=3", "teacher.guidance_scale=3.0"],
    ["student.prediction_type=velocity"], ["student.prediction_type=diff_eps"], ["student.network_time=perflow"],
    ["teacher.method=heun"], ["train.schedule=linear", "objective.time_density=u_shaped", "data.caption_drop=0.5", "teacher.drops_captions=false"],
], ids=lambda o: o[0])
def test_every_setting_trains(tmp_path, override):
    recipe = tiny.recipe(tmp_path, *ONE, *override)
    assert run.train(recipe, tmp_path / "run") == 0
    assert all(w["mse"] > 0 for r in log(tmp_path / "run", "train") for w in r["windows"])


def test_half_straightening_trains_only_its_windows(tmp_path):
    run.train(tiny.recipe(tmp_path, *ONE, "stages.0.half=noisy"), tmp_path / "run")
    assert {w["window"] for w in log(tmp_path / "run", "train")[0]["windows"]} == {0, 1}


def test_a_student_that_does_not_start_as_its_teacher_is_refused(tmp_path, monkeypatch):
    # The wrong wiring: windows read with the coefficients of another schedule.
    right = validation.WindowSolver
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.02}
    monkeypatch.setattr(validation, "WindowSolver", lambda schedule, *args, **kwargs: right(DiscreteVP.from_config(betas), *args, **kwargs))
    with pytest.raises(UserError, match="differs from its network's own 4-step DDIM"):
        run.train(tiny.recipe(tmp_path), tmp_path / "run")
    assert not list((tmp_path / "run").glob("stage-*/*.safetensors"))


def test_other_parameterisations_say_how_far_off_they_start(tmp_path, capsys):
    run.train(tiny.recipe(tmp_path, *ONE, "student.prediction_type=diff_eps"), tmp_path / "run")
    assert "the untrained diff_eps student starts" in capsys.readouterr().out
    assert log(tmp_path / "run", "start")[0]["distance_to_own_ddim"] > 0.01


def poisoned(monkeypatch, rows):
    clean = latents.encode_digits

    def encode(base, **kwargs):
        data = clean(base, **kwargs)
        data.latents[rows] = float("nan")
        return data

    monkeypatch.setattr(run, "encode_digits", encode)


def test_a_non_finite_batch_is_named_and_the_checkpoint_stands(tmp_path, monkeypatch):
    recipe = tiny.recipe(tmp_path, "checkpoint.every=16", "log.every=16")
    order = [loop.sampler.item_of(0, 0, i, 1797) for i in range(64)]
    poisoned(monkeypatch, [order[40]])
    with pytest.raises(UserError, match=r"stage 1, step 2 \(samples 32 to 47\): 1 samples so far, train.max_nonfinite allows 0") as error:
        run.train(recipe, tmp_path / "run")
    latest = tmp_path / "run" / "checkpoints" / (tmp_path / "run" / "checkpoints" / "latest").read_text()
    assert latest.name == "stage-1-000000032" and str(latest) in str(error.value)
    assert all(torch.isfinite(t).all() for t in load_file(latest / "ema.safetensors").values())


def test_a_few_non_finite_samples_are_left_out_where_the_recipe_allows(tmp_path, monkeypatch):
    poisoned(monkeypatch, [loop.sampler.item_of(0, 0, 5, 1797)])
    assert run.train(tiny.recipe(tmp_path, "train.max_nonfinite=2"), tmp_path / "run") == 0
    assert sum(r["excluded"] for r in log(tmp_path / "run", "train") if r["stage"] == 1) == 1
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "run" / "stage-2" / "unet_ema.safetensors").values())


def test_diverged_weights_are_never_saved(tmp_path):
    with pytest.raises(UserError, match="not finite"):
        run.train(tiny.recipe(tmp_path, "train.learning_rate=1e30", "train.schedule=constant", "train.clip=0", "train.warmup=0",
                              "checkpoint.every=32", "log.every=64"), tmp_path / "run")
    assert not list((tmp_path / "run").glob("stage-*/*.safetensors")) and not (tmp_path / "run" / "checkpoints" / "latest").exists()


def test_changed_algorithm_keys_are_refused_on_resume_unless_allowed(tmp_path):
    run.train(tiny.recipe(tmp_path, *ONE), tmp_path / "run")
    changed = tiny.recipe(tmp_path, *ONE, "train.learning_rate=5e-4", "log.every=64")
    with pytest.raises(UserError, match="train.learning_rate: 0.001 -> 0.0005") as error:
        run.train(changed, tmp_path / "run")
    assert "log.every" not in str(error.value) and "--allow-config-change" in str(error.value)
    assert run.train(changed, tmp_path / "run", allow_config_change=True) == 0


def test_a_run_that_followed_other_rules_does_not_go_on_silently(tmp_path):
    recipe = tiny.short(tmp_path)
    with watch.leaving_after(1):
        run.train(recipe, tmp_path / "run")
    (tmp_path / "run" / "rules.json").unlink()  # as older versions left it
    with pytest.raises(UserError, match="train.ema_warmup is now a share .*version 1 -> 2.*--allow-config-change"):
        run.train(recipe, tmp_path / "run")
    for damaged in ("{", "[]"):
        (tmp_path / "run" / "rules.json").write_text(damaged)
        with pytest.raises(UserError, match="rules.json cannot be read"):
            run.train(recipe, tmp_path / "run")
    (tmp_path / "run" / "rules.json").unlink()
    assert run.train(recipe, tmp_path / "run", allow_config_change=True) == 0
    assert run.train(recipe, tmp_path / "run") == 0


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="holds no run of reflow"):
        run.train(tiny.recipe(tmp_path), tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_an_empty_data_set_is_refused():
    data = latents.LatentDataset(torch.empty(0, 4, 8, 8), torch.empty(0, dtype=torch.long), None, None)
    with pytest.raises(UserError, match="folder x is empty"):
        latents.checked(data, "folder x")


def test_a_damaged_checkpoint_is_an_error_that_names_another(tmp_path):
    recipe = tiny.recipe(tmp_path, "checkpoint.every=16")
    run.train(recipe, tmp_path / "run")
    (tmp_path / "run" / "stage-2" / "unet_ema.safetensors").unlink()
    (tmp_path / "run" / "checkpoints" / "stage-2-000000048" / "ema.safetensors").unlink()
    with pytest.raises(UserError, match="stage-2-000000048.*not whole.*stage-2-000000032"):
        run.train(recipe, tmp_path / "run")


@pytest.mark.parametrize("override, words", [
    ("model.family=digit", "digits"), ("model.base=/nowhere/at/all", "/nowhere/at/all"), ("data.source=digts", "digits"),
    ("student.prediction_type=ddim_v", "ddim_eps"), ("train.deepspeed=/nowhere.json", "/nowhere.json"),
])
def test_bad_input_ends_with_a_sentence_and_leaves_nothing(tmp_path, override, words):
    with pytest.raises(UserError, match=words):
        run.train(tiny.recipe(tmp_path, override), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "stage-1").exists()


def test_a_backend_that_cannot_run_here_is_said_before_anything_is_written(tmp_path, monkeypatch, device):
    if device.type != "cpu":
        pytest.skip("Triton runs on a GPU")
    monkeypatch.setenv("REFLOW_KERNELS_BACKEND", "triton")
    monkeypatch.setattr("reflow_kernels.dispatch.interpreting", lambda: False)
    dispatch._resolve.cache_clear()
    with pytest.raises(UserError, match="cannot run on cpu.*REFLOW_KERNELS_BACKEND asks for the triton backend"):
        run.train(tiny.recipe(tmp_path), tmp_path / "run")
    dispatch._resolve.cache_clear()
    assert not (tmp_path / "run").exists()


def test_wandb_that_is_not_installed_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        run.train(tiny.recipe(tmp_path, "log.wandb=true"), tmp_path / "run")


def test_a_users_deepspeed_json_is_laid_over_ours_but_not_over_batch_sizes(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"reduce_bucket_size": 1000}, "gradient_clipping": 0.5, "train_batch_size": "auto"}')
    train = tiny.recipe(tmp_path, "train.zero_stage=2", f"train.deepspeed={path}").train
    merged = engine.config_for(train, 4, 10**6, 1)
    assert merged["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000} and merged["gradient_clipping"] == 0.5
    path.write_text('{"train_batch_size": 64}')
    with pytest.raises(UserError, match="train_batch_size.*recipe"):
        engine.config_for(train, 4, 10**6, 1)


def command(tmp_path, folder, *overrides):
    tiny.recipe(tmp_path)
    sets = [a for o in overrides for a in ("--set", o)]
    return [sys.executable, "scripts/train.py", "--recipe", str(tmp_path / "tiny.toml"), "--run-dir", str(folder), *sets]


def outside():
    """The environment of a fresh shell: without the process group that this test process has joined."""
    group = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in group} | {"OMP_NUM_THREADS": "1"}


def wait_for(path, process, seconds=120):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGKILL", marks=pytest.mark.slow)])  # test_launched.py kills too
def test_a_signal_leaves_a_checkpoint_and_the_same_command_ends_bit_equal(tmp_path, name):
    longer = ("stages.0.samples=160", "stages.1.samples=16", "checkpoint.every=32", "log.every=16", "checkpoint.keep=9")
    process = subprocess.Popen(command(tmp_path, tmp_path / "cut", *longer), cwd=ROOT, env=outside(), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "cut" / "checkpoints" / "latest", process)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=120)
    if name == "SIGKILL":
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == loop.LEFT_EARLY and "The same command goes on from there" in out, err
    recipe = reading.load(str(tmp_path / "tiny.toml"), list(longer))
    assert run.train(recipe, tmp_path / "cut") == 0  # another process than the one that was ended
    run.train(recipe, tmp_path / "whole")
    for i in (0, 1):
        a, b = (load_file(tmp_path / x / f"stage-{i + 1}" / "unet_ema.safetensors") for x in ("cut", "whole"))
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert [r["loss"] for r in log(tmp_path / "cut", "train")] == [r["loss"] for r in log(tmp_path / "whole", "train")]


@pytest.fixture
def python_handlers():
    """The handlers that a program starts with, and the old ones back afterwards."""
    start = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGUSR1: signal.SIG_DFL}
    old = {name: signal.signal(name, handler) for name, handler in start.items()}
    yield start
    for name, handler in old.items():
        signal.signal(name, handler)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_each_signal_asks_once_and_only_a_second_ctrl_c_ends_at_once(python_handlers, capfd, name):
    engine.init_distributed()
    with loop.Signals() as signals:
        number = getattr(signal, name)
        signals.join(0)
        assert signals.agree() == (False, False)
        signal.raise_signal(number)
        assert signals.agree() == (True, False)
        said = capfd.readouterr().err
        if name == "SIGINT":
            assert signal.getsignal(number) == signal.SIG_DFL and said.count("Interrupted") == 1 and len(said.strip().splitlines()) == 1
        else:
            assert signal.getsignal(number) == signals._ask and not said
    assert {n: signal.getsignal(n) for n in python_handlers} == python_handlers


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("place", ["load_base", "load_data", "wait_until_shared"])
def test_a_signal_while_a_run_starts_leaves_with_75_and_the_same_call_goes_on(tmp_path, python_handlers, monkeypatch, capfd, name, place):
    class Left(BaseException):
        pass

    def leave(code):
        raise Left(code)

    before, recipe = getattr(run, place), tiny.short(tmp_path)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(run, place, lambda *args: signal.raise_signal(getattr(signal, name)))
    with pytest.raises(Left) as left:
        run.train(recipe, tmp_path / "run")
    told = capfd.readouterr().err.splitlines()[-1]
    assert left.value.args == (75,) and told == f"Asked to leave ({name}) before the first step of this start; the same command goes on."
    assert {n: signal.getsignal(n) for n in python_handlers} == python_handlers
    monkeypatch.setattr(run, place, before)
    if name == "SIGTERM":
        assert run.train(recipe, tmp_path / "run") == 0


def test_the_command_listens_before_it_imports(tmp_path):
    tiny.recipe(tmp_path)
    script = ("import signal, sys\n"
              "class Finder:\n"
              "    def find_spec(self, name, *_):\n"
              "        if name == 'torch':\n"
              "            signal.raise_signal(signal.SIGTERM)\n"
              "sys.meta_path.insert(0, Finder())\n"
              "from reflow.cli import main\n"
              "main(sys.argv[1:])\n")
    words = ["train", "--recipe", str(tmp_path / "tiny.toml"), "--run-dir", str(tmp_path / "run")]
    finished = subprocess.run([sys.executable, "-c", script, *words], cwd=ROOT, env=outside(), capture_output=True, text=True, timeout=120)
    assert finished.returncode == 75 and "Asked to leave (SIGTERM)" in finished.stderr and not (tmp_path / "run").exists()


def test_a_job_that_ignores_ctrl_c_goes_on_ignoring_it(python_handlers):
    engine.init_distributed()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with loop.Signals() as signals:
        signals.join(0)
        signal.raise_signal(signal.SIGINT)
        assert not signals.asked


def test_ctrl_c_leaves_a_checkpoint_and_the_same_call_goes_on(tmp_path, python_handlers, monkeypatch, capfd):
    agree, count, recipe = loop.Signals.agree, [0], tiny.recipe(tmp_path, *ONE)

    def interrupted(self):
        count[0] += 1
        if count[0] == 1:
            signal.raise_signal(signal.SIGINT)
        return agree(self)

    monkeypatch.setattr(loop.Signals, "agree", interrupted)
    assert run.train(recipe, tmp_path / "run") == loop.LEFT_EARLY
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "stage-1-000000016"
    assert capfd.readouterr().err.count("Interrupted") == 1 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert run.train(recipe, tmp_path / "run") == 0


def test_bad_input_at_the_command_line_is_exit_code_2_and_one_line(tmp_path):
    finished = subprocess.run(command(tmp_path, tmp_path / "run", "train.sed=1"), cwd=ROOT, env=outside(), capture_output=True, text=True,
                              timeout=120)
    assert finished.returncode == 2 and finished.stdout == ""
    assert len(finished.stderr.strip().splitlines()) == 1 and "did you mean 'seed'" in finished.stderr


def test_a_bf16_student_is_validated_in_bf16(tmp_path):
    recipe = tiny.recipe(tmp_path, "train.precision=bf16", "teacher.precision=bf16", "validate.every=32", "stages.0.samples=32")
    run.train(recipe.model_copy(update={"stages": recipe.stages[:1]}), tmp_path / "run")
    (check,) = log(tmp_path / "run", "validate")
    assert all(0 < w["mse"] < 1 for w in check["windows"]) and log(tmp_path / "run", "start")[0]["distance_to_own_ddim"] < 1e-3


@pytest.mark.parametrize("channels_last", ["true", "false"])
def test_a_run_copies_no_operand_of_the_fused_ops(tmp_path, monkeypatch, channels_last):
    import reflow_kernels

    monkeypatch.setenv("REFLOW_KERNELS_BACKEND", "triton")
    reflow_kernels.configure(strict=True)  # an operand in another order than the network's output is an error
    try:
        recipe = tiny.recipe(tmp_path, f"model.channels_last={channels_last}", "stages.0.samples=16", "stages.0.chords_per_solve=2")
        assert run.train(recipe.model_copy(update={"stages": recipe.stages[:1]}), tmp_path / "run") == 0
    finally:
        reflow_kernels.configure(strict=False)
