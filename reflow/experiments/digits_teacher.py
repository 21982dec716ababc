"""Train the digits model from scratch: VAE, then UNet and text encoders together; save a diffusers folder in fp16.

    python -m reflow.experiments.digits_teacher --out DIR

made the committed weights (`reflow/models/weights/digits`); `training.json` in that folder says with what settings
and result.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from reflow.data import digits as data
from reflow.models import digits as model

NEGATIVE_ROW = 10 * len(data.TEMPLATES)
TEACHER = ("unet", "text_encoder", "text_encoder_2")


def cosine_rate(step: int, steps: int, rate: float, warm_up: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < warm_up:
        return rate * (step + 1) / warm_up
    return rate * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def train_vae(
    vae: nn.Module, images: torch.Tensor, *, steps: int, batch: int, rate: float, kl_weight: float, seed: int
) -> float:
    """Fit the VAE to images [N,1,16,16] and make its latents zero-mean with a measured `scaling_factor`.

    Returns the mean squared reconstruction error (pixels in [-1,1], posterior mode).
    """
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
        loss = error + kl_weight * posterior.kl().mean() / pixels[0].numel()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(mse=f"{error.item():.4f}")
    with torch.no_grad():
        latents = encode(vae, images)
        mean = latents.mean((0, 2, 3))
        # The shift moves from the latents into the two 1x1 convolutions beside them: the VAE's function is unchanged.
        vae.quant_conv.bias[: len(mean)] -= mean
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
        latents = encode(vae, images)
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
        return F.mse_loss(torch.cat([vae.decode(part).sample for part in latents.split(256)]), images).item()


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


def encode_text(parts: dict[str, Any], ids: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden states [R,16,64], pooled [R,32]) as StableDiffusionXLPipeline.encode_prompt makes them."""
    first = parts["text_encoder"](ids[0], output_hidden_states=True).hidden_states[-2]
    second = parts["text_encoder_2"](ids[1], output_hidden_states=True)
    return torch.cat([first, second.hidden_states[-2]], -1), second.text_embeds


def loss_weights(alphas_cumprod: torch.Tensor, cap: float) -> torch.Tensor:
    """min(1/alpha^2, cap) with mean 1: the v-prediction weight of an eps error, capped.

    A few-step sampler takes its first step from pure noise, where x0 = (z - sigma eps)/alpha magnifies an eps error
    15 times.
    """
    weights = (1 / alphas_cumprod).clamp_max(cap)
    return weights / weights.mean()


