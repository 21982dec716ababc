"""A diffusers pipeline from a folder or a file on this disk, offline, with the scheduler that is asked for."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from reflow.errors import UserError, quote
from reflow.models.checks import OWN_SCHEDULERS
from reflow.models.digits import BUILTIN
from reflow.models.folder import find_folder, read_index, refuse_options
from reflow.models.parts import read_json
from reflow.models.single_file import read_checkpoint
from reflow.quiet import quiet_imports
from reflow.weights.files import choose_variant
from reflow.weights.guard import pickles_allowed, reason_of
from reflow.weights.original_names import UNET_PREFIX

FILES = (".safetensors", ".ckpt")
OURS = ["reflow.sampling", "PiecewiseFlowScheduler"]
NETWORKS = ("unet", "transformer")
# A keyword that only schedulers with a discrete noise schedule take; those of flow matching do not.
DISCRETE = "beta_schedule"


def place(path: str | Path, *, tokenizer: str = "", config: str = "") -> Path:
    """The folder, or the file of one that only diffusers can take apart, that a path stands for: "builtin", a diffusers folder, or a single
    file, of SD1.5 and SDXL unpacked. Raises UserError where there is neither; nothing is downloaded."""
    if str(path) == "builtin":
        return BUILTIN
    found = Path(path).expanduser()
    if found.is_dir():
        refuse_options(path, {"tokenizer": tokenizer, "config": config})
        return found
    if not found.is_file():
        raise UserError(
            f"There is no folder or file {found}. Write the path of a diffusers folder or of a checkpoint; a repository is downloaded first, "
            f"with 'hf download OWNER/NAME --local-dir FOLDER', since nothing is fetched here."
        )
    if found.suffix not in FILES:
        raise UserError(f"{found} is no diffusers folder and no checkpoint that ends in {' or '.join(FILES)}. Give one of those.")
    if config and not _is_stable_diffusion(found):
        return found
    return find_folder(found, {"tokenizer": tokenizer or config, "config": config})


def _is_stable_diffusion(file: Path) -> bool:
    state, _ = read_checkpoint(file)
    return any(key.startswith(UNET_PREFIX) for key in state)


def kind_of(folder: Path) -> tuple[str, int | None]:
    """The class of a folder's pipeline by name, and the width of the text that its denoiser reads (None where its config does not say)."""
    index = read_index(folder)
    configs = [folder / name / "config.json" for name in NETWORKS if index.get(name) is not None]
    width = read_json(configs[0]).get("cross_attention_dim") if configs else None
    return index["_class_name"], width if isinstance(width, int) else None


