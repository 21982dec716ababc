"""Pipelines of the real classes, small and random, as contenders: what they draw, count, swap, tell and refuse."""

import copy
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))
import tiny_pipelines
from reflow.errors import UserError
from reflow.evaluation.contenders import known
from reflow.evaluation.contenders.calls import as_saved, denoisers
from reflow.evaluation.contenders.loras import put_in
from reflow.evaluation.contenders.opening import load, scheduler_class
from reflow.evaluation.contenders.pipelines import PipelineSpec, open_pipeline
from reflow.export import export_folder, export_single_file
from reflow.flow import Windows
from reflow.weights.delta import student_metadata

PROMPTS, SEEDS = ["abc", "b", "zz"], [1, 2, 3]

CPU = torch.device("cpu")


def opened(path, **spec):
    return open_pipeline(PipelineSpec(str(path), **spec), CPU, torch.float32)


def sd3():
    """A small pipeline of flow matching, without its third text encoder."""
    tok, tok_2 = tiny_pipelines.tokenizer(), tiny_pipelines.tokenizer("!")
    config = {key: value for key, value in tiny_pipelines.vae().config.items() if not key.startswith("_")}
    vae = AutoencoderKL(**{**config, "shift_factor": 0.1})
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=96,
            caption_projection_dim=32, pooled_projection_dim=72, out_channels=4, pos_embed_max_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae, tokenizer=tok, tokenizer_2=tok_2, tokenizer_3=None, text_encoder_3=None,
        text_encoder=CLIPTextModelWithProjection(tiny_pipelines.text_config(tok, 32)),
        text_encoder_2=CLIPTextModelWithProjection(tiny_pipelines.text_config(tok_2, 48, projection_dim=40, hidden_act="gelu")),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(sd15, sdxl, tmp_path_factory):
    """Pipeline folders by base, and a LoRA file of the first."""
    root = tmp_path_factory.mktemp("pipelines")
    sd15.save_pretrained(root / "sd15")
    sdxl.save_pretrained(root / "sdxl")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sd3().save_pretrained(root / "sd3")
    some = {key: tensor for key, tensor in tiny_pipelines.lora(sd15.unet).items() if "down_blocks.0." in key}
    save_file(some, root / "lora.safetensors")
    return root


@pytest.fixture(scope="module")
def contenders(folders):
    return {base: opened(folders / base) for base in ("sd15", "sdxl", "sd3")}


@pytest.fixture(scope="module")
def contender(contenders):
    return contenders["sd15"]


@pytest.fixture(scope="module")
def drawn(contender):
    return contender.draw(PROMPTS, SEEDS, 3, 4.0)


@pytest.mark.parametrize("base", ["sd15", "sdxl", "sd3"])
def test_a_sample_depends_on_its_prompt_and_seed_alone(contenders, base):
    one = contenders[base]
    batch = one.draw(PROMPTS, SEEDS, 2, 4.0)
    alone = one.draw(PROMPTS[1:2], SEEDS[1:2], 2, 4.0)
    assert batch.images.shape == (3, 3, 64, 64) and batch.images.dtype == torch.uint8 and batch.latents.shape == (3, 4, 8, 8)
    assert (batch.latents[1:2] - alone.latents).abs().max() <= 1e-4 * alone.latents.abs().max()
    assert (batch.images[1:2].int() - alone.images.int()).abs().max() <= 1
    assert (batch.latents[0] - batch.latents[1]).abs().max() > 0.1
    assert alone.evaluations == batch.evaluations == 4
    assert one.draw(["b"], [2], 2, 1.0).evaluations == one.draw(["b"], [2], 2, 0.0).evaluations == 2


def test_noise_of_the_steps_is_of_the_sample_too(folders):
    one = opened(folders / "sd15", scheduler="EulerAncestralDiscreteScheduler")
    batch, alone = one.draw(PROMPTS, SEEDS, 3, 1.0), one.draw(["zz"], [3], 3, 1.0)
    assert (batch.latents[2] - alone.latents[0]).abs().max() <= 1e-4 * alone.latents.abs().max()


