"""LoRA files in stock pipelines: both spellings draw what the merged weights draw, for SD1.5 and SDXL, linear layers and convolutions."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from reflow.errors import UserError
from reflow.weights.files import write_state
from reflow.weights.lora import adapter_state, export_lora, is_lora, lora_state, merge_lora, student_state

ENDS = ("attn1.to_q", "attn2.to_out.0", "ff.net.2", "proj_in", "conv1", "conv_shortcut")


def lora_of(unet, rank=2):
    """Random LoRA weights for some layers of every kind, of a size that changes what is drawn."""
    g, state = torch.Generator().manual_seed(3), {}
    for name, module in unet.named_modules():
        if name.endswith(ENDS):
            shape = module.weight.shape
            state[f"unet.{name}.lora_A.weight"] = 0.3 * torch.randn(rank, *shape[1:], generator=g)
            state[f"unet.{name}.lora_B.weight"] = 0.3 * torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=g)
    return state


def latents(pipe):
    return pipe("abc", num_inference_steps=2, guidance_scale=1.0, generator=torch.Generator().manual_seed(2), height=64, width=64,
                output_type="latent").images


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_both_spellings_of_a_lora_draw_what_the_merged_weights_draw(name, request, tmp_path):
    pipe = copy.copy(request.getfixturevalue(name))
    pipe.unet = copy.deepcopy(pipe.unet)
    state, base = lora_of(pipe.unet), {key: tensor.clone() for key, tensor in pipe.unet.state_dict().items()}
    source = write_state(state, tmp_path / "source.safetensors")
    plain = latents(pipe)
    pipe.unet.load_state_dict(student_state(base, source))
    want = latents(pipe)
    pipe.unet.load_state_dict(base)
    assert (want - plain).norm() > 0.05 * plain.norm()
    for kohya in (False, True):
        pipe.load_lora_weights(str(export_lora(source, tmp_path / f"{kohya}.safetensors", kohya=kohya)))
        got = latents(pipe)
        pipe.unload_lora_weights()
        assert (got - want).norm() < 1e-4 * want.norm()
    kohya = load_file(tmp_path / "True.safetensors")
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight" in kohya
    assert all(tensor.item() == 2 for key, tensor in kohya.items() if key.endswith(".alpha"))


def test_alpha_is_in_the_file_and_comes_out_again():
    adapter = {"a.to_q.lora_A.weight": torch.randn(2, 3), "a.to_q.lora_B.weight": torch.randn(4, 2)}
    file = lora_state(adapter, 1.5)
    weight = torch.randn(4, 3).half()
    merged = merge_lora({"a.to_q.weight": weight, "b": torch.ones(1)}, file)
    torch.testing.assert_close(merged["a.to_q.weight"],
                               weight.float() + 1.5 * adapter["a.to_q.lora_B.weight"] @ adapter["a.to_q.lora_A.weight"])
    assert merged["a.to_q.weight"].dtype == torch.float32 and merged["b"] is not None
    back = adapter_state(file, 1.5)
    assert back.keys() == adapter.keys()
    for key in adapter:
        torch.testing.assert_close(back[key], adapter[key])


def test_a_lora_of_another_base_and_a_damaged_file_are_refused(sd15, sdxl, tmp_path):
    with pytest.raises(UserError, match="does not fit the base.*the first is"):
        merge_lora(sdxl.unet.state_dict(), lora_of(sd15.unet))
    path = tmp_path / "cut.safetensors"
    path.write_bytes(write_state(lora_of(sd15.unet), tmp_path / "whole.safetensors").read_bytes()[:200])
    with pytest.raises(UserError, match="damaged or cut short"):
        is_lora(path)
