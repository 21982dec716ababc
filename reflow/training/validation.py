"""It cannot silently train to noise: the untrained student is checked before the first step, and fixed pictures and losses are kept all along."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from reflow.data import sampler
from reflow.errors import UserError
from reflow.flow import WindowSolver, network_time
from reflow.models.conditioning import denoise
from reflow.models.family import Base
from reflow.ranks import barrier
from reflow.recipes.sections import Objective
from reflow.recipes.settings import Recipe
from reflow.sampling.sampler import Samples, sample, sample_teacher
from reflow.training import pictures, targets, verdict
from reflow.training.progress import say
from reflow.training.solves import Solved, Solver
from reflow.training.stages import StageFlow
from reflow.training.telemetry import Log
from reflow_kernels import AlignedVLoss

TAUS = (0.0, 0.25, 0.5, 0.75)
FIXED = 2**40  # solves of validation: far behind any that trains
START_TOLERANCE, START_TOLERANCE_HALF = 1e-3, 2e-2  # a LoRA student lives in its teacher's precision


class Validation:
    """Fixed prompts, noises and solved windows of one stage. Rank 0 does the work, the others wait."""

    def __init__(self, recipe: Recipe, flow: StageFlow, base: Base, root: Callable[[], AbstractContextManager[Any]], solver: Solver,
                 run_dir: pathlib.Path, log: Log) -> None:
        self.recipe, self.flow, self.base, self.root, self.solver, self.log = recipe, flow, base, root, solver, log
        self.folder, self.device = run_dir / "validation", solver.device
        self.schedule = base.schedule()
        settings, data = recipe.validate_, solver.data
        if settings.prompts:
            pixels = tuple(side * base.vae_scale_factor for side in data.shape[1:])
            self.prompts = list(settings.prompts)
            conditioning = base.encode_prompts(self.prompts, pixels)
        else:
            items = data.preview(settings.images)
            self.prompts, conditioning = data.words(items), data.conditioning(items)
        self.conditioning = conditioning.to(self.device, torch.float32)
        _, noise = sampler.solve_draws(recipe.train.seed, 0, list(range(FIXED, FIXED + len(conditioning))), data.shape)
        self.noise = noise.to(self.device)
        self.rows: list[tuple[str, torch.Tensor]] = []
        self.shown: dict[str, float] = {}  # for the bar

    def student_samples(self, unet: torch.nn.Module, steps: int, guidance_scale: float, *, decode: bool = True) -> Samples:
        """The fixed prompts by the scheduler that is exported with the student."""
        student = self.recipe.student
        return sample(self.base, unet, self.conditioning, steps, range(len(self.noise)), windows=self.flow.windows,
                      prediction_type=student.prediction_type, network_time=student.network_time, guidance_scale=guidance_scale,
                      null=self.solver.data.null, noise=self.noise, decode=decode)

    @torch.no_grad()
    def own_ddim(self, unet: torch.nn.Module) -> torch.Tensor:
        """Latents of the fixed prompts by the network's own DDIM, unguided: one step a window."""
        windows, z = self.flow.windows, self.noise
        solver = WindowSolver(self.schedule, windows, 1, prediction_type=self.base.prediction_type, device=self.device)
        for k in range(len(windows)):
            z = solver.solve(lambda x, t: denoise(unet, x, t, self.conditioning), z, torch.full((len(z),), k, device=self.device))
        return z

    def check_start(self, student: torch.nn.Module, total: int) -> None:
        """Sample the untrained student. ddim_*: it must equal the DDIM of the network it starts from; others: say how far off it is.

        Raises UserError where a ddim_* student does not start at its own DDIM: the wiring is wrong and training would learn noise.
        """
        steps, kind = len(self.flow.windows), self.recipe.student.prediction_type
        say(f"stage {self.flow.index + 1}: checking the untrained student against its network's own {steps}-step DDIM"
            f"{' (model.compile: its blocks are compiled now)' if self.recipe.model.compile else ''}")
        if dist.get_rank() == 0:
            with self.root() as root:
                own = self.own_ddim(root if self.flow.index == 0 and not self.recipe.model.student_weights else student)
                whole = next(root.parameters()).dtype == torch.float32
            off = float((self.student_samples(student, steps, 1.0).latents - own).norm() / own.norm())
            self.log.write("start", total, {"stage": self.flow.index, "steps": steps, "distance_to_own_ddim": off})
            tolerance = START_TOLERANCE if whole else START_TOLERANCE_HALF
            # A flow's velocity student is the base itself, whose own sampler is Euler.
            exact = self.base.prediction_type == "velocity" or (kind.startswith("ddim") and self.recipe.student.network_time == "index")
            if not exact:
                print(f"Stage {self.flow.index + 1}: the untrained {kind} student starts {off:.3g} (relative) away from its network's own "
                      f"{steps}-step DDIM; it must first learn that back.", flush=True)
            elif not off < tolerance:
                raise UserError(f"Stage {self.flow.index + 1}: the untrained student differs from its network's own {steps}-step DDIM by "
                                f"{off:.3g} (relative), more than {tolerance:g}; student.prediction_type, the base's scheduler and "
                                f"its weights do not fit together.")
        barrier()

    def prepare(self, untrained: torch.nn.Module | None, total: int) -> None:
        """Solve the fixed windows and sample the teacher once a stage, before the optimizer takes its memory.

        untrained: the student where the stage begins, of which a picture beside the teacher is kept; None where it goes on.
        """
        if dist.get_rank() == 0 and self.recipe.validate_.every:
            say(f"stage {self.flow.index + 1}: solving the fixed windows and sampling the teacher for validation")
            count = max(1, self.recipe.validate_.pairs // len(self.flow.active)) * len(self.flow.active)
            first = -(-FIXED // len(self.flow.active)) * len(self.flow.active)
            self.fixed = [self.solver.whole(part) for part in self.solver.by_shape(list(range(first, first + count)))]
            steps, guidance = self.recipe.validate_.teacher_steps, self.recipe.validate_.guidance_scale
            with self.root() as root:
                teacher = sample_teacher(self.base, root, self.conditioning, steps, range(len(self.noise)), guidance_scale=guidance,
                                         null=self.solver.data.null, noise=self.noise)
                # A guided teacher's guidance is in the student, which is then compared unguided; else both are guided as in the pictures.
                learnt = self.recipe.guidance_of(self.flow.index)
                self.guidances = (learnt, 1.0) if learnt != 1 else (guidance, guidance)
                self.fine, self.own = (
                    teacher.latents if n == steps and self.guidances[0] == guidance else
                    sample_teacher(self.base, root, self.conditioning, n, range(len(self.noise)), guidance_scale=self.guidances[0],
                                   null=self.solver.data.null, noise=self.noise, decode=False).latents
                    for n in (steps, len(self.flow.windows)))
            self.rows = [(f"teacher, {counted(steps)}", teacher.images)]
            if untrained is not None:
                found, images = self.measure(untrained.eval(), total, 0)
                self.picture(untrained, total, "untrained", found, images)
        barrier()

    def measure(self, unet: torch.nn.Module, total: int, samples: int) -> tuple[dict[str, Any], torch.Tensor | None]:
        """The student beside its teacher at one step a window after `samples` of the stage: into the log, and for the bar.

        And its images, where the picture has a row of that very sampling.
        """
        steps, settings = len(self.flow.windows), self.recipe.validate_
        shown = steps in settings.steps and self.guidances[1] == settings.guidance_scale
        drawn = self.student_samples(unet, steps, self.guidances[1], decode=shown)
        found = verdict.compare(drawn.latents, self.own, self.fine)
        self.log.write("paired", total, {"stage": self.flow.index, "samples": samples, "steps": steps,
                                         "teacher_steps": self.recipe.validate_.teacher_steps, **found})
        self.shown = {"student": found["student_error"], "teacher": found["teacher_error"]}
        return found, drawn.images

    @torch.no_grad()
    def fixed_losses(self, unet: torch.nn.Module) -> list[dict[str, float]]:
        """Squared error, its parts and 1 - cosine of the chord velocity at fixed places of every window."""
        window, records = torch.cat([solved.window for solved in self.fixed]), []
        for tau in TAUS:
            parts = [self.errors(unet, solved, tau) for solved in self.fixed]
            mses, magnitudes, cosines = (torch.cat([getattr(part, name) for part in parts]) for name in ("mse", "magnitude", "cosine"))
            for k in self.flow.active.tolist():
                here = window == k
                mse, magnitude = float(mses[here].mean()), float(magnitudes[here].mean())
                records.append({"window": k, "tau": tau, "mse": mse, "magnitude": magnitude, "direction": mse - magnitude,
                                "one_minus_cosine": 1.0 - float(cosines[here].double().mean())})
        return records

    def errors(self, unet: torch.nn.Module, solved: Solved, tau: float) -> AlignedVLoss:
        """The chord velocity's error of solved windows of one shape, at the place tau in each."""
        dtype = next(unet.parameters()).dtype
        places = torch.full((len(solved.window),), tau, device=self.device)
        t = self.flow.table.time(solved.window, places)
        z = torch.lerp(solved.z_start, solved.z_end, places.view(-1, 1, 1, 1))
        velocity = (solved.z_end - solved.z_start) / self.flow.table.dt[solved.window].view(-1, 1, 1, 1)
        output = denoise(unet, z.to(dtype), network_time(t, self.recipe.student.network_time), solved.conditioning.to(dtype=dtype))
        at = targets.Points(z, velocity, solved.z_end, z, solved.window, t)
        return targets.loss(output, at, self.flow.table, Objective(loss="mse"))

    def run(self, averages: dict[str, torch.Tensor], before: int, samples: int, averaged: Callable[[dict[str, torch.Tensor]], Any], last: bool) -> None:
        """The EMA student after `samples` of the stage: fixed losses and distance to its teacher into the log, and a grid of pictures.

        before: samples of the stages before. last: of the stage, whose verdict follows.
        """
        if dist.get_rank() == 0:
            unet, total = averaged(averages), before + samples
            self.log.write("validate", total, {"stage": self.flow.index, "windows": self.fixed_losses(unet)})
            found, images = self.measure(unet, total, samples)
            self.picture(unet, total, "EMA", found, images)
            if last:
                self.judge(found, total)
            else:
                self.warn(found, total, samples)
        barrier()

    def warn(self, found: dict[str, Any], total: int, samples: int) -> None:
        """Say once, and early enough to stop, that the student is behind its teacher."""
        recipe, steps = self.flow.recipe, len(self.flow.windows)
        settings, batch = recipe.validate_, recipe.train.batch_size
        whole = -(-self.flow.stage.samples // batch) * batch
        due = settings.warn_after < 1 and verdict.first_after(settings.warn_after, samples, whole, settings.every, batch)
        if not due or settings.teacher_steps <= steps or found["gain"] is None or found["gain"] >= 0:
            return
        began = next((line for line in self.log.lines("paired", self.flow.index) if line["samples"] == 0), None)
        said = verdict.behind(self.flow.index + 1, steps, samples / whole, found, verdict.cause(recipe, began, found))
        self.log.write("behind", total, {"stage": self.flow.index, "samples": samples, "said": said})
        tqdm.write(said)

    def picture(self, unet: torch.nn.Module, total: int, weights: str, found: dict[str, Any], images: torch.Tensor | None) -> None:
        """A grid of the student beside the teacher, with its prompts and settings, into the folder and TensorBoard. weights: "untrained", "EMA".

        found: its distance to the teacher at one step a window, which stands beside that row; images: of that row, where they are drawn already.
        """
        recipe, student = self.recipe, self.recipe.student
        guidance, counts = recipe.validate_.guidance_scale, [n for n in sorted(recipe.validate_.steps) if n >= len(self.flow.windows)]
        name = "student" if weights == "EMA" else f"{weights} student"
        ready = {} if images is None else {len(self.flow.windows): images}
        rows = [*self.rows, *((f"{name}, {counted(n)}", ready[n] if n in ready else self.student_samples(unet, n, guidance).images) for n in counts)]
        drawn, trained = pictures.labelled_grid([(self.with_error(label, found), row) for label, row in rows], self.prompts), weights == "EMA"
        pictures.save(drawn, self.folder / f"{total:09d}{'' if trained else f'-{weights}'}.png", {
            "recipe": recipe.name, "base": recipe.model.base, "stage": self.flow.index + 1, "samples": total, "weights": weights,
            "rows": [label for label, _ in rows], "paired": found, "prompts": self.prompts, "guidance_scale": guidance, "windows": list(self.flow.windows.boundaries),
            "prediction_type": student.prediction_type, "network_time": student.network_time, "seed": recipe.train.seed})
        self.log.image("validation" if trained else f"validation/{weights}", drawn, total)

    def with_error(self, label: str, found: dict[str, Any]) -> str:
        """A row's label, of the student at one step a window with its distance to the teacher's fine solve and its teacher's own."""
        steps = len(self.flow.windows)
        if not label.endswith(f"student, {counted(steps)}") or self.recipe.validate_.teacher_steps <= steps:
            return label
        return f"{label}\nerror {found['student_error']:.3g}\nteacher's own {found['teacher_error']:.3g}"

    def judge(self, found: dict[str, Any], total: int) -> None:
        """Say and log by how much the finished student beats or misses its teacher at one step a window."""
        steps, fine = len(self.flow.windows), self.recipe.validate_.teacher_steps
        said = verdict.sentence(self.flow.index + 1, steps, fine, found)
        self.log.write("verdict", total, {"stage": self.flow.index, "steps": steps, "teacher_steps": fine, "teacher_guidance": self.guidances[0],
                                          "student_guidance": self.guidances[1], **found, "said": said})
        tqdm.write(said)  # on a line of its own, beside the bar


def counted(steps: int) -> str:
    return f"{steps} step{'s' if steps > 1 else ''}"
