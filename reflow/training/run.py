"""A run directory, the base model and the data of a recipe: everything before the loop."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import socket
import time

import torch
import torch.distributed as dist

import reflow
import reflow_kernels
from reflow.data.cache import CachedDataset
from reflow.data.joined import Joined
from reflow.data.latents import LatentDataset, encode_digits
from reflow.data.shapes import Shaped
from reflow.data.stream import StreamDataset, stream
from reflow.errors import UserError
from reflow.locks import alone
from reflow.models import registry
from reflow.models.family import Base
from reflow.outputs import others, write_text
from reflow.ranks import barrier, need_equal
from reflow.recipes import reading
from reflow.recipes.settings import Recipe
from reflow.training import engine, fit, loop, networks, pulse, rules, stages
from reflow.training.draws import on_paths
from reflow.training.progress import say
from reflow.training.signals import Signals
from reflow_kernels import backend_report


def open_run_dir(run_dir: pathlib.Path, recipe: Recipe, allow_config_change: bool) -> dict[str, str]:
    """Refuse a folder that holds another recipe's run or something else. Nothing is written here.

    Returns what has changed since the run was last started and may: 'old -> new' by key.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--run-dir {run_dir} is a file; give the name of a folder that is new or holds this run.")
    saved = run_dir / "recipe.toml"
    if not saved.exists():
        if run_dir.exists() and others(run_dir, rules.FILE):
            raise UserError(f"--run-dir {run_dir} is not empty and holds no run of reflow; give a new folder.")
        return {}
    before = reading.load(str(saved))
    changed = reading.changed_keys(before, recipe) + rules.changed(run_dir, recipe)
    if changed and not allow_config_change:
        raise UserError(f"--run-dir {run_dir} holds a run of recipe '{before.name}' whose settings differ from the ones given: "
                        f"{'; '.join(changed[:8])}{' ...' if len(changed) > 8 else ''}. Use another --run-dir, the old values, or "
                        f"--allow-config-change to go on with the new ones.")
    return reading.free_changes(before, recipe)


def say_free_changes(changes: dict[str, str], data: Shaped, allow_config_change: bool) -> None:
    """One line for each key that changed and may. Raises UserError where these data make it change the order of samples."""
    if "train.micro_batch" in changes and len(data.groups) > 1 and not allow_config_change:
        raise UserError(f"train.micro_batch = {changes['train.micro_batch']}: with images of several sizes every micro-batch holds one size, so another "
                        f"micro_batch takes the images in another order. Write the old value, or --allow-config-change to go on in the new order.")
    if dist.get_rank() == 0:
        for key, change in changes.items():
            print(f"The run resumes with {key} = {change} (results equal to rounding).", flush=True)


def load_data(recipe: Recipe, base: Base) -> LatentDataset | CachedDataset | StreamDataset | Joined:
    if recipe.data.source == "digits":
        return encode_digits(base)
    if recipe.data.source not in ("cache", "stream"):
        near = reading.nearest(recipe.data.source, ["digits", "cache", "stream"])
        raise UserError(f"data.source = '{recipe.data.source}' is not known{near}; write 'digits', 'cache' with the --out of "
                        f"`reflow prepare` as data.path, or 'stream' with images as data.path.")
    places, cached = recipe.data.places, recipe.data.source == "cache"
    parts = [CachedDataset(place.path, base, other_unet=recipe.data.other_unet) if cached
             else stream(recipe.data.model_copy(update={"path": place.path}), base) for place in places]
    data = Joined(parts, [place.repeats for place in places]) if recipe.data.sources else parts[0]
    check_shapes(recipe, data)
    return data


