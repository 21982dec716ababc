"""What --dry-run says: counted compute and memory against known figures, and against tensors on the meta device byte for byte."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import tiny_pipelines
from reflow.errors import UserError
from reflow.export import export_single_file
from reflow.models import family, single_file
from reflow.models.lora import Adapters, Student
from reflow.recipes import reading
from reflow.training import plan
from reflow.training.counts import Attention, count
from reflow.training.ema import Ema

RECIPE = """
name = "plan"
[model]
family = "{family}"
base = "{base}"
[train]
batch_size = 8
micro_batch = 2
precision = "bf16"
[teacher]
precision = "bf16"
guidance_scale = 7.5
[[stages]]
windows = 4
solver_steps = 3
samples = 80
"""


def recipe(tmp_path, family, base, *overrides):
    file = tmp_path / "plan.toml"
    file.write_text(RECIPE.format(family=family, base=base))
    return reading.load(str(file), list(overrides))


def packaged(name):
    return family(name).load(single_file.packaged(name), parts=())


@pytest.mark.parametrize("name, forward, both, saved", [
    pytest.param("sd15", 0.803e12, 2.47e12, 0.93e9, marks=pytest.mark.slow), ("sdxl", 6.76e12, 20.6e12, 6.9e9),
])  # fmt: skip
def test_the_full_sizes_cost_what_they_are_known_to(name, forward, both, saved):
    base = packaged(name)
    got = count(base.configs["unet"], base.latent_shape(), 77, torch.bfloat16)
    assert got.forward == pytest.approx(forward, rel=2e-3) and got.forward + got.backward == pytest.approx(both, rel=5e-3)
    assert got.saved == pytest.approx(saved, rel=0.05) and got.checkpointed < got.saved / 3


def test_what_is_counted_is_what_a_real_pass_keeps_and_computes():
    unet = tiny_pipelines.sdxl_unet()
    got = count(unet.config, (4, 8, 8), 12, torch.float32)
    weights = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    times = {"text_embeds": torch.randn(1, 40), "time_ids": torch.zeros(1, 6)}
    sample, t, hidden = torch.randn(1, 4, 8, 8), torch.ones(1), torch.randn(1, 12, 80)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = unet(sample, t, hidden, added_cond_kwargs=times, return_dict=False)[0]
    real = sum(storage.nbytes() for place, storage in kept.items() if place not in weights)
    assert got.saved == pytest.approx(real, rel=0.01)
    # Counted too high by the gradients of inputs that need none (text, the first convolution), large in so small a network.
    with torch.device("meta"):
        other = tiny_pipelines.sdxl_unet()
        times = {name: value.to("meta") for name, value in times.items()}
    with FlopCounterMode(display=False) as forward:
        output = other(sample.to("meta"), t.to("meta"), hidden.to("meta"), added_cond_kwargs=times, return_dict=False)[0]
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    assert got.forward == forward.get_total_flops()
    assert backward.get_total_flops() < got.backward < 1.2 * backward.get_total_flops()
    q = torch.zeros(1, 2, 3, 4, device="meta", requires_grad=True)
    Attention.apply(q, q, q).sum().backward()
    assert q.grad.shape == q.shape


def test_a_lora_counts_its_adapter_alone():
    unet = tiny_pipelines.sd15_unet()
    lora = {"rank": 3, "targets": ["to_q", "conv1"]}
    got = count(unet.config, (4, 8, 8), 12, torch.bfloat16, lora=lora)
    whole = count(unet.config, (4, 8, 8), 12, torch.bfloat16)
    student = Student(Adapters(unet, **lora))
    assert got.trained == sum(p.numel() for p in student.parameters()) and got.parameters == whole.trained
    assert got.forward > whole.forward and got.backward < 0.7 * whole.backward


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_full_fine_tuning_of_sdxl_takes_the_plans_bytes_on_the_meta_device(tmp_path, precision):
    asked = recipe(tmp_path, "sdxl", "stabilityai/sdxl", f"train.precision={precision}")
    base = packaged("sdxl")
    with torch.device("meta"):
        parameters = list(single_file.networks(base.configs)["unet"].parameters())
        weights = [torch.nn.Parameter(p.to(torch.bfloat16 if precision == "bf16" else torch.float32)) for p in parameters]
        masters = [torch.nn.Parameter(w.detach().float()) for w in weights] if precision == "bf16" else weights
        for w, m in zip(weights, masters, strict=True):
            w.grad = torch.empty_like(w)
            m.grad = w.grad.float()
        optimizer = torch.optim.AdamW(masters, foreach=False)
    optimizer.step()  # outside: older versions read their step count, which must not be on the meta device
    with torch.device("meta"):
        average = Ema(masters).average
        teacher = [p.to(torch.bfloat16) for p in parameters]

    def size(tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert len(moments) == 2 * 1680
    real = {"weights": size(weights), "gradients": size(w.grad for w in weights), "optimizer": size(moments), "EMA": size(average),
            "teacher": size(teacher), "masters": size(masters) if precision == "bf16" else 0,
            "step": size(m.grad for m in masters) if precision == "bf16" else 0}  # fmt: skip
    counts = plan.Counts(size(parameters) // 4, size(parameters) // 4, 0, 1, 1, 1, 1)
    assert plan.memory(asked, counts, 1) == real
    assert plan.in_cpu_memory(asked, counts, 1)["base"] == size(parameters)
    for stage, shared in ((1, {"optimizer", "masters", "EMA", "step"}), (2, {"gradients"}), (3, {"weights"})):
        before = plan.memory(recipe(tmp_path, "sdxl", "x/y", f"train.precision={precision}", f"train.zero_stage={stage - 1}"), counts, 8)
        after = plan.memory(recipe(tmp_path, "sdxl", "x/y", f"train.precision={precision}", f"train.zero_stage={stage}"), counts, 8)
        if stage > 1 or precision == "bf16":
            assert {part for part in after if after[part] < before[part]} == {p for p in shared if real[p]}
        assert all(after[part] == real[part] // 8 for part in shared if real[part])


def test_a_plan_needs_no_weights_and_downloads_nothing(tmp_path, monkeypatch):
    from diffusers import DiffusionPipeline

    asked = []
    monkeypatch.setattr(DiffusionPipeline, "download", lambda name, **k: (asked.append(k), 1 / 0))
    text = plan.describe(recipe(tmp_path, "sd15", "someone/sd15", "model.gradient_checkpointing=true"))
    assert asked == [{"local_files_only": True}]
    assert "not on this disk, so this plan uses the configs of sd15 that ship with reflow" in text
    assert "0.803 TFLOP a network row, 2.47 TFLOP forward and backward, 3.28 TFLOP with checkpointing" in text
    # 3 steps with an unconditional half for each of the 80 samples.
    assert "6 teacher evaluations and 8.1 TFLOP a student sample" in text
    assert "a student sample; EMA half-life 8 samples at its end (10% of it; the recipe's 10,000 are not reached)" in text
    assert "adamw, ZeRO 3, 8 ranks" in text and "859,520,964 parameters" in text
    with pytest.raises(UserError, match="is not on this disk, and no configs of the family digits ship"):
        plan.describe(recipe(tmp_path, "digits", "someone/else"))


def test_a_plan_reads_folders_and_single_files_as_they_lie(tmp_path, monkeypatch):
    monkeypatch.setenv("REFLOW_CACHE", str(tmp_path / "cache"))
    pipe = tiny_pipelines.sd15("v_prediction")
    pipe.save_pretrained(tmp_path / "base")
    file = export_single_file(tmp_path / "base", pipe.unet.state_dict(), tmp_path / "one.safetensors", metadata={"modelspec.prediction_type": "v"})
    count = f"{sum(p.numel() for p in pipe.unet.parameters()):,} parameters (sd15, v_prediction)"
    v = "student.prediction_type=ddim_v"
    assert count in plan.describe(recipe(tmp_path, "sd15", tmp_path / "base", v))
    assert count in plan.describe(recipe(tmp_path, "sd15", file, v, f"model.config={tmp_path / 'base'}"))
    assert not (tmp_path / "cache").exists()


def test_what_fits_a_card():
    assert plan.fitting(0, plan.GIB, 24) == 22 and plan.fitting(23 * plan.GIB, plan.GIB, 24) == 0
    assert plan.fitting(10 * plan.GIB, 5 * plan.GIB, 48) == 6
