"""What `reflow evaluate` does for pipelines and for runs of any family: arguments to a comparison, and its table."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflow.commands.compared import Named, chosen_devices
from reflow.errors import UserError
from reflow.outputs import check_output

if TYPE_CHECKING:
    from reflow.evaluation.comparison.protocol import Protocol
    from reflow.evaluation.comparison.result import Comparison
    from reflow.evaluation.contenders.pipelines import PipelineSpec
    from reflow.evaluation.runs import Run

Settings = tuple[tuple[int, float], ...]  # (steps, guidance) of one model
STEPS = (1, 2, 4, 8)  # of a model that nothing says the steps of
ELSEWHERE = ("data", "features", "limit", "per_prompt", "teacher_guidance", "size", "dtype", "devices", "keep_samples", "steps", "anyway")


def refuse_for_digits(args: argparse.Namespace) -> None:
    """Raises UserError for options that the digits suite does not read."""
    given = next((name for name in ELSEWHERE if getattr(args, name, None)), None)
    if given is not None:
        raise UserError(
            f"--{given.replace('_', '-')} is not read by the digits' own report; leave it out, or add --protocol paired to measure this run as "
            "those of other families."
        )


def protocol_of(args: argparse.Namespace, default: str) -> Protocol:
    from reflow.evaluation.comparison import protocol

    return protocol.load(args.protocol or default).changed(limit=args.limit, per_prompt=args.per_prompt)


def of_run(args: argparse.Namespace, run: Run) -> int:
    """A run of any family: its teacher and every finished stage's student, at their steps, unguided or at several scales."""
    from reflow.evaluation.comparison import asked
    from reflow.evaluation.comparison.result import Comparison
    from reflow.evaluation.contenders.runs import RunSpec
    from reflow.evaluation.methods import student_steps

    protocol = protocol_of(args, "paired")
    own = tuple(run.recipe.validate_.prompts) if args.data is None else ()
    found = asked.read(protocol, Path(args.data) if args.data else None, own)
    teacher = RunSpec(Path(args.run_dir), None, args.size)
    specs = [RunSpec(Path(args.run_dir), student.stage + 1, args.size) for student in run.students]
    learnt = {spec.label: run.recipe.guidance_of(student.stage) for spec, student in zip(specs, run.students, strict=True)}
    steps: dict[str, list[int]] = {spec.label: [] for spec in specs}
    for position, count in student_steps(run.students):
        steps[specs[position].label].append(count)
    notes = []
    if args.steps:
        for spec, student in zip(specs, run.students, strict=True):
            few = [count for count in args.steps if count < len(student.windows)]
            steps[spec.label] = [count for count in args.steps if count >= len(student.windows)]
            if few:
                notes.append(f"The {spec.label} is not at {' and '.join(map(str, few))} steps: each of its windows needs one.")
    scales = tuple(args.guidance or ())
    models: list[tuple[Any, Settings]] = []
    for spec in specs:
        guided = scales or ((1.0,) if learnt[spec.label] != 1 else (run.recipe.validate_.guidance_scale,))
        models.append((spec, tuple((count, float(w)) for count in steps[spec.label] for w in guided)))
    taught = {args.teacher_guidance} if args.teacher_guidance is not None else set(learnt.values()) - {1.0}
    if len(taught) > 1:
        raise UserError(
            f"The stages of {args.run_dir} have learnt different guidances ({', '.join(f'{w:g}' for w in sorted(taught))}); write "
            "--teacher-guidance SCALE, the one that they are compared with."
        )
    reference = next(iter(taught)) if taught else None
    counts = sorted({count for _, settings in models for count, _ in settings})
    scale_of_teacher = [reference] if reference is not None else sorted({w for _, settings in models for _, w in settings})
    models.append((teacher, tuple((count, float(w)) for count in counts for w in scale_of_teacher if count != args.teacher_steps)))
    comparison = Comparison(
        protocol, found, tuple(model for model in models if model[1]), teacher, args.teacher_steps, reference, dtype_of(args), args.batch_size,
        args.bootstrap, tuple(args.features), straight=reference or scale_of_teacher[0], notes=tuple(notes),
    )  # fmt: skip
    return finish(comparison, args, Path(args.out) if args.out else run.folder / "report")


