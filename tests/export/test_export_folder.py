"""The exported diffusers folder: loads without reflow where it claims to, and samples what the student samples."""

import copy
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors.torch import load_file

import tiny_pipelines
from reflow.errors import UserError
from reflow.export import export_folder, stock_scheduler
from reflow.flow import Windows
from reflow.models import family
from reflow.sampling import PiecewiseFlowScheduler
from reflow.weights.delta import make_delta, merge

ENCODERS = ("text_encoder", "text_encoder_2")


def moved(pipe):
    """A student's UNet state: the base's, a little changed."""
    g = torch.Generator().manual_seed(1)
    return {
        key: tensor + 0.02 * torch.randn(tensor.shape, generator=g) for key, tensor in pipe.unet.state_dict().items()
    }


@pytest.fixture(scope="module")
def trained(sdxl, tmp_path_factory):
    """(base folder, the base's pipeline, a student's UNet state)."""
    folder = tmp_path_factory.mktemp("sdxl") / "base"
    sdxl.save_pretrained(folder)
    return folder, sdxl, moved(sdxl)


def latents(pipe, steps):
    return pipe(
        "abc",
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(2),
        height=64,
        width=64,
        output_type="latent",
    ).images


def student(pipe, state, scheduler, steps):
    before, old = {key: tensor.clone() for key, tensor in pipe.unet.state_dict().items()}, pipe.scheduler
    pipe.unet.load_state_dict(state)
    pipe.scheduler = scheduler
    try:
        return latents(pipe, steps)
    finally:
        pipe.unet.load_state_dict(before)
        pipe.scheduler = old


WITHOUT_REFLOW = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("reflow", "reflow_kernels"):
            raise ImportError(name + " is not installed here")
sys.meta_path.insert(0, Blocker())
try:
    import reflow
    sys.exit("reflow could be imported")
except ImportError:
    pass
import torch
torch.set_num_threads(1)
from diffusers import DiffusionPipeline
for folder in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(folder)
    call = dict(num_inference_steps=4, guidance_scale=3.0, height=64, width=64, output_type="latent")
    call["generator"] = torch.Generator().manual_seed(2)
    torch.save(pipe("abc", **call).images, folder + ".pt")
