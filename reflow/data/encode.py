"""Images and captions through the base's own VAE and text encoders, with the name of the file that goes wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from reflow.data.buckets import Size
from reflow.data.budget import Budget
from reflow.data.foreign import shown
from reflow.data.pictures import fit, pixels_of, upright
from reflow.data.source import Source
from reflow.errors import UserError
from reflow.models.conditioning import Conditioning
from reflow.models.family import Base, head_of

Picture = tuple[np.ndarray, list[int]]  # pixels [c,h,w] uint8, time ids


class Encoder:
    """A base's VAE and text encoders over a source, in fp32 and without TF32. `threads` decode images, a bounded number of pixels at once."""

    def __init__(self, base: Base, source: Source, threads: int = 4) -> None:
        self.base, self.source = base, source
        self.channels = base.configs["vae"].get("in_channels", 3)
        self.pool, self.budget = ThreadPoolExecutor(max_workers=threads), Budget()

    def picture(self, number: int, size: Size) -> Picture | str:
        """The image fitted to (height, width), or why it and its caption cannot be used, in one line."""
        try:
            if fault := self.source.fault(number):
                return shown(fault)
            image = self.source.open(number)
        except Exception as error:  # noqa: BLE001 - PIL's readers raise almost anything on damaged files
            return shown(f"{type(error).__name__}: {error}")
        with self.budget.take(pixels_of(image)):
            try:
                return fit(upright(image), size, self.channels)
            except Exception as error:  # noqa: BLE001 - as above
                return shown(f"{type(error).__name__}: {error}")
            finally:
                image.close()  # its memory goes before its share of the budget

    def pictures(self, batches: Iterable[Sequence[int]], size: Size) -> Iterator[list[Picture | str]]:
        """The pictures of each batch; the next batch is decoded while the caller works on this one."""
        ahead = None
        for batch in batches:
            now, ahead = ahead, [self.pool.submit(self.picture, number, size) for number in batch]
            if now is not None:
                yield [future.result() for future in now]
        if ahead is not None:
            yield [future.result() for future in ahead]

    def latents(self, pixels: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
        """Latents [n,C,h,w] fp32 of pixels [n,c,H,W] uint8. Raises UserError naming an image whose latents are not "
        "finite."""
        with exact():
            latents = self.base.encode_images(torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1)).float().cpu()
        finite = torch.isfinite(latents).flatten(1).all(1)
        if not finite.all():
            name = self.source.key(numbers[int((~finite).nonzero()[0])])
            raise UserError(
                f"The VAE at {self.base.path}, in fp32, gives NaN or infinity for {name} of {self.source.place}; "
                f"check the VAE's "
                f"weights, or take that image away."
            )
        return latents.numpy()

    def text(self, captions: list[str]) -> Conditioning:
        """Both encoders' output [n] of captions, fp32 on the CPU; longer ones are cut as the pipeline cuts prompts."""
        with exact():
            return self.base.encode_prompts(captions).to("cpu", torch.float32)


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Convolutions and products in full fp32 by algorithms that repeat, and a sentence where the GPU's memory is too "
    "small."""
    products = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "The GPU's memory is too small for this many images at once; lower --batch-size (when streaming: "
            "train.micro_batch), or the resolution."
        ) from error
    finally:
        torch.set_float32_matmul_precision(products)


def cut_captions(base: Base, captions: Iterable[str]) -> int:
    """How many captions are longer than a tokenizer of the base takes, so that their end is not seen."""
    count = 0
    for caption in captions:
        # A caption of n characters has at most n tokens besides its two ends.
        lengths = (
            len(caption) + 2 > t.model_max_length and tokens(t, caption) > t.model_max_length for t in base.tokenizers
        )
        count += any(lengths)
    return count


def tokens(tokenizer: Any, caption: str) -> int:
    return len(tokenizer(head_of(caption, tokenizer.model_max_length), verbose=False).input_ids)
