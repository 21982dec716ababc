"""The quick form of the soak of hostile weights, and the rules for folders and files that it once broke."""

import json
import pathlib
import resource
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from reflow.errors import UserError
from reflow.models import family
from reflow.models.digits import BUILTIN
from reflow.weights import guard
from reflow.weights.delta import student_settings
from reflow.weights.files import read_state

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import soak

weights = soak.row("weights")
QUICK = [index for index in range(40) if index % 8 not in (2, 3)] + [2, 3, 11, 18]  # training and evaluation take seconds


def test_hostile_weights_are_refused_in_a_sentence_by_every_command():
    found = [soak.one(weights, index) for index in QUICK]
    assert not [case for case in found if case["failed"]]
    assert sum(case["refused"] for case in found) > 20 and {case["kind"].split(",")[0] for case in found} >= {"sample", "merge", "train", "export"}


def test_a_trial_notices_what_must_not_happen(tmp_path, monkeypatch):
    for index, (end, told) in enumerate([((1, "", "reflow: no.\n"), "exit code 1"), ((2, "", "Traceback\n"), "not one sentence"),
                                         ((2, "", "reflow: set weights_only=False.\n"), "advice to run a pickle")]):  # fmt: skip
        monkeypatch.setattr(weights, "called", lambda words, end=end: end)
        (tmp_path / str(index)).mkdir()
        assert told in weights.trial(5, tmp_path / str(index))["failed"]
    monkeypatch.setattr(weights, "called", lambda words: ((pathlib.Path(words[-1]).parent / "ran").touch(), (2, "", "reflow: No.\n"))[1])
    (tmp_path / "ran").mkdir()
    assert weights.trial(5, tmp_path / "ran")["failed"] == "code of the file was run"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(BUILTIN, tmp_path / "base")


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("file, values, words", [
    ("model_index.json", {"unet": ["evil", "Evil"]}, "its unet is .'evil', 'Evil'., which is code that diffusers and transformers do not have"),
    ("model_index.json", {"../x": ["diffusers", "X"]}, "a part '../x', which is no name of a folder"),
    ("model_index.json", {"_class_name": ["evil", "Evil"]}, "names the pipeline's class as .'evil', 'Evil'."),
    ("unet/config.json", {"auto_map": {"a": "b"}}, "auto_map = .*asks for code or a format"),
    ("text_encoder/config.json", {"attn_implementation": "someone/kernel"}, "attn_implementation = 'someone/kernel', which asks for code"),
    ("vae/config.json", {"quantization_config": {}}, "quantization_config"),
    ("unet/config.json", {"layers_per_block": 10**6}, "layers_per_block = 1000000, which no network has"),
    ("text_encoder/config.json", {"num_hidden_layers": 10**6}, "num_hidden_layers = 1000000, which no network has"),
    ("unet/config.json", {"sample_size": None}, "sample_size = None; it must be a whole number"),
    ("vae/config.json", {"scaling_factor": 0}, "scaling_factor = 0; it must be a number above 0"),
    ("vae/config.json", {"scaling_factor": "x"}, "scaling_factor = 'x'; it must be a number above 0"),
    ("vae/config.json", {"latents_mean": [0.0]}, "latents_mean = .0.0.; it must be one number a channel"),
    ("vae/config.json", {"latents_mean": [0.0] * 4, "latents_std": [0.0] * 4}, "latents_std"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}, "has 1000000000000 train steps"),
    ("scheduler/scheduler_config.json", {"trained_betas": [0.1] * 200_000}, "has 200000 train steps"),
    ("scheduler/scheduler_config.json", {"prediction_type": ["x"]}, "prediction_type = .'x'.; it must be a word"),
])  # fmt: skip
def test_a_folder_that_asks_for_too_much_is_refused_before_anything_is_loaded(folder, file, values, words):
    change(folder / file, **values)
    with pytest.raises(UserError, match=words) as told:
        family("sdxl").load(folder, parts=())
    assert file in str(told.value)


