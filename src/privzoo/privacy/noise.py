"""The Gaussian mechanism: noise for a clipped sum, drawn in float32, in place and block by block."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from privzoo.privacy.plan import PrivacyPlan
from privzoo.privacy.streams import RunKey

BLOCK = 1 << 18  # values a block: 1 MiB of float32. Part of a stream's definition, as is float32.


class GaussianMechanism:
    """Turns the clipped sum of a release into a noisy one.

    Formal guarantee: with the plan's Poisson sampling and contributions of joint L2 norm at most clip_norm, what
    `release` returns costs what the plan says for that release. Noise is independent N(0, (noise_multiplier *
    clip_norm)^2) on every coordinate, keyed by (run key, release, digest, weights, tensor name). A second call with the
    same arguments gives the same noise; a call at other weights or in another configuration gives fresh noise.

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

    def release(self, sums: Mapping[str, Tensor], release: int, weights: str) -> None:
        """Add this release's noise to `sums`, in place.

        Args:
            sums: clipped sum of every trainable parameter.
            release: index in the plan.
            weights: `fingerprint` of the trainable parameters that the sum was taken at.
        Raises:
            IndexError: if the plan has no such release.
        """
        setting = self.plan.at(release)
        self.draws += 1
        if setting.noise_multiplier == 0:
            return
        noise_std = setting.noise_multiplier * setting.clip_norm
        for name, total in sums.items():
            self._add_noise(total, noise_std, release, weights, name)

    def _add_noise(self, total: Tensor, noise_std: float, release: int, weights: str, name: str) -> None:
        if not total.is_contiguous():
            raise ValueError(f"Expected a contiguous sum for {name}: its flat view must be the tensor itself.")
        flat = total.view(-1)
        # float32 noise on a float64 sum could be told from the sum by its missing digits.
        dtype: Any = np.float64 if total.dtype == torch.float64 else np.float32
        blocks = range(-(-flat.numel() // BLOCK))

        def add(block: int) -> None:
            part = flat[block * BLOCK : (block + 1) * BLOCK]
            drawn = np.empty(part.numel(), dtype=dtype)
            stream = self.key.stream("noise", release, self.digest + weights, name, block)
            stream.standard_normal(out=drawn, dtype=dtype)
            part.add_(torch.from_numpy(drawn).to(part.device), alpha=noise_std)

        if len(blocks) == 1:
            add(0)
        else:
            list(self._pool.map(add, blocks))


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of the parameters' names and exact values: released quantities, so it may be written anywhere."""
    digest = sha256()
    for name, value in parameters:
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
