"""The experiments of the exact bed in seconds: what theory says must hold, and that the committed runs are what their rows say."""

import json
import math
import pathlib
from dataclasses import replace

import pytest
import torch

from reflow.errors import UserError
from reflow.experiments import (
    ablation,
    cells,
    comparison,
    conversions,
    direction_vs_magnitude,
    diversity,
    guidance,
    half_straightening,
    losses,
    parameterisations,
    plug_and_play,
    progressive_paths,
    steps,
    stochasticity,
    time_density,
    velocity_discrepancy,
    windows,
)
from reflow.experiments.beds import SHORT, features, measure, students
from reflow.experiments.beds.exact import ExactBed, untrained
from reflow.experiments.beds.students import Stage, Student
from reflow.experiments.store import Store
from reflow.flow import Windows

ALL = {
    "time-density": time_density,
    "ablation": ablation,
    "progressive-paths": progressive_paths,
    "velocity-discrepancy": velocity_discrepancy,
    "direction-vs-magnitude": direction_vs_magnitude,
    "guidance": guidance,
    "parameterisations": parameterisations,
    "losses": losses,
    "steps": steps,
    "windows": windows,
    "half-straightening": half_straightening,
    "stochasticity": stochasticity,
    "conversions": conversions,
    "comparison": comparison,
    "diversity": diversity,
    "plug-and-play": plug_and_play,
}
RESULTS = pathlib.Path(__file__).resolve().parents[2] / "bench" / "results" / "experiments"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One place for all, so that they share their students."""
    return tmp_path_factory.mktemp("experiments")


def made(folder, name, capsys):
    """What the quick form finds; run twice, it makes nothing the second time."""
    out = folder / name
    for _ in range(2):
        ALL[name].run(out, seeds=2, quick=True)
        said = capsys.readouterr().out
    assert "[1/" not in said and all((out / f"{name}.{kind}").stat().st_size for kind in ("json", "jsonl", "md", "png"))
    return cells.read(out / f"{name}.jsonl"), json.loads((out / f"{name}.json").read_text())["found"]


@pytest.mark.parametrize("name", ALL)
def test_another_bed_is_a_sentence(tmp_path, name):
    with pytest.raises(UserError, match=f"{name} is there for --bed exact or mnist.*, not 'cifar'"):
        ALL[name].run(tmp_path, bed="cifar")


def test_time_density(folder, capsys):
    rows, found = made(folder, "time-density", capsys)
    for row in cells.select(rows, density="start", steps=60):
        assert row["result"]["at"]["4"]["paired"] < found["teacher"]["4"]["paired"]  # what is trained where it is used beats its teacher
    # An untrained student's error at a window's start is that of the teacher's own step over the window.
    bed, windows = ExactBed(), Windows.uniform(4)
    at = measure.chords(bed, windows, per_window=20)
    step = bed.solver(windows, 1).solve(lambda z, t: bed.teacher(z, t, at.labels), at.z_start, at.window)
    for k in range(4):
        off, size = ((x[at.window == k].double() ** 2).mean() for x in (step - at.z_end, at.z_end - at.z_start))
        assert found["untrained_profile"]["4"][k][0] == pytest.approx(float((off / size).sqrt()), rel=1e-3)
    steep = found["steepness"]["4"]
    assert steep == sorted(steep) and steep[0] > 1  # the chord's velocity is the steeper in z at the end, most in the cleanest window


def test_ablation(folder, capsys, tmp_path):
    made(folder, "ablation", capsys)
    cell = {"loss": "mse", "density": "near start", "steps": 40, "weight": 1.0, "norm": "window_speed", "seed": 0}
    progressive, equal = (ablation.student_of({**cell, "arm": arm}) for arm in ("progressive", "single, equal evaluations"))
    more = replace(equal, stages=(replace(equal.stages[0], steps=equal.stages[0].steps + 1),))
    assert equal.evaluations() <= progressive.evaluations() < more.evaluations()
    # Alignment of weight 0 is the plain error: the same student.
    plain, aligned = (Student((Stage(4, 20, keys),), pairs=512) for keys in ((), (("direction_weight", 0.0), ("loss", "aligned_v"))))
    first, second = (students.weights(spec, Store(tmp_path)) for spec in (plain, aligned))
    assert plain.name() != aligned.name()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-5)


def test_progressive_paths(folder, capsys):
    rows, found = made(folder, "progressive-paths", capsys)
    assert {tuple(line["path"]) for line in found["paths"]} == {(2,), (4, 2)}
    chained = progressive_paths.student_of({"path": [8, 4, 2], "kind": "chained", "steps": 100, "seed": 1})
    assert [(s.windows, s.steps, s.teacher) for s in chained.stages] == [(8, 33, "root"), (4, 33, "previous"), (2, 34, "previous")]
    root = replace(chained, stages=tuple(replace(s, teacher="root") for s in chained.stages))
    solves = [students.solver_steps(s) for s in (*root.stages, *chained.stages)]
    assert solves == [4, 8, 16, 4, 2, 2]  # 32 steps of the whole of time, or one in each of two merged windows
    assert all(row["result"]["steps"] == 40 for row in cells.select(rows, kind="chained"))


def test_velocity_discrepancy(folder, capsys):
    _, found = made(folder, "velocity-discrepancy", capsys)
    lags = found["teacher"]["by_lag"]
    assert lags[0] == 0 and lags == sorted(lags)  # further apart, further off
    v = torch.randn((8, 5, 3), generator=torch.Generator().manual_seed(0)).repeat_interleave(4, 0)
    straight = velocity_discrepancy.of_velocities(v)  # constant in each of 8 windows
    assert straight["within"]["8"] == pytest.approx(0, abs=1e-6) and straight["within"]["2"] > 0.5
    distance = torch.tensor(straight["distance"])
    assert torch.equal(distance, distance.T) and float(distance.diagonal().max()) == 0
    states = [torch.zeros(5, 3)]
    for move in v:
        states.append(states[-1] - move / 32)
    torch.testing.assert_close(velocity_discrepancy.velocities(states, Windows.uniform(32)), v)


def test_an_untrained_students_path_is_the_teachers_at_the_starts(folder):
    """At the boundaries of its windows, where the chord is the schedule, the velocity of one step is the teacher's own step."""
    bed = ExactBed(dtype=torch.float64)
    z, labels = torch.randn((10, 64), generator=torch.Generator().manual_seed(1), dtype=torch.float64), torch.arange(10)
    mine = bed.path(untrained(bed), bed.student_solver(bed.table(Windows.uniform(8))), z, labels)
    own = bed.path(bed.teacher, bed.solver(Windows.uniform(8), 1), z, labels)
    for a, b in zip(mine, own):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_direction_vs_magnitude(folder, capsys):
    rows, found = made(folder, "direction-vs-magnitude", capsys)
    for line in found["arms"]:
        assert line["paired"]["mean"] > found["undisturbed"]["4"]["paired"] or line["angle"] < 0.5
    v, towards = (torch.randn((7, 64), generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1))
    for angle in (0.1, 0.8):
        found = direction_vs_magnitude.turned(v, towards, angle)
        torch.testing.assert_close(found.norm(dim=1), v.norm(dim=1))
        torch.testing.assert_close((found - v).norm(dim=1), 2 * math.sin(angle / 2) * v.norm(dim=1))  # as long as the magnitude's error
        torch.testing.assert_close((found * v).sum(1) / v.square().sum(1), torch.full((7,), math.cos(angle), dtype=torch.float64))
    bed = ExactBed()
    ref = measure.reference(bed, Store(folder / "students"), **SHORT)
    still = direction_vs_magnitude.disturbed(bed, ref, "random direction", 0.0, 4, False, 0)
    torch.testing.assert_close(still, bed.sample(bed.teacher, bed.solver(Windows.uniform(4), 1), ref.noise, ref.labels), rtol=1e-4, atol=1e-4)