def test_one_seed_is_one_noise_in_two_pipelines(contenders):
    seen = []
    for base in ("sd15", "sdxl"):
        one = contenders[base]
        handle = one._pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
        one.draw(["a", "b"], [5, 6], 1, 1.0)
        handle.remove()
    assert torch.equal(seen[0], seen[1])
    again = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(6))
    assert torch.equal(seen[0][1:], again)


def test_images_and_latents_are_those_of_a_plain_call(folders, contender, drawn, sd15):
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    call = dict(num_inference_steps=3, guidance_scale=4.0, generator=generators)
    saved = np.stack([np.asarray(image) for image in sd15(PROMPTS, **call).images])
    assert torch.equal(drawn.images, torch.from_numpy(saved).permute(0, 3, 1, 2))
    call["generator"] = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    latents = sd15(PROMPTS, **call, output_type="latent").images
    assert torch.equal(drawn.latents, latents)


def test_the_seconds_are_those_of_three_parts(drawn):
    assert min(drawn.seconds.text, drawn.seconds.denoise, drawn.seconds.decode) > 0
    assert drawn.seconds.denoise > drawn.seconds.text / 10  # three steps of a network, against one of two layers


def test_grey_images_become_three_channels():
    grey = as_saved(np.full((2, 4, 4, 1), 0.5))
    assert grey.shape == (2, 3, 4, 4) and (grey == 128).all()
    with pytest.raises(ValueError, match="shape"):
        as_saved(np.zeros((2, 5, 4, 4, 3)))


def test_the_scheduler_is_swapped_by_name(folders, drawn):
    one = opened(folders / "sd15", scheduler="EulerDiscreteScheduler")
    assert one.describe()["scheduler"]["class"] == "EulerDiscreteScheduler"
    assert one.describe()["scheduler"]["config"]["beta_end"] == 0.012
    assert not torch.equal(one.draw(PROMPTS, SEEDS, 3, 4.0).latents, drawn.latents)
    with pytest.raises(UserError, match="did you mean EulerDiscreteScheduler"):
        opened(folders / "sd15", scheduler="EulerDiscreetScheduler")
    with pytest.raises(UserError, match="did you mean EulerDiscreteScheduler"):
        scheduler_class("euler")
    with pytest.raises(UserError, match="trained on flow matching, by its FlowMatch.* --anyway"):
        opened(folders / "sd3", scheduler="EulerDiscreteScheduler")
    with pytest.raises(UserError, match="trained on a discrete noise schedule, by its DDIM"):
        opened(folders / "sd15", scheduler="FlowMatchEulerDiscreteScheduler")
    with pytest.raises(UserError, match="cannot be drawn at 2 steps"):
        opened(folders / "sd15", scheduler="FlowMatchEulerDiscreteScheduler", anyway=True).draw(["a"], [0], 2, 1.0)


def added(pipe, file, scale=1.0):
    """The weights of the denoiser of a copy of the pipeline with this file put in."""
    pipe = copy.deepcopy(pipe)
    assert put_in(pipe, file, scale, "it") == "lora"
    return pipe.unet.state_dict()


def test_a_lora_changes_images_and_at_scale_0_it_does_not(folders, sd15, drawn):
    lora = str(folders / "lora.safetensors")
    with_it = opened(folders / "sd15", lora=lora)
    assert not torch.equal(with_it.draw(PROMPTS, SEEDS, 3, 4.0).images, drawn.images)
    assert with_it.label == "sd15 + lora.safetensors"
    told = with_it.describe()["lora"]
    assert told["scale"] == 1.0 and told["kind"] == "lora" and len(told["sha256"]) == 64
    assert PipelineSpec("a/b", lora="c/d.safetensors", lora_scale=0.5, scheduler="X").label == "b + d.safetensors x 0.5, X"
    state = added(sd15, folders / "lora.safetensors", 0.0)
    assert all(torch.equal(tensor, state[key]) for key, tensor in sd15.unet.state_dict().items())


