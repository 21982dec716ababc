"""What the trainings of the two digits teachers share: the VAE, the loop with its EMA and checkpoints, captions, the folder."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from reflow.data import digits as data
from reflow.models import digits as model

NEGATIVE_ROW = 10 * len(data.TEMPLATES)


def cosine_rate(step: int, steps: int, rate: float, warm_up: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < warm_up:
        return rate * (step + 1) / warm_up
    return rate * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def train_vae(
    vae: nn.Module,
    images: torch.Tensor,
    *,
    steps: int,
    batch: int,
    rate: float,
    kl_weight: float,
    seed: int,
    prior_mean: float = 0.0,
) -> float:
    """Fit the VAE to images [N,1,16,16] and measure what makes its latents zero-mean and unit-variance.

    The prior of the latents is N(prior_mean, 1). Returns the mean squared reconstruction error (pixels in [-1,1],
    posterior mode).
    """
    with torch.no_grad():
        vae.encoder.conv_out.bias[: vae.config.latent_channels] += prior_mean
    generator = torch.Generator(images.device).manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0)
    bar = tqdm(range(steps), desc="vae", mininterval=2)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(step, steps, rate, 50)
        pixels = images[torch.randint(len(images), (batch,), generator=generator, device=images.device)]
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=images.device)
        error = F.mse_loss(vae.decode(posterior.mean + posterior.std * noise).sample, pixels)
        kl = posterior.kl().mean()
        if prior_mean:
            kl = kl + (prior_mean * (0.5 * prior_mean - posterior.mean)).flatten(1).sum(1).mean()
        loss = error + kl_weight * kl / pixels[0].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(mse=f"{error.item():.4f}")
    with torch.no_grad():
        _standardise(vae, images)
        latents = encode(vae, images)
        return F.mse_loss(torch.cat([vae.decode(part).sample for part in latents.split(256)]), images).item()


def _standardise(vae: nn.Module, images: torch.Tensor) -> None:
    """Measure `scaling_factor`, and the mean: into the 1x1 convolutions where the VAE has them, as SDXL's, else `shift_factor`."""
    latents = encode(vae, images)
    if vae.quant_conv is None:
        vae.register_to_config(shift_factor=round(latents.mean().item(), 5))
    else:
        # The shift moves from the latents into the two 1x1 convolutions beside them: the VAE's function is unchanged.
        mean = latents.mean((0, 2, 3))
        vae.quant_conv.bias[: len(mean)] -= mean
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
        latents = encode(vae, images)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))


@torch.no_grad()
def encode(vae: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Unscaled latents [N,4,8,8] of images, the mode of the posterior."""
    return torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(256)])


def all_token_ids(parts: dict[str, Any], device: torch.device) -> list[torch.Tensor]:
    """Token ids of every caption, row label*templates+template, then the empty one; for both tokenizers, cut to the
    longest.
    """
    sentences = [sentence for label in range(10) for sentence in data.captions(label)] + [""]
    return [
        torch.tensor(parts[name](sentences, padding="max_length", truncation=True).input_ids, device=device)
        for name in ("tokenizer", "tokenizer_2")
    ]


def draw_captions(labels: torch.Tensor, drop: float, generator: torch.Generator) -> torch.Tensor:
    """[B] rows of `all_token_ids`: a sentence drawn for each label [B], the empty one with the probability `drop`."""
    template = torch.randint(len(data.TEMPLATES), labels.shape, generator=generator, device=labels.device)
    dropped = torch.rand(labels.shape, generator=generator, device=labels.device) < drop
    return torch.where(dropped, NEGATIVE_ROW, labels * len(data.TEMPLATES) + template)


class Fit(NamedTuple):
    """What a training gave: the networks' EMA, the running loss of every twentieth step, its time on all runs."""

    ema: dict[str, nn.Module]
    curve: list[float]
    seconds: float
    processor_seconds: float


def fit(
    networks: dict[str, nn.Module],
    loss_of: Callable[[torch.Generator], torch.Tensor],
    *,
    name: str,
    steps: int,
    rate: float,
    ema_decay: float,
    generator: torch.Generator,
    checkpoint_every: int = 0,
    on_checkpoint: Callable[[int, dict[str, nn.Module]], None] | None = None,
    state: Path | None = None,
) -> Fit:
    """Minimise `loss_of(generator)`, which draws its batch, with AdamW over all networks.

    Every `checkpoint_every` steps `on_checkpoint(step, EMA)` is called and, with a `state`, a file of that name is
    written from which the same call goes on where it stands.
    """
    live = [p for network in networks.values() for p in network.parameters()]
    ema = {key: deepcopy(network).requires_grad_(False) for key, network in networks.items()}
    shadow = [p for network in ema.values() for p in network.parameters()]
    optimizer = torch.optim.AdamW(live, lr=rate, betas=(0.9, 0.99), weight_decay=0)
    first, curve, running, before = 0, [], 0.0, (0.0, 0.0)
    if state is not None and state.exists():
        saved = torch.load(state, weights_only=True)
        first, curve, running, before = saved["step"], saved["curve"], saved["running"], saved["seconds"]
        torch._foreach_copy_([p.detach() for p in live], saved["live"])
        torch._foreach_copy_(shadow, saved["shadow"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
    start = time.perf_counter(), time.process_time()

    def spent() -> tuple[float, float]:
        return before[0] + time.perf_counter() - start[0], before[1] + time.process_time() - start[1]

    bar = tqdm(range(first, steps), desc=name, mininterval=5, initial=first, total=steps)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(step, steps, rate, 100)
        loss = loss_of(generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(live, 1.0)
        optimizer.step()
        torch._foreach_lerp_(shadow, [p.detach() for p in live], 1 - min(ema_decay, (1 + step) / (10 + step)))
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{running:.4f}")
            curve.append(round(running, 5))
        if checkpoint_every and (step + 1) % checkpoint_every == 0 and step + 1 < steps:
            if on_checkpoint is not None:
                on_checkpoint(step + 1, ema)
            if state is not None:
                record = dict(step=step + 1, curve=curve, running=running, seconds=spent())
                tensors = dict(live=[p.detach() for p in live], shadow=shadow, generator=generator.get_state())
                torch.save({**record, **tensors, "optimizer": optimizer.state_dict()}, state)
    return Fit(ema, curve, *spent())


def save_folder(pipeline: Any, folder: Path) -> None:
    """Write a pipeline as a diffusers folder of safetensors, with the two small files that the texts' readers need."""
    pipeline.save_pretrained(folder, safe_serialization=True)
    for name in ("text_encoder", "text_encoder_2"):
        # transformers loads in the dtype that the config names, diffusers in fp32; without a dtype both must agree.
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(
            json.dumps({**config, "dtype": "float32"}, indent=2, sort_keys=True) + "\n"
        )
    vocab, merges = model.vocabulary()
    for name in ("tokenizer", "tokenizer_2"):
        # The two files that readers of tokenizers before tokenizer.json look for.
        (folder / name / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
        (folder / name / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


def machine() -> dict[str, str]:
    """Processor and versions that a result belongs to."""
    import diffusers
    import transformers

    from reflow.evaluation.machine import processor

    return dict(
        processor=processor(),
        system=platform.platform(),
        python=platform.python_version(),
        torch=torch.__version__,
        diffusers=diffusers.__version__,
        transformers=transformers.__version__,
    )
