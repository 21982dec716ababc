"""Train the digits flow model from scratch: VAE, then transformer and text encoders together; save a diffusers folder.

    python -m reflow.experiments.digits_flow_teacher --out DIR

made the committed weights (`reflow/models/weights/digits-flow`), fp16; `training.json` in that folder says with what
settings and result. With `--checkpoint-every STEPS` the EMA so far appears in DIR-STEP, and the same command goes on
from what stands in DIR-state.

Loss: mean square of the velocity's error (eps - x_0 at x_t = (1-t) x_0 + t eps), rectified flow as in Stable Diffusion
3 (arXiv 2403.03206). Half of the times are logit-normal as there, half uniform, since logit-normal ones hardly reach
the two ends where a few-step sampler starts and stops; all are shifted as the scheduler shifts its grid.
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
from torch import nn
from tqdm import tqdm

from reflow.data import digits as data
from reflow.experiments.digits_training import (
    Fit,
    all_token_ids,
    draw_captions,
    encode,
    fit,
    machine,
    save_folder,
    train_vae,
)
from reflow.flow import shifted
from reflow.models import digits_flow as model

TEACHER = ("transformer", "text_encoder", "text_encoder_2")


def draw_times(batch: int, shift: float, generator: torch.Generator) -> torch.Tensor:
    """[batch] times in (0,1), one from each of equal strata: each logit-normal or uniform by a coin, then shifted."""
    device = generator.device
    uniform = (torch.arange(batch, device=device) + torch.rand(batch, generator=generator, device=device)) / batch
    coin = torch.rand(batch, generator=generator, device=device) < 0.5
    normal = torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6))
    return shifted(torch.where(coin, normal.sigmoid(), uniform), shift)


def train_teacher(
    parts: dict[str, Any],
    latents: torch.Tensor,
    labels: torch.Tensor,
    *,
    steps: int,
    batch: int,
    rate: float,
    drop: float,
    ema_decay: float,
    seed: int,
    on_checkpoint: Any = None,
    checkpoint_every: int = 0,
    state: Path | None = None,
) -> Fit:
    """Train transformer and text encoders on standardised latents [N,4,8,8]; the parts end as their EMA.

    A dropped caption is the empty one, in both poolings too: what the pipeline guides with. The number of zeros in
    place of T5 differs from step to step, 1 to 256 with equal chances for equal ratios, so that callers may choose
    `max_sequence_length`.
    """
    device = latents.device
    ids = all_token_ids(parts, device)
    transformer, shift = parts["transformer"], parts["scheduler"].config.shift
    plain, attention = transformer.attn_processors, model.OneForMany(1)
    transformer.set_attn_processor(attention)

    def loss(generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(latents), (batch,), generator=generator, device=device)
        caption = draw_captions(labels[rows], drop, generator)
        t = draw_times(batch, shift, generator)
        noise = torch.randn((batch, *latents.shape[1:]), generator=generator, device=device)
        attention.count = round(model.MISSING_TOKENS ** torch.rand((), generator=generator, device=device).item())
        states, pooled = model.encode_text(parts, ids)
        wide = t[:, None, None, None]
        output = transformer(
            (1 - wide) * latents[rows] + wide * noise, states[caption], pooled[caption], 1000 * t, return_dict=False
        )[0]
        return (output - (noise - latents[rows])).square().mean()

    done = fit(
        {name: parts[name] for name in TEACHER},
        loss,
        name="transformer + text",
        steps=steps,
        rate=rate,
        ema_decay=ema_decay,
        generator=torch.Generator(device).manual_seed(seed),
        checkpoint_every=checkpoint_every,
        on_checkpoint=lambda step, ema: on_checkpoint(step, {**parts, **ema}),
        state=state,
    )
    parts.update(done.ema)
    parts["transformer"].set_attn_processor(plain)
    return done


def save(parts: dict[str, Any], folder: Path) -> None:
    """Write the parts as a StableDiffusion3Pipeline folder, fp16 safetensors; the parts themselves stay fp32."""
    from diffusers import StableDiffusion3Pipeline

    networks = {name: deepcopy(parts[name]).half() for name in model.NETWORKS}
    save_folder(StableDiffusion3Pipeline(**{**parts, **networks}), folder)


def standardised(vae: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Latents [N,4,8,8] of images as the network sees them: (z - shift_factor) * scaling_factor."""
    return (encode(vae, images) - vae.config.shift_factor) * vae.config.scaling_factor