def test_a_lora_is_added_at_its_scale(folders, sd15):
    lora = load_file(folders / "lora.safetensors")
    key = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    moved = added(sd15, folders / "lora.safetensors", 0.5)[f"{key}.weight"]
    wanted = sd15.unet.state_dict()[f"{key}.weight"] + 0.5 * lora[f"unet.{key}.lora_B.weight"] @ lora[f"unet.{key}.lora_A.weight"]
    assert (moved - wanted).abs().max() <= 1e-6


def test_a_known_lora_of_a_transformer_is_added_at_its_own_scale(folders, contenders, tmp_path):
    key, file = "transformer_blocks.0.attn.to_q", tmp_path / "Hyper-SD3-4steps-CFG-lora.safetensors"
    plain = contenders["sd3"]._pipe.transformer.state_dict()[f"{key}.weight"]
    save_file({f"transformer.{key}.lora_A.weight": torch.eye(32)[:2].contiguous(), f"transformer.{key}.lora_B.weight": torch.ones(32, 2)}, file)
    for given, scale in ((None, 0.125), (0.5, 0.5)):
        one = opened(folders / "sd3", lora=str(file), lora_scale=given)
        assert one.describe()["known"]["name"] == "hyper-sd3-4steps-cfg" and one.describe()["lora"]["scale"] == scale
        change = one._pipe.transformer.state_dict()[f"{key}.weight"] - plain
        assert (change[:, :2] - scale).abs().max() <= 1e-6 and change[:, 2:].abs().max() == 0
    with pytest.raises(UserError, match="guidance 3 .*asked guidance 5"):
        one.check(4, 5.0)


def test_a_lora_of_peft_is_added_at_its_alpha(folders, sd15, tmp_path):
    state = {key.replace("unet.", "base_model.model.", 1): tensor for key, tensor in load_file(folders / "lora.safetensors").items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="adapter_config.json"):
        put_in(sd15, tmp_path / "adapter_model.safetensors", 1.0, "it")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 1, "r": 2}))  # half of rank 2
    moved = added(sd15, tmp_path / "adapter_model.safetensors")
    wanted = added(sd15, folders / "lora.safetensors", 0.5)
    assert all((moved[key] - wanted[key]).abs().max() <= 1e-6 for key in wanted)


def test_a_whole_network_is_put_in(folders, sd15, sdxl, tmp_path):
    state = {key: tensor + 0.01 for key, tensor in sd15.unet.state_dict().items()}
    save_file(state, tmp_path / "whole.safetensors")
    one = opened(folders / "sd15", lora=str(tmp_path / "whole.safetensors"))
    assert one.describe()["lora"]["kind"] == "network" and "scale" not in one.describe()["lora"]
    assert all(torch.equal(tensor, state[key]) for key, tensor in one._pipe.unet.state_dict().items())
    with pytest.raises(UserError, match="as a whole unet it does not fit"):
        put_in(sdxl, tmp_path / "whole.safetensors", 1.0, "it")