def test_guidance(folder, capsys):
    rows, found = made(folder, "guidance", capsys)
    assert {(line["mode"], line["starts"]) for line in found["students"]} == {("sync", "data"), ("fixed", "data"), ("fixed", "noise")}
    sync, fixed = (guidance.student_of({"model": "II", "mode": mode, "starts": "data", "scale": 5, "steps": 9, "seed": 0}) for mode in ("sync", "fixed"))
    assert (sync.guidance, sync.drop, fixed.guidance, fixed.drop) == (1.0, 0.1, 5.0, 0.0) and [s.windows for s in sync.stages] == [8, 4, 2]
    # A scale of 1 with both halves is no guidance.
    bed = ExactBed(dtype=torch.float64)
    z, labels = torch.randn((10, 64), generator=torch.Generator().manual_seed(2), dtype=torch.float64), torch.arange(10)
    plain, one = (bed.sample(bed.teacher, bed.solver(Windows.uniform(2), 2, guidance=w), z, labels) for w in (None, 1.0))
    torch.testing.assert_close(one, plain, rtol=0, atol=1e-11)


def test_parameterisations(folder, capsys):
    _, found = made(folder, "parameterisations", capsys)
    begins = {line["kind"]: line["paired"]["mean"] for line in found["kinds"] if line["steps"] == 0}
    assert begins["ddim_eps"] == pytest.approx(found["teacher_4"]["paired"], rel=1e-4)  # before the first step it is the teacher
    assert min(begins["diff_eps"], begins["velocity"]) > 1.5 * begins["ddim_eps"]


