"""What a protocol asks for: its prompts, and the real images that belong to them, read from the user's --data."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from reflow.data.pictures import open_picture, plain, upright
from reflow.errors import UserError
from reflow.evaluation.comparison.protocol import Protocol
from reflow.lines import read_lines

COUNTED = ("single_object", "two_object", "counting")  # tags of GenEval that a count of objects decides
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "area": Image.Resampling.BOX,
}


@dataclass(frozen=True)
class Asked:
    """The prompts in their order; the files of the real images (() for none); and of each prompt what a detector must find in its images
    (() where nothing is asked): (class, at least, fewer than or None)."""

    prompts: tuple[str, ...]
    images: tuple[Path, ...] = ()
    objects: tuple[tuple[tuple[str, int, int | None], ...], ...] = ()

    @property
    def digest(self) -> str:
        """Of the prompts in their order."""
        return hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()[:16]


def read(protocol: Protocol, data: Path | None, own: Sequence[str] = ()) -> Asked:
    """What the protocol asks for. own: prompts that serve a text protocol where no --data is given.

    Raises UserError, one sentence, where --data is missing or lacks what the protocol names."""
    if protocol.captions.kind == "geneval":
        prompts, objects = geneval(data)
        count = protocol.limit or len(prompts)
        return Asked(tuple(prompts[:count]), (), tuple(objects[:count]))
    if protocol.captions.kind == "text":
        prompts = list(own) if data is None else text_prompts(data)
        if not prompts:
            raise UserError(f"The protocol {protocol.name} needs prompts; give a text file with one prompt a line as --data FILE.")
        images: list[Path] = []
    else:
        if data is None or not data.is_dir():
            raise UserError(
                f"The protocol {protocol.name} needs COCO; give the folder that holds {protocol.captions.file} and {protocol.images.folder}/ as "
                "--data FOLDER."
            )
        prompts, images = coco(protocol, data)
    if protocol.limit:
        prompts = prompts[: protocol.limit]
        images = images if protocol.images.all else images[: protocol.limit]
    return Asked(tuple(prompts), tuple(images))


def text_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one a line, empty lines left out."""
    if not path.is_file():
        raise UserError(f"--data {path}: there is no such file; give a text file with one prompt a line.")
    try:
        return [line.strip() for line in read_lines(path) if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"--data {path} is no UTF-8 text; give a text file with one prompt a line.") from error


def geneval(path: Path | None) -> tuple[list[str], list[tuple[tuple[str, int, int | None], ...]]]:
    """Prompts that a count of objects decides, and what must be found: of GenEval's include at least so many, of its exclude fewer."""
    if path is None or not path.is_file():
        raise UserError("The protocol geneval needs GenEval's evaluation_metadata.jsonl; give it as --data FILE.")
    prompts, objects = [], []
    for number, line in enumerate(text_prompts(path), 1):
        try:
            told = json.loads(line)
            wanted = {str(one["class"]): [int(one["count"]), None] for one in told["include"]}
            for one in told.get("exclude", ()):
                wanted.setdefault(str(one["class"]), [0, None])[1] = int(one["count"])
            if told["tag"] in COUNTED:
                prompts.append(str(told["prompt"]))
                objects.append(tuple((name, low, high) for name, (low, high) in wanted.items()))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"--data {path}, line {number}, is no line of GenEval's metadata ({type(error).__name__}: {error}).") from error
    if not prompts:
        raise UserError(f"--data {path} has no prompt of the tags {', '.join(COUNTED)}, which are those that counts decide.")
    return prompts, objects


def coco(protocol: Protocol, data: Path) -> tuple[list[str], list[Path]]:
    """Prompts and images of a COCO folder, in the protocol's order."""
    wanted, place = protocol.captions, data / protocol.captions.file
    if not place.is_file():
        raise UserError(f"--data {data} has no {wanted.file}, which the protocol {protocol.name} reads; give COCO's own folder.")
    try:
        parsed = json.loads(place.read_text(encoding="utf-8"))
        files = {int(image["id"]): str(image["file_name"]) for image in parsed["images"]}
        told = sorted((int(a["id"]), int(a["image_id"]), str(a["caption"])) for a in parsed["annotations"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{place} is no captions file of COCO ({type(error).__name__}: {error}); give COCO's own folder.") from error
    captions: dict[int, list[str]] = {}
    for _, image, caption in told:
        captions.setdefault(image, []).append(" ".join(caption.split()))
    order = [image for image in files if image in captions] if wanted.order == "file" else sorted(set(files) & set(captions))
    draw = random.Random(wanted.seed)
    chosen = {image: captions[image][0] if wanted.choice == "first" else draw.choice(captions[image]) for image in order}
    if wanted.order == "seeded":
        draw.shuffle(order)
    count = wanted.count or len(order)
    if len(order) < count and not protocol.limit:
        raise UserError(
            f"{place} has captions of {len(order)} images, and the protocol {protocol.name} takes {count}; give the whole of COCO, or add "
            f"--limit {len(order)}, whose numbers are marked as not the protocol's."
        )
    order = order[:count]
    if not protocol.images.folder:
        return [chosen[image] for image in order], []
    folder = data / protocol.images.folder
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES) if protocol.images.all and folder.is_dir() else []
    images = found or [folder / files[image] for image in order]
    missing = [path for path in images[: protocol.limit or None] if not path.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(images)} real images of the protocol {protocol.name} are not there, the first is {missing[0]}; give COCO's "
            f"own folder, with {protocol.images.folder}/ in it, as --data."
        )
    return [chosen[image] for image in order], images


def cut(picture: Image.Image, size: int, resize: str) -> torch.Tensor:
    """[3,size,size] uint8: the shorter side brought to `size` by the filter, then the centre cut out."""
    width, height = picture.size
    scale = size / min(width, height)
    if scale != 1:
        picture = picture.resize((max(size, round(width * scale)), max(size, round(height * scale))), FILTERS[resize])
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    part = picture.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(part)).permute(2, 0, 1).contiguous()


def pictures(paths: Iterable[Path], size: int, resize: str) -> Iterator[torch.Tensor]:
    """Each image [3,H,W] uint8, RGB, upright; cut to size unless that is 0. Raises UserError for one that cannot be read."""
    for path in paths:
        try:
            with open_picture(path) as opened:
                picture = plain(upright(opened), 3)
        except Exception as error:
            raise UserError(f"The image {path} cannot be read ({error}); replace it, or draw or fetch it again.") from error
        yield cut(picture, size, resize) if size else torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