def test_a_lora_that_does_not_fit_is_refused(folders, sd15, sdxl, tmp_path):
    with pytest.raises(UserError, match="lora.safetensors does not fit .*base"):
        put_in(copy.deepcopy(sdxl), folders / "lora.safetensors", 1.0, "it")
    save_file({"elsewhere.lora_A.weight": torch.zeros(2, 2), "elsewhere.lora_B.weight": torch.zeros(2, 2)}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match="odd.safetensors does not fit"):
        put_in(copy.deepcopy(sd15), tmp_path / "odd.safetensors", 1.0, "it")
    with pytest.raises(UserError, match="There is no LoRA file"):
        put_in(sd15, tmp_path / "none.safetensors", 1.0, "it")
    (tmp_path / "pickle.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="does not end in .safetensors"):
        put_in(sd15, tmp_path / "pickle.bin", 1.0, "it")


def test_a_known_lora_brings_its_settings_and_refuses_others(folders, sdxl, tmp_path):
    file = tmp_path / "dmd2_sdxl_4step_lora.safetensors"
    save_file({key: tensor for key, tensor in tiny_pipelines.lora(sdxl.unet).items() if "mid_block" in key}, file)
    one = opened(folders / "sdxl", lora=str(file))
    assert one.describe()["known"]["name"] == "dmd2-sdxl-4step" and one.describe()["scheduler"]["class"] == "LCMScheduler"
    seen = []
    handle = one._pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(int(args[1])))
    one.check(4, 1.0)
    one.draw(["a"], [0], 4, 1.0)
    handle.remove()
    assert seen == [999, 749, 499, 249]
    with pytest.raises(UserError, match="dmd2_sdxl_4step_lora.safetensors is made for 4 steps and guidance 1 .or none. .*asked 8 steps: write --steps 4"):
        one.check(8, 1.0)
    with pytest.raises(UserError, match="asked guidance 7.5: write --guidance 1"):
        one.check(4, 7.5)
    with pytest.raises(UserError, match="asked DDIMScheduler"):
        opened(folders / "sdxl", lora=str(file), scheduler="DDIMScheduler")
    with pytest.raises(UserError, match="made for sdxl, and the pipeline is sd15"):
        opened(folders / "sd15", lora=str(file))
    anyway = opened(folders / "sdxl", lora=str(file), anyway=True)
    anyway.check(8, 7.5)
    assert anyway.draw(["a"], [0], 2, 7.5).evaluations == 4 and anyway.describe()["anyway"]


def test_the_eta_of_a_known_lora_is_used(folders, tmp_path):
    file = tmp_path / "style.safetensors"
    shutil.copy(folders / "lora.safetensors", file)
    one = opened(folders / "sd15", lora=str(file), known="tcd-sd15")
    assert one._call(["a"], [0], 4, 1.0)["eta"] == 0.3 and one.describe()["scheduler"]["class"] == "TCDScheduler"
    assert torch.isfinite(one.draw(["a"], [0], 4, 1.0).latents).all()
    with pytest.raises(UserError, match="did you mean tcd-sd15"):
        opened(folders / "sd15", lora=str(file), known="tcd-sd-15")


def test_an_embedded_guidance_computes_no_unconditional_half(folders, tmp_path):
    pipe = tiny_pipelines.sd15()
    pipe.unet = tiny_pipelines.sd15_unet(time_cond_proj_dim=256)
    pipe.save_pretrained(tmp_path / "student")
    config = tmp_path / "student" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "LCMScheduler"}))
    index = tmp_path / "student" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "scheduler": ["diffusers", "LCMScheduler"]}))
    one = opened(tmp_path / "student")
    assert one.describe()["known"]["name"] == "lcm" and "embedding" in one.describe()["guidance"]
    low, high = one.draw(["a"], [0], 2, 3.0), one.draw(["a"], [0], 2, 8.0)
    assert low.evaluations == high.evaluations == 2 and not torch.equal(low.latents, high.latents)


