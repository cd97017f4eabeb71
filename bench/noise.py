"""What the noise of a release costs beside its clipped sums."""

import statistics
import time

import torch
from models import Case, trainable_of

from privzoo.privacy.clipping import BookKeeping
from privzoo.privacy.noise import NoiseMechanism
from privzoo.privacy.plan import PrivacyPlan
from privzoo.privacy.streams import RunKey

MICRO_BATCHES = 8


def seconds_of_noise(case: Case) -> str:
    """One sentence: share of the noise in a release of eight micro-batches."""
    torch.set_num_threads(1)
    trainable_of(case, "full")
    plan = PrivacyPlan(num_examples=10_000, batch_size=64, epochs=1, delta=1e-5, epsilon=None, clip_norm=1.0,
                       noise_multiplier=1.0)  # fmt: skip
    mechanism = NoiseMechanism(plan, RunKey.fresh(), "bench")
    engine, sums = BookKeeping(case.model), {}
    engine(case.losses, 1.0, into=sums)
    queries, noises = [], []
    for release in range(3):
        start = time.perf_counter()
        engine(case.losses, 1.0, into=sums)
        middle = time.perf_counter()
        mechanism.release(sums, release, "weights")
        queries.append(middle - start)
        noises.append(time.perf_counter() - middle)
    query, noise = statistics.median(queries), statistics.median(noises)
    count = sum(value.numel() for value in sums.values())
    share = noise / (noise + MICRO_BATCHES * query)
    return (
        f"Noise of one release on {count:,} values: {noise:.2f} s ({noise / count * 1e9:.1f} ns a value), "
        f"{share:.1%} of a release of {MICRO_BATCHES} micro-batches of {case.rows} rows ({query:.2f} s each)."
    )
