"""Accounting, against hand arithmetic, dp_accounting's own accountant and Opacus'."""

import json
import math
import os
from inspect import signature
from pathlib import Path

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from scipy import optimize
from scipy.stats import norm

from privzoo.errors import UserError
from privzoo.privacy import accounting, plan
from privzoo.privacy.accounting import Release, cache_file, calibrate, cross_check, epsilon_spent

SST2 = 1000 / 67_349
NOISE_OF_EPSILON = {1: 1.1544, 2: 0.8690, 3: 0.7547, 4: 0.6839, 5: 0.6336, 6: 0.5954, 7: 0.5649, 8: 0.5397}


def gaussian_delta(epsilon: float, sigma: float) -> float:
    """Exact delta of one Gaussian release without sampling (Balle and Wang 2018, Theorem 8)."""
    return norm.cdf(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * norm.cdf(-0.5 / sigma - epsilon * sigma)


def sampled_delta(epsilon: float, rate: float, sigma: float) -> float:
    """Exact delta of one Poisson-sampled release when an example is removed.

    P = (1-q) N(0, s^2) + q N(1, s^2) against Q = N(0, s^2): P/Q = 1 - q + q exp((2x - 1) / (2 s^2)) exceeds e^epsilon
    above x; there P(tail) - e^epsilon Q(tail) is delta.
    """
    x = 0.5 + sigma**2 * math.log((math.exp(epsilon) - 1 + rate) / rate)
    q_tail = norm.sf(x, scale=sigma)
    return (1 - rate) * q_tail + rate * norm.sf(x, loc=1, scale=sigma) - math.exp(epsilon) * q_tail


def exact_epsilon(delta_at, delta: float) -> float:
    return optimize.brentq(lambda epsilon: delta_at(epsilon) - delta, 1e-9, 50)


# ---- epsilon_spent


@pytest.mark.parametrize(("sigma", "count", "delta"), [(1.0, 1, 1e-5), (2.0, 1, 1e-3), (4.0, 9, 1e-5)])
def test_whole_batch_releases_match_the_closed_form(sigma: float, count: int, delta: float) -> None:
    """PRIVACY 39: n releases of everybody at sigma are one at sigma / sqrt(n); ours is the upper end of a fine grid."""
    exact = exact_epsilon(lambda e: gaussian_delta(e, sigma / math.sqrt(count)), delta)
    assert exact <= epsilon_spent([(Release(1.0, sigma), count)], delta, 1e-4) <= exact + 1e-3


@pytest.mark.parametrize(("rate", "sigma", "delta"), [(0.1, 0.7, 1e-5), (0.25, 1.0, 1e-4), (0.01, 0.6, 1e-6)])
def test_a_sampled_release_matches_the_closed_form(rate: float, sigma: float, delta: float) -> None:
    """PRIVACY 20: removing an example costs more than adding one (whose loss never exceeds -log(1-q)); both count."""
    exact = exact_epsilon(lambda e: sampled_delta(e, rate, sigma), delta)
    assert exact > -math.log(1 - rate)
    assert exact <= epsilon_spent([(Release(rate, sigma), 1)], delta) <= exact + 1e-3


def test_equals_dp_accounting_on_its_own_events() -> None:
    """PRIVACY 39: dp_accounting's PLDAccountant, told the same releases as events, finds the same epsilon."""
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for rate, sigma, count in ((0.25, 4.0, 8), (0.5, 5.0, 2)):
        release = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
        accountant.compose(dp_accounting.SelfComposedDpEvent(release, count))
    found = epsilon_spent([(Release(0.25, 4.0), 8), (Release(0.5, 5.0), 2)], 1e-3, 1e-4)
    assert found == pytest.approx(accountant.get_epsilon(1e-3), rel=1e-6)


def test_nothing_released_costs_nothing_and_no_noise_costs_everything() -> None:
    assert epsilon_spent([], 1e-5) == 0
    assert epsilon_spent([(Release(0.1, 1.0), 0)], 1e-5) == 0
    assert epsilon_spent([(Release(0.1, 5.0), 1), (Release(0.1, 0.0), 1)], 1e-5) == math.inf


def test_a_coarse_grid_never_understates() -> None:
    releases = [(Release(0.25, 4.0), 8)]
    assert epsilon_spent(releases, 1e-3, 1e-4) <= epsilon_spent(releases, 1e-3, 1e-3) + 1e-12
    assert epsilon_spent(releases, 1e-3, 1e-3) == pytest.approx(epsilon_spent(releases, 1e-3, 1e-4), abs=5e-4)


# ---- three accountants


@pytest.mark.parametrize(
    ("sigma", "pld", "prv", "rdp"),
    [(0.5, 10.006, 10.017, 11.89), (1.0, 1.3785, 1.3887, 1.758), (2.0, 0.4185, 0.4285, 0.467)],
)
def test_reference_epsilons(sigma: float, pld: float, prv: float, rdp: float) -> None:
    """PRIVACY 20 and 39: PLD, PRV within its stated error (0.01) of it, RDP between 1 and 1.35 times it."""
    releases = [(Release(SST2, sigma), 204)]
    ours, beside = epsilon_spent(releases, 1e-5), cross_check(releases, 1e-5)
    assert ours == pytest.approx(pld, rel=0.005)
    assert beside["prv"] == pytest.approx(prv, rel=0.005)
    assert beside["rdp"] == pytest.approx(rdp, rel=0.005)
    assert abs(beside["prv"] - ours) <= 0.01 + 1e-3
    assert 1 <= beside["rdp"] / ours <= 1.35


def test_nothing_released_costs_nothing_by_any_accountant() -> None:
    assert cross_check([], 1e-5) == {"prv": 0.0, "rdp": 0.0}


def test_no_central_limit_accountant_is_offered() -> None:
    """PRIVACY 38: neither by name, nor as an argument, nor as a number that small."""
    offered = {name for module in (accounting, plan) for name in vars(module)}
    offered |= {
        name for call in (epsilon_spent, cross_check, calibrate, plan.PrivacyPlan) for name in signature(call).parameters
    }
    assert not [name for name in offered if "gdp" in name.lower() or "central" in name.lower()]
    assert cross_check([(Release(0.1, 8.0), 1)], 1e-3).keys() == {"prv", "rdp"}
    assert plan.ACCOUNTANT == "pld"
    # By the central limit theorem (Dong et al. 2019): mu = q sqrt(T (exp(1/sigma^2) - 1)).
    mu = SST2 * math.sqrt(204 * (math.exp(1 / 0.6**2) - 1))
    central_limit = exact_epsilon(lambda e: gaussian_delta(e, 1 / mu), 1e-5)
    assert epsilon_spent([(Release(SST2, 0.6), 204)], 1e-5) > 1.3 * central_limit


# ---- calibration


@pytest.mark.parametrize(("epsilon", "sigma"), NOISE_OF_EPSILON.items())
def test_reference_noise_multipliers(epsilon: int, sigma: float) -> None:
    """PRIVACY 39, last paragraph: epsilon is reached within 0.5 % of the reference sigma, from both sides."""
    assert epsilon_spent([(Release(SST2, sigma * 1.005), 204)], 1e-5) < epsilon
    assert epsilon_spent([(Release(SST2, sigma * 0.995), 204)], 1e-5) > epsilon


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("PRIVZOO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def releases_at(sigma: float):
    return [(Release(1.0, sigma), 1)]


def search(epsilon: float = 1.0, delta: float = 1e-2) -> float:
    return calibrate(releases_at, epsilon, delta)


def holds(sigma: float) -> bool:
    return 0.99 <= epsilon_spent(releases_at(sigma), 1e-2, 1e-4) <= 1.0


def test_calibrated_noise_is_the_smallest(cache: Path) -> None:
    """PRIVACY 39: it spends at most epsilon, 0.1 % less noise would not do, and the closed form agrees."""
    sigma = search()
    assert holds(sigma)
    assert epsilon_spent(releases_at(sigma * 0.999), 1e-2, 1e-4) > 1
    assert gaussian_delta(1.0, sigma) < 1e-2 < gaussian_delta(1.0, sigma * 0.999)


def test_epsilons_out_of_reach_are_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "SMALLEST_NOISE", 0.5)  # the real limits take long to reach
    monkeypatch.setattr(accounting, "LARGEST_NOISE", 4.0)
    with pytest.raises(UserError, match="noise_multiplier <= 4: raise it"):
        search(epsilon=1e-3, delta=1e-9)
    with pytest.raises(UserError, match=r"noise_multiplier < 0.5.*eps=inf"):
        search(epsilon=20.0)


class Searched(Exception):
    """The cache was not believed."""


@pytest.fixture
def believes(cache: Path, monkeypatch: pytest.MonkeyPatch):
    """`believes(content)`: whether calibration takes its answer from a cache file of this content."""

    def search_begins(*_: object) -> None:
        raise Searched

    def believes(content: bytes) -> bool:
        cache.mkdir(exist_ok=True)
        cache_file().write_bytes(content)
        with monkeypatch.context() as patch:
            patch.setattr(accounting, "_bracket", search_begins)
            try:
                search()
            except Searched:
                return False
            return True

    return believes


def entry(value: object) -> bytes:
    return json.dumps({accounting._cache_key(releases_at(1.0), 1.0, 1e-2): value}).encode()


def test_cache_saves_the_search(cache: Path, believes) -> None:
    sigma = search()
    assert cache_file() == cache / "calibrations.json"
    assert cache_file().read_bytes() == entry(sigma)
    assert believes(cache_file().read_bytes())


def test_poisoned_cache_is_not_used(cache: Path, believes) -> None:
    """PRIVACY 39: a remembered sigma that is too small, or wastefully large, is searched for again and replaced."""
    sigma = search()
    assert not any(believes(entry(factor * sigma)) for factor in (0.1, 0.5, 0.9, 0.999, 1.1, 2.0))
    cache_file().write_bytes(entry(0.5 * sigma))
    assert search() == sigma
    assert cache_file().read_bytes() == entry(sigma)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-300, 1e-6, 1e300, math.inf, math.nan, "3", None, [1.0], True], ids=str)