def test_an_exported_folder_is_ours_with_its_windows(folders, sd15, tmp_path):
    state = {key: tensor + 0.01 for key, tensor in sd15.unet.state_dict().items()}
    assert export_folder(folders / "sd15", state, tmp_path / "stock", windows=4, dtype="fp32").stock
    assert not export_folder(folders / "sd15", state, tmp_path / "own", windows=Windows((1.0, 0.5, 0.2, 0.0)), dtype="fp32").stock
    stock, own = opened(tmp_path / "stock"), opened(tmp_path / "own")
    for one, windows in ((stock, 4), (own, 3)):
        assert one.describe()["known"]["name"] == known.OURS
        assert one.describe()["scheduler"]["class"] == "PiecewiseFlowScheduler" and len(one._pipe.scheduler.windows) == windows
        one.check(windows + 1, 7.5)
        with pytest.raises(UserError, match=f"made for {windows} steps or more.*write --steps {windows}"):
            one.check(windows - 1, 1.0)
    stays = opened(tmp_path / "stock", known="none")
    assert stays.describe()["scheduler"]["class"] == "DDIMScheduler"
    want, got = stays.draw(["a"], [0], 4, 3.0).latents, stock.draw(["a"], [0], 4, 3.0).latents
    assert (want - got).abs().max() <= 1e-4 * want.abs().max()
    assert own.draw(["a"], [0], 5, 1.0).evaluations == 5


def test_the_digits_and_their_exports_are_drawn(tmp_path):
    one = opened("builtin")
    assert one.label == "builtin" and one.describe()["known"] is None and one.describe()["height"] == 16
    out = one.draw(["a seven", "a three"], [0, 1], 8, 3.0)
    assert out.images.shape == (2, 3, 16, 16) and (out.images[:, 0] == out.images[:, 1]).all() and out.evaluations == 16
    state = {key: tensor.float() for key, tensor in one._pipe.unet.state_dict().items()}
    export_folder(one._found, state, tmp_path / "student", windows=2)
    student = opened(tmp_path / "student")
    assert student.describe()["known"]["name"] == known.OURS
    assert student.draw(["a seven"], [0], 2, 1.0).evaluations == 2


def test_a_single_file_is_drawn_as_its_folder(folders, sd15, contender, tmp_path, monkeypatch):
    monkeypatch.setenv("REFLOW_CACHE", str(tmp_path / "cache"))
    base, state = folders / "sd15", sd15.unet.state_dict()
    file = export_single_file(base, state, tmp_path / "plain.safetensors", dtype="fp32")
    with pytest.raises(UserError, match="--tokenizer"):
        opened(file)
    one = opened(file, config=str(base))
    want, got = contender.draw(["a"], [0], 2, 3.0), one.draw(["a"], [0], 2, 3.0)
    assert (want.latents - got.latents).abs().max() <= 1e-5 * want.latents.abs().max()
    assert one.label == "plain.safetensors" and len(one.describe()["file"]["sha256"]) == 64 and one.describe()["known"] is None
    says = student_metadata(Windows.uniform(2), "ddim_eps")
    student = opened(export_single_file(base, state, tmp_path / "student.safetensors", metadata=says), config=str(base))
    assert student.describe()["known"]["name"] == known.OURS and len(student._pipe.scheduler.windows) == 2
    # Files of other makes than SD1.5 and SDXL are taken apart by diffusers itself.
    by_diffusers = load(file, torch.float32, config=str(base))
    assert all(torch.equal(tensor, state[key]) for key, tensor in by_diffusers.unet.state_dict().items())
    with pytest.raises(UserError, match="would not be read"):
        opened(base, config=str(base))


def test_a_published_perflow_folder_gets_our_scheduler(folders, tmp_path):
    shutil.copytree(folders / "sd15", tmp_path / "perflow-sd15-mine")
    one = opened(tmp_path / "perflow-sd15-mine")
    config = one.describe()["scheduler"]["config"]
    assert (config["num_time_windows"], config["prediction_type"], config["network_time"]) == (4, "diff_eps", "perflow")
    one.check(8, 7.5)
    with pytest.raises(UserError, match="perflow-sd15-mine is made for 4 steps or more"):
        one.check(2, 7.5)
    index = tmp_path / "perflow-sd15-mine" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "scheduler": ["src.scheduler_perflow", "PeRFlowScheduler"]}))
    assert len(opened(tmp_path / "perflow-sd15-mine")._pipe.scheduler.windows) == 4


