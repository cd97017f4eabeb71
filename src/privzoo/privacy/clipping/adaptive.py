"""Adaptive clipping: the clip norm follows a quantile of the gradient norms, which it learns from a noisy count.

A release makes two sums public at once: that of the gradients, clipped to C_t, and that of b_i - 1/2 over the drawn
examples, b_i = 1 where the gradient norm is at most C_t. One example moves the first by at most C_t and the second by
exactly 1/2. With noise of sigma_g C_t on the first and sigma_b on the second, the pair, each part in units of its noise,
moves by at most sqrt(1 / sigma_g^2 + 1 / (2 sigma_b)^2): one Gaussian event of noise multiplier sigma, where

    1 / sigma^2 = 1 / sigma_g^2 + 1 / (2 sigma_b)^2.

sigma is the plan's, sigma_b is chosen, sigma_g follows. C_t is made of former releases alone.

Under Poisson sampling sum(b_i - 1/2) / B + 1/2 has the mean sum(b_i) / N over all examples, as B = qN: dividing by the
expected B, never by how many were drawn, is unbiased.

Source: Andrew et al. 2021, Algorithm 1 and Theorem 1.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from privzoo.errors import UserError
from privzoo.privacy.noise import Part
from privzoo.privacy.plan import PrivacyPlan, ReleaseSetting

COUNT = "adaptive.count"
COUNT_SENSITIVITY = 0.5
FARTHEST = 1e6  # C_t stays within this factor of where it began: it can neither vanish nor overflow


class AdaptiveClip(nn.Module):
    """The clip norm of each release, C_t = C times a scale that is learned; C is the plan's clip_norm.

    Guarantee: with the parts of `parts` a release costs what the plan says, whatever scale has come to be. The scale begins
    at 1 with each phase and is a buffer: it lies in the checkpoint and its seal, and keys the noise. Without privacy
    (eps=inf, C = inf, no noise) nothing is clipped, and the scale does nothing.

    Args:
        quantile: part of the gradients that C_t is to leave unclipped, in (0, 1).
        rate: eta; C_t moves by the factor exp(-eta (found part - quantile)).
        count_noise: sigma_b, standard deviation of the noise on the count, in examples; None: B / 20.
    Raises:
        UserError: for a value out of range.
    """

    scale: Tensor

    def __init__(self, quantile: float = 0.5, rate: float = 0.2, count_noise: float | None = None) -> None:
        super().__init__()
        for name, value, largest in (
            ("quantile", quantile, 1.0),
            ("rate", rate, math.inf),
            ("count_noise", count_noise, math.inf),
        ):
            if value is not None and (not isinstance(value, (int, float)) or not 0 < value < largest):
                raise UserError(f"Expected 0 < method.adaptive.{name}={value} < {largest:g}.")
        self.quantile, self.rate, self.count_noise = quantile, rate, count_noise
        self.register_buffer("scale", torch.ones(()))

    def check(self, plan: PrivacyPlan) -> None:
        """Raises UserError if sigma_b leaves no noise multiplier for the gradients in some phase."""
        first = 0
        for phase in plan.phases:
            self.noise_multipliers(plan.at(first))
            first += plan.steps_of(phase)

    def noise_multipliers(self, setting: ReleaseSetting) -> tuple[float, float]:
        """(sigma_g, sigma_b) of a release; 0 without privacy.

        Raises:
            UserError: if 2 sigma_b <= sigma.
        """
        sigma = setting.noise_multiplier
        if sigma == 0:
            return 0.0, 0.0
        count_noise = setting.batch_size / 20 if self.count_noise is None else self.count_noise
        left = sigma**-2 - (2 * count_noise) ** -2
        if left <= 0:
            raise UserError(
                f"Expected method.adaptive.count_noise={count_noise:g} > noise_multiplier / 2 = {sigma / 2:g}: the count "
                "alone would take all of the budget; raise it, or batch_size (count_noise is batch_size / 20 by default)."
            )
        return left**-0.5, count_noise

    def clip_norm(self, setting: ReleaseSetting) -> float:
        """C_t."""
        return float(self.scale) * setting.clip_norm

    def count(self, norms: Sequence[Tensor], setting: ReleaseSetting) -> Tensor:
        """Sum of b_i - 1/2 over the drawn examples, (1,); a norm that is not finite has b_i = 0. Private.

        Args:
            norms: gradient norms before clipping, one tensor a micro-batch.
            setting: of the release.
        """
        clip_norm = self.clip_norm(setting)
        total = torch.zeros(1, device=self.scale.device)
        for each in norms:
            total += ((each <= clip_norm) & each.isfinite()).sum() - COUNT_SENSITIVITY * len(each)
        return total

    def parts(self, gradients: Iterable[str], setting: ReleaseSetting) -> list[Part]:
        """What the mechanism needs to know of the two sums of a release.

        Args:
            gradients: names of the sums that are clipped to C_t together.
            setting: of the release.
        """
        of_gradients, of_count = self.noise_multipliers(setting)
        clip_norm = self.clip_norm(setting)
        return [Part(tuple(gradients), clip_norm, of_gradients * clip_norm), Part((COUNT,), COUNT_SENSITIVITY, of_count)]

    def update(self, noisy_count: Tensor, setting: ReleaseSetting) -> None:
        """C_t to C_{t+1} = C_t exp(-eta (part - quantile)), where part = noisy count / B + 1/2.

        Args:
            noisy_count: released, (1,).
            setting: of the release; B is its expected batch size.
        """
        part = noisy_count.reshape(()).to(self.scale) / setting.batch_size + 0.5
        moved = self.scale * torch.exp(-self.rate * (part - self.quantile))
        self.scale.copy_(moved.clamp(1 / FARTHEST, FARTHEST))
