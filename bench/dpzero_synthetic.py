"""Why the noise goes on a number and not on a vector: the synthetic study of the DPZero paper, small.

    python bench/dpzero_synthetic.py [out=bench/results/dpzero_synthetic.md]

Losses ||A (w - w_i)|| with A = 3 diag(1, 1/2, ..., 1/d), so that few coordinates matter however large d is; the w_i lie in
the first coordinate, so that the start is as far from the optimum for every d (Zhang et al. 2024; their code calls the mode
"linear"). Every method makes 1,000 releases over all 5,000 examples, at epsilon 1 and delta 1e-6 (our accountant):

- DP-GD: the sum of clipped gradients, noise on d values.
- DPGD-0th (their Algorithm 1): the sum of clipped (l+ - l-) / (2 lambda) u, which are vectors of length up to L d (their
  code: L times the square of the length of u), noise on d values.
- DPZero (their Algorithm 2): the sum of clipped (l+ - l-) / (2 lambda), noise on one value.

The table shows the excess loss of the mean iterate at the best of some learning rates, mean of three seeds. The data are
drawn here, so that nothing private hangs on the choice.
"""

import platform
import sys
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np

from privzoo.privacy.plan import PrivacyPlan

EXAMPLES, STEPS, SCALE, SMOOTHING = 5_000, 1_000, 3.0, 1e-4
DIMENSIONS, SEEDS = (20, 200, 2_000), (0, 1, 2)
RATES = [10.0 ** (-exponent / 2) for exponent in range(0, 15)]


class Median:
    """The problem in d dimensions: gradients have norm at most L = SCALE."""

    def __init__(self, dimension: int, seed: int) -> None:
        self.generator = np.random.default_rng((seed, dimension))
        self.weights = SCALE / np.arange(1, dimension + 1)
        self.firsts = 1.0 + self.generator.standard_normal(EXAMPLES)
        self.lowest = float(self.losses(np.median(self.firsts) * (np.arange(dimension) == 0)).mean())

    def losses(self, w: np.ndarray) -> np.ndarray:
        """Shape (EXAMPLES,); all but the first coordinate of an example are 0."""
        rest = np.square(self.weights[1:] * w[1:]).sum()
        return np.sqrt(np.square(self.weights[0] * (w[0] - self.firsts)) + rest)

    def clipped_gradients(self, w: np.ndarray) -> np.ndarray:
        """Their sum; no gradient is longer than SCALE."""
        shrunk = 1 / np.maximum(self.losses(w), 1e-12)
        found = np.square(self.weights) * w * shrunk.sum()
        found[0] = self.weights[0] ** 2 * ((w[0] - self.firsts) * shrunk).sum()
        return found

    def slopes(self, w: np.ndarray, u: np.ndarray) -> np.ndarray:
        return (self.losses(w + SMOOTHING * u) - self.losses(w - SMOOTHING * u)) / (2 * SMOOTHING)


def dp_gd(problem: Median, w: np.ndarray, sigma: float) -> np.ndarray:
    return problem.clipped_gradients(w) + sigma * SCALE * problem.generator.standard_normal(len(w))


def dpgd_0th(problem: Median, w: np.ndarray, sigma: float) -> np.ndarray:
    u, clip_norm = problem.generator.standard_normal(len(w)), SCALE * len(w)
    slopes = problem.slopes(w, u)
    factors = np.minimum(1, clip_norm / np.maximum(np.abs(slopes) * np.linalg.norm(u), 1e-12))
    return (factors * slopes).sum() * u + sigma * clip_norm * problem.generator.standard_normal(len(w))


def dpzero(problem: Median, w: np.ndarray, sigma: float) -> np.ndarray:
    u = problem.generator.standard_normal(len(w))
    slopes = np.clip(problem.slopes(w, u), -SCALE, SCALE)
    return (slopes.sum() + sigma * SCALE * problem.generator.standard_normal()) * u


def excess(release: Callable, dimension: int, rate: float, sigma: float) -> float:
    """Loss of the mean iterate over the lowest loss, mean of the seeds."""
    found = []
    for seed in SEEDS:
        problem = Median(dimension, seed)
        w, mean = np.zeros(dimension), np.zeros(dimension)
        for _ in range(STEPS):
            w = w - rate * release(problem, w, sigma) / EXAMPLES
            mean += w / STEPS
        found.append(float(problem.losses(mean).mean()) - problem.lowest)
    return float(np.mean(found))


def main(argv: list[str]) -> None:
    out = Path(dict(argument.split("=", 1) for argument in argv).get("out", "bench/results/dpzero_synthetic.md"))
    plan = PrivacyPlan(num_examples=EXAMPLES, batch_size=EXAMPLES, epochs=STEPS, delta=1e-6, epsilon=1.0)
    sigma = plan.noise_multiplier
    assert sigma is not None
    start = np.mean([Median(20, seed).losses(np.zeros(20)).mean() - Median(20, seed).lowest for seed in SEEDS])
    versions = ", ".join(f"{name} {version(name)}" for name in ("numpy", "dp-accounting"))
    lines = [
        f"`python bench/dpzero_synthetic.py`, {date.today()}, {platform.machine()}, {versions}; sigma {sigma:.2f}.",
        "", f"Excess loss (at the start {start:.3f}) and the best rate, by dimension:", "",
        "| | " + " | ".join(f"d = {d:,}" for d in DIMENSIONS) + " |", "|---" * (len(DIMENSIONS) + 1) + "|",
    ]  # fmt: skip
    for name, release, noise in (
        ("DP-GD", dp_gd, sigma), ("DPGD-0th (Algorithm 1)", dpgd_0th, sigma), ("DPZero (Algorithm 2)", dpzero, sigma),
        ("DPZero without noise", dpzero, 0.0),
    ):  # fmt: skip
        cells = []
        for dimension in DIMENSIONS:
            best = min((excess(release, dimension, rate, noise), rate) for rate in RATES)
            cells.append(f"{best[0]:.3f} (rate {best[1]:.0e})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