def test_half_precision_draws_and_says_so(folders):
    one = open_pipeline(PipelineSpec(str(folders / "sd15")), CPU, torch.bfloat16)
    out = one.draw(["a", "b"], [0, 1], 2, 3.0)
    assert out.latents.dtype == torch.float32 and out.images.shape[0] == 2 and one.describe()["dtype"]["unet"] == "bfloat16"


def test_a_description_is_json_and_tells_what_changed(folders, contender, tmp_path):
    first = json.loads(json.dumps(contender.describe(), allow_nan=False))
    assert first["path"] == "sd15" and first["pipeline"] == "StableDiffusionPipeline" and first["bases"] == ["sd15", "sd21"]
    assert {"unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors", "configs"} <= first["weights"].keys()
    assert first["height"] == first["width"] == 64 and first["dtype"]["unet"] == "float32"
    shutil.copytree(folders / "sd15", tmp_path / "sd15")
    again = opened(tmp_path / "sd15", height=32, width=96, negative_prompt="bad")
    assert again.describe()["weights"] == first["weights"] and again.describe()["height"] == 32
    assert again.draw(["a"], [0], 1, 3.0).images.shape == (1, 3, 32, 96)
    again.spec = PipelineSpec(again.spec.path, height=65)
    with pytest.raises(UserError, match="height.*divisible"):
        again.draw(["a"], [0], 1, 1.0)
    file = tmp_path / "sd15" / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "scaling_factor": 0.5}))
    assert opened(tmp_path / "sd15").describe()["weights"]["configs"] != first["weights"]["configs"]


def test_no_safety_checker_is_loaded(folders, tmp_path):
    shutil.copytree(folders / "sd15", tmp_path / "checked")
    index = tmp_path / "checked" / "model_index.json"
    told = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    index.write_text(json.dumps({**json.loads(index.read_text()), **told}))
    assert opened(tmp_path / "checked")._pipe.safety_checker is None


def test_latents_that_are_not_finite_are_refused(folders):
    one = opened(folders / "sd15", name="mine")
    denoiser = denoisers(one._pipe)["unet"]
    with torch.no_grad():
        denoiser.conv_out.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="mine at 2 steps makes latents that are not finite, in 1 of 1 samples. Try --dtype"):
        one.draw(["a"], [0], 2, 1.0)
    with torch.no_grad():
        denoiser.conv_out.bias.zero_()
        one._pipe.vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="images that are not finite.*VAE"):
        one.draw(["a"], [0], 1, 1.0)
    one.close()
    assert one._pipe is None


def test_what_is_no_pipeline_is_refused(folders, tmp_path):
    with pytest.raises(UserError, match="no folder or file .*hf download"):
        opened(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no model_index.json"):
        opened(tmp_path / "empty")
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(UserError, match="no diffusers folder and no checkpoint"):
        opened(tmp_path / "text.txt")
    with pytest.raises(UserError, match="holds LoRA weights"):
        opened(folders / "lora.safetensors")
    for name, match in (("StableDiffusionImg2ImgPipeline", "image besides a prompt"), ("DDPMPipeline", "cannot be loaded|takes no prompt"),
                        ("NoSuchPipeline", "no pipeline of diffusers")):  # fmt: skip
        shutil.copytree(folders / "sd15", tmp_path / name)
        index = tmp_path / name / "model_index.json"
        index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": name}))
        with pytest.raises(UserError, match=match):
            opened(tmp_path / name)


def test_steps_that_cannot_be_are_refused(contender):
    for steps, guidance in ((0, 1.0), (2, float("nan"))):
        with pytest.raises(UserError, match="at least one step"):
            contender.check(steps, guidance)
    with pytest.raises(UserError, match="cannot be drawn at 5000 steps"):
        contender.draw(["a"], [0], 5000, 1.0)
    with pytest.raises(ValueError, match="one seed a prompt"):
        contender.draw(["a", "b"], [0], 1, 1.0)