def load(path: Path, dtype: torch.dtype, *, config: str = "") -> Any:
    """The pipeline of a folder (or, by the class that `config` names, of a file), on the CPU and without its safety checker, which would
    hand out black images to be measured. Raises UserError with what is wrong with it."""
    quiet_imports()
    import diffusers

    folder = path if path.is_dir() else Path(config).expanduser()
    index = read_index(folder)
    kind = getattr(diffusers, index["_class_name"], None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
        raise UserError(f"{folder} holds a {quote(index['_class_name'])}, which is no pipeline of diffusers {diffusers.__version__}. Update "
                        f"diffusers, or give another folder.")  # fmt: skip
    # Parts that a folder says it does without, as SD3 without T5, are to be named as such.
    more: dict[str, Any] = {name: None for name, value in index.items() if value == [None, None]}
    more |= {name: value for name, value in (("safety_checker", None), ("requires_safety_checker", False)) if name in index}
    bars = diffusers.utils.logging.is_progress_bar_enabled()
    diffusers.utils.logging.disable_progress_bar()
    try:
        if path.is_dir():
            with _with_our_scheduler(path, index) as whole:
                how = {"torch_dtype": dtype, "local_files_only": True, "variant": _variant(path), **more}
                # Without the keyword diffusers reads .bin files, with torch's weights_only.
                pipe = kind.from_pretrained(whole, **how) if pickles_allowed() else kind.from_pretrained(whole, use_safetensors=True, **how)
        else:
            pipe = kind.from_single_file(str(path), config=str(folder), torch_dtype=dtype, local_files_only=True, **more)
    except UserError:
        raise
    except Exception as error:  # the libraries raise anything on folders that are not whole
        raise UserError(f"{path} cannot be loaded as a {index['_class_name']} ({reason_of(error)}). Download or export it again.") from error
    finally:
        if bars:
            diffusers.utils.logging.enable_progress_bar()
    if getattr(pipe, "watermark", None) is not None:
        pipe.watermark = None  # drawn into SDXL's images where its package is installed
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextlib.contextmanager
def _with_our_scheduler(folder: Path, index: Mapping[str, Any]) -> Iterator[Path]:
    """The folder; where its scheduler's class lies in a module of somebody's repository, links to all that is in it, and ours for the class."""
    scheduler = index.get("scheduler") or [None, None]
    if scheduler[-1] not in OWN_SCHEDULERS or scheduler[0] == OURS[0]:
        yield folder
        return
    with tempfile.TemporaryDirectory() as made:
        for entry in folder.resolve().iterdir():
            if entry.name != "model_index.json":
                (Path(made) / entry.name).symlink_to(entry)
        (Path(made) / "model_index.json").write_text(json.dumps({**index, "scheduler": OURS}), encoding="utf-8")
        yield Path(made)


def _variant(folder: Path) -> str | None:
    for name in NETWORKS:
        names = [file.name for file in sorted((folder / name).glob("*.safetensors")) or sorted((folder / name).glob("*.bin"))]
        if names:
            return choose_variant(names, folder / name) or None
    return None


def scheduler_class(name: str) -> Any:
    """The scheduler's class of this name, of diffusers or ours. Raises UserError with the nearest name."""
    quiet_imports()
    import diffusers
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    from reflow.sampling import PiecewiseFlowScheduler

    if name == PiecewiseFlowScheduler.__name__:
        return PiecewiseFlowScheduler
    found = getattr(diffusers, name, None) if name.isidentifier() else None
    if isinstance(found, type) and issubclass(found, SchedulerMixin):
        return found
    names = [known for known in dir(diffusers.schedulers) if known.endswith("Scheduler")] + [PiecewiseFlowScheduler.__name__]
    lower = {known.lower(): known for known in names}
    begun = sorted((key for key in lower if name and key.startswith(name.lower())), key=len)
    asked = name.lower() if name.lower().endswith("scheduler") else f"{name.lower()}scheduler"
    near = begun or difflib.get_close_matches(asked, lower, n=1, cutoff=0.4)
    meant = lower[near[0]] if near else "EulerDiscreteScheduler"
    raise UserError(f"There is no scheduler {quote(name)} in diffusers {diffusers.__version__}: did you mean {meant}?")


def _kind_of_schedule(scheduler: Any) -> str:
    discrete = DISCRETE in inspect.signature(type(scheduler).__init__).parameters
    return "a discrete noise schedule" if discrete and not scheduler.config.get("use_flow_sigmas") else "flow matching"


def swap_scheduler(pipe: Any, name: str, config: Mapping[str, Any], label: str, anyway: bool = False) -> None:
    """Give the pipeline a scheduler of this class, made of its own scheduler's config and these keywords. Raises UserError where the two do
    not go by one kind of noise schedule, unless `anyway`."""
    made = scheduler_class(name)
    own = pipe.scheduler.config
    try:
        new = made.from_config(own, **{key: tuple(value) if isinstance(value, list) else value for key, value in config.items()})
    except UserError as error:
        raise UserError(f"{label}: {error}") from error
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"{label}: {name} cannot be made of the config of {type(pipe.scheduler).__name__} ({reason_of(error)}). Name another "
                        f"scheduler.") from error  # fmt: skip
    # By the classes' own keywords: a config goes on holding those of the class that it was made of.
    was, now = (_kind_of_schedule(scheduler) for scheduler in (pipe.scheduler, new))
    if was != now and not anyway:
        raise UserError(f"{label} was trained on {was}, by its {type(pipe.scheduler).__name__}, and {name} steps on {now}: its images would be "
                        f"noise. Name a scheduler of its own kind, or --anyway to measure it regardless.")  # fmt: skip
    pipe.scheduler = new
