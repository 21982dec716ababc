"""Where the exact bed computes: on a GPU every tensor is made there, the numbers are the CPU's, and neither takes what the other has stored."""

import contextlib
import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from reflow.commands import experiment
from reflow.errors import UserError
from reflow.evaluation import machine
from reflow.experiments import cells, conversions, stochasticity
from reflow.experiments.beds import custom, features, measure, methods, stock, students
from reflow.experiments.beds.consistency import Consistency
from reflow.experiments.beds.custom import Custom
from reflow.experiments.beds.exact import Correction, ExactBed
from reflow.experiments.beds.mixture import LowRankMixture
from reflow.experiments.beds.students import Stage, Student
from reflow.experiments.opened import opened
from reflow.experiments.store import Store, described
from reflow.flow import Windows
from tests.experiments.test_exact_experiments import ALL
from tests.experiments.test_experiment_command import arguments

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))
from pretend_gpu import pretended

OF_THREE_KINDS = (("forward_share", 0.5), ("starts", "noise"), ("starts_share", 0.5))
# Every way to a pair, a loss and a target that a student of the bed has.
STUDENTS = (
    Student((Stage(2, 2, OF_THREE_KINDS),), guidance=3.0),
    Student((Stage(4, 2, (("space", "eps"),)), Stage(2, 2, (("loss", "aligned_v"),), teacher="previous")), drop=0.3),
    Student((Stage(2, 2, (("loss", "pseudo_huber"), ("time_density", "u_shaped")), merges=1),), sees_output=False),
    Student((Stage(2, 2, (("normalize", "loss"),), active=(1,), rest="teacher"),)),
    Student((Stage((1.0, 0.3, 0.0), 2, (("points", "schedule"), ("window_weight", "speed"))),)),
    Student((Stage(2, 2),), prediction_type="diff_eps"),
    Student((Stage(2, 2, (("time_density", "exponential"),)),), zero_snr=True, prediction_type="velocity"),
)


@pytest.fixture
def gpu(device, monkeypatch):
    """A context in which "cuda" is there: the real one where tests run on it, else a pretended one. Networks must be asked there alone."""

    @contextlib.contextmanager
    def entered():
        with monkeypatch.context() as patch, contextlib.nullcontext() if device.type == "cuda" else pretended(patch):
            for owner, name in ((LowRankMixture, "x0_eps"), (Correction, "forward")):
                patch.setattr(owner, name, there(getattr(owner, name)))
            yield

    def there(call):
        def asked(self, z, *more):
            assert z.device.type == "cuda", f"a network was asked on {z.device}"
            return call(self, z, *more)

        return asked

    return entered


@pytest.fixture
def close(device):
    """Rounding: of the same kernels on the pretended GPU, of others on a real one."""
    return {"rel": 1e-6, "abs": 1e-9} if device.type == "cpu" else {"rel": 1e-2, "abs": 1e-3}


