"""The table of known few-step models: complete, unambiguous, in step with diffusers; and what it refuses."""

import inspect
import json
from pathlib import Path

import diffusers
import pydantic
import pytest
import torch
from safetensors.torch import save_file

from reflow.errors import UserError
from reflow.evaluation.contenders import known
from reflow.evaluation.contenders.opening import scheduler_class
from reflow.flow import Windows
from reflow.weights.delta import student_metadata

TABLE = known.table()
names = pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.name)


def test_every_entry_has_a_name_of_its_own():
    assert len({entry.name for entry in TABLE}) == len(TABLE) > 50


@names
def test_every_entry_is_complete(entry):
    assert entry.bases and set(entry.bases) <= known._read()["bases"].keys()
    assert entry.files and entry.examples and entry.source and entry.scheduler
    assert all(pattern == known.plain_name(pattern) or "*" in pattern for pattern in entry.files)
    assert list(entry.steps) == sorted(entry.steps) and entry.fits_guidance(entry.guidance)
    assert entry.confirmed or entry.note, "what was not confirmed is said"
    assert "{" not in entry.name + "".join(entry.files + entry.examples)
    for steps, timesteps in entry.timesteps.items():
        assert entry.fits_steps(steps) and len(timesteps) == steps
        assert list(timesteps) == sorted(timesteps, reverse=True) and 0 <= timesteps[-1] <= timesteps[0] < 1000


@names
def test_every_scheduler_exists_and_takes_the_keywords(entry):
    made = scheduler_class(entry.scheduler)
    takes = inspect.signature(made.__init__).parameters
    assert entry.config.keys() <= takes.keys()
    scheduler = made.from_config({}, **entry.config)
    for key, value in entry.config.items():
        assert scheduler.config[key] == value
    if entry.timesteps:
        assert "timesteps" in inspect.signature(made.set_timesteps).parameters
        for steps, timesteps in entry.timesteps.items():
            scheduler.set_timesteps(timesteps=list(timesteps))
            assert scheduler.timesteps.tolist() == list(timesteps) and len(timesteps) == steps
    if entry.eta is not None:
        assert "eta" in inspect.signature(made.step).parameters


@names
def test_every_pipeline_of_an_entry_takes_what_it_is_called_with(entry):
    classes = {name for base in entry.bases for name in known._read()["bases"][base]["pipelines"]}
    asked = set(entry.call) | ({"timesteps"} if entry.timesteps else set()) | ({"eta"} if entry.eta is not None else set())
    if "LatentConsistencyModelPipeline" in classes and entry.name != "lcm":
        classes.remove("LatentConsistencyModelPipeline")
    for name in classes:
        assert asked <= inspect.signature(getattr(diffusers, name).__call__).parameters.keys(), name


def test_published_names_are_claimed_by_one_entry_each():
    for entry in TABLE:
        for example in entry.examples:
            claimed = [other.name for other in TABLE if any(known.claims(other, name) for name in known._names(Path("/models") / example))]
            assert claimed == [entry.name], example


def test_no_two_entries_claim_one_name():
    patterns = [(pattern, entry.name) for entry in TABLE for pattern in entry.files]
    for pattern, owner in patterns:
        assert {entry.name for entry in TABLE if known.claims(entry, pattern)} == {owner}, pattern


@pytest.mark.parametrize(
    "path,name",
    [
        ("/a/loras/sdxl_lightning_4step_lora.safetensors", "sdxl-lightning-4step"),
        ("/a/Hyper-SD15-8steps-CFG-lora.safetensors", "hyper-sd15-8steps-cfg"),
        ("/hub/models--latent-consistency--lcm-lora-sdxl/snapshots/" + "0a" * 20 + "/pytorch_lora_weights.safetensors", "lcm-lora-sdxl"),
        ("/a/dmd2_sdxl_4step_lora_fp16.safetensors", "dmd2-sdxl-4step"),
        ("/a/TCD-SDXL-LoRA/pytorch_lora_weights.safetensors", "tcd-sdxl"),
        ("/a/lcm-lora-sdxl/my_style.safetensors", None),
        ("/a/pixel-art-xl.safetensors", None),
        ("/a/lightning.safetensors", None),
    ],
)
def test_a_lora_is_known_by_its_name(path, name):
    found = known.recognise("/models/base", path)
    assert (found and found.name) == name


