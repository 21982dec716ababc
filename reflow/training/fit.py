"""Whether a run has the room that its plan counts, asked before anything large is loaded: its device's memory, the machine's, the disk.

What is counted here is the least that a run needs: weights, states and what a micro-batch keeps, without workspaces and fragments.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import socket
from typing import Any

import torch
import torch.distributed as dist

from reflow.errors import UserError
from reflow.recipes.settings import Recipe
from reflow.training import plan
from reflow.training.counts import Counts

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container: version 2, then 1


def check(recipe: Recipe, run_dir: pathlib.Path, device: torch.device) -> None:
    """Compare the plan with what is there; every rank calls it. `train.check_fit = false` prints what it would refuse.

    Raises UserError on all ranks where one of them cannot fit: what is short, how much the plan counts and how much there is.
    """
    try:
        base, _ = plan.find_base(recipe)
        latent, counts = plan.sized(recipe, base, passes=device.type == "cuda" and not recipe.model.compile)
    except UserError:
        counts = None  # the base comes from the hub, or loading it says what is wrong, on this rank alone perhaps
    here = gathered(socket.gethostname()).count(socket.gethostname())
    short = [] if counts is None else [*of_device(recipe, counts, device), *of_machine(recipe, counts, device, here)]
    if counts is not None and dist.get_rank() == 0:
        short += of_disk(recipe, counts, latent, run_dir)
    all_short = list(dict.fromkeys(text for texts in gathered(short) for text in texts))
    if all_short and recipe.train.check_fit:
        raise UserError(f"This run cannot fit: {'; '.join(all_short)}. `--dry-run` prints the whole plan and what other settings take; "
                        f"--set train.check_fit=false starts it all the same.")
    if all_short and dist.get_rank() == 0:
        print(f"This run may not fit: {'; '.join(all_short)}.", flush=True)


def gathered(mine: Any) -> list[Any]:
    """What each rank has, on all of them."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return every


def of_device(recipe: Recipe, counts: Counts, device: torch.device) -> list[str]:
    """What is short on this rank's GPU, as sentences; on a CPU the machine's memory is all there is."""
    if device.type != "cuda":
        return []
    world, size = dist.get_world_size(), device_bytes(device)
    parts = plan.memory(recipe, counts, world)
    if recipe.train.optimizer.startswith("paged"):
        parts["optimizer"] = 0  # moves out where the card is full
    micro = min(recipe.train.micro_batch, max(1, recipe.train.batch_size // world))
    # What a compiled block keeps is less than its operators do one by one, by how much is not known before.
    kept = 0 if recipe.model.compile else micro * (counts.checkpointed if recipe.model.gradient_checkpointing else counts.saved)
    states = sum(parts.values())
    if max(states, states - parts["step"] + kept) <= size:
        return []
    passes = f" and {plan.bytes_of(kept)} for a micro-batch of {micro}" if kept else ""
    return [f"the plan counts {plan.bytes_of(states)} of GPU memory a rank ({plan.listed(parts)}){passes}, and rank {dist.get_rank()}'s GPU on "
            f"{socket.gethostname()} has {plan.bytes_of(size)} (a smaller train.micro_batch, model.gradient_checkpointing, train.optimizer = "
            f"'adamw8bit', train.offload, ZeRO and a LoRA take less)"]


def of_machine(recipe: Recipe, counts: Counts, device: torch.device, ranks: int) -> list[str]:
    """What is short of the memory that the ranks of this machine, so many, share."""
    world = dist.get_world_size()
    parts = plan.in_cpu_memory(recipe, counts, world)
    if device.type != "cuda":
        parts = {**parts, **{name: size + parts.get(name, 0) for name, size in plan.memory(recipe, counts, world).items()}}
    need, have = ranks * sum(parts.values()), machine_bytes()
    if have is None or need <= have:
        return []
    return [f"the plan counts {plan.bytes_of(need)} of the machine's memory for {ranks} rank{'s' if ranks > 1 else ''} ({plan.listed(parts)} a rank), "
            f"and {socket.gethostname()} has {plan.bytes_of(have)} (fewer ranks on this machine, no offload, or a LoRA take less)"]


def of_disk(recipe: Recipe, counts: Counts, latent: tuple[int, int, int], run_dir: pathlib.Path) -> list[str]:
    """What is short on the run directory's disk, beside what lies in the directory already."""
    parts = plan.disk(recipe, counts, latent)
    place = run_dir.absolute()
    there = sum(file.lstat().st_size for file in place.rglob("*") if file.is_file()) if place.is_dir() else 0
    while not place.exists():
        place = place.parent
    need, have = sum(parts.values()) - there, shutil.disk_usage(place).free
    if need <= have:
        return []
    held = f", of which {plan.bytes_of(there)} are there" if there else ""
    return [f"the plan counts {plan.bytes_of(sum(parts.values()))} of disk ({plan.listed(parts)}){held}, and {plan.bytes_of(have)} are free at {place} "
            f"(another --run-dir, a smaller checkpoint.keep, or a LoRA)"]


def device_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[1]


def machine_bytes() -> int | None:
    """Memory of this machine, or of the container that this process may use; None where the system does not tell."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if "SC_PHYS_PAGES" in os.sysconf_names else []
    for limit in LIMITS:
        try:
            found.append(int(pathlib.Path(limit).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min((size for size in found if size > 0), default=None)
