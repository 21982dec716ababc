"""A small convolutional classifier of the scans: the judge of the digits model.

It is trained on real scans only, never sees a generated sample and shares nothing with the diffusion model. Its
logits measure whether the asked digit was drawn; its 64 features carry the Fréchet distance. The weights are
committed, so numbers of different runs compare: `python -m reflow.evaluation.classifier` made them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from reflow.data import digits
from reflow.errors import UserError
from reflow.weights.files import save_tensors

WEIGHTS = Path(__file__).parent / "weights" / "digits_classifier.safetensors"
FEATURES = 64


class DigitClassifier(nn.Module):
    """Pixels [B,1,16,16] in [-1,1] -> logits [B,10]; `features` gives the 64 penultimate activations."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, 10)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Penultimate activations [B,64] of pixels [B,1,16,16] in [-1,1]."""
        if images.shape[1:] != (1, digits.RESOLUTION, digits.RESOLUTION):
            raise ValueError(f"The classifier reads images of shape [B,1,16,16], got {list(images.shape)}")
        return self.body(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


def _shifted(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image moved by up to one pixel either way, paper filling the rim."""
    count, size = len(images), images.shape[-1]
    padded = F.pad(images, (1, 1, 1, 1), value=-1)
    rows, columns = (torch.randint(0, 3, (count, 1), generator=generator) + torch.arange(size) for _ in range(2))
    return padded[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


def train_classifier(seed: int = 0, epochs: int = 40, batch: int = 64) -> tuple[DigitClassifier, float]:
    """Train on the training split of the scans (CPU, a few seconds); returns the model and its held-out accuracy in
    [0,1].
    """
    images, labels = digits.images()
    train, held_out = digits.split()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitClassifier()
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(train) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(epochs):
        order = train[torch.randperm(len(train), generator=generator)]
        for rows in order[: len(train) // batch * batch].split(batch):
            loss = F.cross_entropy(model(_shifted(images[rows], generator)), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval().requires_grad_(False)
    return model, accuracy(model, images[held_out], labels[held_out])


@torch.no_grad()
def accuracy(model: DigitClassifier, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images [B,1,16,16] read as their label [B]."""
    return (model(images).argmax(1).cpu() == labels.cpu()).double().mean().item()


def load_classifier(device: torch.device | str = "cpu", path: Path = WEIGHTS) -> DigitClassifier:
    """The committed classifier in fp32, frozen. UserError if its file is missing or damaged."""
    from safetensors.torch import load_file

    model = DigitClassifier()
    try:
        model.load_state_dict(load_file(path))
    except FileNotFoundError:
        raise UserError(
            f"The digits classifier is missing at {path}. Write it with `python -m reflow.evaluation.classifier`."
        ) from None
    except Exception as error:
        raise UserError(
            f"The digits classifier at {path} cannot be read ({error}). "
            "Write it again with `python -m reflow.evaluation.classifier`."
        ) from error
    return model.to(device).eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the digits classifier and write its weights.")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    model, held_out = train_classifier(args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(model.state_dict(), args.out, {"held_out_accuracy": f"{held_out:.4f}", "seed": str(args.seed)})
    print(
        json.dumps(dict(held_out_accuracy=held_out, seconds=round(time.perf_counter() - start, 1), path=str(args.out)))
    )


if __name__ == "__main__":
    main()
