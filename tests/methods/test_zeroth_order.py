"""DPZero: what one example can do to a release, and what a release does to the weights."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch.func import functional_call

from privzoo.methods.zeroth_order import clipped_sum
from privzoo.privacy.noise import NoiseMechanism, fingerprint
from privzoo.privacy.plan import PrivacyPlan
from privzoo.privacy.sampling import LogicalBatch
from privzoo.privacy.streams import RunKey

SIGMA, C = 2.0, 0.5


class Point(torch.nn.Module):
    """One weight w."""

    def __init__(self, w=0.5):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([w], dtype=torch.float64))


class Distances:
    """Losses (w - x)^2 / 2: the slope along u = 1 or -1 is u (w - x), whatever lambda."""

    rows_of_unit = None

    def collate(self, rows):
        return {"x": torch.tensor([row["x"] for row in rows], dtype=torch.float64)}

    def losses(self, model, batch):
        return (model.w - batch["x"]).square() / 2


def points(*values):
    return [{"x": value, "ids": [0]} for value in values]


def batch_of(run, rows, release=0):
    return LogicalBatch(release, (run.method.task.collate(rows),) if rows else ())


def direction_of(run, release=0, number=0):
    """u by parameter, drawn here from its stream."""
    method, found = run.method, {}
    for name, p in method.active.items():
        stream = method.mechanism.key.stream("direction", release, "digest" + method.weights, f"{number} {name}", 0)
        found[name] = torch.from_numpy(stream.standard_normal(p.numel(), dtype=np.float32)).view_as(p).to(p.dtype)
    return found


def slopes_of(run, rows, us):
    """(l+ - l-) / (2 lambda) row by row, at weights of its own, shape (R, K)."""
    method, lam = run.method, run.method.smoothing
    here, found = {name: p.detach().clone() for name, p in method.model.named_parameters()}, []

    def loss(row, u, side):
        there = here | {name: here[name] + side * lam * value for name, value in u.items()}
        task = method.task
        return task.losses(lambda **inputs: functional_call(method.model, there, (), inputs), task.collate([row]))[0]

    for row in rows:
        found.append([float(loss(row, u, 1.0) - loss(row, u, -1.0)) / (2 * lam) for u in us])
    return torch.tensor(found, dtype=torch.float64)


@pytest.fixture(scope="module")
def two_rows():
    """A plan of 2 rows that always draws both, with sigma and C as above."""
    return PrivacyPlan(num_examples=2, batch_size=2, epochs=1, delta=0.1, clip_norm=C, noise_multiplier=SIGMA)


@pytest.fixture
def make_point(make_walk):
    def make(plan, rows=(), w=0.5, **options):
        return make_walk(plan, rows=rows or points(0.0, 1.0), model=Point(w), new_head=(), task=Distances(), **options)

    return make


# ---- by hand


def test_a_query_by_hand(make_point, two_rows):
    """w = 0.5 and x = 0.25, 1, -3: slopes 0.25, -0.5, 3.5 along u, clipped to 0.25, -0.5, 0.5."""
    run = make_point(two_rows)
    (u,) = [values.item() for _, values in run.method._directions(0)[0].blocks(run.method.model.w)]
    assert u in (1.0, -1.0)
    found = run.method.query(batch_of(run, points(0.25, 1.0, -3.0)))
    assert found.keys() == {"directions"}
    assert found["directions"].dtype == torch.float64
    assert found["directions"].item() == pytest.approx(0.25 * u, rel=1e-9)
    assert run.method.model.w.item() == pytest.approx(0.5, abs=1e-15)
    losses = [(0.25**2 + 0.5**2 + 3.5**2) / 6 + run.method.smoothing**2 / 2]
    assert run.method.private_metrics["private/loss"] == pytest.approx(losses[0], rel=1e-9)


def test_an_update_by_hand(make_point, plans):
    """Without privacy and with u = 1 or -1: w - lr * mean of (w - x) over B = 2, which is an ordinary gradient step."""
    plan = PrivacyPlan(num_examples=2, batch_size=2, epochs=1, delta=0.1, epsilon=math.inf)
    run = make_point(plan, rows=points(-3.0, 1.0), lr=0.1)
    assert run.fit().global_step == 1
    assert run.method.model.w.item() == pytest.approx(0.5 - 0.1 * (3.5 - 0.5) / 2, rel=1e-9)


def test_a_release_is_clipped_sum_plus_noise_over_b_along_the_directions(make_walk, plans):
    """PRIVACY lines 3, 5 and 6, K = 3: weights move by -lr / K * sum of (clipped sum + noise) / B times u, where slopes are
    those of rows one by one, directions are drawn here, and the noise is that of a mechanism of our own."""
    run = make_walk(plans(epochs=0.2), directions=3, direction_kind="normal", lr=0.1, schedule="constant")
    method = run.method
    before = {name: p.detach().clone() for name, p in method.trainable.items()}
    method.weights = fingerprint(method.trainable.items())
    us = [direction_of(run, number=number) for number in range(3)]
    drawn = [run.batches.rows[int(i)] for i in run.draws(0)]
    assert len(drawn) not in (0, 8)  # so that B and the realised size differ
    slopes = slopes_of(run, drawn, us)
    sums = {"directions": sum(row * min(1.0, C / float(row.norm())) for row in slopes)}
    NoiseMechanism(plans(epochs=0.2), RunKey.for_tests(0), "digest").release(sums, 0, method.weights)
    run.fit()
    for name, value in run.recorder.weights[0].items():
        move = sum(s * u[name] for s, u in zip(sums["directions"] / 8, us, strict=True)) / 3
        torch.testing.assert_close(before[name] - value, 0.1 * move, rtol=0, atol=1e-9)


@pytest.mark.parametrize("directions", [1, 2])
def test_without_privacy_it_is_mezo(directions, make_walk, plans):
    """Malladi et al. 2023, Algorithm 1, written here, over the same draws: five steps with a linear schedule."""
    plan = plans(private=False)
    run = make_walk(plan, microbatch_size=3, directions=directions, direction_kind="normal", lr=0.05, schedule="linear")
    other = make_walk(plan, directions=directions, direction_kind="normal")
    theta = dict(other.method.model.named_parameters())
    expected = []
    for release in range(plan.steps):
        other.method.weights = fingerprint(theta.items())
        rows, lr = [other.batches.rows[int(i)] for i in run.draws(release)], 0.05 * (1 - release / plan.steps)
        moves = []
        for number in range(directions):
            z = direction_of(other, release, number)
            moves.append((z, float(slopes_of(other, rows, [z]).sum()) / plan.batch_size))
        with torch.no_grad():
            for z, projected in moves:
                for name, p in theta.items():
                    p -= lr / directions * projected * z[name]
        expected.append({name: p.detach().clone() for name, p in theta.items()})
        # The streams hang on the weights' exact bits, which rounding would change: follow the run's own.
        run_weights = run.recorder.weights
        if not run_weights:
            run.fit()
        torch.testing.assert_close(expected[-1], run_weights[release], rtol=0, atol=1e-9)
        for name, p in theta.items():
            p.data.copy_(run_weights[release][name])


# ---- what one example can do


@pytest.mark.parametrize("directions", [1, 3])
def test_one_example_moves_the_sum_by_at_most_c(directions, make_walk, plans):
    """PRIVACY line 5: rows of any strength; one more or less moves the sum by at most C jointly, and by more than nothing;
    strong ones by C."""
    run = make_walk(plans(), directions=directions)
    rows = [{**row, "strength": 10.0 ** (i % 9 - 4)} for i, row in enumerate(run.batches.rows[:20])]
    whole = run.method.query(batch_of(run, rows))["directions"]
    assert whole.shape == (directions,)
    for left_out in (0, 4, 8, 13, 17):
        rest = [row for i, row in enumerate(rows) if i != left_out]
        moved = float((whole - run.method.query(batch_of(run, rest))["directions"]).norm())
        assert 0 < moved <= C * (1 + 1e-9)
        if left_out % 9 == 8:
            assert moved == pytest.approx(C, rel=1e-9)


@pytest.mark.parametrize("directions", [1, 3])
def test_a_thousand_random_pairs(directions):
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        size = int(torch.randint(1, 9, (), generator=generator))
        scale = 10.0 ** torch.randint(-3, 4, (size, 1), generator=generator)
        slopes = scale * torch.randn(size, directions, generator=generator, dtype=torch.float64)
        moved = float((clipped_sum(slopes, C) - clipped_sum(slopes[1:], C)).norm())
        assert 0 < moved <= C * (1 + 1e-12)


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_poisoned_example_contributes_nothing(poison, private, make_walk, plans):
    """PRIVACY line 9: the sum is that of the others, the release is noisy, counted and finite."""
    run = make_walk(plans(private=private, epochs=0.2), directions=2)
    rows = [{**row, "strength": poison if i == 3 else 1.0} for i, row in enumerate(run.batches.rows[:6])]
    found = run.method.query(batch_of(run, rows))["directions"]
    expected = run.method.query(batch_of(run, rows[:3] + rows[4:]))["directions"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert torch.equal(clipped_sum(torch.tensor([[1.0, poison]]), 0.5), torch.zeros(2))
    rows = list(run.batches.rows)
    rows[int(run.draws(0)[0])] = {**rows[0], "strength": poison}
    poisoned = make_walk(plans(private=private, epochs=0.2), rows=rows)
    assert poisoned.fit().global_step == poisoned.method.mechanism.draws == 1
    assert all(torch.isfinite(p).all() for p in poisoned.method.model.parameters())


def test_released_numbers_of_neighbours(make_point, two_rows):
    """600 releases with and without one example, along one direction: both normal with standard deviation sigma C, the
    means at most C apart (and C apart, as this example is clipped)."""
    run = make_point(two_rows, w=0.0)
    method, released = run.method, {}
    fixed, found = method._directions(0), []
    (u,) = [values.item() for _, values in fixed[0].blocks(method.model.w)]
    method._directions = lambda release: fixed
    method.update = lambda sums, setting: found.append(sums["directions"].item())
    for with_it, rows in ((False, points(0.1)), (True, points(0.1, 7.0))):
        found.clear()
        for i in range(600):
            method.weights = f"{with_it} {i}"  # fresh noise
            method.training_step(batch_of(run, rows), 0)
        released[with_it] = np.array(found)
    for with_it, mean in ((False, -0.1 * u), (True, (-0.1 - C) * u)):
        assert scipy.stats.kstest(released[with_it], "norm", args=(mean, SIGMA * C)).pvalue > 0.01
        assert released[with_it].std() == pytest.approx(SIGMA * C, rel=0.1)
    difference = abs(released[True].mean() - released[False].mean())
    assert difference == pytest.approx(C, abs=4 * SIGMA * C * math.sqrt(2 / 600))


def test_k_numbers_are_one_gaussian_event(make_walk, plans):
    """The noise on each of K = 4 sums is independent with sigma C: the same as on a gradient of four values, drawn once."""
    run = make_walk(plans(), directions=4)
    method, found = run.method, []
    method.update = lambda sums, setting: found.append(sums["directions"].clone())
    method.walker.displace = lambda *_: None  # of empty draws: where the weights stand meanwhile does not matter
    for i in range(500):
        method.weights = str(i)
        method.training_step(batch_of(run, []), 0)
    noise = torch.stack(found)
    assert method.mechanism.draws == 500
    assert noise.std(0).tolist() == pytest.approx([0.5] * 4, rel=0.15)  # sigma = 1, C = 0.5
    correlations = torch.corrcoef(noise.t()) - torch.eye(4)
    assert correlations.abs().max() < 4 / math.sqrt(500)


# ---- noise and directions


def test_noise_is_apart_from_the_direction(make_point, two_rows):
    """PRIVACY line 30: with one direction two steps have different noise; over 1,000 steps noise and direction are
    uncorrelated, and no stream of the direction begins with the noise."""
    run = make_point(two_rows, direction_kind="normal")
    method, noise = run.method, []
    method.update = lambda sums, setting: noise.append(sums["directions"].item() / (SIGMA * C))
    first = []
    for i in range(1000):
        method.weights = str(i)
        method.training_step(batch_of(run, []), 0)
        stream = method.mechanism.key.stream("direction", 0, f"digest{i}", "0 w", 0)
        again = method.mechanism.key.stream("direction", 0, f"digest{i}", "directions", 0)
        starts = [*stream.standard_normal(4), *again.standard_normal(4)]
        assert all(abs(value - noise[-1]) > 1e-12 for value in starts)
        first.append(next(iter(method._directions(0)[0].blocks(method.model.w)))[1].item())
    assert abs(np.corrcoef(first, noise)[0, 1]) < 4 / math.sqrt(1000)
    assert len(set(noise)) == 1000
    fixed = method._directions(0)
    method._directions = lambda release: fixed
    for weights in ("one", "two"):
        method.weights = weights
        method.training_step(batch_of(run, []), 0)
    assert noise[-1] != noise[-2]


def test_directions_of_a_run(make_walk, plans):
    """Fresh for every release, for other weights and for each of K; the same in query and update."""
    run = make_walk(plans(), directions=2, direction_kind="normal")
    method = run.method
    name, p = next(iter(method.trainable.items()))

    def starts(release):
        return [next(iter(d.blocks(p)))[1][0].item() for d in method._directions(release)]

    method.weights = "one"
    found = [*starts(0), *starts(1)]
    assert starts(0) == found[:2]
    method.weights = "two"
    found += starts(0)
    assert len(set(found)) == 6
    expected = method.mechanism.key.stream("direction", 0, "digesttwo", f"1 {name}", 0)
    assert found[-1] == expected.standard_normal(1, dtype=np.float32)[0]


# ---- batches


def test_an_empty_draw_releases_noise(make_walk, plans):
    """PRIVACY line 19: zeros from the query, a noise draw, a step along u."""
    plan = plans(batch_size=1, epochs=0.025)
    seed = next(s for s in range(100) if len(make_walk(plan, seed=s).draws(0)) == 0)
    run = make_walk(plan, seed=seed, directions=2)
    before = {name: p.detach().clone() for name, p in run.method.trainable.items()}
    assert torch.equal(run.method.query(run.batches[0])["directions"], torch.zeros(2, dtype=torch.float64))
    trainer = run.fit()
    assert run.recorder.sizes == [[]]
    assert trainer.global_step == run.method.mechanism.draws == 1
    assert all((before[name] != value).all() for name, value in run.recorder.weights[0].items() if value.dim() == 1)
    assert run.method.private_metrics == {}


def test_micro_batches_do_not_change_a_release(make_walk, plans):
    """PRIVACY line 11: sizes 1, 3 and 100 give one result, with one noise draw a release."""
    plan, found = plans(batch_size=20, epochs=0.5), {}
    for size in (1, 3, 100):
        run = make_walk(plan, microbatch_size=size, lr=0.1)
        run.fit()
        assert run.method.mechanism.draws == plan.steps == 1
        assert max(run.recorder.sizes[0]) == min(size, sum(run.recorder.sizes[0]))
        found[size] = run.recorder.weights[0]
    torch.testing.assert_close(found[1], found[100], rtol=0, atol=1e-9)
    torch.testing.assert_close(found[3], found[100], rtol=0, atol=1e-9)