def check_shapes(recipe: Recipe, data: Shaped) -> None:
    """Refuse what cannot be done with images of several sizes. Raises UserError naming the key."""
    stored = next((i for i, stage in enumerate(recipe.stages) if stage.stored), None)
    if stored is not None:
        data.need_one_shape(f"stages.{stored} with stored pairs")
    for i, stage in enumerate(recipe.stages):
        part, share = recipe.train.micro_batch // stage.chords_per_solve, len(stages.trained(stage))
        if len(data.groups) > 1 and on_paths(recipe.of_stage(i).objective) and part % share and share % part:
            raise UserError(f"With images of several sizes and trajectories (objective.starts = 'noise', forward_share) the windows of a trajectory must not be shared by micro-batches "
                            f"of two sizes: stages.{i} trains {share} windows on {part} solves a micro-batch (train.micro_batch / chords_per_solve); "
                            f"make one of the two a multiple of the other.")
    micro = min(recipe.train.micro_batch, max(1, recipe.train.batch_size // dist.get_world_size()))
    if len(data.groups) > 1 and recipe.train.micro_batch % micro:
        raise UserError(f"With images of several sizes each rank's micro-batch, here {micro} samples, must divide train.micro_batch = "
                        f"{recipe.train.micro_batch}; write train.micro_batch = {micro}.")


def be_deterministic(wanted: bool) -> None:
    """Ask for algorithms that repeat to the bit, without which a resumed run on a GPU would drift from an uninterrupted one."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = not wanted
    torch.backends.cudnn.deterministic = wanted
    # Operators that have no such algorithm run all the same.
    torch.use_deterministic_algorithms(wanted and torch.cuda.is_available(), warn_only=True)


def wait_until_shared(run_dir: pathlib.Path, patience: float = 60.0) -> None:
    """Return once this rank sees what rank 0 wrote; network folders may show it late. Raises UserError after so many seconds."""
    end = time.monotonic() + patience
    while not (run_dir / "recipe.toml").exists():
        if time.monotonic() > end:
            raise UserError(f"Rank {dist.get_rank()} on {socket.gethostname()} does not see the run directory {run_dir} that rank 0 made; give a "
                            f"--run-dir on a folder that all nodes share.")
        os.listdir(run_dir.parent if run_dir.parent.exists() else "/")  # asks a network folder again
        time.sleep(0.5)


def load_base(recipe: Recipe, device: torch.device) -> Base:
    """The recipe's base in fp32, its UNet on the CPU, from where students and teachers are copied.

    The UNet of a LoRA recipe, which is never trained itself, comes at once in the teacher's precision.
    """
    family = registry.family_for(recipe.model)
    base = family.load(registry.base_path(recipe.model), device=device, parts=("vae", "text"))
    dtype = networks.solver_dtype(recipe) if recipe.model.lora_rank else torch.float32
    base.unet = family.load(registry.base_path(recipe.model), device="cpu", dtype=dtype, parts=("unet",)).unet
    return base


def told_of(recipe: Recipe, base: Base, data: Shaped) -> dict[str, str]:
    """What must be equal on all ranks, by name."""
    def short(content: bytes) -> str:
        return hashlib.sha256(content).hexdigest()[:12]

    code = [path for package in (reflow, reflow_kernels) for path in sorted(pathlib.Path(package.__file__).parent.rglob("*.py"))]
    weights = hashlib.sha256()
    for name, tensor in base.unet.state_dict().items():  # a little of each: it tells two bases apart, and takes a moment
        weights.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.flatten()[:64].float().cpu().numpy().tobytes())
    return {"the recipe": short(reading.dump(recipe).encode()), "the data": data.identity(), "the base's weights": weights.hexdigest()[:12],
            "the code of reflow": f"{reflow.__version__}, {short(b''.join(path.read_bytes() for path in code))}", "torch": torch.__version__}


def begin(recipe: Recipe, run_dir: pathlib.Path | None = None) -> tuple[torch.device, Base, LatentDataset | CachedDataset | StreamDataset]:
    """Join the other ranks and load what the recipe names: this rank's device, the base model and the data. Nothing is written.

    run_dir: where a training will write, which is refused first where it cannot fit.
    """
    say(f"importing DeepSpeed and joining {os.environ.get('WORLD_SIZE', '1')} rank(s)")
    device = engine.init_distributed()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))))
    torch.manual_seed(recipe.train.seed)
    be_deterministic(recipe.train.deterministic)
    for op, backend, reason in backend_report(device):
        if backend == "none":
            raise UserError(f"The fused op {op} cannot run on {device}: {reason}")
    if run_dir is not None:
        fit.check(recipe, run_dir, device)
    say(f"loading the base {recipe.model.base}")
    base = load_base(recipe, device)
    stages.check_compatible(recipe, base.prediction_type)
    for i in range(len(recipe.stages)):
        stages.build(recipe, i, base.schedule(), base.prediction_type, device)
    how = "encoding" if recipe.data.source == "digits" else "opening"
    say(f"{how} the data ({recipe.data.source}{f': {recipe.data.path}' if recipe.data.path else ''})")
    return device, base, load_data(recipe, base)


def train(recipe: Recipe, run_dir: pathlib.Path, *, allow_config_change: bool = False, signals: Signals | None = None) -> int:
    """Train on this rank until the recipe is done or a signal asks to leave. Returns the exit code. The same call resumes.

    signals: those that the caller listens to already.
    """
    changes = open_run_dir(run_dir, recipe, allow_config_change)
    with contextlib.ExitStack() as held:
        signals = signals or held.enter_context(Signals())
        device, base, data = begin(recipe, run_dir)
        need_equal(told_of(recipe, base, data))
        say_free_changes(changes, data, allow_config_change)
        if dist.get_rank() == 0:
            run_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(alone(run_dir, "A training"))
            pulse.sweep(run_dir)
            rules.write(run_dir)
            write_text(run_dir / "recipe.toml", reading.dump(recipe))
        barrier()
        wait_until_shared(run_dir)
        held.enter_context(pulse.Pulse(run_dir, recipe.train.rank_patience))
        start = time.monotonic()
        whole = loop.Loop(recipe, run_dir, base, data, device, base.new_network, signals)
        signals.join(recipe.checkpoint.minutes)
        code = whole.run()
        if dist.get_rank() == 0 and code == 0:
            print(f"Finished {recipe.name} in {time.monotonic() - start:.0f} s: {run_dir}", flush=True)
        barrier()
    return code