def of_pipelines(args: argparse.Namespace, named: Sequence[Named]) -> int:
    """Models of any make, each at its steps and guidance."""
    from reflow.evaluation.comparison import asked
    from reflow.evaluation.comparison.result import Comparison

    refuse_digits_options(args)
    teachers = [model for model in named if model.teacher]
    protocol = protocol_of(args, "paired" if teachers else "prompts")
    if protocol.teacher and not teachers:
        raise UserError(f"The protocol {protocol.name} compares with a teacher; name it with --teacher PATH, or take another protocol.")
    found = asked.read(protocol, Path(args.data) if args.data else None)
    specs = distinct([(model, spec_of(model, args)) for model in named])
    models: list[tuple[Any, Settings]] = []
    for model, spec in specs:
        if model.teacher:
            continue
        settings = settings_of(model, spec)
        for steps, guidance in settings:
            spec.check(steps, guidance)
        models.append((spec, settings))
    teacher = next((spec for model, spec in specs if model.teacher), None)
    shared = teachers[0].shared if teachers else {}
    steps = shared.get("steps", [args.teacher_steps])
    scales = shared.get("guidance", [args.teacher_guidance])
    if len(steps) > 1 or len(scales) > 1:
        raise UserError("The teacher is the reference at one number of steps and one guidance; write one behind --teacher, the rest as --pipeline.")
    comparison = Comparison(
        protocol, found, tuple(models), teacher, steps[0], scales[0], dtype_of(args), args.batch_size, args.bootstrap, tuple(args.features)
    )  # fmt: skip
    return finish(comparison, args, Path(args.out or "evaluation"))


def refuse_digits_options(args: argparse.Namespace) -> None:
    if args.samples != 1797 or args.seeds != 3 or args.unequal_sets or args.beside or args.device:
        raise UserError(
            "--samples, --seeds, --unequal-sets, --beside and --device belong to the digits' own report; for pipelines write --limit, "
            "--per-prompt and --devices."
        )


def spec_of(model: Named, args: argparse.Namespace) -> PipelineSpec:
    from reflow.evaluation.contenders.pipelines import PipelineSpec

    return PipelineSpec(path=model.path, height=args.size, width=args.size, anyway=args.anyway, **model.own)


def distinct(specs: Sequence[tuple[Named, PipelineSpec]]) -> list[tuple[Named, PipelineSpec]]:
    """The specs with a name of its own each. Raises UserError for a --name that is given twice."""
    import dataclasses

    taken: set[str] = set()
    found = []
    for model, spec in specs:
        label, number = spec.label, 1
        if label in taken and spec.name:
            raise UserError(f"--name {spec.name} is given to two models; write another for one of them.")
        while label in taken:
            number += 1
            label = f"{spec.label} ({number})"
        taken.add(label)
        found.append((model, dataclasses.replace(spec, name=label)))
    return found


def settings_of(model: Named, spec: PipelineSpec) -> Settings:
    """Its steps and guidance: as written, else as the known model or the student is made for."""
    steps, guidance = spec.made_for()
    steps = model.shared.get("steps") or steps or STEPS
    guidance = model.shared.get("guidance") or guidance or (1.0,)
    return tuple((count, float(w)) for count in dict.fromkeys(steps) for w in dict.fromkeys(guidance))


def dtype_of(args: argparse.Namespace) -> str:
    return args.dtype or ("fp16" if chosen_devices(args.devices)[0].startswith("cuda") else "fp32")


def finish(comparison: Comparison, args: argparse.Namespace, out: Path) -> int:
    """Make the comparison, or find it, and print its table."""
    from reflow.evaluation.comparison import result, text

    check_output(out, "--out" if args.out else "the report's folder (--out names another)")
    found = None if args.again else result.existing(out, comparison)
    if found is None:
        command = shlex.join(["reflow", *sys.argv[1:]])
        found = result.make(comparison, out, chosen_devices(args.devices), command=command, keep=args.keep_samples)
    else:
        print(f"{out / result.NAME} is of these models and settings already; --again measures anew.")
    print("\n" + text.described(found))
    print(f"\nReport: {out / 'index.html'}")
    return 0