def test_losses(folder, capsys):
    _, found = made(folder, "losses", capsys)
    assert {line["windows"] for line in found["arms"]} == {1, 4}
    x = torch.randn((6, 64), generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    seen = features.look(x)
    assert [tuple(layer.shape[1:]) for layer in seen] == [(16, 16, 16), (32, 8, 8), (64, 4, 4), (64,)]
    assert max(float(layer.norm(dim=1).max()) for layer in seen) < 1 + 1e-5
    assert float(features.distance(x, x.clone()).max()) == 0 and float(features.distance(x, x.flip(1)).min()) > 0.1


def test_steps(folder, capsys):
    _, found = made(folder, "steps", capsys)
    untouched = {line["steps"]: line["paired"]["mean"] for line in found["arms"] if line["arm"] == "untrained"}
    assert untouched[4] == pytest.approx(found["teacher"]["4"]["paired"], rel=1e-4) and untouched[4] > untouched[5] > untouched[8]
    assert steps.split(8) == [2, 2, 2, 2] and sorted(steps.split(5)) == [1, 1, 1, 2]
    bed, z, labels = ExactBed(dtype=torch.float64), torch.randn((10, 64), generator=torch.Generator().manual_seed(1), dtype=torch.float64), torch.arange(10)
    table = bed.table(Windows.uniform(4))
    ours = steps.sampled(bed, untrained(bed), table, [3, 3, 3, 3], z, labels)
    torch.testing.assert_close(ours, bed.sample(untrained(bed), bed.student_solver(table, 3), z, labels), rtol=0, atol=1e-12)


def test_windows(folder, capsys):
    _, found = made(folder, "windows", capsys)
    assert found["cuts"][0]["edges"] == [1.0, 0.5, 0.0]
    bed, ref = ExactBed(), measure.reference(ExactBed(), Store(folder / "students"), **SHORT)
    for cut in windows.CUTS:
        density = windows.density(bed, cut, ref)
        for count in (2, 4):
            edges = windows.edges_of(density, count)
            whole = torch.cat([torch.zeros(1, dtype=torch.float64), density.cumsum(0)])
            at = [float(torch.tensor(list(whole))[round((1 - edge) * windows.GRID)]) for edge in edges]
            assert [b - a for a, b in zip(at, at[1:])] == pytest.approx([1 / count] * count, abs=2.5 * float(density.max()))
    alpha, sigma = bed.schedule.alpha_sigma(torch.tensor([1.0, windows.edges_of(windows.density(bed, "equal log-SNR", ref), 2)[1], 0.0], dtype=torch.float64))
    ratio = (sigma / alpha).log()
    assert float(ratio[1]) == pytest.approx(float(ratio[0] + ratio[2]) / 2, abs=0.02)
    for first in (0, -1):  # all of it at one end of time: windows still hold the teacher's steps
        crowded = torch.zeros(windows.GRID, dtype=torch.float64)
        crowded[first] = 1.0
        edges = windows.edges_of(crowded, 8)
        bed.solver(Windows(edges), 4)


def test_half_straightening(folder, capsys):
    rows, found = made(folder, "half-straightening", capsys)
    path = {name: cells.select(rows, training=name, seed=0)[0]["result"]["pixels"] for name in half_straightening.TRAININGS}
    for pixel in range(3):  # until the split nobody knows which half's student comes next
        assert path["clean, teacher elsewhere"][pixel][:10] == found["none"]["t = .5"]["pixels"][pixel][:10]
        assert path["noisy"][pixel][:10] == path["noisy, teacher elsewhere"][pixel][:10] == path["a student each"][pixel][:10]
        assert path["clean"][pixel][:10] != path["clean, teacher elsewhere"][pixel][:10]
    assert found["none"]["t = .5"]["9,9"]["paired"] < found["none"]["t = .5"]["1,1"]["paired"]
    assert {line["training"] for line in found["trainings"]} == set(half_straightening.TRAININGS)


def test_stochasticity(folder, capsys):
    _, found = made(folder, "stochasticity", capsys)
    at = {(x["sampler"], x["score"], x["evaluations"]): x["frechet"]["mean"] for x in found["samplers"]}
    for name in ("ancestral", "VP SDE", "VE SDE", "sub-VP SDE", "Heun"):
        assert at[name, "exact", 20] < at[name, "exact", 5]
    assert at["VP SDE", "exact", 5] > 2 * at["VP flow, Euler", "exact", 5]  # noise that few steps cannot use
    assert at["Heun, Karras's levels", "15 % wrong", 20] > at["Heun, Karras's levels", "exact", 20]


def test_conversions(folder, capsys):
    _, found = made(folder, "conversions", capsys)
    for line in found["readings"]:
        for n in (key for key in line if key != "family"):
            assert max(line[n][key] for key in ("euler", "product", "others")) < 1e-10, line
            assert line[n]["single"] < 1e-2 and (line["family"] == "flow matching") == (line[n]["not rescaled"] < 1e-10), line
    assert max(found["trained"]["euler"] + found["trained"]["edm"]) < 1e-10 < 1e-3 < min(found["trained"]["from_exact"])
    width = {line["factor"]: line for line in found["width"] if line["data"] == "digits"}
    unit = next(line for line in found["width"] if (line["data"], line["factor"]) == ("one Gaussian", 1.0))
    assert unit["VP"]["deviation"]["mean"] == 0 and unit["VP"]["errors"]["1"]["mean"] < 1e-12 < unit["flow"]["deviation"]["mean"]
    assert width[0.1]["flow"]["deviation"]["mean"] < width[1.0]["flow"]["deviation"]["mean"]  # narrow data are nearly a point
    assert width[0.1]["VP_less_flow_deviation"]["mean"] > 0 and all(line["fine"] < 0.1 for line in width.values())


@pytest.mark.parametrize("run", [*ALL, "ablation-digits"])
def test_the_committed_run_is_what_its_rows_say(run):
    name, path = run.removesuffix("-digits"), RESULTS / f"{run}.json"
    if not path.exists():
        pytest.skip(f"no full run of {run} is committed")
    summary, rows = json.loads(path.read_text()), cells.read(RESULTS / f"{run}.jsonl")
    assert len(summary["seeds"]) >= (5 if run == "ablation" else 3) and summary["revision"] and "processor" in summary["machine"]
    assert {row["version"] for row in rows} == {summary["version"]} and (RESULTS / f"{run}.png").stat().st_size < 300_000
    again = {
        "time-density": lambda: {"rows": time_density.gathered(rows, {int(k): v for k, v in summary["found"]["teacher"].items()})},
        "ablation": lambda: {"differences": ablation.differences(rows), "weights": ablation.by_weight(rows)},
        "progressive-paths": lambda: {"paths": progressive_paths.gathered(rows)},
        "velocity-discrepancy": lambda: {"stages": velocity_discrepancy.gathered(rows, summary["found"]["teacher"])},
        "direction-vs-magnitude": lambda: {"arms": direction_vs_magnitude.gathered(rows)},
        "guidance": lambda: {"students": guidance.gathered(rows, summary["found"]["teacher"])},
        "parameterisations": lambda: {"kinds": parameterisations.gathered(rows)},
        "losses": lambda: {"arms": losses.gathered(rows)},
        "steps": lambda: {"arms": steps.gathered(rows)},
        "windows": lambda: {"cuts": windows.gathered(rows)},
        "half-straightening": lambda: {
            "trainings": half_straightening.gathered(rows, summary["found"]["none"]),
            "halves": half_straightening.compared(rows),
        },
        "conversions": lambda: {key: value for key, value in conversions.gathered(rows).items() if key != "trained"},
        "stochasticity": lambda: {"samplers": stochasticity.gathered(rows), "pairs": stochasticity.compared(rows)},
        "comparison": lambda: comparison.gathered(rows),
        "diversity": lambda: diversity.gathered(rows),
        "plug-and-play": lambda: {"rows": plug_and_play.gathered(rows)},
    }[name]()
    for key, value in again.items():
        mine, told = (sorted(json.dumps(line, sort_keys=True) for line in lines) for lines in (value, summary["found"][key]))
        assert mine == told, key  # in any order: rows stand as they were made
