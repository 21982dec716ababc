"""What a recipe will take, without starting it: `--dry-run`. Everything printed here is counted or estimated, nothing is measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reflow.errors import UserError
from reflow.models import registry
from reflow.models.family import Base
from reflow.models.shipped import shipped
from reflow.recipes.settings import Recipe
from reflow.training import stages
from reflow.training.counts import Counts, count
from reflow.training.draws import on_paths
from reflow.training.ema import half_life_at
from reflow.training.solves import windows_solved
from reflow.weights.guard import REMEDY, reason_of

GIB = 2**30
CARDS = (24, 48, 80, 141)
FREE = 0.92  # of a card: the rest is CUDA's own, workspaces and fragments
RATE = 300e12  # FLOP/s that well-kept bf16 training reaches on an H100 or H200; 790e12 is the sheet's


def describe(recipe: Recipe) -> str:
    """Parameters, compute, room on the disk, memory by part and what fits which card, as text."""
    import torch

    base, note = find_base(recipe)
    stages.check_compatible(recipe, base.prediction_type)
    latent, counts = sized(recipe, base)
    trained = "" if counts.trained == counts.parameters else f", beside which a LoRA trains {counts.trained:,}"
    lines = ([note] if note else []) + [f"network: {counts.parameters:,} parameters ({recipe.model.family}, {base.prediction_type}){trained}"]
    side = " x ".join(str(n * base.vae_scale_factor) for n in latent[1:])
    again = counts.forward if recipe.model.gradient_checkpointing else 0
    student = counts.forward + counts.backward + again
    lines.append(f"compute at {side} pixels (counted): {flop(counts.forward)} a network row, {flop(counts.forward + counts.backward)} forward and "
                 f"backward{f', {flop(student)} with checkpointing' if again else ''}")
    whole = 0.0
    for i, stage in enumerate(recipe.stages):
        flow = stages.build(recipe, i, base.schedule(), base.prediction_type, torch.device("cpu"))
        per_sample, solves = evaluations_per_sample(recipe, i, flow)
        cost = per_sample * counts.forward + student
        whole += cost * stage.samples
        kind = "read from " + stage.pairs_from if stage.pairs_from else "stored pairs" if stage.pairs else "solved as it goes"
        merging = f" that merge into {len(flow.windows)}" if flow.merger else ""
        lines.append(f"stage {i + 1}: {len(flow.active)} windows{merging} x {stage.solver_steps} solver steps, teacher '{stage.teacher}', {stage.samples:,} samples, "
                     f"{solves:,} windows {kind}: {per_sample:.3g} teacher evaluations and {flop(cost)} a student sample"
                     f"{cut_said(recipe, i, flow)}{ema_said(recipe, i)}")
    lines.append(f"the run: {flop(whole)}, {duration(whole / RATE)} of one GPU at {RATE / 1e12:.0f} TFLOP/s (an assumption, not measured)")
    room = disk(recipe, counts, latent)
    lines += ["", f"expected room on the disk (counted): {bytes_of(sum(room.values()))} ({listed(room)})",
              "", f"expected memory a rank (estimated; {bytes_of(counts.saved)} for every sample of a micro-batch come on top, "
                  f"{bytes_of(counts.checkpointed)} with gradient checkpointing, and workspaces):"]
    for ranks in (1, 2, 8):
        parts = memory(recipe, counts, ranks)
        lines.append(f"  {ranks} rank{'s' if ranks > 1 else ''}: {bytes_of(sum(parts.values()))} ({listed(parts)})")
    there = in_cpu_memory(recipe, counts, 1)
    if any(there.values()):
        lines.append(f"  in the CPU's memory, a rank of 1: {listed(there)}")
    lines += ["", f"largest micro-batch that fits, without / with gradient checkpointing (estimated, {FREE:.0%} of each card; -: not even one):",
              f"  {'':44}" + "".join(f"{f'{card} GB':>12}" for card in CARDS)]
    for name, other, ranks in variants(recipe):
        states = sum(memory(other, counts, ranks).values())
        cells = [" / ".join(shown(fitting(states, size, card)) for size in (counts.saved, counts.checkpointed)) for card in CARDS]
        lines.append(f"  {name:44}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def ema_said(recipe: Recipe, index: int) -> str:
    """The EMA's half-life at the end of a stage, which its ramp may keep below the recipe's."""
    train = recipe.train
    if not train.ema_half_life:
        return "; no EMA"
    held = half_life_at(train.ema_half_life, train.ema_warmup, -(-recipe.stages[index].samples // train.batch_size) * train.batch_size)
    why = f" ({train.ema_warmup:.0%} of it; the recipe's {train.ema_half_life:,.0f} are not reached)" if held < train.ema_half_life else ""
    return f"; EMA half-life {held:,.0f} samples at its end{why}"


def amount(value: float, units: tuple[tuple[float, str], ...]) -> str:
    """Three digits in the first unit, of falling size, that the value reaches a tenth of."""
    size, name = next(((size, name) for size, name in units if value >= 0.1 * size), units[-1])
    return f"{value / size:.3g} {name}"


def flop(value: float) -> str:
    return amount(value, ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")))


def bytes_of(value: float) -> str:
    return amount(value, ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB"))) if value else "0"


def duration(seconds: float) -> str:
    return amount(seconds, ((3600, "hours"), (60, "minutes"), (1, "seconds"), (1e-3, "ms")))


def listed(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {bytes_of(size)}" for name, size in parts.items() if size)


def disk(recipe: Recipe, counts: Counts, latent: tuple[int, int, int]) -> dict[str, int]:
    """Bytes of a run directory by part, but for logs, pictures and the headers of files: `checkpoint.keep` checkpoints and the one being written, each stage's
    averaged weights in fp32, and the pairs that stages store. Any number of ranks writes the same."""
    states = counts.trained * (4 + state_bytes(recipe.train.optimizer) + 4)  # masters, moments and the EMA
    pair = 2 * 4 * latent[0] * latent[1] * latent[2] + 17  # both ends in fp32; item, dropped and window
    stored = sum(stage.pairs for stage in recipe.stages if not stage.pairs_from)
    return {f"{recipe.checkpoint.keep + 1} checkpoints": int((recipe.checkpoint.keep + 1) * states),
            "stage weights": len(recipe.stages) * counts.trained * 4, "stored pairs": stored * pair}


def shown(samples: int) -> str:
    return "-" if not samples else str(samples) if samples < 1000 else ">999"


def fitting(states: int, sample: int, card: int) -> int:
    """Samples of `sample` bytes beside `states` bytes on a card of so many GB; 0 where not one fits."""
    return max(0, int((FREE * card * GIB - states) // max(sample, 1)))


def find_base(recipe: Recipe) -> tuple[Base, str]:
    """(the base's configs, a note): of the base on this disk, else those that ship with its family. Nothing is downloaded or unpacked.

    Raises UserError for a base that is not here, of a family whose configs do not ship.
    """
    from reflow.models import single_file

    model, family = recipe.model, registry.family(recipe.model.family)
    path = Path(model.base).expanduser()
    if model.base == "builtin" or path.is_dir():
        return family.load(registry.base_path(model), parts=()), ""
    note = ""
    if path.is_file():
        state, metadata = single_file.read_checkpoint(path)
        folder = Path(model.config).expanduser() if model.config else single_file.packaged(single_file.kind_of(state, path))
        prediction = single_file.prediction_of(state, metadata, model.prediction_type, path)
    else:
        prediction, folder = model.prediction_type or None, downloaded(model.base)
        if folder is None:
            folder = Path(model.config).expanduser() if model.config else shipped(family.name, model.base)
            name = folder.name if folder else family.name
            note = f"note: the base {model.base} is not on this disk, so this plan uses the configs of {name} that ship with reflow"
    if folder is None:
        raise UserError(f"The base {model.base} is not on this disk, and no configs of the family {family.name} ship with reflow; download it first, or "
                        f"write a folder with its configs as model.config.")
    base = family.load(folder, parts=())
    if prediction:
        base.configs = {**base.configs, "scheduler": {**base.scheduler_config, "prediction_type": prediction}}
    return base, note


def downloaded(name: str) -> Path | None:
    """The folder of a hub repository that is in the cache already."""
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(name, local_files_only=True))
    except Exception:  # noqa: BLE001 - not on this machine, whatever the hub's client raises
        return None


def sized(recipe: Recipe, base: Base, passes: bool = True) -> tuple[tuple[int, int, int], Counts]:
    """`latent_of` and `counts_of`. Raises UserError where the base's configs, which may be anybody's, describe no network."""
    try:
        latent = latent_of(recipe, base)
        return latent, counts_of(recipe, base, latent, passes=passes)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"The configs of the base {recipe.model.base} describe no network of the family {recipe.model.family} that can be planned "
                        f"({reason_of(error)}). {REMEDY}") from error


def latent_of(recipe: Recipe, base: Base) -> tuple[int, int, int]:
    """(C, h, w) of the largest latent of the recipe's data; where that is not on this disk, of the base's own resolution."""
    if recipe.data.source == "cache":
        from reflow.data.cache import read_manifest

        try:
            made = [read_manifest(Path(place.path)) for place in recipe.data.places]
            shapes = [tuple(shard["shape"]) for manifest in made for shard in manifest["shards"]["latents"] if "shape" in shard]
        except (UserError, KeyError):
            shapes = []
        if shapes:
            return max(shapes, key=lambda shape: shape[1] * shape[2])
    return base.latent_shape(getattr(recipe.data, "resolution", 0) or None)


def counts_of(recipe: Recipe, base: Base, latent: tuple[int, int, int], passes: bool = True) -> Counts:
    """`count` of the recipe's student at its precision."""
    import torch

    model = recipe.model
    lora = {"rank": model.lora_rank, "targets": model.lora_targets} if model.lora_rank else None
    dtype = torch.float32 if recipe.train.precision == "fp32" else torch.bfloat16
    return count(base.network_config, latent, 0, dtype, lora=lora, passes=passes, base=base)


def variants(recipe: Recipe) -> Iterator[tuple[str, Recipe, int]]:
    """(name, recipe, ranks): this recipe, and the same with other optimizers and ZeRO stages."""
    yield f"this recipe ({recipe.train.optimizer}, ZeRO {recipe.train.zero_stage}), 1 rank", recipe, 1
    for optimizer, zero, offload, ranks in (("adamw", 0, False, 1), ("adamw8bit", 0, False, 1), ("adamw", 1, True, 1), ("adamw", 2, False, 2),
                                            ("adamw", 2, False, 8), ("adamw", 3, False, 8), ("adamw", 3, True, 8)):  # fmt: skip
        train = recipe.train.model_copy(update={"optimizer": optimizer, "zero_stage": zero, "offload": offload})
        name = f"{optimizer}, ZeRO {zero}{', offload' if offload else ''}, {ranks} rank{'s' if ranks > 1 else ''}"
        yield name, recipe.model_copy(update={"train": train}), ranks


def evaluations_per_sample(recipe: Recipe, index: int, flow: stages.StageFlow) -> tuple[float, int]:
    """(network rows of the teacher a student sample, those of the average that finishes chords included; windows that are kept) of a stage."""
    stage, objective = recipe.stages[index], flow.recipe.objective
    kept = 0 if stage.pairs_from else stage.pairs or -(-stage.samples // stage.chords_per_solve)
    solved = windows_solved(flow.active.tolist(), len(flow.parts), kept, batch_of(recipe, index, flow), objective)
    finishing = flow.merger.evaluations(flow.active) / stage.chords_per_solve if flow.merger else 0.0
    return solved * flow.solver.evaluations / stage.samples + finishing, kept


def batch_of(recipe: Recipe, index: int, flow: stages.StageFlow) -> int:
    """Pairs that are solved together on one rank."""
    stage = recipe.stages[index]
    return recipe.teacher.batch_size * len(flow.active) if stage.pairs else recipe.train.micro_batch // stage.chords_per_solve


def cut_said(recipe: Recipe, index: int, flow: stages.StageFlow) -> str:
    """What it costs that micro-batches cut the teacher's trajectories from noise; '' where they do not."""
    stage, count = recipe.stages[index], len(flow.active)
    if not on_paths(flow.recipe.objective) or stage.stored or not batch_of(recipe, index, flow) % count:
        return ""
    solves = -(-stage.samples // stage.chords_per_solve)
    objective = flow.recipe.objective
    least, real = (windows_solved(flow.active.tolist(), len(flow.parts), solves, part, objective) for part in (count, batch_of(recipe, index, flow)))
    return (f"; micro-batches of {batch_of(recipe, index, flow)} solves cut trajectories of {count} windows, which costs {real / least:.3g} times the "
            f"solves: make train.micro_batch a multiple of {count * stage.chords_per_solve}")


def state_bytes(optimizer: str) -> float:
    """Bytes a trained parameter of the optimizer's two moments; in 8 bits one fp32 scale serves 256 of them."""
    return 2 * (1 + 4 / 256) if "8bit" in optimizer else 8


def memory(recipe: Recipe, counts: Counts, ranks: int) -> dict[str, int]:
    """Bytes on a rank's device by part. ZeRO 1 shares optimizer, masters and EMA between ranks, 2 gradients too, 3 weights too.

    `step` is the fp32 copy of the gradients that a bf16 engine makes to step. Parts that a paged optimizer may move out count as here.
    """
    train, teacher, size = recipe.train, recipe.teacher, counts.trained
    share = [1 if train.zero_stage < level else ranks for level in (1, 2, 3)]
    bf16, lora = train.precision == "bf16", bool(recipe.model.lora_rank)
    weight = 2 if bf16 else 4
    # In fp32 at stage 0 the weights are their own masters.
    masters = 4 if bf16 or train.zero_stage else 0
    frozen = frozen_bytes(counts, teacher.precision)
    parts = {"weights": size * weight // share[2], "gradients": size * weight // share[1], "step": size * 4 // share[0] if bf16 else 0,
             "masters": size * masters // share[0], "optimizer": int(size * state_bytes(train.optimizer)) // share[0], "EMA": size * 4 // share[0]}
    if train.offload:
        parts |= dict.fromkeys(("step", "masters", "optimizer", "EMA"), 0)
    # A LoRA's base is its teacher; beside it stand the adapters of a previous stage and of the average that is looked at.
    named = {"base and teacher": frozen, "other adapters": size * 8} if lora else {"teacher": 0 if getattr(teacher, "offload", False) else frozen}
    if not lora and any(stage.merges for stage in recipe.stages):
        named["the average that finishes chords"] = size * weight
    return parts | named


def frozen_bytes(counts: Counts, precision: str) -> int:
    """Of a network that is not trained; "fp8" keeps linear layers in one byte and the rest in two."""
    return counts.parameters * 4 if precision == "fp32" else counts.parameters * 2 - (counts.linear if precision == "fp8" else 0)


def in_cpu_memory(recipe: Recipe, counts: Counts, ranks: int) -> dict[str, int]:
    """Bytes a rank keeps in CPU memory where its device is a GPU: the base in fp32, and what is offloaded."""
    result: dict[str, Any] = {"base": 0 if recipe.model.lora_rank else counts.parameters * 4}
    if recipe.train.offload:
        stay = memory(recipe.model_copy(update={"train": recipe.train.model_copy(update={"offload": False})}), counts, ranks)
        result |= {name: stay[name] for name in ("masters", "optimizer", "EMA")}
    if getattr(recipe.teacher, "offload", False):
        result["teacher"] = frozen_bytes(counts, recipe.teacher.precision)
    return result
