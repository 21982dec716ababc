"""Solved windows kept on disk: solve once, train many cheap steps, in this run or in later ones (`reflow prepare --pairs`)."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from reflow.data import sampler
from reflow.errors import UserError, quote, short
from reflow.outputs import others, write_text
from reflow.ranks import barrier
from reflow.training.checkpoint import save_weights
from reflow.training.solves import Solved, Solver
from reflow.weights import guard

CHUNK = 512
MOST = 10**9  # pairs of a store
MANIFEST = "pairs.json"
TENSORS = ("z_start", "z_end", "item", "dropped", "window")


def describe(solver: Solver) -> dict[str, Any]:
    """What decides the pairs that a solver makes: two stores with equal descriptions hold pairs of the same distribution."""
    recipe, flow = solver.recipe, solver.flow
    told = {
        "boundaries": list(flow.parts.boundaries),
        "trained windows": flow.active.tolist(),
        "solver_steps": flow.stage.solver_steps,
        "teacher": flow.stage.teacher,
        "teacher.method": recipe.teacher.method,
        "teacher.guidance_scale": recipe.teacher.guidance_scale,
        "teacher.drops_captions": recipe.teacher.drops_captions,
        "teacher.precision": recipe.teacher.precision,
        "data.caption_drop": recipe.data.caption_drop,
        "objective.starts": recipe.objective.starts,
        "items of the data": len(solver.data),
        "teacher's weights": digest(v for k, v in solver.teacher.state_dict().items() if "lora_" not in k),
        "data": digest(_tensors(solver)),
    }
    if recipe.objective.starts == "noise" and recipe.objective.starts_share < 1:
        told["objective.starts_share"] = recipe.objective.starts_share
    if recipe.objective.forward_share:
        told["objective.forward_share"] = recipe.objective.forward_share
    if solver.share > 1:
        told["pairs of one trajectory"] = solver.share
    if flow.stage.teacher == "previous":
        told["student.prediction_type"] = recipe.student.prediction_type
        told["student.network_time"] = recipe.student.network_time
    return told


def _tensors(solver: Solver) -> list[torch.Tensor]:
    """Latent and conditioning of the first and the last item."""
    found = []
    for item in (torch.tensor([0]), torch.tensor([len(solver.data) - 1])):
        found += [solver.data.latent(item), *solver.data.conditioning(item).tensors]
    return found


def digest(tensors: Any) -> str:
    """Hash of the shapes of tensors and of up to 4096 evenly spaced elements of each: quick for billions of parameters."""
    total = hashlib.sha256()
    for tensor in tensors:
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
        flat = (tensor if plain else tensor.dequantize()).detach().reshape(-1)  # a float8 teacher's
        total.update(str(tuple(tensor.shape)).encode())
        total.update(flat[:: max(1, flat.numel() // 4096)].float().cpu().numpy().tobytes())
    return total.hexdigest()


class PairStore:
    """A folder of solved pairs in chunks that appear whole. Ranks share the work and map all of it into memory.

    count: pairs in the store. With one `solver` the store is filled, continued after a kill, and read by global solve index.
    """

    def __init__(self, folder: pathlib.Path, solver: Solver, count: int) -> None:
        solver.data.need_one_shape("A store of pairs")
        self.folder, self.solver, self.count = folder, solver, count
        self.chunk = max(1, CHUNK // solver.share) * solver.share  # of whole trajectories
        self.chunks = [range(first, min(first + self.chunk, count)) for first in range(0, count, self.chunk)]

    def path(self, chunk: int) -> pathlib.Path:
        return self.folder / f"pairs-{chunk:05d}.safetensors"

    def fill(self, progress: Callable[[int], None], stop: Callable[[], bool] = lambda: False) -> bool:
        """Solve what is missing; a killed run goes on where it was. False if `stop` asked to leave before the end."""
        rank, world = dist.get_rank(), dist.get_world_size()
        self.folder.mkdir(parents=True, exist_ok=True)
        batch = self.solver.recipe.teacher.batch_size * self.solver.share  # windows solved at once: one of each trajectory
        for c in range(rank, len(self.chunks), world):
            if not self.path(c).exists():
                if stop():
                    return False
                self._write(c, [self._solve(list(self.chunks[c][i:i + batch])) for i in range(0, len(self.chunks[c]), batch)])
            progress(len(self.chunks[c]))
        return True

    def _solve(self, indices: list[int]) -> dict[str, torch.Tensor]:
        items, dropped, _ = self.solver.inputs(indices)
        solved = self.solver(indices)
        return {"z_start": solved.z_start, "z_end": solved.z_end, "item": items, "dropped": dropped, "window": solved.window}

    def _write(self, chunk: int, parts: list[dict[str, torch.Tensor]]) -> None:
        tensors = {name: torch.cat([p[name].cpu() for p in parts]) for name in TENSORS}
        if not all(torch.isfinite(tensors[name]).all() for name in ("z_start", "z_end")):
            raise UserError(f"The teacher's solve of pairs {self.chunks[chunk][0]} to {self.chunks[chunk][-1]} is not finite; check the base "
                            f"model's weights, or write teacher.precision = 'fp32'.")
        save_weights(tensors, self.path(chunk), {})

    def load(self) -> PairStore:
        """Map all chunks into memory; rows are read from disk when they are asked for."""
        self.parts = []
        for c, rows in enumerate(self.chunks):
            try:
                part = guard.load(self.path(c))[0]
                self._check(part, len(rows))
            except Exception as error:
                raise UserError(f"The stored pairs in {self.path(c)} cannot be used ({guard.reason_of(error)}); remove that file, and the command "
                                f"that wrote it solves them again.") from error
            self.parts.append(part)
        return self

    def _check(self, part: dict[str, torch.Tensor], count: int) -> None:
        """Raises ValueError for a chunk that holds other than `count` pairs of these data and this stage. Latents are looked at when used."""
        items, latent = len(self.solver.data), tuple(self.solver.data.groups[0].shape)
        wanted = {"z_start": (torch.float32, latent), "z_end": (torch.float32, latent), "item": (torch.int64, ()), "window": (torch.int64, ()),
                  "dropped": (torch.bool, ())}
        if set(part) != set(TENSORS):
            raise ValueError(f"it holds {short(', '.join(sorted(part)))} and not {', '.join(TENSORS)}")
        if len(part["z_end"].shape) and len(part["z_end"]) != count:
            raise ValueError(f"it holds {len(part['z_end'])} pairs instead of {count}")
        for name, (dtype, shape) in wanted.items():
            if part[name].dtype != dtype or tuple(part[name].shape) != (count, *shape):
                raise ValueError(f"its {name} is {part[name].dtype} {list(part[name].shape)} and not {dtype} {[count, *shape]}")
        for name, most in (("item", items), ("window", len(self.solver.flow.parts))):
            if int(part[name].min()) < 0 or int(part[name].max()) >= most:
                raise ValueError(f"its {name} has a number outside 0 to {most - 1}")

    def rows(self, name: str, pairs: torch.Tensor) -> torch.Tensor:
        """Rows [B, ...] of one tensor for pair numbers [B], on the CPU."""
        return torch.stack([self.parts[p // self.chunk][name][p % self.chunk] for p in pairs.tolist()])

    def __call__(self, indices: list[int]) -> Solved:
        """Pairs for the given global solve indices; every epoch over the store visits each pair once, in an order of its own."""
        recipe, flow, device = self.solver.recipe, self.solver.flow, self.solver.device
        pairs = torch.tensor([sampler.item_of(recipe.train.seed, 128 + flow.index, i, self.count) for i in indices])
        conditioning = self.solver.data.conditioning(self.rows("item", pairs), self.rows("dropped", pairs)).to(device, torch.float32)
        start, end = (self.rows(name, pairs).to(device, non_blocking=True) for name in ("z_start", "z_end"))
        return Solved(start, end, self.rows("window", pairs).to(device), conditioning)


def create(folder: pathlib.Path, solver: Solver, count: int) -> PairStore:
    """A store of its own that later runs may name as `pairs_from`. The same call goes on after a kill.

    Raises UserError for a folder that holds something else or pairs of another teacher, data or stage.
    """
    manifest = folder / MANIFEST
    told = {"pairs": count, "seed": solver.recipe.train.seed, "stage": solver.flow.index, "settings": describe(solver)}
    if manifest.exists():
        differing = differences(read_manifest(folder), told)
        if differing:
            raise UserError(f"{folder} holds pairs of other settings ({'; '.join(differing)}); give another --out.")
    elif folder.exists() and others(folder):
        raise UserError(f"--out {folder} is not empty and holds no stored pairs; give a new folder.")
    elif dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(manifest, json.dumps(told, indent=1))
    barrier()
    return PairStore(folder, solver, count)


def reuse(folder: pathlib.Path, solver: Solver, count: int) -> PairStore:
    """The first `count` pairs (0: all) of a finished store for another run's stage. Raises UserError naming each setting that differs."""
    made = read_manifest(folder)
    differing = differences(made, {**made, "settings": describe(solver)})
    if differing:
        raise UserError(f"The pairs in {folder} do not fit stage {solver.flow.index + 1}: {'; '.join(differing)} (there -> here). Change the "
                        f"recipe, or solve new ones with `reflow prepare --pairs`.")
    if count > made["pairs"]:
        raise UserError(f"{folder} holds {made['pairs']} pairs and the stage asks for {count}; write pairs = {made['pairs']} or less.")
    store = PairStore(folder, solver, made["pairs"])
    missing = [c for c in range(len(store.chunks)) if not store.path(c).exists()]
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} of its {len(store.chunks)} chunks; run the same `reflow prepare --pairs` again, it "
                        f"solves what is missing.")
    store.load()
    store.count = count or store.count
    return store


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    try:
        made = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder} is no folder of stored pairs: {folder / MANIFEST} is missing or not readable. Write the --out of "
                        f"`reflow prepare --pairs`.") from error
    said = made if isinstance(made, dict) else {}
    if not isinstance(said.get("settings"), dict) or type(said.get("pairs")) is not int or not 0 < said["pairs"] <= MOST:
        raise UserError(f"{folder / MANIFEST} is damaged: it does not say how many pairs of which settings are there. Solve them again with "
                        f"`reflow prepare --pairs` and another --out.")
    return made


def differences(made: dict[str, Any], told: dict[str, Any]) -> list[str]:
    """Settings that differ, as 'name: there -> here'."""
    a, b = ({**{k: v for k, v in d.items() if k != "settings"}, **d["settings"]} for d in (made, told))
    return [f"{short(k)}: {_short(a.get(k))} -> {_short(b.get(k))}" for k in sorted(set(a) | set(b)) if a.get(k) != b.get(k)]


def _short(value: Any) -> str:
    return value[:8] if isinstance(value, str) and len(value) == 64 else quote(value)
