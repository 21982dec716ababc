"""Train the digits model from scratch: VAE, then UNet and text encoders together; save a diffusers folder in fp16.

    python -m reflow.experiments.digits_teacher --out DIR

made the committed weights (`reflow/models/weights/digits`); `training.json` in that folder says with what settings
and result.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from reflow.data import digits as data
from reflow.experiments.digits_training import (
    all_token_ids,
    draw_captions,
    encode,
    fit,
    machine,
    save_folder,
    train_vae,
)
from reflow.models import digits as model

TEACHER = ("unet", "text_encoder", "text_encoder_2")


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
    ids = all_token_ids(parts, device)
    alphas = parts["scheduler"].alphas_cumprod.to(device)
    weights = loss_weights(alphas, weight_cap)
    time_ids = torch.tensor([16.0, 16, 0, 0, 16, 16], device=device).expand(batch, 6)

    def loss(generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(latents), (batch,), generator=generator, device=device)
        caption = draw_captions(labels[rows], drop, generator)
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
        return (weights[index] * (output - noise).square().mean((1, 2, 3))).mean()

    done = fit(
        {name: parts[name] for name in TEACHER},
        loss,
        name="unet + text",
        steps=steps,
        rate=rate,
        ema_decay=ema_decay,
        generator=torch.Generator(device).manual_seed(seed),
        checkpoint_every=checkpoint_every,
        on_checkpoint=lambda step, ema: on_checkpoint(step, {**parts, **ema}),
    )
    parts.update(done.ema)
    return done.curve


def save(parts: dict[str, Any], folder: Path) -> None:
    """Write the parts as a StableDiffusionXLPipeline folder, fp16 safetensors; the parts themselves stay fp32."""
    from diffusers import StableDiffusionXLPipeline

    networks = {name: deepcopy(parts[name]).half() for name in ("vae", *TEACHER)}
    pipeline = StableDiffusionXLPipeline(
        **{**parts, **networks}, force_zeros_for_empty_prompt=False, add_watermarker=False
    )
    save_folder(pipeline, folder)


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


if __name__ == "__main__":
    main()
