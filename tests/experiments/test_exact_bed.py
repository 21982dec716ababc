"""The exact bed: closed forms against autograd, quadrature and sampling in fp64, and students that begin as their teacher."""

import math
from dataclasses import replace

import pytest
import torch

from reflow.evaluation.measures.frechet import distance_of_moments, moments
from reflow.evaluation.metrics import paired_error
from reflow.experiments.beds import measure, scans, students
from reflow.experiments.beds.exact import ExactBed, untrained
from reflow.experiments.beds.mixture import CLASSES, NULL, LowRankMixture, clusters
from reflow.experiments.beds.students import Stage, Student
from reflow.experiments.store import Store
from reflow.flow import Windows

START = (("time_density", "window_start"), ("time_share", 1.0))


def rows(count, seed=0, width=64):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES + 1, (count,), generator=generator)
    return torch.randn((count, width), generator=generator, dtype=torch.float64), labels, torch.rand(count, generator=generator, dtype=torch.float64) * 0.9 + 0.05


@pytest.fixture(scope="module")
def bed():
    return ExactBed(dtype=torch.float64)


def plane(spread=((0.5,), (0.2,), (0.9,))):
    """A small mixture in the plane, of two classes, whose integrals a grid can take."""
    means = torch.tensor([[0.4, -0.2], [-0.6, 0.3], [0.1, 0.7]], dtype=torch.float64)
    turn = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.28, -0.96]], dtype=torch.float64)[:, :, None]
    weights = torch.tensor([0.3, 0.2, 0.5], dtype=torch.float64)
    return LowRankMixture(means, turn, torch.tensor(spread, dtype=torch.float64), 0.05, weights, torch.tensor([0, 0, 1]))


