"""Adaptive clipping: one event of the plan's sigma for gradients and count, and an unbiased part."""

import itertools
import math

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting.pld import privacy_loss_distribution
from scipy.stats import chi2

from privzoo.errors import UserError
from privzoo.privacy.clipping import AdaptiveClip
from privzoo.privacy.clipping.adaptive import COUNT, FARTHEST
from privzoo.privacy.noise import NoiseMechanism, Part
from privzoo.privacy.plan import PrivacyPlan, ReleaseSetting
from privzoo.privacy.streams import RunKey


def setting(batch_size=40, noise_multiplier=1.0, clip_norm=0.5):
    return ReleaseSetting(0, 0, 0, 10, batch_size, 0.1, noise_multiplier, clip_norm, "gaussian")


# ---- the two sums are one event


@pytest.mark.parametrize(("sigma", "count_noise"), [(1.0, 2.0), (0.5, 0.3), (3.0, 20.0)])
def test_two_sums_cost_what_one_of_sigma_costs(sigma, count_noise):
    """Against dp_accounting, which composes the two without sampling: a sum of multiplier sigma_g and one of 2 sigma_b."""
    of_gradients, of_count = AdaptiveClip(count_noise=count_noise).noise_multipliers(setting(noise_multiplier=sigma))
    assert of_count == count_noise
    assert of_gradients > sigma

    def loss(noise_multiplier):
        return privacy_loss_distribution.from_gaussian_mechanism(
            noise_multiplier,
            value_discretization_interval=1e-3,
            neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
        )

    both = loss(of_gradients).compose(loss(2 * of_count)).get_epsilon_for_delta(1e-5)
    assert both == pytest.approx(loss(sigma).get_epsilon_for_delta(1e-5), rel=1e-3)


def test_noise_by_hand():
    """sigma = 1, sigma_b = 1: 1/sigma_g^2 = 1 - 1/4; by default sigma_b = B / 20."""
    assert AdaptiveClip(count_noise=1.0).noise_multipliers(setting()) == pytest.approx((math.sqrt(4 / 3), 1.0))
    assert AdaptiveClip().noise_multipliers(setting(batch_size=60))[1] == 3.0
    assert AdaptiveClip().noise_multipliers(setting(noise_multiplier=0.0, clip_norm=math.inf)) == (0.0, 0.0)


def test_parts_by_hand():
    """Noise follows C_t: at scale 3 it is sigma_g 3 C."""
    adaptive = AdaptiveClip(count_noise=1.0)
    adaptive.scale.fill_(3)
    gradients, count = adaptive.parts(["a", "b"], setting())
    assert gradients == Part(("a", "b"), 1.5, pytest.approx(math.sqrt(4 / 3) * 1.5))
    assert count == Part((COUNT,), 0.5, 1.0)


@pytest.mark.parametrize("count_noise", [0.5, 0.2])
def test_a_count_that_takes_the_whole_budget(count_noise):
    with pytest.raises(UserError, match=r"count_noise=0\.. > noise_multiplier / 2 = 0\.5"):
        AdaptiveClip(count_noise=count_noise).noise_multipliers(setting())


@pytest.mark.parametrize(
    "options", [{"quantile": 0.0}, {"quantile": 1.0}, {"quantile": "half"}, {"rate": 0}, {"rate": None, "count_noise": -1.0}]
)
def test_options_out_of_range(options):
    with pytest.raises(UserError, match=r"Expected 0 < method\.adaptive\."):
        AdaptiveClip(**options)


# ---- the mechanism


def mechanism(sigma=1.0):
    plan = PrivacyPlan(num_examples=40, batch_size=8, epochs=1, delta=1e-3, noise_multiplier=sigma, clip_norm=0.5)
    return NoiseMechanism(plan, RunKey.for_tests(0), "digest")


def in_bounds(values, noise_std):
    drawn = values.double() / noise_std
    return chi2.ppf(1e-6, drawn.numel()) < float(drawn.square().sum()) < chi2.isf(1e-6, drawn.numel())


def test_each_part_gets_its_own_noise():
    """PRIVACY line 6."""
    adaptive = AdaptiveClip(count_noise=1.0)
    adaptive.scale.fill_(7)
    sums, count = {"w": torch.zeros(5000)}, []
    for release in range(5):
        sums[COUNT] = torch.zeros(1000)
        mechanism().release(sums, release, "", adaptive.parts(["w"], setting()))
        count.append(sums[COUNT])
        assert in_bounds(sums["w"], math.sqrt(4 / 3) * 3.5)
        sums["w"].zero_()
    assert in_bounds(torch.cat(count), 1.0)


