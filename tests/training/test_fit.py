"""A run that cannot fit is refused before anything large is loaded, with the plan's figures: the GPU's memory, the machine's, the disk."""

import json
import shutil
import types

import pytest
import torch
import torch.distributed as dist

import tiny
from reflow.errors import UserError
from reflow.models.digits import BUILTIN
from reflow.recipes import reading
from reflow.training import engine, fit, plan, run

GPU = torch.device("cuda")
GIB = 2**30


@pytest.fixture(autouse=True)
def group():
    engine.init_distributed()


def sdxl(tmp_path, *overrides):
    return reading.load("sdxl-proreflow", [f"data.path='{tmp_path}'", "train.micro_batch=4", "model.compile=false", *overrides])


def refusal(recipe, run_dir, device):
    with pytest.raises(UserError) as error:
        fit.check(recipe, run_dir, device)
    return str(error.value)


def test_a_card_that_is_too_small_is_named_with_the_plans_figures(tmp_path, monkeypatch, capsys):
    recipe = sdxl(tmp_path)
    counts = plan.counts_of(recipe, plan.find_base(recipe)[0], (4, 128, 128))
    monkeypatch.setattr(plan, "counts_of", lambda *_, **__: counts)  # the same UNet three times
    monkeypatch.setattr(fit, "machine_bytes", lambda: 10**13)
    monkeypatch.setattr(fit, "of_disk", lambda *_: [])
    for card, fits in ((24, False), (48, False), (80, True)):
        monkeypatch.setattr(fit, "device_bytes", lambda _, card=card: card * GIB)
        if fits:
            fit.check(recipe, tmp_path / "run", GPU)
            continue
        said = refusal(recipe, tmp_path / "run", GPU)
        assert "counts 47.9 GiB of GPU memory a rank (weights 4.78 GiB" in said and f"has {card} GiB" in said and "for a micro-batch of 4" in said
    # What the same card holds with checkpointing, and with an adapter.
    monkeypatch.setattr(fit, "device_bytes", lambda _: 48 * GIB)
    fit.check(sdxl(tmp_path, "model.gradient_checkpointing=true"), tmp_path / "run", GPU)
    assert capsys.readouterr().out == ""
    fit.check(sdxl(tmp_path, "train.check_fit=false"), tmp_path / "run", GPU)
    assert capsys.readouterr().out.startswith("This run may not fit: the plan counts 47.9 GiB of GPU memory")


def test_a_disk_that_is_too_small_is_named_and_what_lies_there_counts(tmp_path, monkeypatch):
    recipe, run_dir = tiny.recipe(tmp_path), tmp_path / "new" / "run"
    base, _ = plan.find_base(recipe)
    latent = plan.latent_of(recipe, base)
    need = sum(plan.disk(recipe, plan.counts_of(recipe, base, latent, passes=False), latent).values())
    free = [need]
    monkeypatch.setattr(shutil, "disk_usage", lambda place: types.SimpleNamespace(free=free[0]) if place == tmp_path else None)
    fit.check(recipe, run_dir, torch.device("cpu"))
    free[0] = need - 1
    said = refusal(recipe, run_dir, torch.device("cpu"))
    assert f"counts {plan.bytes_of(need)} of disk (3 checkpoints " in said and f"free at {tmp_path}" in said
    # A run that goes on needs only what it has not written yet.
    monkeypatch.setattr(shutil, "disk_usage", lambda place: types.SimpleNamespace(free=free[0]) if place == run_dir else None)
    run_dir.mkdir(parents=True)
    (run_dir / "weights").write_bytes(b"x")
    fit.check(recipe, run_dir, torch.device("cpu"))


def test_a_machine_that_is_too_small_is_named_before_the_base_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "machine_bytes", lambda: 2**20)
    monkeypatch.setattr(run, "load_base", lambda *_: pytest.fail("the base was loaded"))
    with pytest.raises(UserError, match=r"cannot fit: the plan counts [\d.]+ MiB of the machine's memory for 1 rank \(base 1.51 MiB, weights .* has 1 MiB"):
        run.train(tiny.recipe(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_offload_counts_in_the_machines_memory_for_every_rank_there(tmp_path, monkeypatch):
    recipe = sdxl(tmp_path, "train.optimizer=adamw", "train.zero_stage=1", "train.offload=true")
    counts = plan.counts_of(recipe, plan.find_base(recipe)[0], (4, 8, 8), passes=False)
    one = sum(plan.in_cpu_memory(recipe, counts, 1).values())
    monkeypatch.setattr(fit, "machine_bytes", lambda: one)
    assert fit.of_machine(recipe, counts, GPU, 1) == []
    monkeypatch.setattr(fit, "machine_bytes", lambda: one - 1)
    assert "base 9.56 GiB, masters 9.56 GiB, optimizer 19.1 GiB" in fit.of_machine(recipe, counts, GPU, 1)[0]
    # Two ranks share the offloaded states, and each holds the base.
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(fit, "machine_bytes", lambda: one + plan.in_cpu_memory(recipe, counts, 2)["base"] - 1)
    assert "for 2 ranks" in fit.of_machine(recipe, counts, GPU, 2)[0]
    assert fit.of_machine(recipe, counts, GPU, 1) == []  # the other one is on another machine


def test_what_another_rank_lacks_ends_all_of_them(tmp_path, monkeypatch):
    def gather(out, mine):
        out[:] = [mine, "node2"] if isinstance(mine, str) else [mine, ["the plan counts 9 GiB of GPU memory a rank, and rank 1's GPU on node2 has 8 GiB"]]

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    assert "rank 1's GPU on node2 has 8 GiB" in refusal(tiny.recipe(tmp_path), tmp_path / "run", torch.device("cpu"))
    # A rank that lacks the base, and so the plan, hears of it too.
    monkeypatch.setattr(plan, "find_base", lambda _: (_ for _ in ()).throw(UserError("not here")))
    assert "rank 1's GPU on node2 has 8 GiB" in refusal(tiny.recipe(tmp_path), tmp_path / "run", torch.device("cpu"))


def test_configs_of_no_network_are_left_to_the_loading_which_says_what_is_wrong(tmp_path):
    shutil.copytree(BUILTIN, tmp_path / "base")
    file = tmp_path / "base" / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attention_head_dim": 0}))
    recipe = tiny.recipe(tmp_path, f"model.base='{tmp_path / 'base'}'")
    fit.check(recipe, tmp_path / "run", torch.device("cpu"))
    with pytest.raises(UserError, match="describe no network of the family digits that can be planned"):
        plan.describe(recipe)


def test_this_machine_tells_its_memory(tmp_path, monkeypatch):
    whole = fit.machine_bytes()
    assert whole > GIB // 4
    limit = tmp_path / "memory.max"
    limit.write_text("123456789\n")
    monkeypatch.setattr(fit, "LIMITS", (str(limit), str(tmp_path / "none")))
    assert fit.machine_bytes() == 123456789
    limit.write_text("max\n")
    assert fit.machine_bytes() >= whole