@pytest.mark.parametrize("file, values, words", [
    ("unet/config.json", {"norm_eps": "x"}, "norm_eps = 'x', which is no float"),
    ("unet/config.json", {"in_channels": 60_000}, "has shape .* describes"),
    ("text_encoder/config.json", {"vocab_size": 2**30}, "has shape .* describes"),
    ("unet/config.json", {"down_block_types": ["Evil", "Evil"]}, "describes no network that can be built"),
])  # fmt: skip
def test_a_config_that_does_not_describe_the_weights_beside_it_takes_no_memory(folder, file, values, words):
    change(folder / file, **values)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=words):
        family("sdxl").load(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


def test_an_index_of_shards_leads_to_files_beside_it(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    shards = file.parent / f"{file.name}.index.json"
    for name in ("../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", "x.bin", 3):
        shards.write_text(json.dumps({"metadata": {}, "weight_map": {"conv_in.weight": name}}))
        with pytest.raises(UserError, match="which is no .safetensors file beside it"):
            family("sdxl").load(folder, parts=("unet",))
        file.rename(file.with_name("kept"))
        with pytest.raises(UserError, match="which is no .safetensors file beside it"):
            read_state(folder)
        file.with_name("kept").rename(file)


def test_pickles_of_a_folder_are_read_only_where_that_is_asked_for(folder, tmp_path, monkeypatch):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    file.unlink()
    torch.save(state, file.with_suffix(".bin"))
    with pytest.raises(UserError, match="no .safetensors weights. Pickles can run code .*REFLOW_PICKLES=1"):
        family("sdxl").load(folder, parts=("unet",))
    monkeypatch.setenv(guard.PICKLES, "1")
    base = family("sdxl").load(folder, parts=("unet",))
    assert all(torch.equal(tensor, state[key]) for key, tensor in base.unet.state_dict().items())
    torch.save(state | {"x": weights.Mark(tmp_path / "ran")}, file.with_suffix(".bin"))
    with pytest.raises(UserError, match="cannot be loaded") as told:
        family("sdxl").load(folder, parts=("unet",))
    assert "weights_only=False" not in str(told.value) and "two options" not in str(told.value) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("said", [
    {"windows": "x"}, {"windows": "[1, 2]"}, {"windows": "[NaN, 0]"}, {"windows": "null"}, {"windows": "[" * 9999}, {"prediction_type": "epsilon"},
    {"network_time": ""}, {"windows": json.dumps([1 - i / 5000 for i in range(5001)])},
])  # fmt: skip
def test_metadata_that_cannot_be_are_refused(tmp_path, said):
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors", weights.says(**said))
    with pytest.raises(UserError, match=f"x.safetensors says in its metadata that {next(iter(said))} is"):
        student_settings(tmp_path / "x.safetensors")


@pytest.mark.parametrize("tensor, words", [
    (torch.full((2,), float("nan")), "1 tensors of .*x.safetensors are not finite"), (torch.zeros(2, dtype=torch.int8), "is stored as int8"),
    (torch.zeros(2).to(torch.float8_e4m3fn), "is stored as float8_e4m3fn"), (torch.zeros(2, dtype=torch.complex64), "is stored as complex64"),
])  # fmt: skip
def test_tensors_that_are_no_weights_are_refused(tmp_path, tensor, words):
    save_file({"a": torch.zeros(1), "b": tensor}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=words):
        read_state(tmp_path / "x.safetensors")


def test_a_header_is_not_believed_before_it_is_looked_at(tmp_path):
    for size in (2**63, 2**40, guard.HEADER + 1):
        (tmp_path / "x.safetensors").write_bytes(size.to_bytes(8, "little") + b"{" * 100)
        with pytest.raises(UserError, match="x.safetensors is damaged or cut short .it names a header of"):
            read_state(tmp_path / "x.safetensors")