def test_the_score_is_the_gradient_of_the_log_likelihood(bed):
    z, labels, alpha = rows(40)
    sigma, z = (1 - alpha**2).sqrt(), z.requires_grad_(True)
    gradient = torch.autograd.grad(bed.mixture.log_likelihood(z, labels, alpha, sigma).sum(), z)[0]
    x0, eps = bed.mixture.x0_eps(z.detach(), labels, alpha, sigma)
    torch.testing.assert_close(eps, -sigma[:, None] * gradient, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(alpha[:, None] * x0 + sigma[:, None] * eps, z.detach(), rtol=0, atol=1e-11)


def test_the_likelihood_is_that_of_the_dense_gaussians(bed):
    z, _, alpha = rows(6)
    sigma, mixture = (1 - alpha**2).sqrt(), bed.mixture
    for k in (0, 17):
        inner = mixture.axes[k] @ torch.diag(mixture.spread[k]) @ mixture.axes[k].T + mixture.floor * torch.eye(64, dtype=torch.float64)
        for i in range(len(z)):
            covariance = alpha[i] ** 2 * inner + sigma[i] ** 2 * torch.eye(64, dtype=torch.float64)
            dense = torch.distributions.MultivariateNormal(alpha[i] * mixture.means[k], covariance).log_prob(z[i])
            found = mixture.log_densities(z[i : i + 1], alpha[i], sigma[i])[0, k] - mixture.weights[k].log()
            assert float(found - dense) == pytest.approx(0.0, abs=1e-8)


@pytest.mark.parametrize("label", [0, 1, NULL])
def test_likelihood_and_moments_against_a_grid(label):
    mixture, alpha, sigma, edge, count = plane(), 0.8, 0.6, 8.0, 401
    axis = torch.linspace(-edge, edge, count, dtype=torch.float64)
    z, cell = torch.cartesian_prod(axis, axis), (2 * edge / (count - 1)) ** 2
    density = mixture.log_likelihood(z, torch.full((len(z),), label), alpha, sigma).exp()
    mean, covariance = mixture.moments(None if label == NULL else label)
    found = (density[:, None] * z).sum(0) * cell
    second = torch.einsum("n,ni,nj->ij", density, z - found, z - found) * cell
    assert float(density.sum() * cell) == pytest.approx(1.0, abs=1e-9)
    torch.testing.assert_close(found, alpha * mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(second, alpha**2 * covariance + sigma**2 * torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-9)


def test_samples_have_the_moments_and_the_classes(bed):
    labels = torch.arange(40_000) % CLASSES
    drawn = bed.mixture.sample(labels, torch.Generator().manual_seed(1))
    mean, covariance = bed.mixture.moments()
    assert float(((drawn.mean(0) - mean) / (covariance.diagonal() / len(drawn)).sqrt()).abs().max()) < 4.5
    assert distance_of_moments(*moments(drawn), mean, covariance) < 0.1  # of 64 pixels; a second set as large is .03 away
    assert float((bed.mixture.most_likely(drawn[:2000], 1.0, 0.03) == labels[:2000]).double().mean()) > 0.97


def test_the_bayes_class_is_the_one_of_the_largest_likelihood(bed):
    z, _, _ = rows(50)
    each = torch.stack([bed.mixture.log_likelihood(z, torch.full((len(z),), c), 0.7, 0.7) for c in range(CLASSES)], 1)
    assert torch.equal(bed.mixture.most_likely(z, 0.7, 0.7), each.argmax(1))


def test_nothing_is_known_at_zero_terminal_snr(bed):
    z, _, _ = rows(20)
    labels = torch.full((20,), 3)
    x0, eps = bed.mixture.x0_eps(z, labels, 0.0, 1.0)
    torch.testing.assert_close(eps, z)
    torch.testing.assert_close(x0, bed.mixture.moments(3)[0].expand_as(x0))


def test_the_fit_is_of_the_scans():
    mixture = scans.mixture("")
    assert mixture.means.shape == (20, 64) and float(mixture.weights.sum()) == pytest.approx(1.0)
    unit = torch.einsum("mdr,mds->mrs", mixture.axes, mixture.axes)
    torch.testing.assert_close(unit, torch.eye(6, dtype=torch.float64).expand_as(unit))
    images, labels = scans.read("")
    for digit in (0, 8):
        torch.testing.assert_close(mixture.moments(digit)[0], images[labels == digit].mean(0))
    assert float((mixture.most_likely(images, 1.0, 0.0) == labels).double().mean()) > 0.97
    parts = clusters(torch.tensor([[0.0], [0.1], [5.0], [5.2], [9.0]]), 3)
    assert parts[0] == parts[1] != parts[2] == parts[3] != parts[4]


@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_fine_solve_reaches_the_mixture(zero_snr):
    """Started at exact z of t = 1 the flow ends at exact z of t = 0: the moments and the mean log-likelihood of the mixture."""
    bed = ExactBed(zero_snr=zero_snr, dtype=torch.float64)
    labels, generator = torch.arange(800) % CLASSES, torch.Generator().manual_seed(3)
    data, noise = (bed.mixture.sample(labels, generator) for _ in range(2)), torch.randn((800, 64), generator=generator, dtype=torch.float64)
    first, second = data
    begin, (alpha, sigma) = bed.table(Windows.uniform(1)).start(first, noise, torch.zeros(800, dtype=torch.long)), bed.clean()
    end = bed.fine(begin, labels, steps=80)
    fresh = alpha * second + sigma * torch.randn((800, 64), generator=generator, dtype=torch.float64)
    mean, covariance = bed.mixture.moments()
    target = alpha * mean, alpha**2 * covariance + sigma**2 * torch.eye(64, dtype=torch.float64)
    found, other = (distance_of_moments(*moments(x), *target) for x in (end, fresh))
    assert found < 1.25 * other  # as far as a fresh sample of that size
    logs = [bed.mixture.log_likelihood(x, labels, alpha, sigma) for x in (end, fresh)]
    assert abs(float(logs[0].mean() - logs[1].mean())) < 4 * float(logs[1].std()) * (2 / 800) ** 0.5


def test_a_single_gaussian_is_solved_in_closed_form():
    """One component: the flow keeps every standardised coordinate, along the axes and beyond them."""
    whole = scans.mixture("")
    one = LowRankMixture(whole.means[:1], whole.axes[:1], whole.spread[:1], whole.floor, torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.long))
    bed = ExactBed(dtype=torch.float64)
    bed.__dict__["mixture"] = one
    z = torch.randn((20, 64), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = [tuple(float(v) for v in bed.schedule.alpha_sigma(torch.tensor(t, dtype=torch.float64))) for t in (1.0, 0.0)]
    (a, s), (b, r) = ends
    centred, inside = z - a * one.means[0], (z - a * one.means[0]) @ one.axes[0]
    floor = math.sqrt((b * b * one.floor + r * r) / (a * a * one.floor + s * s))
    along = ((b * b * (one.floor + one.spread[0]) + r * r) / (a * a * (one.floor + one.spread[0]) + s * s)).sqrt()
    wanted = b * one.means[0] + floor * (centred - inside @ one.axes[0].T) + (along * inside) @ one.axes[0].T
    coarse, fine = (float((bed.fine(z, torch.zeros(20, dtype=torch.long), steps=n) - wanted).abs().max()) for n in (250, 500))
    assert fine < 2e-3 and coarse > 3 * fine  # second order


@pytest.mark.parametrize("zero_snr, guidance", [(False, None), (False, 4.0), (True, None)])
@pytest.mark.parametrize("count", [1, 4])
def test_an_untrained_student_is_its_teachers_ddim(zero_snr, guidance, count):
    bed = ExactBed(zero_snr=zero_snr, dtype=torch.float64)
    ref = rows(30)[0], torch.arange(30) % CLASSES
    student = bed.sample(untrained(bed), bed.student_solver(bed.table(Windows.uniform(count)), guidance=guidance), *ref)
    teacher = bed.sample(bed.teacher, bed.solver(Windows.uniform(1), count, guidance=guidance), *ref)
    torch.testing.assert_close(student, teacher, rtol=0, atol=1e-11)


def test_finer_steps_of_the_teacher_come_nearer(bed):
    z, labels = rows(60)[0], torch.arange(60) % CLASSES
    fine = bed.fine(z, labels, steps=200)
    errors = [float(paired_error(bed.sample(bed.teacher, bed.solver(Windows.uniform(1), n), z, labels), fine).mean()) for n in (1, 2, 4, 8, 32)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.06 < 0.3 < errors[0]


def short(seed=0, **more):
    return Student((Stage(4, 60, START),), seed=seed, pairs=2048, **more)


def test_a_student_is_kept_and_trained_once(tmp_path, monkeypatch):
    store = Store(tmp_path / "students")
    ref = measure.reference(ExactBed(), store, samples=100, steps=60)
    own, made = measure.of_teacher(ExactBed(), 4, ref)["paired"], store.made
    found = [measure.of_student(ExactBed(), students.trained(short(seed), store, (0, 1)), short().table(), ref)["4"]["paired"] for seed in (0, 1)]
    assert store.made == made + 2 and max(found) < own and found[0] != found[1]
    monkeypatch.setattr(students, "train", lambda *_: pytest.fail("trained again"))
    again = measure.of_student(ExactBed(), students.trained(short(1), Store(tmp_path / "students")), short().table(), ref)["4"]["paired"]
    assert again == found[1]


def test_a_student_is_the_same_alone_and_beside_others(tmp_path):
    store = Store(tmp_path)
    alone, beside = students.train([short(1)], store)[0], students.train([short(0), short(1), short(2)], store)[1]
    for name, value in alone.items():
        torch.testing.assert_close(beside[name], value, rtol=1e-3, atol=1e-4)
    assert float(alone["leave"].norm()) > 0.1


def test_names_tell_students_apart():
    base = short()
    others = [short(1), short(width=64), short(guidance=2.0), replace(base, stages=(Stage(4, 61, START),)), replace(base, stages=(Stage(4, 60),))]
    assert len({s.name() for s in (base, *others)}) == 6 and base.name() == short().name()
    assert students.version() in str(base.resolved()) and students.version() != students.version("experiments/cells.py")


def test_a_stage_begins_from_the_one_before(tmp_path):
    store = Store(tmp_path)
    both = Student((Stage(8, 40, START), Stage(4, 0, START)), pairs=1024)
    first = students.weights(both.before(), store)
    for name, value in students.weights(both, store).items():  # the average of no step is the start
        torch.testing.assert_close(value, first[name])
    assert store.made == 2


def test_pairs_of_trajectories_hang_together(tmp_path):
    spec = Student((Stage(4, 8, (("starts", "noise"),)),), pairs=64, guidance=3.0)
    z_start, z_end, window, labels = students.pool(spec, Store(tmp_path))
    assert window.bincount().tolist() == [16] * 4 and len(labels) == 64
    by_window = [(z_start[window == k], z_end[window == k]) for k in range(4)]
    for (_, end), (start, _) in zip(by_window, by_window[1:]):
        assert torch.equal(end, start)
    bed = ExactBed()
    whole = bed.sample(bed.teacher, bed.solver(Windows.uniform(4), 8, guidance=3.0), by_window[0][0], labels[window == 0])
    torch.testing.assert_close(by_window[-1][1], whole)


def test_dropped_labels_are_the_teachers_too_unless_it_is_guided(tmp_path):
    stage, bed = (Stage(2, 16),), ExactBed()
    for guidance in (1.0, 3.0):
        z_start, z_end, window, labels = students.pool(Student(stage, pairs=400, drop=0.5, guidance=guidance), Store(tmp_path))
        dropped = labels == NULL
        assert 120 < int(dropped.sum()) < 280
        solved = bed.solver(Windows.uniform(2), 16).solve(lambda z, t, asked=labels[dropped]: bed.teacher(z, t, asked), z_start[dropped], window[dropped])
        assert torch.allclose(solved, z_end[dropped], atol=1e-5) is (guidance == 1.0)


def test_the_chained_teacher_steps_through_its_own_windows(tmp_path):
    store, bed = Store(tmp_path), ExactBed()
    spec = Student((Stage(4, 30, START), Stage(2, 4, START, teacher="previous")), pairs=256)
    z_start, z_end, window, labels = students.pool(spec, store)
    model, table = students.trained(spec.before(), store), spec.before().table()
    z = z_start
    for half in range(2):
        small = 2 * window + half
        state, output = table.end_coefficients(small, table.t_start[small])
        index = torch.round(table.t_start[small].double() * 1000) - 1
        z = state[:, None] * z + output[:, None] * model(z, index.float(), labels)
    torch.testing.assert_close(z, z_end, rtol=1e-4, atol=1e-5)
    assert bed.student_type == "ddim_eps" and spec.evaluations() == 256 * 8 + 256 * 2 + 3 * 128 * 34


def test_a_damaged_student_is_a_sentence(tmp_path):
    from reflow.errors import UserError

    store = Store(tmp_path)
    students.weights(short(), store)
    (tmp_path / f"{short().name()}.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read.*the same command makes it anew"):
        students.weights(short(), store)


def test_windows_that_merge_while_they_are_learnt_reach_the_merged_chord(tmp_path):
    """Two parts merged once: a student that trains on the chord of one window, without another solve than of the parts."""
    spec = Student((Stage(2, 80, START, merges=1),), pairs=2048)
    assert [round(b, 4) for b in spec.stages[0].parts.boundaries] == [1.0, 0.75, 0.5, 0.25, 0.0] and len(spec.table()) == 2
    ref = measure.reference(ExactBed(), Store(tmp_path), samples=100, steps=60)
    found = measure.of_student(ExactBed(), students.trained(spec, Store(tmp_path)), spec.table(), ref)["2"]["paired"]
    assert found < measure.of_teacher(ExactBed(), 2, ref)["paired"]
    plain = replace(spec, stages=(Stage(2, 80, START),))
    # half of the chords are asked of the average once, and a part is solved in as many steps of 1/32 as it is long
    assert spec.evaluations() - plain.evaluations() == 80 * 128 // 2 + 2048 * (8 - 16)


def test_what_is_not_trained_is_held_to_the_teacher(tmp_path):
    """The clean half straightened: in the noisy one, where nothing is trained, a student drifts unless it is held."""
    bed, store = ExactBed(), Store(tmp_path)
    z, labels = rows(200)[0].float(), torch.arange(200) % CLASSES
    windows = Windows.uniform(2)
    solver, off = bed.solver(windows, 4), {}
    for rest in ("", "teacher"):
        spec = Student((Stage(2, 150, START, active=(1,), rest=rest),), pairs=2048)
        drifted, own = (bed.path(model, solver, z, labels)[1] for model in (students.trained(spec, store), bed.teacher))
        off[rest] = float((drifted - own).square().mean().sqrt())
    assert off["teacher"] < 0.5 * off[""]


def test_pairs_of_three_kinds_are_windows_of_the_flow(tmp_path):
    """From noise down, from data up and from noised data: whole trajectories hang together, and each pair is what a finer solve makes too."""
    bed, keys = ExactBed(), (("forward_share", 0.5), ("starts", "noise"), ("starts_share", 0.5))
    z_start, z_end, window, labels = students.pool(Student((Stage(4, 8, keys),), pairs=64), Store(tmp_path))
    assert window.bincount().tolist() == [16] * 4
    by_window = [(z_start[window == k], z_end[window == k]) for k in range(4)]
    joined = [int(((end - start).abs().amax(1) < 1e-6).sum()) for (_, end), (start, _) in zip(by_window, by_window[1:])]
    assert joined == [12] * 3  # 8 upwards and 4 from noise; 4 are noised data
    finer = bed.solver(Windows.uniform(4), 40).solve(lambda z, t: bed.teacher(z, t, labels), z_start, window)
    off, size = ((x**2).mean(1).sqrt() for x in (finer - z_end, z_end - z_start))
    assert float((off / size).max()) < 0.2
