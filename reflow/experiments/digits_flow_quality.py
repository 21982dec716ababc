"""How good a digits flow folder is: prompt accuracy, Fréchet distance and paired error at several step counts.

python -m reflow.experiments.digits_flow_quality [FOLDER] [--guidance 1.0] [--missing 256] [--shift A]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from reflow.data import digits as data
from reflow.experiments.digits_quality import measure
from reflow.experiments.digits_training import NEGATIVE_ROW, all_token_ids
from reflow.flow import shifted
from reflow.models import digits_flow as model


def grid(steps: int, shift: float) -> list[float]:
    """Times s_a(1 - i/steps), i = 0..steps, from noise (1) to data (0).

    Not the default of FlowMatchEulerDiscreteScheduler, which ends on an all but empty step and shifts twice
    (diffusers issue 13243); `sigmas=[1 - i/steps ...]` without the last makes the stock pipeline take these.
    """
    return [float(shifted(1 - i / steps, shift)) for i in range(steps + 1)]


@torch.no_grad()
def euler(
    parts: dict[str, Any],
    labels: torch.Tensor,
    steps: int,
    *,
    seed: int = 0,
    guidance: float = 1.0,
    missing: int = model.MISSING_TOKENS,
    shift: float | None = None,
    batch: int = 250,
) -> torch.Tensor:
    """Images [N,1,16,16] in [-1,1] of the canonical prompts of labels [N]: Euler steps on the shifted grid.

    `missing` zeros stand in for T5, as the pipeline's `max_sequence_length`. Noise is drawn on the CPU, one seed for
    the whole set. Without a `shift` that of the scheduler. Guidance other than 1 is against the empty prompt.
    """
    vae, transformer = parts["vae"], parts["transformer"]
    plain = transformer.attn_processors
    transformer.set_attn_processor(model.OneForMany(missing))
    device = transformer.device
    states, pooled = model.encode_text(parts, all_token_ids(parts, device))
    times = grid(steps, parts["scheduler"].config.shift if shift is None else shift)
    noise = torch.randn((len(labels), 4, 8, 8), generator=torch.Generator().manual_seed(seed))

    def velocity(sample: torch.Tensor, t: float, rows: torch.Tensor) -> torch.Tensor:
        time = torch.full((len(sample),), 1000 * t, device=device)
        return transformer(sample, states[rows], pooled[rows], time, return_dict=False)[0]

    images = []
    for part in torch.arange(len(labels)).split(batch):
        caption = labels[part].to(device) * len(data.TEMPLATES)
        sample = noise[part].to(device)
        for t, end in zip(times, times[1:], strict=False):
            output = velocity(sample, t, caption)
            if guidance != 1:
                null = velocity(sample, t, torch.full_like(caption, NEGATIVE_ROW))
                output = null + guidance * (output - null)
            sample = sample + (end - t) * output
        latents = sample / vae.config.scaling_factor + vae.config.shift_factor
        images.append(vae.decode(latents).sample.clamp(-1, 1).cpu())
    transformer.set_attn_processor(plain)
    return torch.cat(images)


def load(folder: Path | str = model.BUILTIN, device: str = "cpu") -> dict[str, Any]:
    """The parts of a folder as stock diffusers loads them, in fp32."""
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline.from_pretrained(folder, **model.WITHOUT_T5).to(device, torch.float32).components


@torch.no_grad()
def evaluate(
    folder: Path | str, *, samples: int = 3000, device: str = "cpu", seed: int = 0, **how: Any
) -> dict[str, Any]:
    """Measure the saved weights of a folder, cast to fp32: `measure` on `euler` with 32, 8, 4 and 2 steps.

    `how`: keywords of `euler`.
    """
    parts = load(folder, device)
    vae = parts["vae"]
    decoded = [
        vae.decode(vae.encode(part.to(device)).latent_dist.mode()).sample for part in data.images()[0].split(256)
    ]
    return measure(
        lambda labels, steps: euler(parts, labels, steps, seed=seed, **how),
        torch.cat(decoded).clamp(-1, 1).cpu(),
        samples=samples,
        seed=seed,
        paired=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=model.BUILTIN)
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--missing", type=int, default=model.MISSING_TOKENS, help="zeros in place of T5's states")
    parser.add_argument("--shift", type=float, help="of the grid; the scheduler's where not given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    how = dict(guidance=args.guidance, missing=args.missing, shift=args.shift)
    result = evaluate(args.folder, samples=args.samples, device=args.device, seed=args.seed, **how)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
