"""Laplace noise for DPZero: an L1 bound, noise of that kind, and an account against integrals written here."""

import json
import math
from functools import reduce

import numpy as np
import pytest
import scipy.stats
import torch
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution, from_laplace_mechanism

from privzoo.errors import UserError
from privzoo.methods.zeroth_order import clipped_sum
from privzoo.privacy.accounting import Release, cross_check, epsilon_spent, pure_epsilon
from privzoo.privacy.callback import PrivacyCallback
from privzoo.privacy.ledger import Entry, Ledger
from privzoo.privacy.noise import NoiseMechanism, Part
from privzoo.privacy.plan import PrivacyPlan
from privzoo.privacy.sampling import LogicalBatch
from privzoo.privacy.streams import RunKey

C, SCALE = 0.5, 2.0


def plan_of(**changes) -> PrivacyPlan:
    given = {"num_examples": 40, "batch_size": 8, "epochs": 1, "delta": 1e-3, "clip_norm": C, "noise_multiplier": SCALE}
    return PrivacyPlan(**{**given, "noise": "laplace", **changes})


def sampled_delta(epsilon: float, scale: float, rate: float) -> float:
    """The worse of both hockey-stick divergences between Laplace at 0 and its mixture with Laplace at 1."""
    step = 1e-4  # midpoints: both kinks, 0 and 1, lie between two of them
    x = np.arange(-30 * scale, 30 * scale + 1, step) + step / 2
    without = np.exp(-np.abs(x) / scale) / (2 * scale)
    with_it = (1 - rate) * without + rate * np.exp(-np.abs(x - 1) / scale) / (2 * scale)
    return step * max(
        np.maximum(0.0, first - math.exp(epsilon) * second).sum()
        for first, second in ((with_it, without), (without, with_it))
    )


# ---- the account


@pytest.mark.parametrize(("scale", "rate"), [(0.5, 1.0), (2.0, 1.0), (0.4, 0.1), (1.0, 0.3)])
def test_one_release_costs_what_the_integral_says(scale: float, rate: float) -> None:
    """PRIVACY 20, 39: for adding and for removing, an upper bound within the grid."""
    release = Release(rate, scale, "laplace")
    top = pure_epsilon([(release, 1)])
    for part in (0.3, 0.7, 0.95):
        delta = sampled_delta(part * top, scale, rate)
        assert part * top - 1e-5 <= epsilon_spent([(release, 1)], delta) <= part * top + 1.1e-3


@pytest.mark.parametrize(("scale", "rate"), [(0.5, 1.0), (0.4, 0.1), (1.0, 0.3)])
def test_pure_epsilon_is_the_largest_privacy_loss(scale: float, rate: float) -> None:
    x = np.linspace(-30 * scale, 30 * scale, 10_001)
    without = scipy.stats.laplace.pdf(x, 0, scale)
    with_it = (1 - rate) * without + rate * scipy.stats.laplace.pdf(x, 1, scale)
    largest = np.abs(np.log(with_it / without)).max()
    releases = [(Release(rate, scale, "laplace"), 7)]
    assert pure_epsilon(releases) == pytest.approx(7 * largest, rel=1e-9)
    assert epsilon_spent(releases, 1e-9) <= pure_epsilon(releases) + 7e-3
    assert cross_check(releases, 1e-9) == {"pure": pure_epsilon(releases)}
    assert pure_epsilon([*releases, (Release(rate, scale), 1)]) == math.inf


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.1), (0.5, 0.3, 0.2)])
def test_several_coordinates_cost_no_more_than_one_that_moves_by_their_sum(shares) -> None:
    """What lets K numbers of L1 norm C be one event: their losses, composed, are dominated."""
    one = from_laplace_mechanism(0.5, value_discretization_interval=1e-4)
    several = reduce(
        PrivacyLossDistribution.compose,
        [from_laplace_mechanism(0.5, share, value_discretization_interval=1e-4) for share in shares],
    )
    for epsilon in (0.0, 0.5, 1.0, 1.5, 1.9):
        assert several.get_delta_for_epsilon(epsilon) < one.get_delta_for_epsilon(epsilon)


def test_a_plan_is_calibrated_for_its_noise() -> None:
    """The same epsilon asks for another multiplier, and the plan's own releases cost it."""
    laplace = plan_of(noise_multiplier=None, epsilon=2.0)
    gaussian = plan_of(noise_multiplier=None, epsilon=2.0, noise="gaussian")
    release = Release(0.2, laplace.noise_multiplier, "laplace")
    assert 0.99 * 2 <= epsilon_spent([(release, 5)], 1e-3, 1e-4) <= 2
    assert laplace.releases() == [(release, 5)]
    assert laplace.at(3).release == release
    assert laplace.noise_multiplier != pytest.approx(gaussian.noise_multiplier, rel=0.05)
    assert laplace.as_record()["noise"] == "laplace"


def test_the_ledger_keeps_the_kinds_apart(tmp_path) -> None:
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        for number, noise in enumerate(("gaussian", "laplace", "laplace")):
            ledger.charge(Entry(number, 0.2, SCALE, C, "digest", "weights", noise))
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        assert ledger.releases() == [(Release(0.2, SCALE), 1), (Release(0.2, SCALE, "laplace"), 2)]