W, V = Part(("w",), 0.5, 1.0), Part(("v",), 0.5, 1.0)  # 1/4 each: sigma = sqrt(2)


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ([W, Part(("v",), 0.5, 0.99)], "of a noise multiplier of 1.41421 in all, found 1.407"),
        ([W, Part(("v",), 0.51, 1.0)], "found 1.400"),
        ([W, Part(("v",), 0.5, 0.0)], "found 0"),
        ([W, Part(("v",), 0.0, 0.0)], "found 0"),
        ([W, Part(("v",), math.inf, math.inf)], "found 0"),
        ([W, Part(("v",), math.nan, 1.0)], "found 0"),
        ([W], "in exactly one part"),
        ([W, V, V], "in exactly one part"),
        ([W, Part(("v", "w"), 0.1, 1.0)], "in exactly one part"),
        ([W, Part(("v", "u"), 0.5, 1.0)], "in exactly one part"),
    ],
)
def test_parts_that_the_plan_does_not_pay_for(parts, sentence):
    """The mechanism's guarantee does not hang on who asks."""
    sums = {"w": torch.zeros(3), "v": torch.zeros(3)}
    with pytest.raises(ValueError, match=sentence):
        mechanism(math.sqrt(2)).release(sums, 0, "", parts)
    assert not any(value.any() for value in sums.values())
    mechanism(math.sqrt(2)).release(sums, 0, "", [W, V])
    assert all(value.all() for value in sums.values())


# ---- the part that is found


def test_the_part_is_unbiased_under_poisson_sampling():
    """All 2^5 draws of 5 examples at q = 2/5, weighted by their probability: the mean of sum(b - 1/2) / B + 1/2 is 3/5."""
    norms, q, batch_size = torch.tensor([0.1, 0.4, 0.6, 0.5, 2.0]), 0.4, 2
    adaptive, mean = AdaptiveClip(), 0.0
    for drawn in itertools.product([False, True], repeat=5):
        chosen = norms[torch.tensor(drawn)]
        count = float(adaptive.count([chosen[:1], chosen[1:]], setting(batch_size)))
        mean += (count / batch_size + 0.5) * math.prod(q if each else 1 - q for each in drawn)
    assert mean == pytest.approx(3 / 5)


def test_count_by_hand():
    """C_t = 0.5 * 2: three within it, one beyond, two that are not finite; an empty draw counts nothing."""
    adaptive = AdaptiveClip()
    adaptive.scale.fill_(2)
    norms = [torch.tensor([0.0, 1.0, 1.5]), torch.tensor([math.nan, math.inf, 0.3])]
    assert adaptive.count(norms, setting()).tolist() == [0.0]
    assert adaptive.count(norms[:1], setting()).tolist() == [0.5]
    assert adaptive.count([], setting()).tolist() == [0.0]


def test_update_by_hand():
    """B = 40, count 10: part 0.75; quantile 0.5, eta 0.2: the factor is exp(-0.05)."""
    adaptive = AdaptiveClip()
    adaptive.update(torch.tensor([10.0]), setting())
    assert adaptive.clip_norm(setting()) == pytest.approx(0.5 * math.exp(-0.05))
    adaptive.update(torch.tensor([-30.0]), setting())
    assert adaptive.clip_norm(setting()) == pytest.approx(0.5 * math.exp(-0.05 + 0.15))


@pytest.mark.parametrize(("count", "end"), [(1e9, 1 / FARTHEST), (-1e9, FARTHEST)])
def test_it_neither_vanishes_nor_overflows(count, end):
    adaptive = AdaptiveClip()
    for _ in range(3):
        adaptive.update(torch.tensor([count]), setting())
        assert float(adaptive.scale) == pytest.approx(end)


@pytest.mark.parametrize("quantile", [0.25, 0.5, 0.9])
def test_it_finds_the_quantile(quantile):
    """Norms between 0 and 10, C_0 = 0.5, noise as by default: within a tenth of all examples."""
    adaptive, random = AdaptiveClip(quantile), np.random.default_rng(3)
    found = []
    for _ in range(400):
        drawn = torch.from_numpy(random.uniform(0, 10, random.binomial(400, 0.1)))
        adaptive.update(adaptive.count([drawn], setting()) + 2 * random.standard_normal(), setting())
        found.append(adaptive.clip_norm(setting()))
    assert np.mean(found[200:]) == pytest.approx(10 * quantile, abs=1.0)
