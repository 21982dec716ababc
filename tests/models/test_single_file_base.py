"""A single-file checkpoint as the base: unpacked offline, bit-equal, with the configs that ship or ones that are named."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import tiny_pipelines
from reflow.errors import UserError
from reflow.export import export_folder, export_single_file
from reflow.flow import Windows
from reflow.models import base_path, family, family_of, single_file
from reflow.recipes.sections import Model
from reflow.weights.original_names import (
    SD_CLIP_PREFIX,
    SDXL_CLIP_PREFIX,
    original_clip,
    original_open_clip,
    original_unet,
    original_vae,
)

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REFLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def made(request, tmp_path_factory):
    """(family, pipeline, its folder, the same as one file)."""
    folder = tmp_path_factory.mktemp(request.param)
    pipe = getattr(tiny_pipelines, request.param)()
    pipe.save_pretrained(folder / "base")
    file = export_single_file(folder / "base", pipe.unet.state_dict(), folder / "model.safetensors", dtype="fp32")
    return request.param, pipe, folder / "base", file


def changed(file, target, metadata=None, drop=(), **more):
    state = {key: tensor for key, tensor in load_file(file).items() if key not in drop}
    save_file({**state, **more}, target, metadata=metadata)
    return target


def test_every_weight_comes_back_and_text_and_images_are_the_same(made, cache):
    name, pipe, folder, file = made
    options = {"tokenizer": str(folder), "config": str(folder)}
    base, want = family(name).load(file, **options), family(name).load(folder)
    for part in ("unet", "vae"):
        got, stock = getattr(base, part).state_dict(), getattr(pipe, part).state_dict()
        assert got.keys() == stock.keys() and all(torch.equal(got[k], stock[k]) for k in stock), part
    prompts = ["a cat", "b"]
    for a, b in zip(base.text_encoders, want.text_encoders, strict=True):
        stock = b.state_dict()
        assert a.state_dict().keys() == stock.keys() and all(torch.equal(t, stock[k]) for k, t in a.state_dict().items())
    a, b = base.encode_prompts(prompts), want.encode_prompts(prompts)
    # The same weights at other addresses: some processors round a network's sums otherwise.
    torch.testing.assert_close(a.encoder_hidden_states, b.encoder_hidden_states, rtol=1e-5, atol=1e-5)
    assert a.text_embeds is None or torch.allclose(a.text_embeds, b.text_embeds, rtol=1e-5, atol=1e-5)
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(base.encode_images(pixels), want.encode_images(pixels), rtol=1e-5, atol=1e-5)
    assert base.scheduler_config["prediction_type"] == "epsilon"
    # Unpacked once, found again, and a folder like any other: its own export is the same file.
    before = base.path.stat().st_ino
    assert base_path(Model(family=name, base=str(file), **options)) == base.path == family_of(file, **options)[1]
    assert family_of(file, **options)[0].name == name and base.path.stat().st_ino == before
    assert [p.name for p in (cache / "single-file").iterdir() if p.is_dir()] == [base.path.name]
    again = export_single_file(base.path, base.unet.state_dict(), cache / "again.safetensors", dtype="fp32")
    first, second = load_file(file), load_file(again)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    done = export_folder(base.path, base.unet.state_dict(), cache / "out", windows=4, dtype="fp32")
    assert done.stock and family(name).load(done.path).unet is not None


def test_ckpt_files_and_files_without_the_old_prefix(made, tmp_path):
    name, pipe, folder, file = made
    state = {key.replace(".transformer.text_model.", ".transformer."): t for key, t in load_file(file).items()}
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "model.ckpt")
    base = family(name).load(tmp_path / "model.ckpt", tokenizer=str(folder), config=str(folder), parts=("unet", "text"))
    stock = pipe.text_encoder.state_dict()
    assert all(torch.equal(t, stock[key]) for key, t in base.text_encoders[0].state_dict().items())
    torch.save({"state_dict": state, "callbacks": subprocess.Popen}, tmp_path / "code.ckpt")
    for bad in ("code.ckpt", "\x1b[31mred\u202e.ckpt"):
        (tmp_path / bad).write_bytes((tmp_path / "code.ckpt").read_bytes())
        with pytest.raises(UserError, match="it asks for [a-z]+.Popen.*holds pickled code") as told:
            family(name).load(tmp_path / bad, tokenizer=str(folder), config=str(folder))
        assert str(told.value).isprintable() and "two options" not in str(told.value)
    assert r"\x1b[31mred\u202e.ckpt cannot be read" in str(told.value)
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "code.ckpt").read_bytes()[:300])
    with pytest.raises(UserError, match="cut.ckpt cannot be read .*it is damaged") as told:
        family(name).load(tmp_path / "cut.ckpt", tokenizer=str(folder), config=str(folder))
    assert str(told.value).isprintable()


@pytest.mark.parametrize("how", ["key", "modelspec", "student", "given", "over"])
def test_v_prediction_is_read_from_the_file_or_as_given(made, tmp_path, how, capsys):
    name, _, folder, file = made
    says = {
        "modelspec": {"modelspec.prediction_type": "v"},
        "over": {"modelspec.prediction_type": "epsilon"},
        "student": {"windows": json.dumps([1.0, 0.5, 0.0]), "prediction_type": "ddim_v", "network_time": "index"},
    }.get(how)
    extra = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)} if how == "key" else {}
    other = changed(file, tmp_path / "v.safetensors", says, **extra)
    given = "v_prediction" if how in ("given", "over") else ""
    base = family(name).load(other, tokenizer=str(folder), config=str(folder), prediction_type=given, parts=())
    assert base.prediction_type == "v_prediction"
    assert base.scheduler_config.get("rescale_betas_zero_snr", False) == (how == "key")
    assert ("as you wrote" in capsys.readouterr().err) == (how == "over")
    if how == "student":
        from reflow.weights.delta import student_settings
        from reflow.weights.files import weight_files

        assert student_settings(weight_files(base.path / "unet")[0])["windows"] == Windows.uniform(2)


@pytest.mark.parametrize("keys", [("edm_mean", "edm_std"), ("edm_vpred.sigma_max", "edm_vpred.sigma_min")])
@pytest.mark.parametrize("more", [{}, {"v_pred": torch.zeros(0)}])
def test_edm_models_are_refused_whatever_else_is_said(made, tmp_path, cache, keys, more):
    name, _, folder, file = made
    for left in (keys, keys[:1], keys[1:]):
        extra = {key: torch.ones(1) for key in left}
        other = changed(file, tmp_path / "e.safetensors", {"modelspec.prediction_type": "v"}, **extra, **more)
        for given in ("", "v_prediction"):
            with pytest.raises(UserError, match=rf"e\.safetensors is an EDM model \(it holds {left[0]}\)") as caught:
                family(name).load(other, tokenizer=str(folder), config=str(folder), prediction_type=given)
            assert "\n" not in str(caught.value) and ". " not in str(caught.value)
    assert not list((cache / "single-file").glob("*"))


@pytest.mark.parametrize("said", ["v", "v_prediction", "v-prediction", "v_pred", "v-pred", "vpred", "epsilon", "eps"])
def test_every_known_name_of_a_prediction_is_read_in_any_case(said):
    want = "epsilon" if said.startswith("e") else "v_prediction"
    for written in (said, said.upper(), said.title(), f" {said} "):
        metadata = {"modelspec.prediction_type": written}
        assert single_file.prediction_of({}, metadata, "", Path("x")) == want


def test_an_unknown_prediction_is_refused_by_its_name(made, tmp_path, cache, capsys):
    name, _, folder, file = made
    options = {"tokenizer": str(folder), "config": str(folder)}
    student = {"windows": json.dumps([1.0, 0.5, 0.0]), "network_time": "index"}
    for said in ("Sample", "flow", "epsilon_v", "velocity"):
        other = changed(file, tmp_path / "u.safetensors", {"modelspec.prediction_type": said})
        with pytest.raises(UserError, match=f"'{said}' as its modelspec.prediction_type, which is not known") as caught:
            family(name).load(other, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="'x0' as its prediction_type, which is not known"):
        single_file.prediction_of({}, {**student, "prediction_type": "x0"}, "", file)
    assert not list((cache / "single-file").glob("*"))
    # What decides without it: the user, the v_pred key, silence; a velocity student keeps its config's.
    metadata = {"modelspec.prediction_type": "flow"}
    assert single_file.prediction_of({}, metadata, "epsilon", file) == "epsilon"
    assert single_file.prediction_of({"v_pred": torch.zeros(0)}, metadata, "", file) == "v_prediction"
    for silent in ({}, {"modelspec.prediction_type": ""}, {**student, "prediction_type": "velocity"}):
        assert single_file.prediction_of({}, silent, "", file) is None


def test_the_second_tokenizer_of_sdxl_follows_from_the_first(made, tmp_path):
    name, _, folder, file = made
    if name == "sdxl":
        base = family(name).load(file, tokenizer=str(folder / "tokenizer"), config=str(folder), parts=("text",))
        want = family(name).load(folder, parts=("text",))
        got, stock = base.encode_prompts(["a cat"]), want.encode_prompts(["a cat"])
        torch.testing.assert_close(got.encoder_hidden_states, stock.encoder_hidden_states, rtol=1e-5, atol=1e-5)
        assert base.tokenizers[1].pad_token == "!"


def test_what_does_not_fit_is_said_in_one_sentence(made, tmp_path, cache):
    name, _, folder, file = made
    load, options = family(name).load, {"tokenizer": str(folder), "config": str(folder)}
    with pytest.raises(UserError, match="holds no tokenizer: name a folder that has one"):
        load(file, config=str(folder))
    with pytest.raises(UserError, match="has neither tokenizer/ nor"):
        load(file, **{**options, "tokenizer": str(tmp_path)})
    # The configs that ship are those of the full size.
    with pytest.raises(UserError, match=f"the {name} config has|lacks|does not have"):
        load(file, tokenizer=str(folder))
    with pytest.raises(UserError, match="There is no config folder"):
        load(file, **{**options, "config": str(tmp_path / "none")})
    with pytest.raises(UserError, match="is a diffusers folder, which has a tokenizer"):
        load(folder, tokenizer=str(folder))
    key = "model.diffusion_model.out.2.weight"
    with pytest.raises(UserError, match="lacks 1 weights of its unet, the first is model.diffusion_model.out.2.weight"):
        load(changed(file, tmp_path / "a.safetensors", drop=[key]), **options)
    with pytest.raises(UserError, match="holds 1 UNet weights that its"):
        load(changed(file, tmp_path / "b.safetensors", **{"model.diffusion_model.odd": torch.zeros(1)}), **options)
    nine = torch.zeros(8, 9, 3, 3)
    with pytest.raises(UserError, match="an inpainting model"):
        load(changed(file, tmp_path / "c.safetensors", **{"model.diffusion_model.input_blocks.0.0.weight": nine}), **options)
    for gone, message in (("first_stage_model.", "no VAE"), ("cond", "no text encoder"), ("model.", "no UNet")):
        state = {key: t for key, t in load_file(file).items() if not key.startswith(gone)}
        save_file(state, tmp_path / "d.safetensors")
        with pytest.raises(UserError, match=message):
            load(tmp_path / "d.safetensors", **options)
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="holds LoRA weights"):
        load(tmp_path / "lora.safetensors", **options)
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged or cut short"):
        load(tmp_path / "cut.safetensors", **options)
    short = tmp_path / "words"
    shutil.copytree(folder / "tokenizer", short)
    settings = json.loads((short / "tokenizer_config.json").read_text())
    (short / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 77}))
    with pytest.raises(UserError, match="prompts of 77"):
        load(file, **{**options, "tokenizer": str(short)})
    assert not list((cache / "single-file").glob("*/")) and not list((cache / "single-file").glob(".*.tmp"))


def test_a_full_disk_is_a_sentence_and_leaves_nothing(made, cache, monkeypatch):
    name, _, folder, file = made

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(single_file.os, "rename", full)
    with pytest.raises(UserError, match=r"No space left on device\); make room there, or set REFLOW_CACHE"):
        family(name).load(file, tokenizer=str(folder), config=str(folder))
    assert not list((cache / "single-file").glob("*/"))


@pytest.mark.parametrize("name, unet, tensors", [("sd15", 859_520_964, 686), ("sdxl", 2_567_463_684, 1680)])
def test_the_configs_that_ship_are_the_published_ones_and_read_a_full_size_file(name, unet, tensors):
    folder = single_file.packaged(name)
    configs = single_file.read_configs(folder)
    parts = single_file.networks(configs)
    count = {part: sum(p.numel() for p in network.parameters()) for part, network in parts.items()}
    assert count["unet"] == unet and count["vae"] == 83_653_863
    assert count["text_encoder"] == 123_060_480 and count.get("text_encoder_2", 694_659_840) == 694_659_840
    state = original_unet(parts["unet"].state_dict(), parts["unet"].config)
    state |= original_vae(parts["vae"].state_dict(), parts["vae"].config)
    with torch.device("meta"):
        clip = original_clip(parts["text_encoder"].state_dict(), SDXL_CLIP_PREFIX if name == "sdxl" else SD_CLIP_PREFIX)
        state |= clip
        if name == "sdxl":
            state |= original_open_clip(parts["text_encoder_2"].state_dict())
    assert single_file.kind_of(state, Path("x")) == name
    read = single_file.convert(state, name, parts, Path("x"))
    assert len(read["unet"]) == tensors and {len(read[p]) for p in read if p == "vae"} == {248}
    base = family(name).load(folder, parts=())
    assert base.latent_shape() == ((4, 128, 128) if name == "sdxl" else (4, 64, 64)) and base.prediction_type == "epsilon"
    assert base.configs["vae"]["scaling_factor"] == (0.13025 if name == "sdxl" else 0.18215)