def test_releases_are_charged_as_laplace(tmp_path) -> None:
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        assert PrivacyCallback(plan_of(), ledger, "digest")._entry(0, "weights").noise == "laplace"


# ---- the release


def test_noise_is_laplace_of_scale_sigma_c() -> None:
    """PRIVACY 6: float64 and float32, and of no other kind."""
    mechanism = NoiseMechanism(plan_of(), RunKey.for_tests(3), "digest")
    for dtype in (torch.float64, torch.float32):
        total = torch.zeros(20_000, dtype=dtype)
        mechanism.release({"directions": total}, 0, "weights")
        assert scipy.stats.kstest(total.numpy(), "laplace", args=(0, SCALE * C)).pvalue > 0.01
        assert scipy.stats.kstest(total.numpy(), "norm", args=(0, SCALE * C)).pvalue < 1e-6


def test_parts_are_for_gaussian_noise() -> None:
    mechanism = NoiseMechanism(plan_of(), RunKey.for_tests(3), "digest")
    with pytest.raises(ValueError, match="no parts with laplace noise"):
        mechanism.release({"a": torch.zeros(1)}, 0, "weights", [Part(("a",), 1.0, 100.0)])


@pytest.mark.parametrize("directions", [1, 3])
def test_one_example_moves_the_sum_by_at_most_c_in_l1(directions: int, make_walk) -> None:
    """PRIVACY 5: rows of any strength; strong ones move it by C. An L2 bound would let K = 3 numbers move it further."""
    run = make_walk(plan_of(), directions=directions)
    rows = [{**row, "strength": 10.0 ** (i % 9 - 4)} for i, row in enumerate(run.batches.rows[:20])]

    def query(rows: list) -> torch.Tensor:
        return run.method.query(LogicalBatch(0, (run.method.task.collate(rows),)))["directions"]

    whole = query(rows)
    for left_out in (0, 4, 8, 13, 17):
        moved = float((whole - query([row for i, row in enumerate(rows) if i != left_out])).abs().sum())
        assert 0 < moved <= C * (1 + 1e-9)
        if left_out % 9 == 8:
            assert moved == pytest.approx(C, rel=1e-9)


def test_a_thousand_random_pairs_in_l1() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        slopes = 10.0 ** torch.randint(-3, 4, (4, 1), generator=generator) * torch.randn(4, 3, generator=generator).double()
        moved = float((clipped_sum(slopes, C, 1) - clipped_sum(slopes[1:], C, 1)).abs().sum())
        assert 0 < moved <= C * (1 + 1e-12)


def test_released_numbers_of_neighbours(make_walk) -> None:
    """600 releases with and without one strong example: Laplace both, the medians C apart."""
    run = make_walk(plan_of())
    method, released = run.method, {}
    row = {**run.batches.rows[0], "strength": 1e4}
    fixed, found = method._directions(0), []
    method._directions = lambda release: fixed
    method.update = lambda sums, setting: found.append(sums["directions"].item())
    query = method.query
    for rows in ([], [row]):
        found.clear()
        total = query(LogicalBatch(0, (method.task.collate(rows),) if rows else ()))["directions"]
        method.query = lambda batch, total=total: {"directions": total.clone()}  # the same along fixed directions
        for i in range(600):
            method.weights = f"{len(rows)} {i}"  # fresh noise
            method.training_step(LogicalBatch(0, ()), 0)
        released[len(rows)] = np.array(found)
    u = math.copysign(1.0, released[1].mean() - released[0].mean())
    for count, mean in ((0, 0.0), (1, C * u)):
        assert scipy.stats.kstest(released[count], "laplace", args=(mean, SCALE * C)).pvalue > 0.01
        assert released[count].std() == pytest.approx(math.sqrt(2) * SCALE * C, rel=0.2)


# ---- who may


def test_methods_that_bound_gradients_refuse(make_run) -> None:
    with pytest.raises(UserError, match=r"privacy\.noise=laplace to be gaussian .*method=dpzero takes laplace"):
        make_run(plan_of())


def test_an_unknown_noise() -> None:
    with pytest.raises(UserError, match="noise=uniform to be one of gaussian, laplace"):
        plan_of(noise="uniform")


def test_a_run_and_its_card(privzoo_on_few_rows, tmp_path) -> None:
    """The card names the noise and gives the epsilon of pure DP; a resumed run may not change the noise."""
    argv = ["method=dpzero", "eps=8", "privacy.noise=laplace", "batch_size=100", "epochs=0.4", "trainer.accelerator=cpu"]
    code, output = privzoo_on_few_rows(*argv, f"output_dir={tmp_path}")
    assert code == 0, output
    (run,) = tmp_path.iterdir()
    card = json.loads((run / "privacy.json").read_text())
    assert card["plan"]["noise"] == "laplace"
    assert card["epsilon_spent"] <= 8
    assert card["cross_check"]["pure"] >= card["epsilon_spent"]
    assert {json.loads(line)["noise"] for line in (run / "ledger.jsonl").read_text().splitlines()} == {"laplace"}
    code, output = privzoo_on_few_rows("method=dp_full", "privacy.noise=laplace", f"output_dir={tmp_path}")
    assert (code, "method=dpzero takes laplace" in output) == (2, True), output
