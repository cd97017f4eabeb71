"""The Gaussian mechanism: how much noise, where it comes from, and that it comes in place."""

import itertools
import math
import tracemalloc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2, kstest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from privzoo.privacy.noise import BLOCK, NoiseMechanism, fingerprint
from privzoo.privacy.plan import Phase, PrivacyPlan
from privzoo.privacy.sampling import PoissonDraws
from privzoo.privacy.streams import RunKey

DIGEST, WEIGHTS = "d" * 64, "0" * 64
PLAN = PrivacyPlan(num_examples=20, batch_size=5, epochs=2, delta=1e-3, noise_multiplier=8.0, clip_norm=0.25)
STD = 8.0 * 0.25


def mechanism(plan: PrivacyPlan = PLAN, seed: int = 0, digest: str = DIGEST, threads: int | None = None) -> NoiseMechanism:
    return NoiseMechanism(plan, RunKey.for_tests(seed), digest, threads)


def noise(size: int = 5000, *, name: str = "w", release: int = 0, weights: str = WEIGHTS, **options: Any) -> np.ndarray:
    """What is added to a sum of `size` zeros, in units of its stated standard deviation."""
    sums = {name: torch.zeros(size)}
    mechanism(**options).release(sums, release, weights)
    return sums[name].double().numpy() / STD


def independent(first: np.ndarray, second: np.ndarray) -> bool:
    """Correlation of two standard normal samples within 5 standard errors of 0, and no value in common."""
    return abs(float(first @ second)) / math.sqrt(len(first)) < 5 and not (first == second).any()


# ---- how much


def test_noise_has_standard_deviation_sigma_times_clip_norm() -> None:
    """PRIVACY 6: sum of 5,000 squares is chi-square; the shape is normal (Kolmogorov-Smirnov)."""
    drawn = noise()
    assert chi2.ppf(1e-6, 5000) < (drawn**2).sum() < chi2.isf(1e-6, 5000)
    assert abs(drawn.mean()) < 5 / math.sqrt(5000)
    assert kstest(drawn, "norm").pvalue > 1e-3


