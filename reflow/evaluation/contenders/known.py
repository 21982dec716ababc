"""Few-step models that others published, and what they are made for: known.toml as objects, found again by the names of files.

A few-step model drawn with another number of steps, guidance or scheduler than it was trained for gives images that say nothing of it, and
nothing else tells. Time runs from t=1 (noise) to t=0 (data); timesteps fall.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import functools
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic

from reflow.errors import UserError, quote
from reflow.models.parts import read_json
from reflow.weights.delta import student_settings
from reflow.weights.files import read_metadata, weight_files

TABLE = Path(__file__).with_name("known.toml")
OURS = "reflow"
# Names that say nothing: of files that repositories hold, and of folders between them and the repository's own.
PLAIN = ("pytorch-lora-weights", "adapter-model", "diffusion-pytorch-model", "model", "unet", "transformer", "lora", "loras", "snapshots")
ENDINGS = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
ABOVE = 4  # folders above a file that may name it
TOLD = ("timestep_spacing", "prediction_type", "num_time_windows")  # of a scheduler's keywords, those that sentences name
REVISION = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Known:
    """What one few-step model is made for. guidance_range None: any; steps (): any number from `least` on; scheduler "": the pipeline's own;
    config: keywords for its from_config; timesteps: those of a number of steps, where they are not the scheduler's own; call: further
    keywords of the pipeline's call; needs: why it cannot be drawn here, or ""."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    name: str
    kind: Literal["lora", "network", "pipeline"]
    bases: tuple[str, ...]
    files: tuple[str, ...]
    guidance: float
    source: str
    examples: tuple[str, ...] = ()
    steps: tuple[int, ...] = ()
    least: int = 1
    guidance_range: tuple[float, float] | None = None
    scheduler: str = ""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    timesteps: Mapping[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    lora_scale: float = 1.0
    eta: float | None = None
    call: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    marks: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    needs: str = ""
    confirmed: bool = True
    note: str = ""

    def fits_steps(self, steps: int) -> bool:
        return steps in self.steps if self.steps else steps >= self.least

    def fits_guidance(self, guidance: float) -> bool:
        """Scales of 1 and below are one: none."""
        if self.guidance_range is None:
            return True
        low, high = self.guidance_range
        return low <= max(guidance, 1.0) <= high

    def says(self) -> str:
        """In words: "4 steps and guidance 1 (or none) with EulerDiscreteScheduler (timestep_spacing trailing)"."""
        if self.steps:
            counted = f"{_range(self.steps)} step{'s' if self.steps != (1,) else ''}"
        else:
            counted = f"{self.least} steps or more" if self.least > 1 else "any number of steps"
        if self.guidance_range is None:
            scale = "any guidance"
        elif self.guidance_range == (1.0, 1.0):
            scale = "guidance 1 (or none)"
        else:
            low, high = self.guidance_range
            scale = f"guidance {low:g}" if low == high else f"guidance {low:g} to {high:g}"
        words = ", ".join(f"{key} {value}" for key, value in self.config.items() if key in TOLD)
        by = f" with {self.scheduler}{f' ({words})' if words else ''}" if self.scheduler else ""
        return f"{counted} and {scale}{by}"


def _range(counts: Sequence[int]) -> str:
    """ "4", "2 to 8", "1, 2, 4 or 8"."""
    if len(counts) > 2 and list(counts) == list(range(counts[0], counts[-1] + 1)):
        return f"{counts[0]} to {counts[-1]}"
    words = [str(n) for n in counts]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _filled(value: Any, **words: Any) -> Any:
    """The entry with {n} and {base} of all its texts replaced."""
    if isinstance(value, str):
        for key, word in words.items():
            value = value.replace(f"{{{key}}}", str(word))
        return value
    if isinstance(value, list):
        return [_filled(item, **words) for item in value]
    return value


def _expanded(raw: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    entry = dict(raw)
    counts = entry.pop("each", [None])
    for base in entry["bases"] if "{base}" in entry["name"] else [None]:
        for count in counts:
            one: dict[str, Any] = {key: _filled(value, n=count, base=base) for key, value in entry.items()}
            if base is not None:
                one["bases"] = [base]
            if count is not None:
                one["steps"] = [count]
            yield {"guidance_range": [one["guidance"]] * 2, **one}


@functools.cache
def table() -> tuple[Known, ...]:
    """Every entry of known.toml, checked; ValueError for one that is no entry (the file ships with the package)."""
    check = pydantic.TypeAdapter(Known)
    return tuple(check.validate_python(one) for raw in _read()["model"] for one in _expanded(raw))


@functools.cache
def _read() -> dict[str, Any]:
    return tomllib.loads(TABLE.read_text(encoding="utf-8"))


def by_name(name: str) -> Known:
    """The entry of this name. Raises UserError with the nearest name where there is none."""
    entries = {entry.name: entry for entry in table()}
    if name not in entries:
        near = difflib.get_close_matches(name.lower(), entries, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"names are those of {TABLE.name}, such as {next(iter(entries))}."
        raise UserError(f"There is no known few-step model {quote(name)}: {hint} Write 'none' to take the model for none of them.")
    return entries[name]


def plain_name(name: str) -> str:
    """A file's or folder's name as known.toml has it."""
    name = name.rpartition("--")[2].lower()  # folders of the hub's cache are models--OWNER--NAME
    for ending in ENDINGS:
        name = name.removesuffix(ending)
    name = re.sub(r"[\s_.-]+", "-", name).strip("-")
    return re.sub(r"-(fp16|bf16|fp32)$", "", name)


def _names(path: Path) -> Iterator[str]:
    """The name of a file or folder, then those of the folders above it while the names say nothing."""
    path = Path(path).expanduser().absolute()
    for place in [path, *path.parents[:ABOVE]]:
        name = plain_name(place.name)
        yield name
        said = name.partition("-fp16")[0]
        # Published files are pytorch_lora_weights.safetensors in a folder that has the model's name.
        if not (said in PLAIN or said.startswith("diffusion-pytorch-model-") or REVISION.fullmatch(place.name)):
            return


def claims(entry: Known, name: str) -> bool:
    """Whether an entry claims a name that `plain_name` gave."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in entry.files)


def _by_file(path: Path) -> Known | None:
    return next((entry for name in _names(path) for entry in table() if claims(entry, name)), None)


def _by_marks(folder: Path) -> Known | None:
    def bears(entry: Known) -> bool:
        for name, wanted in entry.marks.items():
            if not (folder / name).is_file():
                return False
            found = read_json(folder / name)
            if any(found.get(key) != value for key, value in wanted.items()):
                return False
        return bool(entry.marks)

    return next((entry for entry in table() if bears(entry)), None)


def _ours(settings: Mapping[str, Any], own_scheduler: bool) -> Known:
    """What a student of reflow is made for: at least a step a window, at any guidance, by the scheduler of its windows."""
    windows = settings["windows"]
    config = {"window_boundaries": list(windows.boundaries), **{key: settings[key] for key in ("prediction_type", "network_time")}}
    return Known(
        name=OURS, kind="pipeline", bases=(), files=(), guidance=1.0, source="its own weights' metadata", least=len(windows),
        scheduler="" if own_scheduler else "PiecewiseFlowScheduler", config={} if own_scheduler else config,
        note=f"a student on {len(windows)} windows",
    )  # fmt: skip


def _our_folder(folder: Path) -> Known | None:
    file = folder / "scheduler" / "scheduler_config.json"
    scheduler = read_json(file) if file.is_file() else {}
    if scheduler.get("_class_name") == "PiecewiseFlowScheduler":
        from reflow.sampling import PiecewiseFlowScheduler

        own = PiecewiseFlowScheduler.from_config(scheduler)
        read = {"windows": own.windows, "prediction_type": own.config.prediction_type, "network_time": own.config.network_time}
        return _ours(read, own_scheduler=True)
    files = weight_files(folder / "unet") if (folder / "unet").is_dir() else []
    settings = student_settings(files[0]) if files else {}
    return _ours(settings, own_scheduler=False) if settings else None


def recognise(path: str | Path, lora: str | Path = "") -> Known | None:
    """What a pipeline (a folder or a file) with a LoRA over it ("": none) is known as: the LoRA's entry, else the pipeline's; None where
    neither is known. Students of reflow are known by what their weights say, others by their names and by marks in a folder's configs."""
    if lora:
        file = Path(lora).expanduser()
        settings = student_settings(file) if file.is_file() and file.suffix == ".safetensors" and "windows" in read_metadata(file) else {}
        found = _ours(settings, own_scheduler=False) if settings else _by_file(file)
        if found:
            return found
    place = Path(path).expanduser()
    folder = place.is_dir()
    return (_our_folder(place) if folder else None) or _by_file(place) or (_by_marks(place) if folder else None)


def bases_of(pipeline: str, width: int | None) -> tuple[str, ...]:
    """The bases that a pipeline of this class, whose denoiser reads text of this width, may be; () for a class that none comes as."""
    fit = {name: base for name, base in _read()["bases"].items() if pipeline in base["pipelines"]}
    exact = tuple(name for name, base in fit.items() if base.get("width") == width)
    return exact or tuple(fit)


def refuse(known: Known, steps: int, guidance: float, scheduler: str = "", base: Iterable[str] = (), label: str = "") -> None:
    """Raises UserError where a known model is not made for this, in a sentence that names what it is made for. scheduler: the class that was
    asked for by name, "" for the known one; base: the bases that the pipeline may be (`bases_of`), () where that is not known; label: how
    the model is called in the sentence."""
    label = label or known.name
    anyway = "or --anyway to measure it regardless"
    base = tuple(base)
    if base and known.bases and not set(base) & set(known.bases):
        raise UserError(
            f"{label} is made for {' or '.join(known.bases)}, and the pipeline is {' or '.join(base)}: give a pipeline of "
            f"{' or '.join(known.bases)}, {anyway}."
        )
    if known.needs:
        raise UserError(f"{label} needs {known.needs}, which is not in diffusers, so it cannot be drawn as it was made to: leave it out, {anyway}.")
    asked, write = [], []
    if not known.fits_steps(steps):
        nearest = min(known.steps, key=lambda n: abs(n - steps)) if known.steps else known.least
        asked.append(f"{steps} step{'s' if steps != 1 else ''}")
        write.append(f"--steps {nearest}")
    if not known.fits_guidance(guidance):
        asked.append(f"guidance {guidance:g}")
        write.append(f"--guidance {known.guidance:g}")
    if scheduler and known.scheduler and scheduler != known.scheduler:
        asked.append(scheduler)
        write.append(f"--scheduler {known.scheduler}, or no scheduler")
    if asked:
        raise UserError(f"{label} is made for {known.says()} ({known.source}); asked {' and '.join(asked)}: write {' and '.join(write)}, {anyway}.")


def told(known: Known | None) -> dict[str, Any] | None:
    """What a description says of it, ready for JSON; None for none."""
    if known is None:
        return None
    fields = ("name", "kind", "source", "confirmed", "note", "config", "timesteps", "eta", "call")
    return {"made_for": known.says(), **json.loads(json.dumps({key: getattr(known, key) for key in fields}))}