def train_teacher(
    parts: dict[str, Any],
    latents: torch.Tensor,
    labels: torch.Tensor,
    *,
    steps: int,
    batch: int,
    rate: float,
    drop: float,
    weight_cap: float,
    ema_decay: float,
    seed: int,
    on_checkpoint: Any = None,
    checkpoint_every: int = 0,
) -> list[float]:
    """Train UNet and text encoders on scaled latents [N,4,8,8]; the parts end as their EMA. Returns the loss curve.

    `on_checkpoint(step, ema_parts)` is called every `checkpoint_every` steps.
    """
    device = latents.device
    generator = torch.Generator(device).manual_seed(seed)
    ids = all_token_ids(parts, device)
    live = [p for name in TEACHER for p in parts[name].parameters()]
    ema = {name: deepcopy(parts[name]).requires_grad_(False) for name in TEACHER}
    shadow = [p for name in TEACHER for p in ema[name].parameters()]
    alphas = parts["scheduler"].alphas_cumprod.to(device)
    weights = loss_weights(alphas, weight_cap)
    time_ids = torch.tensor([16.0, 16, 0, 0, 16, 16], device=device).expand(batch, 6)
    optimizer = torch.optim.AdamW(live, lr=rate, betas=(0.9, 0.99), weight_decay=0)
    curve, running = [], 0.0
    bar = tqdm(range(steps), desc="unet + text", mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(step, steps, rate, 100)
        rows = torch.randint(len(latents), (batch,), generator=generator, device=device)
        template = torch.randint(len(data.TEMPLATES), (batch,), generator=generator, device=device)
        caption = labels[rows] * len(data.TEMPLATES) + template
        caption = torch.where(torch.rand(batch, generator=generator, device=device) < drop, NEGATIVE_ROW, caption)
        # One time from each of `batch` equal strata: the loss of a step varies less than with independent times.
        uniform = (torch.arange(batch, device=device) + torch.rand(batch, generator=generator, device=device)) / batch
        index = (uniform * len(alphas)).long().clamp_max(len(alphas) - 1)
        noise = torch.randn(latents[:1].expand(batch, -1, -1, -1).shape, generator=generator, device=device)
        alpha = alphas[index].sqrt()[:, None, None, None]
        sigma = (1 - alphas[index]).sqrt()[:, None, None, None]
        hidden, pooled = encode_text(parts, ids)
        output = parts["unet"](
            alpha * latents[rows] + sigma * noise,
            index,
            hidden[caption],
            return_dict=False,
            added_cond_kwargs=dict(text_embeds=pooled[caption], time_ids=time_ids),
        )[0]
        loss = (weights[index] * (output - noise).square().mean((1, 2, 3))).mean()
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
            on_checkpoint(step + 1, {**parts, **ema})
    parts.update(ema)
    return curve


def save(parts: dict[str, Any], folder: Path) -> None:
    """Write the parts as a StableDiffusionXLPipeline folder, fp16 safetensors; the parts themselves stay fp32."""
    from diffusers import StableDiffusionXLPipeline

    networks = {name: deepcopy(parts[name]).half() for name in ("vae", *TEACHER)}
    pipeline = StableDiffusionXLPipeline(
        **{**parts, **networks}, force_zeros_for_empty_prompt=False, add_watermarker=False
    )
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the diffusers pipeline")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vae-steps", type=int, default=500)
    parser.add_argument("--vae-rate", type=float, default=2e-3)
    parser.add_argument("--kl-weight", type=float, default=1e-3)
    parser.add_argument("--unet-steps", type=int, default=4500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--drop", type=float, default=0.1, help="share of captions replaced by the empty one")
    parser.add_argument("--weight-cap", type=float, default=25.0, help="upper end of the loss weight 1/alpha^2")
    parser.add_argument("--ema-decay", type=float, default=0.998)
    parser.add_argument("--checkpoint-every", type=int, default=0, help="steps between saves of the EMA in OUT-STEP")
    parser.add_argument("--samples", type=int, default=3000, help="samples of the final evaluation")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    parts = model.build(args.seed)
    for name in ("vae", *TEACHER):
        parts[name].to(device)
    images, labels = (tensor.to(device) for tensor in data.images())
    start = time.perf_counter()
    error = train_vae(
        parts["vae"],
        images,
        steps=args.vae_steps,
        batch=64,
        rate=args.vae_rate,
        kl_weight=args.kl_weight,
        seed=args.seed,
    )
    vae_seconds = time.perf_counter() - start
    parts["vae"].requires_grad_(False)
    latents = encode(parts["vae"], images) * parts["vae"].config.scaling_factor
    tqdm.write(
        f"vae: mse {error:.5f}, scaling_factor {parts['vae'].config.scaling_factor}, "
        f"channel std {[round(s, 3) for s in latents.std((0, 2, 3)).tolist()]}, {vae_seconds:.0f} s",
        file=sys.stderr,
    )
    start = time.perf_counter()
    curve = train_teacher(
        parts,
        latents,
        labels,
        steps=args.unet_steps,
        batch=args.batch,
        rate=args.rate,
        drop=args.drop,
        weight_cap=args.weight_cap,
        ema_decay=args.ema_decay,
        seed=args.seed + 1,
        checkpoint_every=args.checkpoint_every,
        on_checkpoint=lambda step, ema: save(ema, args.out.with_name(f"{args.out.name}-{step}")),
    )
    unet_seconds = time.perf_counter() - start
    save(parts, args.out)

    from reflow.experiments.digits_quality import evaluate

    report = dict(
        command="python -m reflow.experiments.digits_teacher",
        settings={key: value for key, value in vars(args).items() if key != "out"},
        machine=machine(),
        seconds=dict(vae=round(vae_seconds, 1), unet=round(unet_seconds, 1)),
        parameters={name: sum(p.numel() for p in parts[name].parameters()) for name in ("vae", *TEACHER)},
        vae_mse=error,
        loss_every_20_steps=curve,
        evaluation=evaluate(args.out, samples=args.samples, device=args.device),
    )
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["evaluation"], indent=1))


def machine() -> dict[str, str]:
    """Processor and versions that a result belongs to."""
    import diffusers
    import transformers

    return dict(
        processor=processor(),
        system=platform.platform(),
        python=platform.python_version(),
        torch=torch.__version__,
        diffusers=diffusers.__version__,
        transformers=transformers.__version__,
    )


def processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    main()
