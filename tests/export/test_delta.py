"""Delta weights: exact sums in fp32, and a report of every key that does not fit."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from reflow.errors import UserError
from reflow.flow import Windows
from reflow.training.checkpoint import save_weights
from reflow.weights.delta import make_delta, merge, student_metadata, student_settings, write_delta
from reflow.weights.files import read_state, write_state


def state(seed, scale=1.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    shapes = {"conv_in.weight": (8, 4, 3, 3), "mid.attn.to_q.weight": (16, 16), "mid.attn.to_q.bias": (16,)}
    return {key: (scale * torch.randn(*shape, generator=g)).to(dtype) for key, shape in shapes.items()} | {
        "ids": torch.arange(3)
    }


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1e-4, 1e-2, 1.0]))
def test_merging_into_the_base_gives_the_student_back(seed, change):
    base = state(seed)
    student = {
        key: tensor + change * torch.randn(tensor.shape) if tensor.is_floating_point() else tensor
        for key, tensor in base.items()
    }
    delta = make_delta(base, student)
    merged, report = merge(base, delta)
    assert set(report.matched) == set(delta) and not report.mismatched and not report.skipped
    for key in delta:
        # dW is rounded once: exact wherever |dW| < |W|, else half a unit of dW's last place.
        ulp = torch.finfo(torch.float32).eps * delta[key].abs()
        assert ((merged[key] - student[key]).abs() <= ulp).all()
        small = delta[key].abs() < 0.5 * student[key].abs()
        assert torch.equal(merged[key][small], student[key][small])
    assert torch.equal(merged["ids"], base["ids"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_summed_in_fp32_and_cast_once(dtype):
    base, student, custom = state(0, dtype=dtype), state(1, dtype=dtype), state(2, dtype=dtype)
    delta = make_delta(base, student)
    assert all(tensor.dtype == torch.float32 for tensor in delta.values())
    back, _ = merge(base, delta)
    merged, _ = merge(custom, delta, scale=0.5)
    for key in delta:
        assert torch.equal(back[key], student[key]) and back[key].dtype == dtype
        want = custom[key].double() + 0.5 * (student[key].double() - base[key].double())
        assert torch.equal(merged[key], want.float().to(dtype))


def test_a_published_half_precision_delta_merges_into_fp32(tmp_path):
    # PeRFlow's delta_weights.safetensors: UNet keys of diffusers, half precision, no metadata but the format.
    delta = {key: tensor for key, tensor in state(1, 0.01, torch.float16).items() if key != "ids"}
    save_file(delta, tmp_path / "delta_weights.safetensors", metadata={"format": "pt"})
    custom = {key: tensor for key, tensor in state(2).items() if key != "ids"}
    merged, report = merge(custom, tmp_path / "delta_weights.safetensors")
    assert len(report.matched) == 3 and "3 tensors merged" in str(report)
    for key in custom:
        assert torch.equal(merged[key], custom[key] + delta[key].float()) and merged[key].dtype == torch.float32
    assert student_settings(tmp_path / "delta_weights.safetensors") == student_settings(tmp_path) == {}
    again, _ = merge(custom, tmp_path)  # the published folder
    assert all(torch.equal(again[key], merged[key]) for key in merged)


def test_delta_file_keeps_how_to_sample_it(tmp_path):
    base, student, windows = state(0), state(1), Windows((1.0, 0.5, 0.25, 0.0))
    path = write_delta(
        base,
        student,
        tmp_path / "out" / "delta.safetensors",
        metadata=student_metadata(windows, "ddim_eps", steps=3, base="some/base"),
    )
    assert student_settings(path) == {"windows": windows, "prediction_type": "ddim_eps", "network_time": "index"}
    delta = read_state(path)
    assert set(delta) == set(base) - {"ids"}
    assert all(torch.equal(delta[key], student[key] - base[key]) for key in delta)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["delta.safetensors"]  # no temporary file left
    with pytest.raises(UserError, match="already exists"):
        write_delta(base, student, path)


def test_every_kind_of_mismatch_is_refused_unless_named():
    delta = make_delta(state(0), state(1))
    inpaint = state(2) | {"conv_in.weight": torch.randn(8, 9, 3, 3)}
    with pytest.raises(UserError, match="conv_in.weight"):
        merge(inpaint, delta)
    merged, report = merge(inpaint, delta, allow=["conv_in.*"])
    assert torch.equal(merged["conv_in.weight"], inpaint["conv_in.weight"])
    assert report.mismatched == ["conv_in.weight"] and "other shape: conv_in.weight" in str(report)

    extra = state(2) | {"control.weight": torch.zeros(2)}
    with pytest.raises(UserError, match="control.weight"):
        merge(extra, delta)
    merged, report = merge(extra, delta, allow=["control.weight"])
    assert report.skipped == ["control.weight"] and torch.equal(merged["control.weight"], extra["control.weight"])

    lacking = {key: tensor for key, tensor in state(2).items() if key != "mid.attn.to_q.bias"}
    with pytest.raises(UserError, match="1 of 3 weights.*mid.attn.to_q.bias"):
        merge(lacking, delta)
    merged, _ = merge(lacking, delta, allow=["mid.attn.*"])
    assert set(merged) == set(lacking)
    with pytest.raises(UserError, match="no key that differs"):
        merge(state(2), delta, allow=["conv_out.*"])
    with pytest.raises(UserError, match="finite"):
        merge(state(2), delta, scale=float("nan"))


def test_a_delta_needs_one_architecture():
    other = state(1)
    other["mid.attn.to_q.weight"] = torch.zeros(8, 8)
    with pytest.raises(UserError, match="mid.attn.to_q.weight"):
        make_delta(state(0), other)
    with pytest.raises(UserError, match="same architecture"):
        make_delta(state(0), {**state(1), "more": torch.zeros(1)})


@pytest.mark.parametrize("mask, rights", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_weight_files_have_the_rights_of_any_new_file(tmp_path, mask, rights):
    before = os.umask(mask)
    try:
        files = [write_state(state(0), tmp_path / "a.safetensors"), tmp_path / "b.safetensors"]
        save_weights(state(0), files[1], {})
    finally:
        os.umask(before)
    assert [file.stat().st_mode & 0o777 for file in files] == [rights, rights]


@pytest.mark.parametrize(
    "path, name",
    [
        ("some/base", "some/base"),
        ("here/base", "base"),
        ("/data/models/base/", "base"),
        ("~/base", "base"),
        ("../x/base.safetensors", "base.safetensors"),
        ("builtin", "builtin"),
        (".", "work"),
    ],
)
def test_what_is_passed_on_has_names_and_no_paths(tmp_path, monkeypatch, path, name):
    (tmp_path / "work" / "here" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    assert student_metadata(Windows.uniform(4), "ddim_eps", base=path)["base"] == name


def test_reading_weights_wherever_they_lie(tmp_path, sd15):
    sd15.save_pretrained(tmp_path / "whole")
    sd15.unet.save_pretrained(tmp_path / "shards", max_shard_size="400KB")
    sd15.unet.save_pretrained(tmp_path / "half", variant="fp16")
    want = sd15.unet.state_dict()
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for source in (
        tmp_path / "whole",
        tmp_path / "whole" / "unet",
        tmp_path / "shards",
        tmp_path / "half",
        tmp_path / "whole" / "unet" / "diffusion_pytorch_model.safetensors",
    ):
        got = read_state(source)
        assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
    with pytest.raises(UserError, match="holds no UNet weights"):
        read_state(tmp_path / "whole" / "vae" / "nothing")
    (tmp_path / "weights.ckpt").write_bytes(b"x")
    with pytest.raises(UserError, match="only safetensors"):
        read_state(tmp_path / "weights.ckpt")
    (tmp_path / "cut.safetensors").write_bytes(
        (tmp_path / "half/diffusion_pytorch_model.fp16.safetensors").read_bytes()[:5000]
    )
    with pytest.raises(UserError, match="cut.safetensors is damaged or cut short"):
        read_state(tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match="damaged or cut short"):
        student_settings(tmp_path / "cut.safetensors")