def test_what_a_gpu_refuses_the_pretended_one_refuses(monkeypatch):
    with pretended(monkeypatch):
        here, at = torch.arange(6.0).view(2, 3), torch.tensor([1, 0])
        there = here.to("cuda")
        for mixed in (
            lambda: there + here, lambda: torch.cat([there, here]), lambda: here[at.to("cuda")], lambda: here @ there.T, lambda: there.mul_(here),
            lambda: torch.stack([there[0, 0], here[0, 0]]), lambda: there.index_put_((at,), here), lambda: torch._foreach_mul([there], [here]),
            lambda: torch.where(here > 0, there, 0.0), lambda: there.sum() + here, lambda: torch.zeros(2, 3, device=there.device).copy_(there) + here,
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        for drawn in (lambda g: torch.randn(3, generator=g, device="cuda"), lambda g: there.normal_(generator=g)):
            with pytest.raises(RuntimeError, match="'cuda' device type for generator"):
                drawn(torch.Generator())
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        # And takes what a GPU takes.
        found = (there * here[0, 1] + there.new_ones(3))[at]
        assert found.device == torch.device("cuda", 0) and found.tolist() == (here + 1)[at].tolist()
        there[at] = torch.zeros_like(there)
        assert not there.any() and here.any() and there.cpu().device.type == "cpu"
        layer = torch.nn.Linear(3, 1).to("cuda")
        layer(there).sum().backward()
        assert layer.weight.grad.device.type == "cuda" and layer.bias.grad.tolist() == [2.0]


def numbers(folder, device):
    """What students of every kind, every sampler and every reading make on a device, in a few steps of few samples."""
    store, found = Store(folder / "students"), {}
    bed = ExactBed(device=device)
    ref = measure.reference(bed, store, samples=20, steps=4)
    for n, spec in enumerate(STUDENTS):
        own = replace(spec, pairs=64, batch=16, width=16, device=device)
        model = students.trained(own, store, (0, 1))
        found[f"student {n}"] = measure.of_student(own.bed(), model, own.table(), ref, guidance=2.0 if own.drop else None)
    for target in ("network", "average"):
        spec = Consistency(2, 2, grid=4, target=target, batch=16, width=16, pairs=64)
        model, _ = methods.trained(spec, bed, store, (0,))
        found[target] = measure.of_samples(bed, methods.sample(bed, spec, model, 2, ref.noise, ref.labels, guidance=2.0), ref)
    last = Custom("moved", 2, base=Custom("one kind", 2, batch=16, width=16, device=device), batch=16, width=16, device=device)
    spec = Student((Stage(2, 2),), pairs=64, batch=16, width=16, device=device)
    features_of = replace(spec, width=8)
    for name, weights in {"tuned": custom.tuned(last, store), "distilled": custom.distilled(last, spec, store)}.items():
        found[name] = measure.of_samples(bed, bed.sample(custom.of_weights(bed, weights), bed.solver(Windows.uniform(2), 1), ref.noise, ref.labels), ref)
    found["features"] = {key: value.tolist() for key, value in features.weights(features_of, store).items()}
    for kind in stock.KINDS:
        found[kind] = measure.of_samples(bed, stock.sample(bed, bed.teacher, stock.made(kind, 3), ref.noise, ref.labels, guidance=2.0), ref)
    for name in (*stochasticity.DETERMINISTIC, *stochasticity.STOCHASTIC):
        cell = {"sampler": name, "score": "15 % wrong", "evaluations": 16, "seed": 0}
        found[name] = measure.of_samples(bed, stochasticity.sampled(bed, cell, ref.labels), ref)
    at = opened("conversions", folder / "conversions", quick=True, device=device)
    cell = {"family": "sub-VP", "count": 5, "seed": 0, "steps": 2, "windows": 1, "times": "uniform", "data": "one Gaussian", "factor": 2.0}
    found["conversions"] = [of(at, cell, range(1)) for of in (conversions.of_readings, conversions.of_trained, conversions.of_paths)]
    return found


def alike(mine, theirs, close, where=""):
    if isinstance(mine, dict | list):
        assert type(mine) is type(theirs) and len(mine) == len(theirs), where
        for key in mine if isinstance(mine, dict) else range(len(mine)):
            if key != "time":  # measured
                alike(mine[key], theirs[key], close, f"{where}/{key}")
    elif isinstance(mine, float):
        assert math.isnan(mine) and math.isnan(theirs) or mine == pytest.approx(theirs, **close), where
    else:
        assert mine == theirs, where


def test_the_beds_make_on_a_gpu_what_they_make_on_the_cpu(tmp_path, gpu, close):
    here = numbers(tmp_path, "cpu")
    kept = len(list((tmp_path / "students").iterdir()))
    with gpu():
        there = numbers(tmp_path, "cuda")
    assert len(list((tmp_path / "students").iterdir())) == 2 * kept  # nothing of one is the other's
    alike(here, there, close)


@pytest.mark.parametrize("owner, name, wrong", [
    (ExactBed, "table", lambda self, windows, kind="": replace(self, device="cpu").table(windows, kind)),
    (LowRankMixture, "sample", lambda self, labels, generator: torch.zeros(len(labels), self.means.shape[1])),
])  # fmt: skip
def test_a_tensor_left_on_the_cpu_is_found(tmp_path, monkeypatch, gpu, owner, name, wrong):
    original = getattr(owner, name)
    with gpu(), pytest.raises((RuntimeError, ValueError), match="device"):
        monkeypatch.setattr(owner, name, lambda self, *more: (original if getattr(self, "device", "") == "cpu" else wrong)(self, *more))
        students.train([replace(STUDENTS[0], pairs=64, batch=16, width=16, device="cuda")], Store(tmp_path))


@pytest.mark.slow
def test_the_command_says_where_and_keeps_both(tmp_path, gpu, close, capsys):
    out = tmp_path / "steps"
    for words, context in (((), contextlib.nullcontext), (("--device", "cuda"), gpu)):
        with context():
            assert experiment.run(arguments("steps", "--quick", "--seeds", "1", "--out", str(out), *words)) == 0
        summary = json.loads((out / "steps.json").read_text())
        assert summary["command"].endswith(" ".join(("--seeds 1", *words))) and summary["device"] == (words or ("", "cpu"))[1]
    assert " x " in summary["machine"]["gpu"]
    rows = cells.read(out / "steps.jsonl")
    here, there = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    assert {row["version"] for row in there} == {f"{here[0]['version']}-cuda"}
    alike(*([[row["cell"], row["result"]] for row in part] for part in (here, there)), close)
    with pytest.raises(SystemExit):
        experiment.run(arguments("steps", "--help"))
    assert "cpu or cuda (default: cpu)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_an_experiment_on_a_gpu_is_that_of_the_cpu(tmp_path, gpu, close, name):
    rows = {}
    for device, context in (("cpu", contextlib.nullcontext), ("cuda", gpu)):
        with context():
            ALL[name].run(tmp_path / device / name, seeds=1, quick=True, device=device)
        rows[device] = [[row["cell"], row["result"]] for row in cells.read(tmp_path / device / name / f"{name}.jsonl")]
    alike(rows["cpu"], rows["cuda"], close)


def test_a_device_that_is_not_there_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, said in (("cuda", "needs a GPU that PyTorch can use"), ("tpu", "neither cpu nor cuda"), ("mps", "neither cpu nor cuda")):
        with pytest.raises(UserError, match=f"--device {device}.*{said}"):
            ALL["steps"].run(tmp_path / "steps", device=device)
    with pytest.raises(UserError, match="--device goes with --bed exact or mnist"):
        ALL["ablation"].run(tmp_path / "ablation", bed="digits", device="cuda")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--device cuda:2 is not there: .* 2 GPUs"):
        machine.usable("cuda:2")
    assert machine.usable("cuda:1") == "cuda:1" and machine.usable("cpu") == "cpu"


def test_names_tell_the_type_of_a_device_that_is_not_the_cpu():
    for made in (Student((Stage(4, 9),)), Consistency(2, 9), Custom("moved", 9, base=Custom("faded", 9))):
        plain = asdict(made)
        assert plain.pop("device") == "cpu" and (plain.get("base") or {"device": "cpu"}).pop("device") == "cpu"
        assert described(made) == plain  # as names were before there was a choice
        moved = [replace(made, device=device, **({"base": replace(made.base, device=device)} if plain.get("base") else {})) for device in ("cuda", "cuda:1")]
        assert described(moved[0])["device"] == "cuda" and moved[0].name() == moved[1].name() != made.name()
