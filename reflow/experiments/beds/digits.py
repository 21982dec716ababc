"""The digits bed: the same students as runs of the product's own trainer on the miniature SDXL that ships with the project.

A stage of `students.Stage` is a stage of a recipe, an optimizer step 128 samples. Learning rate 1e-3: 2e-3, the exact bed's, is worse here. The
teacher is a trained network, so it has errors of its own, and what a student is asked for is the teacher's flow (100 steps of Heun), not the
data: paired error decides, since the Fréchet distance to 1,797 scans is saturated. Time runs from t=1 (noise) to t=0 (data).
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from reflow.data import digits
from reflow.errors import UserError
from reflow.evaluation import classifier
from reflow.evaluation.measures.frechet import frechet_distance
from reflow.evaluation.methods import noises
from reflow.evaluation.metrics import paired_error
from reflow.evaluation.runs import open_run
from reflow.experiments.beds import SHORT
from reflow.experiments.beds.measure import NOISE_SEED
from reflow.experiments.beds.students import BASE, Student, solver_steps, version
from reflow.experiments.store import Store
from reflow.models import family
from reflow.models.family import Base
from reflow.recipes import reading
from reflow.recipes.sections import Objective
from reflow.recipes.settings import Recipe, Stage
from reflow.sampling import sample, sample_teacher
from reflow.training import run
from reflow.weights.lora import student_state

SAMPLES = 600
FINE_STEPS = 100
# Of a student's training and measuring, besides the exact bed's.
SOURCES = ("training", "models", "data", "recipes", "experiments/beds/digits.py")


def recipe_of(spec: Student) -> Recipe:
    """The recipe of a student. Raises UserError for what the trainer's recipes do not have."""
    if spec.zero_snr or any(stage.rest or stage.active for stage in spec.stages):
        raise UserError("The digits bed has no students at zero terminal SNR and none that are trained in some of their windows alone.")
    plain = reading.load("digits-perflow", [f"train.seed={spec.seed}", f"train.batch_size={spec.batch}", "train.micro_batch=64", "train.warmup=2560"])
    stages = []
    for one in spec.stages:
        samples = one.steps * spec.batch
        cut = {"windows": one.windows} if isinstance(one.windows, int) else {"boundaries": one.windows}
        more = {"merges": one.merges, "self_share": one.self_share} if one.merges else {}
        pairs = min(spec.pairs, samples) // 64 * 64  # whole trajectories of up to 8 windows
        stages.append(Stage(**cut, solver_steps=solver_steps(one), samples=samples, pairs=pairs, teacher=one.teacher, **more, **dict(one.objective)))
    silent = {"every": 0}
    return plain.model_copy(update={
        "name": "bed", "objective": Objective(**BASE), "stages": stages,
        "student": plain.student.model_copy(update={"prediction_type": spec.prediction_type or "ddim_eps"}),
        "teacher": plain.teacher.model_copy(update={"guidance_scale": spec.guidance, "drops_captions": spec.guidance == 1.0}),
        "data": plain.data.model_copy(update={"caption_drop": spec.drop}),
        "validate_": plain.validate_.model_copy(update=silent), "checkpoint": plain.checkpoint.model_copy(update=silent),
        "log": plain.log.model_copy(update={"every": 64 * spec.batch})})  # fmt: skip


class DigitsBed:
    """Trains, keeps and measures. quick: few samples."""

    scans = ""

    def __init__(self, quick: bool = False) -> None:
        self.samples = SHORT["samples"] if quick else SAMPLES
        self.fine_steps = SHORT["steps"] if quick else FINE_STEPS

    @cached_property
    def base(self) -> Base:
        return family("digits").load("builtin")

    @cached_property
    def labels(self) -> Tensor:
        return torch.arange(self.samples) % 10

    @cached_property
    def noise(self) -> Tensor:
        return noises(NOISE_SEED, range(self.samples), self.base.latent_shape())

    def fine(self, store: Store, guidance: float | None = None) -> Tensor:
        """Latents [N,C,h,w] that the teacher's flow makes of the noises: kept in the store."""
        name = f"fine-digits-{self.samples}-{self.fine_steps}-{guidance}-{version(*SOURCES)}"
        make = lambda: {"fine": self.by_teacher(self.fine_steps, "heun", guidance)}  # noqa: E731
        return store.tensors(name, make, name)["fine"]

    def by_teacher(self, steps: int, method: str = "ddim", guidance: float | None = None) -> Tensor:
        return sample_teacher(self.base, self.base.unet, self._asked(), steps, range(self.samples), method=method, guidance_scale=guidance or 1.0,
                              noise=self.noise, batch_size=100, decode=False).latents  # fmt: skip

    def of_teacher(self, store: Store, steps: int, guidance: float | None = None) -> dict[str, float]:
        return self.of_samples(self.by_teacher(steps, guidance=guidance), self.fine(store, guidance))

    def of_student(self, spec: Student, store: Store, per_window: Sequence[int], *, guidance: float | None = None,
                   flow: float | None = None) -> dict[str, dict[str, float]]:  # fmt: skip
        """{steps in all: numbers}. guidance: of the student's own steps; flow: of the fine solve it is compared with."""
        unet, windows = self.base.new_network(), spec.stages[-1].edges
        unet.load_state_dict(weights(spec, store))
        found = {}
        for n in per_window:
            steps = n * len(windows)
            drawn = sample(self.base, unet.eval(), self._asked(), steps, range(self.samples), windows=windows, guidance_scale=guidance or 1.0,
                           prediction_type=spec.prediction_type or "ddim_eps", noise=self.noise, batch_size=100, decode=False).latents  # fmt: skip
            found[str(steps)] = self.of_samples(drawn, self.fine(store, flow))
        return found

    @torch.no_grad()
    def of_samples(self, latents: Tensor, fine: Tensor) -> dict[str, float]:
        """paired: mean over noises of the RMS pixel distance to the fine solve; paired_latents the same of latents. frechet: of the classifier's
        features to those of the fine solve. agreement: share of samples that the classifier reads as the digit asked for."""
        mine, true = (torch.cat([self.base.decode(part) for part in z.split(100)]) for z in (latents, fine))
        features, others = (_judge().features(pixels) for pixels in (mine, true))
        read = _judge().head(features).argmax(1)
        return {
            "paired": float(paired_error(mine, true).mean()),
            "paired_latents": float(paired_error(latents, fine).mean()),
            "frechet": frechet_distance(features, others),
            "agreement": float((read == self.labels).double().mean()),
        }

    def _asked(self) -> list[str]:
        return [digits.caption(int(label)) for label in self.labels]


@lru_cache(maxsize=1)
def _judge() -> classifier.DigitClassifier:
    return classifier.load_classifier().eval()


def weights(spec: Student, store: Store) -> dict[str, Tensor]:
    """The last stage's average, from the store or trained now; the base's own for a student of no steps. A run that was stopped goes on."""
    if not spec.stages[-1].steps:
        return family("digits").load("builtin").unet.state_dict()
    spec = replace(spec, learning_rate=1e-3)
    name = f"digits-{spec.name()}-{version(*SOURCES)}"

    def make() -> dict[str, Tensor]:
        folder = store.folder / f"run-{name}"
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = run.train(recipe_of(spec), folder)
        if code:
            raise KeyboardInterrupt
        state = student_state(family("digits").load("builtin").unet.state_dict(), open_run(folder).students[-1].path)
        shutil.rmtree(folder)
        return state

    return store.tensors(name, make, name)
