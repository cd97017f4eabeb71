"""The privacy plan: one frozen, public record from which sampler, noise and accountant all take their numbers.

Formal guarantee. With add-or-remove-one neighbours, the unit stated in the plan and Poisson sampling, the composition of
the plan's releases is (epsilon, delta)-DP, provided that each release is a sum of per-unit contributions of L2 norm at
most `clip_norm` plus Gaussian noise of standard deviation `noise_multiplier * clip_norm` (Abadi et al. 2016; accounting by
privacy loss distributions); for Laplace noise, of L1 norm at most `clip_norm` plus noise of scale
`noise_multiplier * clip_norm`. The number of examples is declared public.

>>> plan = PrivacyPlan(num_examples=67_349, batch_size=1_000, epochs=3, delta=1e-5, epsilon=8.0)
>>> plan.steps, round(plan.sample_rate, 6), round(plan.noise_multiplier, 3)
(203, 0.014848, 0.539)
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from typing import Any

from privzoo.errors import UserError
from privzoo.privacy.accounting import GAUSSIAN, NOISES, Release, Releases, calibrate, epsilon_spent

NEIGHBOURS = "add_or_remove_one"
ACCOUNTANT = "pld"


@dataclass(frozen=True)
class Phase:
    """A stretch of equal releases: `ceil(epochs * N / batch_size)` of them.

    `noise_multiplier` None means: calibrated, equal for all phases that leave it open.
    """

    batch_size: int
    epochs: float
    clip_norm: float = 1.0
    noise_multiplier: float | None = None


@dataclass(frozen=True)
class ReleaseSetting:
    """What one release needs to know: the phase it belongs to and that phase's public numbers.

    `number` counts over the whole plan, `index` within the phase, which has `steps` releases; all from 0.
    """

    number: int
    phase: int
    index: int
    steps: int
    batch_size: int
    sample_rate: float
    noise_multiplier: float
    clip_norm: float
    noise: str

    @property
    def release(self) -> Release:
        return Release(self.sample_rate, self.noise_multiplier, self.noise)


@dataclass(frozen=True)
class PrivacyPlan:
    """A calibrated plan. Give `epsilon` (inf for a run without privacy) or `noise_multiplier`; the other is computed.

    Args:
        num_examples: N, number of units in the private training set; public.
        batch_size: B, expected number of units in a release; every mean divides by it, never by the realised one.
        epochs: expected passes over the data, may be a fraction; the plan has ceil(epochs * N / B) releases.
        delta: below 1 / N.
        epsilon: the target; afterwards an upper bound that the plan meets.
        clip_norm: C, L2 bound on one unit's contribution; L1 where the noise is Laplace.
        noise_multiplier: sigma; the noise on a sum has standard deviation (Laplace: scale) sigma * C.
        then: further phases after the first, composed in the same account.
        unit: whose data one contribution holds.
        noise: "gaussian" or "laplace", in all phases.
    Raises:
        UserError: for a value out of range, or both or neither of epsilon and noise_multiplier.
    """

    num_examples: int
    batch_size: int
    epochs: float
    delta: float
    epsilon: float | None = None
    clip_norm: float = 1.0
    noise_multiplier: float | None = None
    then: tuple[Phase, ...] = ()
    unit: str = "example"
    noise: str = GAUSSIAN
    neighbours: str = field(default=NEIGHBOURS, init=False)
    accountant: str = field(default=ACCOUNTANT, init=False)

    def __post_init__(self) -> None:
        self._check()
        if self.epsilon is None:
            object.__setattr__(self, "epsilon", epsilon_spent(self.releases(), self.delta))
        elif math.isinf(self.epsilon):
            object.__setattr__(self, "noise_multiplier", 0.0)
            object.__setattr__(self, "clip_norm", math.inf)
            object.__setattr__(self, "then", tuple(Phase(p.batch_size, p.epochs, math.inf, 0.0) for p in self.then))
        else:
            noise = calibrate(self._releases_at, self.epsilon, self.delta)
            object.__setattr__(self, "noise_multiplier", noise)

    def _check(self) -> None:
        if self.noise not in NOISES:
            raise UserError(f"Expected noise={self.noise} to be one of {', '.join(NOISES)}.")
        if self.num_examples < 1:
            raise UserError(f"Expected num_examples={self.num_examples} >= 1: the training split is empty.")
        if not 0 < self.delta < 1 / self.num_examples:
            raise UserError(
                f"Expected 0 < delta={self.delta:g} < 1/N = {1 / self.num_examples:.3g} for N={self.num_examples}: at "
                f"1/N a mechanism may publish somebody's record; delta={default_delta(self.num_examples):g} is the default."
            )
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise UserError("Give epsilon or noise_multiplier, and not both: the other one is computed.")
        if self.epsilon is not None and not self.epsilon > 0:
            raise UserError(f"Expected epsilon={self.epsilon:g} > 0; eps=inf is a run without privacy.")
        if self.epsilon is not None and any(phase.noise_multiplier is not None for phase in self.then):
            raise UserError("Expected no noise_multiplier in a later phase when epsilon is given: one of the two decides.")
        if self.epsilon is None and any(phase.noise_multiplier is None for phase in self.then):
            raise UserError("Expected a noise_multiplier in every phase when the first one gives it.")
        for phase in self.phases:
            self._check_phase(phase)

    def _check_phase(self, phase: Phase) -> None:
        if not 1 <= phase.batch_size <= self.num_examples:
            raise UserError(f"Expected 1 <= batch_size={phase.batch_size} <= N={self.num_examples}, the training examples.")
        if not 0 < phase.epochs < math.inf:
            raise UserError(f"Expected 0 < epochs={phase.epochs} < inf.")
        if not phase.clip_norm > 0:
            raise UserError(f"Expected clip_norm={phase.clip_norm:g} > 0.")
        if phase.noise_multiplier is not None and not 0 < phase.noise_multiplier < math.inf:
            raise UserError(f"Expected 0 < noise_multiplier={phase.noise_multiplier:g} < inf; eps=inf is no noise.")
        if phase.clip_norm == math.inf and self.epsilon != math.inf:
            raise UserError("Expected a finite clip_norm: without clipping no noise is enough; eps=inf is no privacy.")

    @property
    def phases(self) -> tuple[Phase, ...]:
        """All phases in order, with the noise multipliers in force."""
        first = Phase(self.batch_size, self.epochs, self.clip_norm, self.noise_multiplier)
        later = [
            p if p.noise_multiplier is not None else Phase(p.batch_size, p.epochs, p.clip_norm, self.noise_multiplier)
            for p in self.then
        ]
        return (first, *later)

    def steps_of(self, phase: Phase) -> int:
        """Releases in a phase: ceil(epochs * N / B), in exact arithmetic (0.1 means one tenth)."""
        return math.ceil(Fraction(str(phase.epochs)) * self.num_examples / phase.batch_size)

    @property
    def steps(self) -> int:
        """T, number of releases in all."""
        return sum(self.steps_of(phase) for phase in self.phases)

    def expected_examples(self, count: int) -> int:
        """Expected number of units in the first `count` releases together, each counted as often as it is drawn."""
        drawn, left = 0, count
        for phase in self.phases:
            taken = min(left, self.steps_of(phase))
            drawn, left = drawn + taken * phase.batch_size, left - taken
        return drawn

    @property
    def sample_rate(self) -> float:
        """q = B / N of the first phase."""
        return self.batch_size / self.num_examples

    @property
    def private(self) -> bool:
        return self.epsilon != math.inf

    def at(self, release: int) -> ReleaseSetting:
        """The numbers of release number `release` (from 0).

        Raises:
            IndexError: for a release that the plan does not have.
        """
        first = 0
        for number, phase in enumerate(self.phases):
            steps = self.steps_of(phase)
            if first <= release < first + steps:
                assert phase.noise_multiplier is not None
                return ReleaseSetting(
                    number=release, phase=number, index=release - first, steps=steps, batch_size=phase.batch_size,
                    sample_rate=phase.batch_size / self.num_examples, noise_multiplier=phase.noise_multiplier,
                    clip_norm=phase.clip_norm, noise=self.noise,
                )  # fmt: skip
            first += steps
        raise IndexError(f"Expected 0 <= release={release} < steps={self.steps}: the plan pays for no other.")

    def releases(self, count: int | None = None) -> Releases:
        """The first `count` releases (all by default) as (release, how often), one pair a phase."""
        return self._first(self.phases, self.steps if count is None else count)

    def epsilon_after(self, count: int) -> float:
        """Epsilon of the first `count` releases at the plan's delta; inf without privacy."""
        return epsilon_spent(self.releases(count), self.delta)

    def as_record(self) -> dict[str, Any]:
        """The plan as plain values for the privacy card; infinite values become None, as JSON has no infinity."""
        record = asdict(self) | {
            "phases": [asdict(p) | {"steps": self.steps_of(p), "sample_rate": p.batch_size / self.num_examples}
                       for p in self.phases],
            "steps": self.steps,
            "sample_rate": self.sample_rate,
            "sampling": "poisson",
            "delta_times_num_examples": self.delta * self.num_examples,
        }  # fmt: skip
        del record["then"]
        return _finite(record)

    def _releases_at(self, noise: float) -> Releases:
        phases = [replace(phase, noise_multiplier=noise) for phase in self.phases]
        return self._first(phases, sum(self.steps_of(p) for p in phases))

    def _first(self, phases: Sequence[Phase], count: int) -> Releases:
        found, left = [], count
        for phase in phases:
            taken = min(left, self.steps_of(phase))
            assert phase.noise_multiplier is not None
            if taken:
                found.append((Release(phase.batch_size / self.num_examples, phase.noise_multiplier, self.noise), taken))
            left -= taken
        return found


def default_delta(num_examples: int) -> float:
    """1 / (2N), rounded down to one significant digit.

    >>> default_delta(67_349)
    7e-06
    """
    exact = Fraction(1, 2 * num_examples)
    exponent = math.floor(math.log10(exact))
    digit = math.floor(exact / Fraction(10) ** exponent)
    if digit == 0:  # log10 rounded up to the next power of ten
        exponent, digit = exponent - 1, 9
    return float(f"{digit}e{exponent}")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
