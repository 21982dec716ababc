"""The loop: solve a window, place points on its chord, teach the student the chord's velocity, and go on to the next stage."""

from __future__ import annotations

import math
import pathlib
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from reflow.data import sampler
from reflow.data.latents import LatentDataset
from reflow.errors import UserError
from reflow.flow import network_time
from reflow.models.conditioning import denoise
from reflow.models.family import Base
from reflow.ranks import barrier
from reflow.recipes.settings import Recipe
from reflow.training import networks, optimizers, stages, targets
from reflow.training.checkpoint import Checkpoints, save_weights, together
from reflow.training.ema import Ema, decay
from reflow.training.engine import Engine
from reflow.training.merged import Merged
from reflow.training.pairs import PairStore, reuse
from reflow.training.progress import Progress, Rate, say
from reflow.training.signals import LEFT_EARLY, Signals
from reflow.training.solves import Solved, Solver, kept, known_good, usable
from reflow.training.telemetry import Clock, Log, Meter, peak_memory
from reflow.training.validation import Validation
from reflow.weights.delta import student_metadata
from reflow.weights.runs import checkpoint_place, stage_folder


class Leave(Exception):
    """A signal asked the run to write a checkpoint and leave."""


class Loop:
    """One run of a recipe on this rank. `run` goes through all stages and returns an exit code."""

    def __init__(self, recipe: Recipe, run_dir: pathlib.Path, base: Base, data: LatentDataset, device: torch.device,
                 make_unet: Callable[[], torch.nn.Module], signals: Signals) -> None:
        self.recipe, self.run_dir, self.base, self.data, self.device = recipe, run_dir, base, data, device
        train, world = recipe.train, dist.get_world_size()
        self.rank, self.world = dist.get_rank(), world
        self.schedule = base.schedule()
        self.micro = min(train.micro_batch, train.batch_size // world)
        if not self.micro or train.batch_size % (self.micro * world):
            raise UserError(f"train.batch_size = {train.batch_size} cannot be shared by {world} ranks in micro-batches of {train.micro_batch}; "
                            f"make it a multiple of {train.micro_batch * world}.")
        chords = next((s.chords_per_solve for s in recipe.stages if self.micro % s.chords_per_solve), None)
        if chords:
            raise UserError(f"Each of {world} ranks takes micro-batches of {self.micro}, which chords_per_solve = {chords} does not divide; "
                            f"use fewer ranks, or a train.batch_size of at least {chords * world}.")
        self.accumulation = train.batch_size // (self.micro * world)
        self.dtype = networks.trained_dtype(recipe)
        self.networks = networks.build(recipe, run_dir, base, device, make_unet)
        self.checkpoints = Checkpoints(run_dir, recipe.checkpoint.keep)
        self.signals = signals

    def run(self) -> int:
        latest = self.checkpoints.latest()
        first = next((i for i in range(len(self.recipe.stages)) if not self.networks.weights_of(i).exists()), len(self.recipe.stages))
        if latest is not None and checkpoint_place(latest)[0] != first:
            latest = None
        before = sum(self.steps_of(i) * self.recipe.train.batch_size for i in range(first))
        done = checkpoint_place(latest)[1] if latest is not None else 0
        self.log = Log(self.run_dir, before + done, wandb=self.recipe.log.wandb, name=self.recipe.name,
                       restarted=first if latest is None else None)
        try:
            for i in range(first, len(self.recipe.stages)):
                self.run_stage(i, before, latest)
                before, latest = before + self.steps_of(i) * self.recipe.train.batch_size, None
        except Leave as leaving:
            if self.rank == 0:
                print(f"Asked to leave: {leaving} The same command goes on from there.", flush=True)
            return LEFT_EARLY
        finally:
            self.log.close()
        return 0

    def steps_of(self, stage: int) -> int:
        return math.ceil(self.recipe.stages[stage].samples / self.recipe.train.batch_size)

    def run_stage(self, index: int, before: int, resume: pathlib.Path | None) -> None:
        recipe = self.recipe.of_stage(index)
        train, stage = recipe.train, recipe.stages[index]
        say(f"stage {index + 1}: making teacher and student")
        flow = stages.build(recipe, index, self.schedule, self.base.prediction_type, self.device)
        solver = Solver(recipe, flow, self.data, self.networks.teacher(index), self.device)
        if solver.rounding and resume is None:
            self.log.write("teacher", before, {"stage": index, **solver.rounding})
        student = self.networks.student(index)
        validation = Validation(recipe, flow, self.base, self.networks.root, solver, self.run_dir, self.log)
        if resume is None:
            validation.check_start(student.eval(), before)
        source = self.stored_pairs(flow, solver) if stage.stored else solver
        validation.prepare(student if resume is None else None, before)
        total, steps = self.steps_of(index) * train.batch_size, self.steps_of(index)
        engine = Engine(student.train(), train, self.accumulation)
        merged = Merged(flow, source, self.networks) if flow.merger else None
        ema, meter, clock = Ema(engine.masters, engine.tail), Meter(len(flow.parts), self.device), Clock(self.device)
        step, pace = 0, Rate()
        if resume is not None:
            say(f"stage {index + 1}: reading the checkpoint {resume}")
            state, saved = self.checkpoints.load(resume, engine, ema, meter.state_dict())
            meter.load_state_dict(saved)
            step = state["step"]
            if state["how"] != "same layout":
                self.log.write("resume", before + state["samples"], {"stage": index, "how": state["how"], "ranks": [state["ranks"], self.world],
                                                                     "zero_stage": [state["zero_stage"], engine.stage]})
        say(f"stage {index + 1}: {'reading' if stage.stored else 'solving'} the first batch and taking the first step"
            f"{' (model.compile: blocks that are not compiled yet are compiled now)' if recipe.model.compile else ''}")
        bar = Progress(f"stage {index + 1}/{len(recipe.stages)}, {len(flow.active)} windows", total, step * train.batch_size, self.rank == 0)
        since, excluded, skipped, counted, fresh = time.monotonic(), 0, [], 0, step == 0
        while step < steps:
            done = step * train.batch_size
            rows = sampler.rows_of_step(step, train.batch_size, self.micro, self.rank, self.world, self.accumulation)
            rate = optimizers.learning_rate(train.learning_rate, train.schedule, train.warmup, total, done, train.batch_size)
            keep = decay(train.ema_half_life, train.ema_warmup, done, train.batch_size)
            if merged:
                merged.follow(engine, ema)
            ema.ride(keep)
            for samples in rows:
                with clock.part("data" if stage.stored and not merged else "teacher"):
                    solved = (merged or source)(list(dict.fromkeys(s // stage.chords_per_solve for s in samples)))
                if not self.micro_step(engine, flow, solved, samples, rate, meter, clock, step):
                    skipped.append(step)
            ema.update(keep)
            step, done = step + 1, done + train.batch_size
            bar.advance(train.batch_size)
            pace.add(train.batch_size)
            last = step == steps
            if crossed(done, recipe.log.every, train.batch_size) or last:
                record, seconds = meter.read(), time.monotonic() - since
                excluded += record["excluded"]
                record["skipped_steps"] = len(skipped) - counted
                if solver.captured is not None:
                    record["solves"] = dict(solver.captured.counts)
                counted = len(skipped)
                self.log.write("train", before + done, {
                    "stage": index, "samples": done, "learning_rate": rate, **record, "grad_norm": engine.gradient_norm(), "seconds": clock.read(),
                    "samples_per_second": pace.read(), "peak_memory": peak_memory(self.device), "elapsed": seconds})
                bar.show(loss=record["loss"], **validation.shown)
                self.stop_if_not_finite(record, excluded, index)
            self.stop_if_skipped(skipped, excluded, index, steps if fresh and last else None)
            if crossed(done, recipe.validate_.every, train.batch_size) or (last and recipe.validate_.every):
                with pace.pause():
                    validation.run(engine.state(ema.average), before, done, self.networks.averaged, last)
            planned = crossed(done, recipe.checkpoint.every, train.batch_size)
            leave, due = self.signals.after_step(last or planned)
            if not last and (leave or due or planned):
                self.refuse_damaged(engine, ema, index, step)
                with pace.pause():
                    path = self.checkpoints.save(engine, ema, meter.state_dict(), index, step, done)
                self.signals.saved_at = time.monotonic()
                if leave:
                    bar.close()
                    raise Leave(f"stage {index + 1} stands at {done} of {total} samples in {path}.")
        bar.close()
        self.refuse_damaged(engine, ema, index, step)
        averages = engine.state(ema.average)
        target = self.networks.weights_of(index)
        together(f"The weights of stage {index + 1}", f"Make room for {target} and run the same command: it goes on from the last checkpoint.",
                 lambda: save_weights(self.networks.to_save(averages), target, metadata(recipe, index)) if self.rank == 0 else None)
        engine.destroy()
        if leave and index + 1 < len(recipe.stages):
            raise Leave(f"stage {index + 1} is finished.")

    def stored_pairs(self, flow: stages.StageFlow, solver: Solver) -> PairStore:
        """The stage's pair store, filled by all ranks and read by each, or the one that the recipe names."""
        count = flow.stage.pairs
        if flow.stage.pairs_from:
            return reuse(pathlib.Path(flow.stage.pairs_from), solver, count)
        store = PairStore(stage_folder(self.run_dir, flow.index) / "pairs", solver, count)
        bar = Progress(f"stage {flow.index + 1}, solving pairs", count, 0, self.rank == 0)
        finished = store.fill(lambda n: bar.advance(n * self.world), lambda: self.signals.asked)
        bar.close()
        if self.signals.agree()[0] or not finished:
            raise Leave(f"stage {flow.index + 1} has solved a part of its pairs.")
        barrier()
        return store.load()

    def micro_step(self, engine: Engine, flow: stages.StageFlow, solved: Solved, samples: list[int], rate: float, meter: Meter,
                   clock: Clock, step: int) -> bool:
        """One forward and backward over `samples`; the last of an accumulation steps the optimizer, or returns False where it could not."""
        recipe, table, chords = flow.recipe, flow.table, flow.stage.chords_per_solve
        with clock.part("data"):
            draws = sampler.chord_draws(recipe.train.seed, flow.index, samples).to(self.device)
        with clock.part("student"):
            # A sample that is not finite is taken out of the batch, not left to poison the weights.
            good, solved = solved.finite()
            z_start, z_end = solved.z_start, solved.z_end
            points = targets.points(z_start, z_end, solved.window, draws.view(-1, chords, 2), table, recipe.objective, input_dtype=self.dtype)
            conditioning = solved.conditioning
            if chords > 1:
                copies = torch.arange(len(good), device=self.device).repeat(chords)
                good, conditioning = good[copies], conditioning.select(copies)
            conditioning = conditioning.to(self.device, self.dtype)
            output = denoise(engine, points.model_input, network_time(points.t, recipe.student.network_time), conditioning)
            good = good & usable(output.detach())
            weight = None if flow.merger is None else flow.merger.weight[points.window]
            if not known_good(good):
                output = kept(output, good)
                weight = good.float() if weight is None else good * weight
            result = targets.loss(output, points, table, recipe.objective, weight=weight)
            meter.add(points.window, result.loss, result.mse, result.magnitude, result.cosine, good, step)
            engine.backward(result.loss)
        with clock.part("optimizer"):
            return engine.step(rate)

    def stop_if_not_finite(self, record: dict, excluded: int, stage: int) -> None:
        """Leave with the batch's name when more samples were not finite than the recipe allows. Every rank decides the same."""
        limit = self.recipe.train.max_nonfinite
        if excluded <= limit and math.isfinite(record["loss"]):
            return
        first = record["bad_step"] * self.recipe.train.batch_size
        raise UserError(f"The loss is not finite in stage {stage + 1}, step {record['bad_step']} (samples {first} to "
                        f"{first + self.recipe.train.batch_size - 1}): {excluded} samples so far, train.max_nonfinite allows {limit}. "
                        f"The last good checkpoint is {self.checkpoints.last_good()}; lower "
                        f"train.learning_rate or look at those samples.")

    def stop_if_skipped(self, skipped: list[int], excluded: int, stage: int, steps: int | None) -> None:
        """Leave where steps without a finite gradient lose more samples than the recipe allows, or, of a whole stage of `steps`, all."""
        batch, limit = self.recipe.train.batch_size, self.recipe.train.max_nonfinite
        if skipped and (excluded + len(skipped) * batch > limit or len(skipped) == steps):
            raise UserError(f"The gradient is not finite in {len(skipped)} steps of stage {stage + 1}, the first is step {skipped[0]} (samples "
                            f"{skipped[0] * batch} to {skipped[0] * batch + batch - 1}); they were not taken, and train.max_nonfinite allows {limit} "
                            f"samples. The last good checkpoint is {self.checkpoints.last_good()}; lower train.learning_rate or "
                            f"train.clip, or look at those samples.")

    def refuse_damaged(self, engine: Engine, ema: Ema, stage: int, step: int) -> None:
        """Weights, averages and moments that are not finite never reach a file, so what stands on disk stays good."""
        held = [*engine.masters, *ema.average, *engine.moments()]
        damaged = torch.stack([(~torch.isfinite(t)).any().to(self.device) for t in held]).any().int()
        dist.all_reduce(damaged, op=dist.ReduceOp.MAX)
        if damaged:
            raise UserError(f"The student's weights, their average or the optimizer's moments are not finite after step {step} of stage {stage + 1} "
                            f"and were not saved; the last good checkpoint is {self.checkpoints.last_good()}. Lower train.learning_rate or train.clip.")


def crossed(done: int, every: int, batch: int) -> bool:
    """Whether the last batch reached or passed a multiple of `every` samples; never for 0."""
    return bool(every) and done // every > (done - batch) // every


def metadata(recipe: Recipe, stage: int) -> dict[str, str]:
    """What a weights file says of itself; export and sampling read it."""
    return student_metadata(stages.windows_of(recipe.stages[stage]), recipe.student.prediction_type, recipe.student.network_time,
                            recipe=recipe.name, stage=stage + 1, family=recipe.model.family, base=recipe.model.base)