@pytest.mark.parametrize("size", [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_every_coordinate_gets_noise_of_its_own(size: int) -> None:
    """PRIVACY 36: also where a tensor ends within a block; float32 normals are distinct but for rare accidents."""
    drawn = noise(size)
    assert (drawn != 0).all()
    assert len(np.unique(drawn)) > 0.9 * size
    for start in range(0, size - BLOCK, BLOCK):
        both = min(BLOCK, size - start - BLOCK)
        assert not (drawn[start : start + both] == drawn[start + BLOCK : start + BLOCK + both]).all()


def test_noise_is_added_to_the_sum() -> None:
    """PRIVACY 6: what comes out is the sum plus the noise, to a rounding error of float32."""
    sums = {"w": torch.full((5000,), 100.0)}
    mechanism().release(sums, 0, WEIGHTS)
    assert torch.allclose(sums["w"] - 100, torch.from_numpy(noise() * STD).float(), atol=1e-4)


def test_noise_follows_the_phase() -> None:
    """Each phase has its own sigma and C: 8 * 0.25 = 2, then 3 * 9 = 27."""
    later = (Phase(batch_size=10, epochs=1, clip_norm=3.0, noise_multiplier=9.0),)
    plan = PrivacyPlan(20, 5, 2, 1e-3, clip_norm=0.25, noise_multiplier=8.0, then=later)
    for release, std in ((0, 2.0), (7, 2.0), (8, 27.0), (9, 27.0)):
        drawn = noise(release=release, plan=plan) * STD / std
        assert chi2.ppf(1e-6, 5000) < (drawn**2).sum() < chi2.isf(1e-6, 5000)
    with pytest.raises(IndexError):
        noise(release=10, plan=plan)


def test_without_privacy_nothing_is_added() -> None:
    plan = PrivacyPlan(num_examples=20, batch_size=5, epochs=2, delta=1e-3, epsilon=math.inf)
    assert not noise(plan=plan).any()


def test_one_call_is_one_draw() -> None:
    """PRIVACY 10: releases are counted, however many tensors a release has."""
    counted = mechanism()
    for release in range(3):
        counted.release({"a": torch.zeros(2), "b": torch.zeros(3)}, release, WEIGHTS)
        assert counted.draws == release + 1


# ---- from where


@pytest.mark.parametrize(
    "other",
    [{"release": 1}, {"weights": "1" * 64}, {"digest": "e" * 64}, {"name": "v"}, {"seed": 1}],
    ids=lambda other: next(iter(other)),
)
def test_noise_is_fresh_wherever_the_sum_may_differ(other: dict[str, Any]) -> None:
    """PRIVACY 35 and 36: another release, other weights, another configuration, tensor or key have independent noise."""
    assert independent(noise(), noise(**other))


def test_all_releases_of_a_run_have_independent_noise() -> None:
    """PRIVACY 36: no two of 8 releases share a stream."""
    drawn = [noise(release=t) for t in range(8)]
    assert all(independent(drawn[i], drawn[j]) for i in range(8) for j in range(i))


def test_blocks_of_a_tensor_have_independent_noise() -> None:
    drawn = noise(3 * BLOCK).reshape(3, BLOCK)
    assert all(independent(drawn[i][:5000], drawn[j][:5000]) for i in range(3) for j in range(i))


def test_same_release_at_same_weights_has_the_same_noise() -> None:
    """PRIVACY 35: a release that is computed again after a kill comes out bit by bit the same."""
    assert (noise() == noise()).all()
    again = mechanism()
    again.release({"w": torch.zeros(5000)}, 5, WEIGHTS)  # whatever was drawn in between
    sums = {"other": torch.zeros(3), "w": torch.zeros(5000)}
    again.release(sums, 0, WEIGHTS)
    assert (sums["w"].double().numpy() / STD == noise()).all()


def test_noise_is_not_that_of_a_published_seed() -> None:
    """PRIVACY 36: torch's and numpy's generators, seeded or not, neither give the noise nor are used up by it."""
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    drawn = noise(seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    assert (noise(seed=0) == drawn).all()
    torch.manual_seed(0)
    assert independent(drawn, torch.randn(5000, dtype=torch.float32).double().numpy())


def test_runs_that_differ_only_in_epsilon_share_neither_draw_nor_noise() -> None:
    """PRIVACY 36: a grid eps=1,3 with one seed, even with one key: subtracting the runs does not cancel the noise."""
    key, digests = RunKey.for_tests(0), [RunKey.for_tests(0).digest({"seed": 0, "eps": eps}) for eps in (1.0, 3.0)]
    for release in range(8):
        assert independent(*(noise(release=release, digest=digest) for digest in digests))
    plan = PrivacyPlan(num_examples=200, batch_size=100, epochs=4, delta=1e-3, epsilon=math.inf)
    one, other = ([PoissonDraws(plan, key, digest)(t).tolist() for t in range(8)] for digest in digests)
    assert not any(a == b for a, b in zip(one, other, strict=True))


def test_noise_is_the_documented_stream() -> None:
    """A stream's definition: float32 normals, in blocks of 2^18, keyed by release, digest, weights and tensor."""
    assert BLOCK == 2**18
    key = RunKey.for_tests(0)
    blocks = [key.stream("noise", 3, DIGEST + WEIGHTS, "w", b).standard_normal(BLOCK, dtype=np.float32) for b in range(2)]
    expected = torch.from_numpy(np.concatenate(blocks)[: BLOCK + 9])
    sums = {"w": torch.zeros(BLOCK + 9)}
    mechanism().release(sums, 3, WEIGHTS)
    assert torch.equal(sums["w"], torch.zeros(BLOCK + 9).add_(expected, alpha=STD))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parts_have_the_noise_of_the_whole(monkeypatch, dtype) -> None:
    """PRIVACY 17: ranks that hold parts draw together what one process draws; parts begin and end anywhere in a block. Where
    one begins is what two real processes ask their tensors in tests/methods/test_ranks.py."""
    size, cuts = 3 * BLOCK + 5, (0, 0, 3, BLOCK - 1, BLOCK + 2, 3 * BLOCK, 3 * BLOCK, 3 * BLOCK + 5)
    whole = torch.zeros(size, dtype=dtype)
    mechanism().release({"w": whole}, 3, WEIGHTS)
    for begins, ends in itertools.pairwise(cuts):
        monkeypatch.setattr("privzoo.privacy.noise.begins_here", lambda _, begins=begins: begins)
        part = torch.zeros(ends - begins, dtype=dtype)
        mechanism().release({"w": part}, 3, WEIGHTS)
        assert torch.equal(part, whole[begins:ends]), (begins, ends)


@pytest.mark.parametrize("threads", [2, 5])
def test_noise_does_not_depend_on_the_number_of_threads(threads: int) -> None:
    assert (noise(4 * BLOCK + 3, threads=threads) == noise(4 * BLOCK + 3, threads=1)).all()


# ---- in place


def test_noise_is_added_in_place() -> None:
    sums = {"w": torch.zeros(3, 4), "b": torch.zeros(()), "none": torch.zeros(0)}
    addresses = {name: value.data_ptr() for name, value in sums.items()}
    mechanism().release(sums, 0, WEIGHTS)
    assert {name: value.data_ptr() for name, value in sums.items()} == addresses
    assert [tuple(value.shape) for value in sums.values()] == [(3, 4), (), (0,)]
    assert (sums["w"] != 0).all()
    assert sums["b"] != 0


def test_noise_is_as_fine_as_the_sum() -> None:
    """PRIVACY 27 and 36: a float64 sum gets float64 noise, whose last digits float32 noise would leave to the sum.

    Less than 1 in 1,000 values would be a float32 number by accident.
    """
    sums = {"w": torch.zeros(5000, dtype=torch.float64)}
    mechanism().release(sums, 0, WEIGHTS)
    units = sums["w"] / STD
    assert (units == units.float().double()).sum() < 5
    assert chi2.ppf(1e-6, 5000) < float(units.square().sum()) < chi2.isf(1e-6, 5000)


def test_a_sum_that_is_no_contiguous_block_is_refused() -> None:
    """Its flat copy would get the noise, and the sum none."""
    with pytest.raises(ValueError, match="contiguous sum for w"):
        mechanism().release({"w": torch.zeros(4, 3).T}, 0, WEIGHTS)


class Allocations(TorchDispatchMode):
    """Sizes in bytes of all storages that torch operations make, but for those of known tensors."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [t.untyped_storage() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.sizes += [s.nbytes() for s in made if s.data_ptr() not in self.known]
        return result


def test_a_large_sum_is_not_copied() -> None:
    """Of a sum of 16 MiB, numpy holds at most 3 MiB at a time and torch makes no tensor larger than 1 MiB."""
    sums, drawing = {"w": torch.zeros(16 * 2**18)}, mechanism(threads=1)
    drawing._pool = SimpleNamespace(map=map)  # type: ignore[assignment]  # in this thread, where torch can be watched
    with Allocations(sums["w"]) as watched:
        tracemalloc.start()
        drawing.release(sums, 0, WEIGHTS)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert 2**20 <= peak < 3 * 2**20
    assert max(watched.sizes, default=0) <= 2**20


# ---- fingerprint


def test_fingerprint_tells_weights_apart() -> None:
    """PRIVACY 35: one bit of one value, a name, or the sign of a zero is another fingerprint; a copy is the same."""
    weights = torch.tensor([1.0, 2.0, 0.0])
    nearly = weights.clone()
    nearly[1] = torch.nextafter(nearly[1], torch.tensor(3.0))
    found = [fingerprint([("w", value)]) for value in (weights, nearly, torch.tensor([1.0, 2.0, -0.0]), weights.double())]
    found += [fingerprint([("v", weights)]), fingerprint([("w", weights), ("v", weights)]), fingerprint([])]
    assert len(set(found)) == len(found)
    assert fingerprint([("w", weights.clone().requires_grad_())]) == found[0]
    assert fingerprint([("w", torch.stack([weights, weights], 1)[:, 0])]) == found[0]  # the values count, not the strides


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
def test_fingerprint_takes_every_dtype(dtype: torch.dtype) -> None:
    one, other = torch.tensor([1, 0]).to(dtype), torch.tensor([0, 1]).to(dtype)
    assert fingerprint([("w", one)]) != fingerprint([("w", other)])
    assert fingerprint([("w", torch.ones((), dtype=dtype))]) == fingerprint([("w", torch.ones((), dtype=dtype))])
