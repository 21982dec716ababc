"""LoRA files in stock pipelines: both spellings draw what the merged weights draw, for SD1.5 and SDXL, linear layers and convolutions."""

import copy
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils import convert_unet_state_dict_to_peft as convert
from safetensors.torch import load_file

import reflow.models
from reflow.errors import UserError
from reflow.weights.files import write_state
from reflow.weights.kohya import kohya_names
from reflow.weights.lora import adapter_state, export_lora, is_lora, lora_state, merge_lora, student_state


def lora_of(unet, rank=2):
    """Random LoRA weights for every linear layer and convolution, of a size that changes what is drawn."""
    g, state = torch.Generator().manual_seed(3), {}
    for name, module in unet.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            shape = module.weight.shape
            state[f"unet.{name}.lora_A.weight"] = 0.1 * torch.randn(rank, *shape[1:], generator=g)
            state[f"unet.{name}.lora_B.weight"] = 0.1 * torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=g)
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
    for kohya in (None, pipe.unet.config):
        path = export_lora(source, tmp_path / f"{kohya is None}.safetensors", kohya=kohya)
        pipe.load_lora_weights(str(path))
        got = latents(pipe)
        pipe.unload_lora_weights()
        assert (got - want).norm() < 1e-4 * want.norm()
    written = load_file(path)
    assert all(tensor.item() == 2 for key, tensor in written.items() if key.endswith(".alpha"))
    assert OF_KOHYA[name] <= {key.partition(".")[0] for key in written} and 3 * len(state) == 2 * len(written)


# kohya's scripts have SD1.5 in diffusers' blocks and SDXL in the original checkpoint's; ComfyUI and AUTOMATIC1111 read these.
OF_KOHYA = {
    "sd15": {
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0",
        "lora_unet_up_blocks_3_resnets_2_conv_shortcut",
        "lora_unet_down_blocks_0_downsamplers_0_conv",
    },
    "sdxl": {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_middle_block_1_transformer_blocks_1_attn2_to_out_0",
        "lora_unet_output_blocks_2_1_proj_in",
        "lora_unet_output_blocks_5_0_skip_connection",
        "lora_unet_input_blocks_3_0_op",
        "lora_unet_output_blocks_2_2_conv",
        "lora_unet_input_blocks_1_0_emb_layers_1",
        "lora_unet_label_emb_0_0",
        "lora_unet_label_emb_0_2",
    },
}


def test_kohyas_names_of_the_full_size_sdxl():
    """All that the default targets train, in the blocks of kohya's own SDXL: 4, 5, 7, 8 in, the middle, 0 to 5 out."""
    config = json.loads((Path(reflow.models.__file__).parent / "configs" / "sdxl" / "unet" / "config.json").read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    layers = [name for name, _ in unet.named_modules() if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    names = kohya_names(layers, config)
    assert len(set(names.values())) == len(layers) == 560
    blocks = Counter(name.partition("_1_transformer")[0].removeprefix("lora_unet_") for name in names.values())
    wide = dict.fromkeys(("input_blocks_7", "input_blocks_8", "middle_block", "output_blocks_0", "output_blocks_1", "output_blocks_2"), 80)
    narrow = dict.fromkeys(("input_blocks_4", "input_blocks_5", "output_blocks_3", "output_blocks_4", "output_blocks_5"), 16)
    assert blocks == wide | narrow


def test_a_layer_without_a_name_of_kohyas_is_refused(sd15, sdxl, monkeypatch):
    with pytest.raises(UserError, match="changes add_embedding.linear_1, which the base's UNet does not have"):
        kohya_names(["add_embedding.linear_1"], sd15.unet.config)
    odd = {**sdxl.unet.config, "layers_per_block": [1, 2, 2]}
    with pytest.raises(UserError, match="the blocks of this UNet have none. Write it with --format lora"):
        kohya_names(["conv_in"], odd)
    # As a diffusers that loses what it does not know.
    monkeypatch.setattr("diffusers.utils.convert_unet_state_dict_to_peft", lambda state: {
        key: tensor for key, tensor in convert(state).items() if "add_embedding" not in key})  # fmt: skip
    with pytest.raises(UserError, match="would not read 2 of the 4 weights .* for example add_embedding.linear_2.lora_A.weight"):
        kohya_names(["time_embedding.linear_1", "add_embedding.linear_2"], sdxl.unet.config)


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
