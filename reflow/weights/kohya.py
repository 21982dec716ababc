"""Names of a LoRA's layers in the files of kohya's scripts, which ComfyUI and AUTOMATIC1111 read.

Those scripts train SD1.5 in diffusers' blocks and SDXL in the original checkpoint's, so a layer is
"lora_unet_down_blocks_1_..." of the one and "lora_unet_input_blocks_4_..." of the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from reflow.errors import UserError
from reflow.quiet import quiet_imports
from reflow.weights.guard import on_meta
from reflow.weights.original_names import UNET_PREFIX, unet_names

# diffusers' ends of a layer's two tensors, and kohya's.
PARTS = {".lora_A.weight": ".lora_down.weight", ".lora_B.weight": ".lora_up.weight"}
OTHERWISE = "Write it with --format lora, or train other model.lora_targets."


def kohya_names(layers: Sequence[str], unet_config: Mapping[str, Any]) -> dict[str, str]:
    """Layer of a UNet of this config (diffusers' name) -> its name in a file of kohya's.

    Every name is checked against diffusers' own reading of it. Raises UserError for a layer that the UNet does not
    have, or that diffusers would not read back.
    """
    quiet_imports()
    from diffusers import UNet2DConditionModel

    weights = on_meta(lambda: UNet2DConditionModel.from_config(dict(unet_config)), "The config of the base's UNet").state_dict()
    for layer in layers:
        if f"{layer}.weight" not in weights:
            raise UserError(
                f"The LoRA changes {layer}, which the base's UNet does not have. Give the base that it was trained "
                "from."
            )
    own = {key: key for key in weights}
    if unet_config.get("addition_embed_type") == "text_time":  # SDXL's kind
        try:
            own = {key: name.removeprefix(UNET_PREFIX) for key, name in unet_names(weights, unet_config).items()}
        except UserError as error:
            raise UserError(
                "kohya's spelling gives a LoRA of an SDXL model the original checkpoint's names, and the blocks of "
                f"this UNet have none. {OTHERWISE}"
            ) from error
    names = {layer: own[f"{layer}.weight"].removesuffix(".weight").replace(".", "_") for layer in layers}
    names = {layer: f"lora_unet_{name}" for layer, name in names.items()}
    _check(names, unet_config)
    return names


def _check(names: Mapping[str, str], unet_config: Mapping[str, Any]) -> None:
    from diffusers import StableDiffusionXLPipeline
    from diffusers.configuration_utils import FrozenDict
    from diffusers.utils import convert_unet_state_dict_to_peft

    # A number in place of every tensor: which number comes back under which name says it all.
    asked: dict[str, torch.Tensor] = {}
    want: dict[str, int] = {}
    for layer, name in names.items():
        asked[f"{name}.alpha"] = torch.tensor(1)
        for ours, theirs in PARTS.items():
            want[layer + ours] = len(want)
            asked[name + theirs] = torch.tensor(want[layer + ours])
    try:
        back, _ = StableDiffusionXLPipeline.lora_state_dict(asked, unet_config=FrozenDict(unet_config))
        read = {key.removeprefix("unet."): int(n) for key, n in convert_unet_state_dict_to_peft(back).items()}
    except (ValueError, KeyError, IndexError):  # what its converter raises on names that it does not know
        read = {}
    wrong = [key for key in want if read.get(key) != want[key]]
    if wrong:
        raise UserError(
            f"diffusers would not read {len(wrong)} of the {len(want)} weights of this LoRA back from kohya's "
            f"spelling, for example {wrong[0]}. {OTHERWISE}"
        )
