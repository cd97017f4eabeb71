"""The Gaussian (and the Laplace) mechanism: noise for a clipped sum, in the sum's type, in place and block by block."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from privzoo.privacy.accounting import GAUSSIAN
from privzoo.privacy.plan import PrivacyPlan
from privzoo.privacy.ranks import begins_here, held_here
from privzoo.privacy.streams import RunKey

BLOCK = 1 << 18  # values a block: 1 MiB of float32. Part of a stream's definition, as is float32.


@dataclass(frozen=True)
class Part:
    """Some of the sums of one release, with a sensitivity and a noise of their own.

    Args:
        names: of the sums.
        sensitivity: bound on the joint L2 norm of one unit's contribution to them.
        noise_std: standard deviation of the noise on every coordinate of them.
    """

    names: tuple[str, ...]
    sensitivity: float
    noise_std: float


class NoiseMechanism:
    """Turns the clipped sum of a release into a noisy one.

    Formal guarantee: with the plan's Poisson sampling and contributions of joint L2 norm at most clip_norm (or, in parts, of
    at most each part's sensitivity), what `release` returns costs what the plan says for that release. Noise is independent
    N(0, (noise_multiplier * clip_norm)^2), or N(0, noise_std^2) of the part, on every coordinate; in a plan of Laplace noise
    the norms are L1 and the noise is Laplace(noise_multiplier * clip_norm). It is keyed by (run key,
    release, digest, weights, tensor name). A second call with the same arguments gives the same noise; a call at other
    weights or in another configuration gives fresh noise. Of a sum that is dealt out to ranks each rank draws for its part
    what would be drawn there for the whole sum: together they are one draw, whatever their number.

    Args:
        plan: the public numbers.
        key: the run's secret.
        digest: `RunKey.digest` of all that determines the sum, but for the weights.
        threads: how many blocks are drawn at a time; the values do not depend on it.
    """

    def __init__(self, plan: PrivacyPlan, key: RunKey, digest: str, threads: int | None = None) -> None:
        self.plan = plan
        self.key = key
        self.digest = digest
        self.draws = 0
        self._pool = ThreadPoolExecutor(threads or torch.get_num_threads())

    def release(self, sums: Mapping[str, Tensor], release: int, weights: str, parts: Sequence[Part] | None = None) -> None:
        """Add this release's noise to `sums`, in place.

        Divided by its noise, part k moves by at most sensitivity_k / noise_std_k; all of them together are one Gaussian
        event of the plan's noise multiplier sigma if sum_k (sensitivity_k / noise_std_k)^2 <= 1 / sigma^2, which is
        checked (to 1e-9, for rounding).

        Args:
            sums: clipped sum of every trainable parameter.
            release: index in the plan.
            weights: `fingerprint` of the trainable parameters that the sum was taken at.
            parts: sensitivity and noise of each part; None: one part, of the plan's clip_norm.
        Raises:
            IndexError: if the plan has no such release.
            ValueError: if the parts cost more than the plan pays for, or a sum is in none or in two of them.
        """
        setting = self.plan.at(release)
        self.draws += 1
        if setting.noise_multiplier == 0:
            return
        if parts is not None and setting.noise != GAUSSIAN:
            raise ValueError(f"Expected no parts with {setting.noise} noise: their costs add up for Gaussian noise alone.")
        scale = setting.noise_multiplier * setting.clip_norm
        scales = dict.fromkeys(sums, scale) if parts is None else _noise_stds(parts, list(sums), setting.noise_multiplier)
        for name, total in sums.items():
            self._add_noise(total, scales[name], release, weights, name)

    def _add_noise(self, total: Tensor, scale: float, release: int, weights: str, name: str) -> None:
        here, first = held_here(total), begins_here(total)
        if not here.is_contiguous():
            raise ValueError(f"Expected a contiguous sum for {name}: its flat view must be the tensor itself.")
        flat = here.view(-1)
        end = first + len(flat)
        # float32 noise on a float64 sum could be told from the sum by its missing digits.
        dtype: Any = np.float64 if total.dtype == torch.float64 else np.float32
        blocks = range(first // BLOCK, -(-end // BLOCK) if len(flat) else first // BLOCK)

        def add(block: int) -> None:
            begins, ends = max(first, block * BLOCK), min(end, (block + 1) * BLOCK)
            drawn = np.empty(ends - block * BLOCK, dtype=dtype)  # of a block whose beginning another rank holds, that too
            stream = self.key.stream("noise", release, self.digest + weights, name, block)
            if self.plan.noise == GAUSSIAN:
                stream.standard_normal(out=drawn, dtype=dtype)
            else:
                drawn[:] = stream.laplace(size=len(drawn))
            own = torch.from_numpy(drawn[begins - block * BLOCK :])
            flat[begins - first : ends - first].add_(own.to(flat.device), alpha=scale)

        if len(blocks) == 1:
            add(blocks[0])
        else:
            list(self._pool.map(add, blocks))


def _noise_stds(parts: Sequence[Part], sums: Iterable[str], noise_multiplier: float) -> dict[str, float]:
    """Noise by name, if the parts are the sums and together cost no more than one event of the noise multiplier."""
    if Counter(name for part in parts for name in part.names) != Counter(sums):
        raise ValueError("Expected every sum of a release in exactly one part.")
    noisy = all(part.noise_std > 0 and 0 <= part.sensitivity < math.inf for part in parts)
    cost = sum((part.sensitivity / part.noise_std) ** 2 for part in parts) if noisy else math.inf
    if not cost <= noise_multiplier**-2 * (1 + 1e-9):
        raise ValueError(f"Expected parts of a noise multiplier of {noise_multiplier:g} in all, found {cost**-0.5:g}.")
    return {name: part.noise_std for part in parts for name in part.names}


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of the parameters' names and exact values: released quantities, so it may be written anywhere.

    Of what is dealt out to ranks it is of this one's part.
    """
    digest = sha256()
    for name, value in parameters:
        digest.update(name.encode())
        digest.update(held_here(value.detach()).cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