def vae_for(
    vae: nn.Module, images: torch.Tensor, args: argparse.Namespace, state: Path | None
) -> tuple[nn.Module, dict[str, float]]:
    """(trained VAE, its error and the time of its training); with a `state` folder kept there and taken from there."""
    if state is not None and (state / "vae.json").exists():
        kept = json.loads((state / "vae.json").read_text())
        vae.load_state_dict(torch.load(state / "vae.pt", weights_only=True))
        vae.register_to_config(**kept["config"])
        return vae, kept["measured"]
    start = time.perf_counter(), time.process_time()
    error = train_vae(
        vae,
        images,
        steps=args.vae_steps,
        batch=64,
        rate=args.vae_rate,
        kl_weight=args.kl_weight,
        seed=args.seed,
        prior_mean=args.prior_mean,
    )
    seconds, processor = time.perf_counter() - start[0], time.process_time() - start[1]
    measured = dict(mse=error, seconds=seconds, processor_seconds=processor)
    if state is not None:
        state.mkdir(parents=True, exist_ok=True)
        torch.save(vae.state_dict(), state / "vae.pt")
        config = {key: vae.config[key] for key in ("shift_factor", "scaling_factor")}
        (state / "vae.json").write_text(json.dumps(dict(config=config, measured=measured)))
    return vae, measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the diffusers pipeline")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vae-steps", type=int, default=500)
    parser.add_argument("--vae-rate", type=float, default=2e-3)
    parser.add_argument("--kl-weight", type=float, default=1e-3)
    parser.add_argument("--prior-mean", type=float, default=0.5, help="mean that the latents' prior has")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--drop", type=float, default=0.1, help="share of captions replaced by the empty one")
    parser.add_argument("--ema-decay", type=float, default=0.998)
    parser.add_argument("--checkpoint-every", type=int, default=0, help="steps between saves of the EMA in OUT-STEP")
    parser.add_argument("--samples", type=int, default=3000, help="samples of the final evaluation")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    parts = model.new_parts(args.seed)
    for name in model.NETWORKS:
        parts[name].to(device)
    images, labels = (tensor.to(device) for tensor in data.images())
    state = args.out.with_name(f"{args.out.name}-state") if args.checkpoint_every else None
    parts["vae"], measured = vae_for(parts["vae"], images, args, state)
    vae = parts["vae"].requires_grad_(False)
    latents = standardised(vae, images)
    tqdm.write(
        f"vae: mse {measured['mse']:.5f}, shift_factor {vae.config.shift_factor}, "
        f"scaling_factor {vae.config.scaling_factor}, "
        f"channel mean {[round(m, 3) for m in latents.mean((0, 2, 3)).tolist()]} "
        f"and std {[round(s, 3) for s in latents.std((0, 2, 3)).tolist()]}, {measured['seconds']:.0f} s",
        file=sys.stderr,
    )
    done = train_teacher(
        parts,
        latents,
        labels,
        steps=args.steps,
        batch=args.batch,
        rate=args.rate,
        drop=args.drop,
        ema_decay=args.ema_decay,
        seed=args.seed + 1,
        checkpoint_every=args.checkpoint_every,
        on_checkpoint=lambda step, ema: save(ema, args.out.with_name(f"{args.out.name}-{step}")),
        state=state / "training.pt" if state else None,
    )
    save(parts, args.out)

    from reflow.experiments.digits_flow_quality import evaluate

    report = dict(
        command="python -m reflow.experiments.digits_flow_teacher",
        settings={key: value for key, value in vars(args).items() if key != "out"},
        machine=machine(),
        seconds=dict(vae=round(measured["seconds"], 1), transformer=round(done.seconds, 1)),
        processor_seconds=dict(
            vae=round(measured["processor_seconds"], 1), transformer=round(done.processor_seconds, 1)
        ),
        parameters={name: sum(p.numel() for p in parts[name].parameters()) for name in model.NETWORKS},
        vae_mse=measured["mse"],
        loss_every_20_steps=done.curve,
        evaluation=evaluate(args.out, samples=args.samples, device=args.device),
    )
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["evaluation"], indent=1))


if __name__ == "__main__":
    main()