def test_nonsense_in_the_cache_is_ignored(believes, value: object) -> None:
    """PRIVACY 39: nor does it stop a run or fill the memory: 1e-6 would ask for a grid of 10^15 cells."""
    assert not believes(entry(value))


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"null", b"\xff\xfe", b"7"])
def test_corrupt_cache_is_ignored(believes, content: bytes) -> None:
    assert not believes(content)


def test_corrupt_cache_is_replaced(cache: Path) -> None:
    cache.mkdir()
    cache_file().write_bytes(b"{")
    sigma = search()
    assert holds(sigma)
    assert cache_file().read_bytes() == entry(sigma)


def test_a_cache_for_other_numbers_is_not_used() -> None:
    """Epsilon, delta, rate, count and phases are all part of the key."""
    keys = {
        accounting._cache_key(releases, epsilon, delta)
        for releases in (
            [(Release(0.25, 1.0), 8)],
            [(Release(0.25, 1.0), 9)],
            [(Release(0.2, 1.0), 8)],
            releases_at(1.0) * 2,
        )
        for epsilon in (0.5, 0.6)
        for delta in (1e-3, 1e-4)
    }
    assert len(keys) == 4 * 2 * 2


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("PRIVZOO_CACHE", str(tmp_path / "file"))
    assert holds(search())
    assert os.listdir(tmp_path) == ["file"]
