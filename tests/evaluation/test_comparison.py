"""A comparison of contenders that paint by arithmetic: samples on disk, resumption, measures, the result."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

from painter import SIDE, Means, PainterSpec
from reflow.errors import UserError
from reflow.evaluation import features as networks
from reflow.evaluation.comparison import asked, drawing, protocol, result, text
from reflow.evaluation.comparison.columns import COLUMNS
from reflow.evaluation.comparison.samples import Cell, Samples
from reflow.evaluation.measures.frechet import frechet_distance

PROMPTS = ("a cat", "two dogs", "a very long red line")


def comparison(*models, teacher=None, per_prompt=4, features=(), images=(), settings=((2, 1.0), (4, 3.0)), **changes):
    found = protocol.load("paired").changed(per_prompt=per_prompt)
    base = dict(teacher_steps=32, teacher_guidance=None, dtype="fp32", batch=5, replicates=4, features=tuple(features))
    return result.Comparison(found, asked.Asked(PROMPTS, tuple(images)), tuple((m, settings) for m in models), teacher, **{**base, **changes})


@pytest.fixture(autouse=True)
def means(monkeypatch):
    """Networks by arithmetic under the names of the real ones."""
    names = {"clip": ("clip", "clip_score")}  # as `open_features` gives two for one

    def opened(specs, device):
        return {name: Means(name) for spec in specs for name in names.get(spec.split("=")[0], (spec.split("=")[0],))}

    monkeypatch.setattr(networks, "open_features", opened)


def make(out, what, keep=True, devices=("cpu",)):
    return result.make(what, out, devices, command="reflow evaluate", keep=keep)


def row(report, model, steps=2, guidance=1.0):
    return next(r for r in report["rows"] if (r["model"], r["steps"], r["guidance"]) == (model, steps, guidance))


def test_measures_are_what_the_painters_did(tmp_path):
    teacher, twin, off = PainterSpec("teacher"), PainterSpec("twin"), PainterSpec("off", shift=10)
    report = make(tmp_path / "out", comparison(twin, off, teacher=teacher, features=("inception=x", "clip=x", "lpips=x", "dinov2=x")))
    same, apart = row(report, "twin")["measures"], row(report, "off")["measures"]
    assert same["paired_pixels"]["mean"] == same["paired_latents"]["mean"] == same["lpips_to_teacher"]["mean"] == 0
    assert apart["paired_pixels"]["mean"] == pytest.approx(10 / 127.5) and apart["paired_latents"]["mean"] == pytest.approx(10)
    assert apart["lpips_to_teacher"]["mean"] == pytest.approx(10)
    # Moments that differ in the mean of nine features by 10 each, and in nothing else.
    assert apart["fid_to_teacher"]["mean"] == pytest.approx(900, rel=1e-6) and abs(same["fid_to_teacher"]["mean"]) < 1e-6
    assert apart["diversity_lpips"]["mean"] == pytest.approx(same["diversity_lpips"]["mean"])
    assert apart["clip_score"]["mean"] == pytest.approx(same["clip_score"]["mean"] + 10, abs=1e-4)
    assert apart["clip_score"]["low"] < apart["clip_score"]["mean"] < apart["clip_score"]["high"]
    assert len(apart["clip_score"]["over_seeds"]["values"]) == 4 and apart["clip_score"]["over_seeds"]["count"] == 4
    assert report["not_measured"]["fid"] == "needs a protocol with real images" and report["not_measured"]["hpsv2"] == "needs --features hpsv2=PATH"
    assert row(report, "off", 4, 3.0)["evaluations"] == 8 and row(report, "off")["evaluations"] == 2
    assert row(report, "off", 4, 3.0)["reference"] == {"model": "teacher", "steps": 32, "guidance": 3.0}
    assert [r["model"] for r in report["rows"] if r["is_reference"]] == ["teacher", "teacher"]
    assert report["cost"]["network_evaluations"] == 12 * (32 + 64 + 2 * (2 + 8))
    shown = text.described(report)
    assert "off" in shown and "0.0784 ± 0.0000" in shown and "needs --features" not in shown.split("\n\n")[0]


def test_real_images_are_cut_to_the_samples_and_compared(tmp_path):
    paths = []
    for n in range(9):
        picture = torch.randint(0, 256, (SIDE + 8, SIDE, 3), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
        Image.fromarray(picture.numpy()).save(tmp_path / f"{n}.png")
        paths.append(tmp_path / f"{n}.png")
    report = make(tmp_path / "out", comparison(PainterSpec("one"), features=("inception=x",), images=paths, settings=((2, 1.0),)))
    own = torch.stack(list(asked.pictures(sorted((tmp_path / "out" / "samples").rglob("*.png")), 0, "lanczos")))
    real = torch.stack(list(asked.pictures(paths, SIDE, "lanczos")))
    network = Means("inception")
    expected = frechet_distance(network.features(own), network.features(real))
    found = row(report, "one")["measures"]
    assert real.shape[1:] == own.shape[1:] and found["fid"]["mean"] == pytest.approx(expected, rel=1e-6)
    assert {"kid", "precision", "recall"} <= found.keys() and "paired_pixels" not in found and report["real_images"] == 9
    assert report["not_measured"]["paired_pixels"] == "needs --teacher" and report["not_measured"]["fid_infinity"] == "needs 40 images or more"


def test_a_comparison_that_was_stopped_goes_on_where_it_was(tmp_path):
    log = tmp_path / "log"
    broken = PainterSpec("one", fail_at=1, log=str(log))
    with pytest.raises(OSError, match="No space left"):
        make(tmp_path / "out", comparison(broken, settings=((2, 1.0),)))
    place = tmp_path / "out" / "samples" / "one" / "steps-2-guidance-1"
    first = {path.name: path.read_bytes() for path in place.iterdir()}
    assert len(first) == 5 + 2  # images of the first batch, its latents, what the samples are
    (place / "000005.png").write_bytes(b"half a")
    whole = PainterSpec("one", log=str(log))
    make(tmp_path / "out", comparison(whole, settings=((2, 1.0),)))
    assert {name: (place / name).read_bytes() for name in first} == first
    assert [line.split()[-1] for line in log.read_text().splitlines()][:3] == ["0", "5", "10"]  # no batch twice; then the timing
    make(tmp_path / "fresh", comparison(PainterSpec("one"), settings=((2, 1.0),)))
    fresh = tmp_path / "fresh" / "samples" / "one" / "steps-2-guidance-1"
    assert {p.name: p.read_bytes() for p in fresh.glob("*.png")} == {p.name: p.read_bytes() for p in place.glob("*.png")}


def test_samples_of_something_else_are_not_mixed_in(tmp_path):
    make(tmp_path / "out", comparison(PainterSpec("one"), settings=((2, 1.0),)))
    with pytest.raises(UserError, match=r"holds samples that were drawn otherwise \(contender differs\)"):
        make(tmp_path / "out", comparison(PainterSpec("one", shift=3), settings=((2, 1.0),)))


def test_a_batch_size_that_changes_draws_only_what_is_missing(tmp_path):
    samples = Samples(tmp_path, Cell("a model / of mine", 2, 1.0), 10, {"x": 1}).open()
    painter = PainterSpec("a model / of mine").open("cpu", "fp32")
    for numbers in (range(2, 4), range(7, 10)):
        samples.put(numbers, painter.draw(["p"] * len(numbers), list(numbers), 2, 1.0), ["p"] * len(numbers), 0)
    assert samples.missing(3) == [range(2), range(4, 7)] and samples.missing(2) == [range(2), range(4, 6), range(6, 7)]
    assert samples.costs[0]["samples"] == 2 and samples.costs[1]["evaluations"] == 2
    other = Cell("a model - of mine", 2, 1.0)
    assert other.place != samples.cell.place and "/" not in str(other.place.parent)


def test_several_devices_draw_what_one_does(tmp_path):
    what = comparison(PainterSpec("one"), PainterSpec("two", shift=2), settings=((2, 1.0),))
    log = tmp_path / "log"
    plan = what.drawing(tmp_path / "both")
    shares = drawing.missing(plan)
    for rank in (0, 1):
        drawing.work(plan, shares, "cpu", rank, 2, None)
    drawing.draw(what.drawing(tmp_path / "alone"), ["cpu"])
    names = sorted(p.relative_to(tmp_path / "alone") for p in (tmp_path / "alone").rglob("*.png"))
    assert len(names) == 24 and all((tmp_path / "both" / n).read_bytes() == (tmp_path / "alone" / n).read_bytes() for n in names)
    assert not log.exists() and not any(drawing.missing(plan).values())


@pytest.mark.slow
def test_processes_draw_side_by_side(tmp_path):
    what = comparison(PainterSpec("one"), settings=((2, 1.0), (4, 1.0)))
    told = drawing.draw(what.drawing(tmp_path / "both"), ["cpu", "cpu"])
    drawing.draw(what.drawing(tmp_path / "alone"), ["cpu"])
    names = sorted(p.relative_to(tmp_path / "alone") for p in (tmp_path / "alone").rglob("*.png"))
    assert len(names) == 24 and all((tmp_path / "both" / n).read_bytes() == (tmp_path / "alone" / n).read_bytes() for n in names)
    assert told["one"]["kind"] == "painter"
    with pytest.raises(UserError, match="at most 64 steps"):  # a worker's sentence arrives as one
        drawing.draw(comparison(PainterSpec("one"), settings=((65, 1.0),)).drawing(tmp_path / "third"), ["cpu", "cpu"])


def test_a_report_that_answers_is_found_again_and_one_that_does_not_is_not(tmp_path):
    what = comparison(PainterSpec("one"), teacher=PainterSpec("teacher"))
    report = make(tmp_path / "out", what, keep=False)
    assert not (tmp_path / "out" / "samples").exists() and (tmp_path / "out" / "index.html").is_file()
    assert result.existing(tmp_path / "out", what) == report == result.open_result(tmp_path / "out")
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"1")
    for other in (comparison(PainterSpec("one")), comparison(PainterSpec("one"), teacher=PainterSpec("teacher"), per_prompt=3),
                  comparison(PainterSpec("one"), teacher=PainterSpec("teacher"), features=(f"inception={weights}",))):  # fmt: skip
        assert result.existing(tmp_path / "out", other) is None
    with pytest.raises(UserError, match="holds no result"):
        result.open_result(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps({"format": 9}))
    with pytest.raises(UserError, match="no result of `reflow evaluate` of this version"):
        result.open_result(tmp_path)


def test_objects_are_counted_by_the_users_detector(tmp_path):
    """A detector that sees a dog in every image and a second one in those of odd brightness."""

    class Counter(Means):
        def count(self, images, classes):
            bright = images.long().sum((1, 2, 3)) % 2
            return torch.stack([{"dog": 1 + bright, "cat": torch.zeros_like(bright)}[name] for name in classes], 1)

    def share(wanted):
        what = comparison(PainterSpec("one"), settings=((2, 1.0),), features=("detector=x",))
        found = dataclasses.replace(what.asked, objects=tuple(wanted for _ in PROMPTS))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(networks, "open_features", lambda specs, device: {"detector": Counter("detector")})
            return row(make(tmp_path / str(len(list(tmp_path.iterdir()))), dataclasses.replace(what, asked=found)), "one")["measures"]["objects"]["mean"]

    two = share((("dog", 2, 3),))
    assert 0 < two < 1 and share((("dog", 1, 2),)) == pytest.approx(1 - two)
    assert share((("dog", 1, None),)) == 1.0 and share((("dog", 1, None), ("cat", 1, None))) == 0.0


def test_every_column_says_what_it_needs():
    assert len({column.name for column in COLUMNS}) == len({column.title for column in COLUMNS}) == len(COLUMNS)
    known = {column.name for column in COLUMNS}
    for name in protocol.names():
        assert set(protocol.load(name).measures.wanted) <= known, name
