"""Protocols of an evaluation as data: which captions, which real images and how they are cut, how many samples, which measures.

A number is comparable with another of the same protocol alone; `Protocol.digest` is in every result, and tables of several results mark
those that differ in it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reflow.errors import UserError

FOLDER = Path(__file__).parent / "protocols"


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Captions(Part):
    """kind: "coco", a captions file of COCO's format below --data; "text", the file --data with one prompt a line; or "geneval", the file
    --data with a JSON object a line: prompt, tag, include and exclude. choice: of an
    image's captions the one of the lowest id, or one drawn by `seed`. order: of the file, by image id, or shuffled by `seed`. count: how
    many of them from the first; 0: all."""

    kind: Literal["coco", "text", "geneval"]
    file: str = ""
    choice: Literal["first", "seeded"] = "first"
    order: Literal["file", "image_id", "seeded"] = "file"
    count: int = Field(0, ge=0)
    seed: int = Field(0, ge=0)


class Images(Part):
    """The real images: folder below --data; "" for none. all: every image of the folder, not only those of the captions. resize: the
    filter that brings the shorter side to `size` pixels before the centre is cut out; size 0: that of the samples. Samples larger or
    smaller than `size` are resized to it in the same way."""

    folder: str = ""
    resize: Literal["lanczos", "bicubic", "bilinear", "area"] = "lanczos"
    size: int = Field(0, ge=0)
    all: bool = False


class Samples(Part):
    """Images a prompt; sample number i (prompts in order, a prompt's images one after the other) has the noise of seed + i."""

    per_prompt: int = Field(1, ge=1)
    seed: int = Field(0, ge=0)


class Measures(Part):
    """What a result of this protocol is expected to hold; what else the given features allow is measured as well."""

    wanted: tuple[str, ...] = ()


class Protocol(Part):
    """One protocol. limit: only so many prompts, a first answer which is not the protocol's number; 0: all. teacher: samples of one are
    needed."""

    name: str
    about: str
    source: str
    teacher: bool = False
    captions: Captions
    images: Images = Images()
    samples: Samples = Samples()
    measures: Measures = Measures()
    limit: int = Field(0, ge=0)

    @property
    def title(self) -> str:
        """As tables name it: a limited one is never taken for the whole."""
        return f"{self.name}, first {self.limit}" if self.limit else self.name

    @property
    def digest(self) -> str:
        """Of all that changes a number."""
        told = self.model_dump(mode="json", exclude={"about", "source"})
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def changed(self, **keys: Any) -> Protocol:
        """With other `per_prompt`, `seed`, `count` or `limit`, as the command's options give them; a changed protocol says so by its
        digest, and by its name unless the protocol leaves that open."""
        given = {key: value for key, value in keys.items() if value is not None}
        if not given:
            return self
        samples = {key: given[key] for key in ("per_prompt", "seed") if key in given}
        own = self.captions.kind != "coco"
        renamed = self.name if own or not samples or samples.items() <= self.samples.model_dump().items() else f"{self.name} (changed)"
        update = {"samples": self.samples.model_copy(update=samples), "name": renamed, "limit": given.get("limit", self.limit)}
        return self.model_copy(update=update)


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str) -> Protocol:
    """A protocol that ships with reflow, by its name, or a .toml file of the same keys. Raises UserError for an unknown name, and for a
    file that is none, with the key at fault."""
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        if name.endswith(".toml"):
            raise UserError(f"--protocol {name}: there is no such file; give one, or a name out of {', '.join(names())}.")
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"--protocol {name} is not known{hint}; write one of {', '.join(names())}, or a .toml file with the keys of one of them.")
    try:
        # Through JSON: its lists are the tuples of a frozen model.
        return Protocol.model_validate_json(json.dumps({"name": path.stem, **tomllib.loads(path.read_text(encoding="utf-8"))}))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--protocol {name} is no TOML file: {error}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"--protocol {name}, key {key}: {first['msg'].lower()}; compare it with one of {', '.join(names())}.") from error
