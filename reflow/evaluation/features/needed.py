"""Which weights each feature needs, where people find them, and the one sentence that says so."""

from __future__ import annotations

from pathlib import Path

from reflow.errors import UserError, short

NEEDS = {
    "inception": "the file pt_inception-2015-12-05-6726825d.pth of the releases of mseitzer/pytorch-fid (the same as "
    "weights-inception-2015-12-05-6726825d.pth of toshas/torch-fidelity)",
    "dinov2": "a folder of the model facebook/dinov2-large (config.json and model.safetensors)",
    "clip": "a folder of a CLIP model (for CMMD as published openai/clip-vit-large-patch14-336, for CLIP score often openai/clip-vit-large-patch14: "
    "config.json, model.safetensors, preprocessor_config.json and the tokenizer's files)",
    "lpips": "torchvision's file alexnet-owt-7be5be79.pth or vgg16-397923af.pth",
    "pickscore": "a folder of the model yuvalkirstain/PickScore_v1, with the tokenizer's files of laion/CLIP-ViT-H-14-laion2B-s32B-b79K where it "
    "lacks them",
    "hpsv2": "the file HPS_v2.1_compressed.pt of xswu/HPSv2 in a folder with the tokenizer's files of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, or a "
    "folder of the same weights as a transformers CLIPModel",
    "image_reward": "the file ImageReward.pt of THUDM/ImageReward in a folder with vocab.txt (or tokenizer.json) of google-bert/bert-base-uncased",
    "detector": "MODULE:FUNCTION of your own in place of PATH, where FUNCTION(device) gives an object with count(images, class_names)",
}


def refuse(name: str, path: str | Path, wrong: str) -> UserError:
    """The error that says what is wrong with a feature's weights, what to fetch and where to put it."""
    where = "" if name == "detector" else f"; fetch it, put it anywhere on this disk and give --features {name}=PATH"
    return UserError(f"--features {name}={short(str(path))}: {wrong}. {name} needs {NEEDS[name]}{where}.")