def test_the_lora_speaks_before_the_pipeline():
    assert known.recognise("/models/sdxl-turbo").name == "sdxl-turbo"
    assert known.recognise("/models/sdxl-turbo", "/a/my_style.safetensors").name == "sdxl-turbo"
    assert known.recognise("/models/sdxl-turbo", "/a/lcm-lora-sdxl.safetensors").name == "lcm-lora-sdxl"


def test_a_folder_is_known_by_its_configs(tmp_path):
    for name, content in (("scheduler/scheduler_config.json", {"_class_name": "LCMScheduler"}), ("unet/config.json", {"time_cond_proj_dim": 256})):
        assert known.recognise(tmp_path) is None
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(content))
    assert known.recognise(tmp_path).name == "lcm"


def test_our_lora_says_its_windows(tmp_path):
    file = tmp_path / "student.safetensors"
    save_file({"unet.x.lora_A.weight": torch.zeros(1, 1)}, file, metadata=student_metadata(Windows.uniform(4), "ddim_eps"))
    found = known.recognise("/models/base", file)
    assert found.name == known.OURS and found.least == 4 and found.scheduler == "PiecewiseFlowScheduler"
    assert found.fits_steps(5) and not found.fits_steps(3) and found.fits_guidance(7.5)


def test_a_wrong_combination_names_the_right_one():
    lightning = known.by_name("sdxl-lightning-4step")
    for guidance in (0.0, 1.0):
        known.refuse(lightning, 4, guidance, base=("sdxl",))
    with pytest.raises(UserError) as error:
        known.refuse(lightning, 8, 1.0, label="sdxl_lightning_4step_lora.safetensors")
    assert str(error.value) == (
        "sdxl_lightning_4step_lora.safetensors is made for 4 steps and guidance 1 (or none) with EulerDiscreteScheduler (timestep_spacing "
        "trailing) (ByteDance/SDXL-Lightning, README); asked 8 steps: write --steps 4, or --anyway to measure it regardless."
    )
    with pytest.raises(UserError, match=r"asked 2 steps and guidance 7.5: write --steps 4 and --guidance 1, or --anyway"):
        known.refuse(lightning, 2, 7.5)
    with pytest.raises(UserError, match="asked DDIMScheduler: write --scheduler EulerDiscreteScheduler"):
        known.refuse(lightning, 4, 1.0, "DDIMScheduler")
    with pytest.raises(UserError, match="made for sdxl, and the pipeline is sd15"):
        known.refuse(lightning, 4, 1.0, base=("sd15",))
    with pytest.raises(UserError, match="guidance 5 to 8 .*asked guidance 1: write --guidance 5"):
        known.refuse(known.by_name("hyper-sdxl-8steps-cfg"), 8, 1.0)
    with pytest.raises(UserError, match="timestep-shifted"):
        known.refuse(known.by_name("nitrofusion"), 1, 1.0)
    with pytest.raises(UserError, match="4 steps or more .*asked 2 steps: write --steps 4"):
        known.refuse(known.by_name("perflow-sd15"), 2, 7.5)


def test_a_misspelt_name_gets_the_nearest():
    with pytest.raises(UserError, match="did you mean sdxl-lightning-4step"):
        known.by_name("sdxl-lightening-4step")
    with pytest.raises(UserError, match="names are those of known.toml"):
        known.by_name("????")


def test_bases_are_told_by_class_and_width():
    assert known.bases_of("StableDiffusionPipeline", 768) == ("sd15",)
    assert known.bases_of("StableDiffusionPipeline", 1024) == ("sd21",)
    assert known.bases_of("StableDiffusionPipeline", 32) == ("sd15", "sd21")
    assert known.bases_of("StableDiffusionXLPipeline", 2048) == ("sdxl", "ssd1b")
    assert known.bases_of("FluxPipeline", None) == ("flux",) and known.bases_of("KolorsPipeline", 4096) == ()


def test_an_entry_with_an_unknown_key_is_no_entry():
    check = pydantic.TypeAdapter(known.Known)
    whole = dict(name="x", kind="lora", bases=["sdxl"], files=["x"], guidance=1.0, source="x")
    check.validate_python(whole)
    for wrong in ({"stepz": [4]}, {"guidance": "high"}, {"kind": "model"}):
        with pytest.raises(pydantic.ValidationError):
            check.validate_python(whole | wrong)
