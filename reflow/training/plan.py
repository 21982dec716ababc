"""What a recipe will take, without starting it: `--dry-run`."""

from __future__ import annotations

from reflow import config
from reflow.settings import Recipe
from reflow.flow import DiscreteVP
from reflow.models import registry
from reflow.training import stages

GIB = 2**30

def describe(recipe: Recipe) -> str:
    """The resolved recipe, parameter count, teacher evaluations a student sample and expected memory, as text."""
    import torch
    from diffusers import UNet2DConditionModel

    base = registry.family(recipe.model.family).load(registry.base_path(recipe.model), parts=())
    stages.check_compatible(recipe, base.prediction_type)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(base.configs["unet"])
    parameters = sum(p.numel() for p in unet.parameters())
    lines = [config.dump(recipe).rstrip(), "", f"student: {parameters:,} parameters ({recipe.model.family}, {base.prediction_type})"]
    for i, stage in enumerate(recipe.stages):
        flow = stages.build(recipe, i, DiscreteVP.from_config(base.scheduler_config), base.prediction_type, torch.device("cpu"))
        per_sample, solves = evaluations_per_sample(recipe, i, flow)
        kind = "read from " + stage.pairs_from if stage.pairs_from else "stored pairs" if stage.pairs else "solved as it goes"
        lines.append(f"stage {i + 1}: {len(flow.active)} windows x {stage.solver_steps} solver steps, teacher '{stage.teacher}', {stage.samples:,} samples, "
                     f"{solves:,} windows {kind}: {per_sample:.3g} teacher evaluations a student sample")
    lines.append("expected memory a rank (weights, gradients, optimizer, EMA, teacher; activations come on top):")
    for ranks in (1, 2, 8):
        total = sum(memory(recipe, parameters, ranks).values())
        parts = ", ".join(f"{name} {size / GIB:.3f}" for name, size in memory(recipe, parameters, ranks).items())
        lines.append(f"  {ranks} rank{'s' if ranks > 1 else ''}: {total / GIB:.3f} GiB ({parts})")
    return "\n".join(lines)

def evaluations_per_sample(recipe: Recipe, index: int, flow: stages.StageFlow) -> tuple[float, int]:
    """(network rows of the teacher a student sample, windows that are solved) of a stage. Starts from noise pay for the way there."""
    stage = recipe.stages[index]
    solves = 0 if stage.pairs_from else stage.pairs or -(-stage.samples // stage.chords_per_solve)
    windows = 1 if recipe.objective.starts == "data" else int(flow.active.max()) + 1
    return solves * windows * flow.solver.evaluations / stage.samples, solves

def memory(recipe: Recipe, parameters: int, ranks: int) -> dict[str, int]:
    """Bytes a rank by part. ZeRO 1 shares optimizer, masters and EMA between ranks, 2 gradients too, 3 weights too."""
    train = recipe.train
    share = [1 if train.zero_stage < level else ranks for level in (1, 2, 3)]
    bf16 = train.precision == "bf16"
    weight = 2 if bf16 else 4
    states = 2 if "8bit" in train.optimizer else 8
    # In fp32 at stage 0 the weights are their own masters.
    masters = 4 if bf16 or train.zero_stage else 0
    parts = {"weights": parameters * weight // share[2], "gradients": parameters * weight // share[1],
             "masters": parameters * masters // share[0], "optimizer": parameters * states // share[0], "EMA": parameters * 4 // share[0],
             "teacher": parameters * (2 if recipe.teacher.precision == "bf16" else 4), "base": parameters * 4}
    if train.offload:
        parts["masters"] = parts["optimizer"] = 0
    return parts
