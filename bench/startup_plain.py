"""One windowed reflow step as a plain diffusers script would start it: what `python -m bench startup` compares with.

`python -m bench.startup_plain FILE` loads the digits' pipeline with diffusers, encodes the digits, solves a window of 128
samples in 4 DDIM steps, takes one AdamW step on the chord's velocity and writes FILE.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

ROOT = Path(__file__).resolve().parents[1]


def main(done: str) -> None:
    pipe = DiffusionPipeline.from_pretrained(ROOT / "reflow" / "models" / "weights" / "digits")
    student, teacher = copy.deepcopy(pipe.unet).train(), pipe.unet.eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    sklearn = importlib.util.find_spec("sklearn").submodule_search_locations[0]
    table = np.loadtxt(Path(sklearn, "datasets", "data", "digits.csv.gz"), delimiter=",")
    pixels = torch.from_numpy(table[:, :-1]).float().view(-1, 1, 8, 8) / 8 - 1
    pixels = torch.nn.functional.interpolate(pixels, size=(16, 16), mode="bicubic").clamp_(-1, 1)
    with torch.no_grad():
        parts = [pipe.vae.encode(part).latent_dist.mean for part in pixels.split(256)]
        latents = torch.cat(parts)[:128] * pipe.vae.config.scaling_factor
        captions = [f"the number {int(n)}" for n in table[:128, -1]]
        hidden, _, pooled, _ = pipe.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False)
        ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).repeat(128, 1)
        added = {"text_embeds": pooled, "time_ids": ids}
        abar = pipe.scheduler.alphas_cumprod
        start = torch.randint(1, 9, (128,)) * 125 - 1
        column = [1, 1, 1]
        z = abar[start].sqrt().view(-1, *column) * latents
        z_start = z = z + (1 - abar[start]).sqrt().view(-1, *column) * torch.randn_like(latents)
        at = start
        for _ in range(4):
            eps, to = teacher(z, at, hidden, added_cond_kwargs=added).sample, (at - 31).clamp(min=0)
            a, b = abar[at].view(-1, *column), abar[to].view(-1, *column)
            z, at = b.sqrt() * (z - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps, to
        target = (z - z_start) / -0.125
    for half in (slice(0, 64), slice(64, 128)):
        rows = {name: value[half] for name, value in added.items()}
        output = student(z_start[half], start[half], hidden[half], added_cond_kwargs=rows).sample
        torch.nn.functional.mse_loss(output, target[half]).backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    Path(done).write_text(json.dumps({"event": "train"}))


if __name__ == "__main__":
    main(sys.argv[1])
