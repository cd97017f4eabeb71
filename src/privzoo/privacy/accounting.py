"""What releases cost: epsilon of a list of Poisson-sampled Gaussian (or Laplace) releases, by three accountants.

PLD (google's dp_accounting) gives the promise; PRV and RDP (Opacus) stand beside it as a cross-check, and for Laplace noise
the epsilon of pure DP. All are for adding or removing one unit. The central-limit ("GDP") accountant is not offered: it
understates epsilon.

>>> release = Release(sample_rate=0.01, noise_multiplier=1.0)
>>> round(epsilon_spent([(release, 100)], delta=1e-5), 2)
0.72
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache, reduce
from importlib.metadata import version
from pathlib import Path

import dp_accounting
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from scipy import optimize

from privzoo.errors import UserError

SEARCH_GRID = 1e-2
GRID = 1e-3  # an upper bound like every grid, within 5e-4 of 1e-4, which takes seconds an evaluation
SMALLEST_NOISE, LARGEST_NOISE = 0.05, 1e4
GAUSSIAN, LAPLACE = NOISES = ("gaussian", "laplace")


@dataclass(frozen=True)
class Release:
    """One noisy sum: every example joins with probability `sample_rate`, and noise is added.

    Gaussian noise has standard deviation `noise_multiplier` times the L2 sensitivity; Laplace noise has scale
    `noise_multiplier` times the L1 sensitivity.
    """

    sample_rate: float
    noise_multiplier: float
    noise: str = GAUSSIAN


Releases = Sequence[tuple[Release, int]]


@lru_cache(maxsize=8)  # making one takes most of the time; composing it with itself takes little
def _loss_distribution(release: Release, grid: float) -> PrivacyLossDistribution:
    if release.noise == LAPLACE:
        return privacy_loss_distribution.from_laplace_mechanism(  # knows no other neighbours than these
            release.noise_multiplier, value_discretization_interval=grid, sampling_prob=release.sample_rate
        )
    return privacy_loss_distribution.from_gaussian_mechanism(
        release.noise_multiplier,
        value_discretization_interval=grid,
        sampling_prob=release.sample_rate,
        neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


def epsilon_spent(releases: Releases, delta: float, grid: float = GRID) -> float:
    """An upper bound on the epsilon of these releases at `delta`, by privacy loss distributions.

    Args:
        releases: pairs (release, how often).
        delta: in (0, 1).
        grid: discretisation of the privacy loss. Rounding is pessimistic, so a coarse grid never understates.
    Returns:
        0 for no release; inf where a release has no noise.
    """
    return _epsilon_spent(tuple((release, count) for release, count in releases if count > 0), delta, grid)


@lru_cache(maxsize=1024)  # the runs of a sweep ask the same again and again, and an answer takes a twentieth of a second
def _epsilon_spent(releases: tuple[tuple[Release, int], ...], delta: float, grid: float) -> float:
    if not releases:
        return 0.0
    if any(release.noise_multiplier == 0 for release, _ in releases):
        return math.inf
    composed = [_loss_distribution(release, grid).self_compose(count) for release, count in releases]
    return float(reduce(PrivacyLossDistribution.compose, composed).get_epsilon_for_delta(delta))


def cross_check(releases: Releases, delta: float) -> dict[str, float]:
    """Epsilon of the same releases by Opacus' PRV and RDP accountants: `{"prv": ..., "rdp": ...}`.

    PRV's figure is its upper estimate; RDP's is looser (up to 1.35 times PLD in ordinary settings). Neither knows Laplace
    noise: for that it is `{"pure": ...}`, see `pure_epsilon`.
    """
    if any(release.noise == LAPLACE for release, _ in releases):
        return {"pure": pure_epsilon(releases)}
    return dict(_prv_and_rdp(tuple((release, count) for release, count in releases if count > 0), delta))


@lru_cache(maxsize=64)
def _prv_and_rdp(releases: tuple[tuple[Release, int], ...], delta: float) -> tuple[tuple[str, float], ...]:
    from opacus.accountants import PRVAccountant, RDPAccountant  # imports torch: only when asked for

    found = []
    for name, accountant in (("prv", PRVAccountant()), ("rdp", RDPAccountant())):
        accountant.history = [(r.noise_multiplier, r.sample_rate, count) for r, count in releases]
        found.append((name, float(accountant.get_epsilon(delta=delta)) if accountant.history else 0.0))
    return tuple(found)


def pure_epsilon(releases: Releases) -> float:
    """Epsilon at delta 0 of Poisson-sampled Laplace releases; inf where one is Gaussian.

    A release costs log(1 + q (exp(1 / noise_multiplier) - 1)): basic composition of what sampling leaves of 1 / scale.

    >>> round(pure_epsilon([(Release(0.5, 1.0, "laplace"), 2)]), 3)
    1.24
    """
    return math.fsum(count * _pure_epsilon_of(release) for release, count in releases)


def _pure_epsilon_of(release: Release) -> float:
    if release.noise != LAPLACE or release.noise_multiplier == 0:
        return math.inf
    return math.log1p(release.sample_rate * math.expm1(1 / release.noise_multiplier))


def calibrate(releases_at: Callable[[float], Releases], epsilon: float, delta: float) -> float:
    """The smallest noise multiplier (to 0.02 %) at which `releases_at(noise_multiplier)` cost at most `epsilon`.

    Guarantee: PLD, whose figures are upper bounds on every grid, confirms epsilon for the value returned, whether it was
    searched for or found in the cache on disk; the cache saves the search, it is never believed.

    Raises:
        UserError: if no noise multiplier between 0.05 and 10,000 reaches epsilon.
    """

    def excess(log_noise: float, grid: float = GRID) -> float:
        spent = epsilon_spent(releases_at(math.exp(log_noise)), delta, grid)
        return math.log(max(spent, 1e-12)) - math.log(epsilon)

    key = _cache_key(releases_at(1.0), epsilon, delta)
    remembered = _read_cache().get(key)
    if isinstance(remembered, float) and _holds(excess, remembered):
        return remembered
    noise = math.exp(_root(excess, epsilon)) * (1 + 1e-4)
    while excess(math.log(noise)) > 0:
        noise *= 1 + 2e-4
    _write_cache(key, noise)
    return noise


def _holds(excess: Callable[[float], float], noise: float) -> bool:
    """True if `noise` meets the target and does not waste more than 1 % of it."""
    return SMALLEST_NOISE <= noise <= LARGEST_NOISE and -0.01 < excess(math.log(noise)) <= 0


def _root(excess: Callable[..., float], epsilon: float) -> float:
    """Where `excess` is 0, to 5e-5: found roughly on a coarse grid first, which is ten times faster."""

    def coarse(log_noise: float) -> float:
        return excess(log_noise, SEARCH_GRID)

    rough = optimize.brentq(coarse, *_bracket(coarse, epsilon), xtol=1e-3)
    fine = cache(excess)  # brentq asks again for the ends of the bracket
    low, high = rough - 0.01, rough + 0.002
    while fine(high) > 0:
        high += 0.05
    while fine(low) <= 0:
        low -= 0.05
    return float(optimize.brentq(fine, low, high, xtol=5e-5))


def _bracket(excess: Callable[[float], float], epsilon: float) -> tuple[float, float]:
    low = high = 0.0
    while excess(high) > 0:
        low, high = high, high + 0.7
        if high > math.log(LARGEST_NOISE):
            raise UserError(f"epsilon {epsilon:g} is out of reach with noise_multiplier <= {LARGEST_NOISE:g}: raise it.")
    while excess(low) <= 0:
        low, high = low - 0.35, low
        if low < math.log(SMALLEST_NOISE):
            raise UserError(
                f"epsilon {epsilon:g} asks for noise_multiplier < {SMALLEST_NOISE:g}, which protects nobody: "
                "lower epsilon, or say eps=inf for a run without privacy."
            )
    return low, high


def cache_file() -> Path:
    """Where calibrations are remembered: `$PRIVZOO_CACHE`, else the user's cache folder. It holds public numbers only."""
    folder = os.environ.get("PRIVZOO_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "privzoo"
    )
    return Path(folder) / "calibrations.json"


def _cache_key(releases: Releases, epsilon: float, delta: float) -> str:
    public = [[asdict(release), count] for release, count in releases]
    text = json.dumps([public, epsilon, delta, GRID, version("dp-accounting")])
    return hashlib.sha256(text.encode()).hexdigest()


def _read_cache() -> dict[str, float]:
    try:
        remembered = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return remembered if isinstance(remembered, dict) else {}


def _write_cache(key: str, noise: float) -> None:
    """Best effort: a cache that cannot be written costs two seconds next time and nothing else."""
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({**_read_cache(), key: noise}, file)
        os.replace(file.name, path)
    except OSError:
        return