"""


def test_a_stock_export_samples_the_student_without_reflow(sd15, sdxl, tmp_path):
    wanted = {}
    for name, pipe in (("sd15", sd15), ("sdxl", sdxl)):
        pipe.save_pretrained(tmp_path / "base" / name)
        state = moved(pipe)
        export = export_folder(tmp_path / "base" / name, state, tmp_path / name, windows=4, dtype="fp32")
        assert export.stock and export.path == tmp_path / name
        assert json.loads((tmp_path / name / "model_index.json").read_text())["scheduler"] == [
            "diffusers",
            "DDIMScheduler",
        ]
        got = load_file(tmp_path / name / "unet/diffusion_pytorch_model.safetensors")
        assert got.keys() == state.keys() and all(torch.equal(got[key], state[key]) for key in state)
        wanted[name] = student(pipe, state, PiecewiseFlowScheduler(num_time_windows=4), 4)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_REFLOW, *(str(tmp_path / name) for name in wanted)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, want in wanted.items():
        assert (torch.load(tmp_path / f"{name}.pt") - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize(
    "settings,word",
    [
        (dict(windows=3), "differs by|timesteps"),
        (dict(windows=4, network_time="perflow"), "timesteps"),
        (dict(windows=4, prediction_type="diff_eps"), "no diff_eps"),
        (dict(windows=4, prediction_type="velocity"), "no velocity"),
        (dict(windows=2, steps=4), "4 steps on 2 windows"),
        (dict(windows=Windows((1.0, 0.75, 0.5, 0.0))), "timesteps|differs by"),
    ],
)
def test_what_stock_ddim_cannot_do_carries_our_scheduler(trained, settings, word, tmp_path):
    base, pipe, state = trained
    export = export_folder(base, state, tmp_path / "out", dtype="fp32", **settings)
    assert not export.stock
    assert any(part in export.reason for part in word.split("|")), export.reason
    again = tiny_pipelines.quiet(DiffusionPipeline.from_pretrained(tmp_path / "out"))
    assert type(again.scheduler) is PiecewiseFlowScheduler
    steps = settings.get("steps") or len(again.scheduler.windows)
    want = student(
        pipe,
        state,
        PiecewiseFlowScheduler.for_student(
            tiny_pipelines.ddim().config,
            settings["windows"],
            prediction_type=settings.get("prediction_type"),
            network_time=settings.get("network_time"),
        ),
        steps,
    )
    # Several network calls, each of which may differ by 1e-6 on weights that lie elsewhere, and diff_eps divides by dt.
    torch.testing.assert_close(latents(again, steps), want, rtol=1e-4, atol=1e-4)
    card = (tmp_path / "out/README.md").read_text()
    assert "import reflow.sampling" in card and f"num_inference_steps={steps}" in card and export.reason[1:-1] in card


@pytest.mark.parametrize(
    "base,windows,stock",
    [
        (dict(), 1, True),
        (dict(), 2, True),
        (dict(), 4, True),
        (dict(), 8, True),
        (dict(), 10, True),
        (dict(), 6, False),
        (dict(), 7, False),
        (dict(prediction_type="v_prediction"), 4, True),
        (dict(prediction_type="v_prediction", rescale_betas_zero_snr=True), 2, True),
        (dict(beta_schedule="linear"), 4, True),
    ],
)
def test_where_stock_ddim_is_exact(base, windows, stock):
    scheduler, reason = stock_scheduler(PiecewiseFlowScheduler.for_student(tiny_pipelines.ddim(**base).config, windows))
    assert (scheduler is not None) == stock, reason
    if stock:
        wanted = dict(
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            timestep_spacing="trailing",
            prediction_type=base.get("prediction_type", "epsilon"),
        )
        assert type(scheduler) is DDIMScheduler and wanted.items() <= dict(scheduler.config).items()


def test_half_precision_and_untouched_parts(trained, tmp_path):
    base, _, state = trained
    export_folder(base, state, tmp_path / "half", windows=4, card={"recipe": "r"})
    got = load_file(tmp_path / "half/unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(got[key], state[key].half()) for key in state)
    for part in ("vae", "text_encoder", "tokenizer"):
        for file in (base / part).iterdir():
            assert (tmp_path / "half" / part / file.name).read_bytes() == file.read_bytes()
    assert json.loads((tmp_path / "half/unet/config.json").read_text()) == json.loads(
        (base / "unet/config.json").read_text()
    )
    export_folder(base, state, tmp_path / "linked", windows=4, link=True)
    assert os.path.samefile(tmp_path / "linked/vae/config.json", base / "vae/config.json")
    assert not os.path.samefile(tmp_path / "linked/unet/config.json", base / "unet/config.json")


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_a_half_precision_base_loads_in_one_dtype(sdxl, tmp_path, key):
    """transformers would load text encoders in the dtype of their config, or else of their weights."""
    base = tmp_path / "base"
    half = {name: copy.deepcopy(getattr(sdxl, name)).half() for name in ("unet", "vae", *ENCODERS)}
    type(sdxl)(**{**sdxl.components, **half}, add_watermarker=False).save_pretrained(base)
    for name in ENCODERS:
        config = json.loads((base / name / "config.json").read_text())
        config.pop("dtype")
        (base / name / "config.json").write_text(json.dumps(config | ({key: "float16"} if key else {})))
    before = (base / "text_encoder/config.json").read_bytes()
    export_folder(base, half["unet"].state_dict(), tmp_path / "out", windows=4, link=True)
    again = tiny_pipelines.quiet(DiffusionPipeline.from_pretrained(tmp_path / "out"))
    assert {getattr(again, name).dtype for name in half} == {torch.float32}
    assert torch.isfinite(latents(again, 4)).all()
    asked = DiffusionPipeline.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert {getattr(asked, name).dtype for name in half} == {torch.bfloat16}
    assert (base / "text_encoder/config.json").read_bytes() == before


def test_nothing_is_overwritten_and_nothing_half_written(trained, tmp_path, monkeypatch):
    base, _, state = trained
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").write_text("kept")
    with pytest.raises(UserError, match="already exists"):
        export_folder(base, state, tmp_path / "full", windows=4)
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["precious"]
    (tmp_path / "empty").mkdir()
    export_folder(base, state, tmp_path / "empty", windows=4)
    assert (tmp_path / "empty/model_index.json").exists()

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("reflow.export.folder.write_state", full_disk)
    with pytest.raises(OSError):
        export_folder(base, state, tmp_path / "new", windows=4)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty", "full"]


@pytest.mark.parametrize(
    "change,word",
    [
        (lambda s: s.pop("conv_in.bias"), "1 differ in name or shape, the first is conv_in.bias"),
        (lambda s: s.update({"conv_in.bias": torch.zeros(3)}), "conv_in.bias"),
        (
            lambda s: s.update({"conv_in.bias": torch.full_like(s["conv_in.bias"], float("nan"))}),
            "conv_in.bias is not finite",
        ),
        (
            lambda s: s.update({"conv_in.bias": torch.full_like(s["conv_in.bias"], 1e6)}),
            "does not fit into torch.float16",
        ),
    ],
)
def test_weights_that_do_not_fit(trained, change, word, tmp_path):
    base, _, state = trained
    state = dict(state)
    change(state)
    with pytest.raises(UserError, match=word):
        export_folder(base, state, tmp_path / "out", windows=4)
    assert not (tmp_path / "out").exists()


def test_bases_that_are_not_whole(trained, tmp_path):
    base, _, state = trained
    with pytest.raises(UserError, match="no diffusers pipeline: it has no model_index.json"):
        export_folder(tmp_path, state, tmp_path / "out", windows=4)
    broken = shutil.copytree(base, tmp_path / "broken")
    shutil.rmtree(broken / "vae")
    with pytest.raises(UserError, match="vae is missing"):
        export_folder(broken, state, tmp_path / "out", windows=4)
    with pytest.raises(UserError, match="num_inference_steps=2 is fewer than the 4 windows"):
        export_folder(base, state, tmp_path / "out", windows=4, steps=2)
    with pytest.raises(UserError, match="dtype 'fp12'"):
        export_folder(base, state, tmp_path / "out", windows=4, dtype="fp12")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("variant", ["fp16", "v0-fix"])
def test_a_base_with_variants_and_spare_formats(trained, tmp_path, variant):
    """As downloaded from a hub: a variant only in one part, both kinds in another, and formats that nobody needs."""
    base, pipe, state = trained
    folder = shutil.copytree(base, tmp_path / "base")
    named = folder / f"vae/diffusion_pytorch_model.{variant}.safetensors"
    (folder / "vae/diffusion_pytorch_model.safetensors").rename(named)
    shutil.copy(folder / "text_encoder/model.safetensors", folder / f"text_encoder/model.{variant}.safetensors")
    (folder / "text_encoder/pytorch_model.bin").write_bytes(b"old")
    (folder / "text_encoder/flax_model.msgpack").write_bytes(b"old")
    index = json.loads((folder / "model_index.json").read_text())
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]  # named, but not downloaded
    (folder / "model_index.json").write_text(json.dumps(index))
    export_folder(folder, state, tmp_path / "out", windows=4, dtype="fp32")
    names = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert {name for name in names if name.startswith(("vae/", "text_encoder/"))} == {
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
    }
    again = tiny_pipelines.quiet(DiffusionPipeline.from_pretrained(tmp_path / "out"))
    want = student(pipe, state, PiecewiseFlowScheduler(num_time_windows=4), 4)
    np.testing.assert_allclose(latents(again, 4).numpy(), want.numpy(), atol=1e-4)


@pytest.mark.parametrize("variant", ["fp16", "v0-fix"])
def test_shards_of_a_variant_load(sd15, tmp_path, variant):
    sd15.save_pretrained(tmp_path / "base")
    for name in ("vae", "unet", "text_encoder"):
        part = getattr(sd15, name)
        shutil.rmtree(tmp_path / "base" / name)
        size = "20KB" if name == "text_encoder" else "100KB"
        part.save_pretrained(tmp_path / "base" / name, variant=variant, max_shard_size=size)
        assert len(list((tmp_path / "base" / name).glob(f"*.{variant}-0000*.safetensors"))) > 1
    export_folder(tmp_path / "base", tmp_path / "base", tmp_path / "out", windows=4, dtype="fp32")
    again, ours = DiffusionPipeline.from_pretrained(tmp_path / "out"), family("sd15").load(tmp_path / "base")
    for name, read in {"vae": ours.vae, "unet": ours.unet, "text_encoder": ours.text_encoders[0]}.items():
        want = getattr(sd15, name).state_dict()
        for part in (getattr(again, name), read):
            assert all(torch.equal(tensor, want[key]) for key, tensor in part.state_dict().items())
    index = tmp_path / "base" / "unet" / f"diffusion_pytorch_model.safetensors.index.{variant}.json"
    index.write_text("{")
    with pytest.raises(UserError, match=f"index.{variant}.json is no readable index of shards"):
        export_folder(tmp_path / "base", tmp_path / "base", tmp_path / "again", windows=4)


def test_several_variants_and_none_to_prefer_are_refused(trained, tmp_path):
    base, _, state = trained
    folder = shutil.copytree(base, tmp_path / "base")
    plain = folder / "vae/diffusion_pytorch_model.safetensors"
    for name in ("v0-fix", "v0-sync"):
        shutil.copy(plain, folder / f"vae/diffusion_pytorch_model.{name}.safetensors")
    export_folder(folder, state, tmp_path / "plain", windows=4)
    plain.unlink()
    with pytest.raises(UserError, match="vae holds 2 variants .*v0-fix.safetensors, .*v0-sync.*leave only one"):
        export_folder(folder, state, tmp_path / "out", windows=4)
    with pytest.raises(UserError, match="vae holds 2 variants"):
        family("sdxl").load(folder, parts=("vae",))


@pytest.mark.parametrize("dtype, said", [("fp16", "torch.float16"), ("bf16", "torch.bfloat16"), ("fp32", "")])
def test_the_card_says_how_to_load_halves(trained, tmp_path, dtype, said):
    base, _, state = trained
    export_folder(base, state, tmp_path / "out", windows=4, dtype=dtype)
    text = (tmp_path / "out/README.md").read_text()
    assert ("leave `variant` out" in text) == bool(said) and (not said or f"`torch_dtype={said}`" in text)
    kind = getattr(torch, said.removeprefix("torch.") or "float32")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out", **({"torch_dtype": kind} if said else {}))
    assert pipe.unet.dtype == pipe.text_encoder.dtype == kind


def test_merging_a_delta_into_another_model_and_exporting_it(trained, tmp_path):
    base, pipe, state = trained
    delta = make_delta(pipe.unet.state_dict(), state)
    merged, _ = merge(base, delta)
    export_folder(base, merged, tmp_path / "out", windows=4, dtype="fp32")
    got = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    assert all(torch.allclose(got[key], state[key], rtol=0, atol=1e-8) for key in state)


def test_the_card(trained, tmp_path):
    base, _, state = trained
    card = dict(
        title="Few steps",
        base="some/base",
        license="apache-2.0",
        recipe={"stages": {"0": {"windows": 8}}, "lr": 1e-05},
        data="1797 digits",
        guidance={"guidance_scale": 4.5},
        evaluation=[{"steps": 4, "frechet": 0.7512345}, {"steps": 2, "note": "a|b"}],
        thanks="to all",
    )
    export_folder(base, state, tmp_path / "out", windows=4, card=card)
    text = (tmp_path / "out/README.md").read_text()
    header, _, body = text[4:].partition("---\n")
    assert (
        'license: "apache-2.0"' in header
        and 'base_model: "some/base"' in header
        and 'library_name: "diffusers"' in header
    )
    for piece in (
        "# Few steps",
        "| stages.0.windows | 8 |",
        "| lr | 1e-05 |",
        "1797 digits",
        "guidance_scale=4.5",
        "num_inference_steps=4",
        "| 4 | 0.751235 |  |",
        "| 2 |  | a\\|b |",
        "## Thanks",
        "t = 1, 0.75, 0.5, 0.25, 0",
        "Use exactly 4 steps",
    ):
        assert piece in body, piece
    assert body.index("## Recipe") < body.index("## Data") < body.index("## Evaluation") < body.index("## Thanks")
