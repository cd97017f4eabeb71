"""Poisson sampling: every example, alone, with probability q; and the logical batches made of the draws."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from privzoo.privacy.plan import Phase, PrivacyPlan
from privzoo.privacy.sampling import DrawnRows, LogicalBatch, PoissonBatches, PoissonDraws, private_loader
from privzoo.privacy.streams import RunKey

DIGEST = "d" * 64
N, B, DRAWS = 20, 5, 10_000
RATE = B / N


def unaccounted(**changes: object) -> PrivacyPlan:
    """A plan that costs no accounting; draws don't depend on the noise."""
    numbers = {"num_examples": N, "batch_size": B, "epochs": DRAWS * B / N, "delta": 1e-3, "epsilon": math.inf}
    return PrivacyPlan(**{**numbers, **changes})


@pytest.fixture(scope="module")
def membership() -> np.ndarray:
    """(draws, N) of 0 and 1: who takes part in which of 10,000 draws."""
    draws = PoissonDraws(unaccounted(), RunKey.for_tests(0), DIGEST)
    found = np.zeros((DRAWS, N))
    for release in range(DRAWS):
        found[release, draws(release)] = 1
    return found


def within(statistic: float, degrees: int) -> bool:
    """Inside the central 1 - 2e-6 of a chi-square distribution. The draws are fixed: this never fails by chance."""
    return bool(chi2.ppf(1e-6, degrees) < statistic < chi2.isf(1e-6, degrees))


def test_every_example_takes_part_at_rate_q(membership: np.ndarray) -> None:
    """PRIVACY 1: 10,000 draws; counts of 20 examples are binomial(10,000, q)."""
    counts = membership.sum(0)
    assert within(float(((counts - DRAWS * RATE) ** 2).sum() / (DRAWS * RATE * (1 - RATE))), N)


def test_examples_are_drawn_independently_of_each_other(membership: np.ndarray) -> None:
    """PRIVACY 2: sum over 190 pairs of the squared correlation, times the draws, is chi-square with 190 degrees.

    A fixed batch size has correlation -1/19 in every pair: 190 * 10,000 / 361 = 5,263 more than expected.
    """
    centred = membership - RATE
    covariance = centred.T @ centred / DRAWS / (RATE * (1 - RATE))
    pairs = [covariance[i, j] for i, j in itertools.combinations(range(N), 2)]
    assert within(DRAWS * float(np.square(pairs).sum()), len(pairs))


def test_batch_size_is_binomial(membership: np.ndarray) -> None:
    """PRIVACY 1: the realised size has variance N q (1-q) = 3.75, not 0 (shuffled or fixed-size batches)."""
    sizes = membership.sum(1)
    assert within(float(((sizes - N * RATE) ** 2).sum() / (N * RATE * (1 - RATE))), DRAWS)
    assert sizes.min() <= 1
    assert sizes.max() >= 11


@pytest.mark.parametrize("lag", [1, 2, 3, 4])
def test_draws_are_independent_of_earlier_draws(membership: np.ndarray, lag: int) -> None:
    """PRIVACY 1: whoever took part in one release is neither more nor less likely to in the next ones.

    A shuffled epoch gives 4 batches of 5; who was in one is not in the next 3: correlation -1/3.
    """
    now, later = membership[:-lag] - RATE, membership[lag:] - RATE
    correlation = (now * later).sum(0) / (len(now) * RATE * (1 - RATE))
    assert within(len(now) * float(np.square(correlation).sum()), N)


def test_draws_are_ascending_indices_without_repetition() -> None:
    draws = PoissonDraws(unaccounted(), RunKey.for_tests(0), DIGEST)
    for release in range(200):
        drawn = draws(release)
        assert drawn.tolist() == sorted(set(drawn.tolist()) & set(range(N)))


def test_a_draw_is_the_same_each_time_and_hangs_on_key_release_and_digest() -> None:
    """PRIVACY 36: 64 draws, compared whole: each of the three that differs gives other draws."""

    def draws(key: RunKey, digest: str, first: int = 0) -> list[list[int]]:
        drawn = PoissonDraws(unaccounted(), key, digest)
        return [drawn(release).tolist() for release in range(first, first + 64)]

    known = draws(RunKey.for_tests(0), DIGEST)
    assert draws(RunKey.for_tests(0), DIGEST) == known
    for other in (draws(RunKey.for_tests(1), DIGEST), draws(RunKey.for_tests(0), "e" * 64),
                  draws(RunKey.for_tests(0), DIGEST, first=64)):  # fmt: skip
        assert sum(a == b for a, b in zip(known, other, strict=True)) <= 3


def test_noise_and_draws_have_streams_of_their_own() -> None:
    """PRIVACY 36: the uniforms of a draw are not those of any noise stream of the release."""
    key = RunKey.for_tests(0)
    drawn = PoissonDraws(unaccounted(), key, DIGEST)(0)
    for purpose in ("noise", "directions"):
        assert np.flatnonzero(key.stream(purpose, 0, DIGEST).random(N) < RATE).tolist() != drawn.tolist()


def test_rate_follows_the_phase() -> None:
    plan = unaccounted(epochs=100, then=(Phase(batch_size=15, epochs=300),))
    draws = PoissonDraws(plan, RunKey.for_tests(0), DIGEST)
    sizes = [len(draws(release)) for release in range(plan.steps)]
    assert (len(sizes), plan.steps_of(plan.phases[0])) == (800, 400)
    assert np.mean(sizes[:400]) == pytest.approx(5, abs=5 * math.sqrt(3.75 / 400))  # five standard errors
    assert np.mean(sizes[400:]) == pytest.approx(15, abs=5 * math.sqrt(3.75 / 400))


def test_no_draw_beyond_the_plan() -> None:
    """PRIVACY 24: release T does not exist."""
    draws = PoissonDraws(unaccounted(epochs=1), RunKey.for_tests(0), DIGEST)
    with pytest.raises(IndexError):
        draws(4)


# ---- logical batches


class Rows(list):
    """Row i has length i % 7."""


def batches(plan: PrivacyPlan, microbatch_size: int) -> PoissonBatches:
    def collate(rows: list[int]) -> dict[str, Tensor]:
        assert rows, "collate was given no rows"
        return {"x": torch.tensor(rows)}

    draws = PoissonDraws(plan, RunKey.for_tests(0), DIGEST)
    return PoissonBatches(Rows(range(plan.num_examples)), draws, collate, lambda row: row % 7, microbatch_size)


@pytest.mark.parametrize("microbatch_size", [1, 3, 100])
def test_a_logical_batch_holds_the_whole_draw_once(microbatch_size: int) -> None:
    """PRIVACY 24: micro-batches cut the draw up, sorted by length; no ragged end is dropped, nothing comes twice."""
    made = batches(unaccounted(epochs=20), microbatch_size)
    for release in range(len(made)):
        batch = made[release]
        assert batch.release == release
        sizes = [len(m["x"]) for m in batch.micro_batches]
        assert all(size == microbatch_size for size in sizes[:-1])
        assert all(0 < size <= microbatch_size for size in sizes)
        rows = [int(i) for m in batch.micro_batches for i in m["x"]]
        assert sorted(rows) == made.draws(release).tolist()
        assert [row % 7 for row in rows] == sorted((row % 7 for row in rows), reverse=True)


def test_an_empty_draw_is_a_batch_without_micro_batches() -> None:
    """PRIVACY 19: it is handed over like any other, and collate is not called."""
    made = batches(unaccounted(batch_size=1, epochs=1), 4)
    empty = [release for release in range(20) if not len(made.draws(release))]
    assert empty  # (19/20)^20 = 36 % of the draws
    assert [made[release] for release in empty] == [LogicalBatch(release, ()) for release in empty]


def test_loader_gives_every_release_of_the_plan_once_and_in_order() -> None:
    """PRIVACY 19 and 24: T batches, none skipped, none dropped, also from a later start on."""
    made = batches(unaccounted(batch_size=1, epochs=1.1), 4)
    assert len(made) == 22
    assert [batch.release for batch in private_loader(made)] == list(range(22))
    assert [batch.release for batch in private_loader(made, start=20)] == [20, 21]
    assert len(private_loader(made, start=20)) == 22  # Lightning counts batches from 0
    assert list(private_loader(made, start=22)) == []


def test_a_resumed_loader_gives_the_same_batches() -> None:
    """PRIVACY 25 and 35: release t draws the same rows, wherever the loader starts."""
    made = batches(unaccounted(epochs=3), 4)
    straight = list(private_loader(made))
    for start in range(12):
        for batch, expected in zip(private_loader(made, start), straight[start:], strict=True):
            assert batch.release == expected.release
            assert [m["x"].tolist() for m in batch.micro_batches] == [m["x"].tolist() for m in expected.micro_batches]


def test_plan_for_another_number_of_rows_is_refused() -> None:
    """PRIVACY 1: N of the plan is the N that is drawn from."""
    draws = PoissonDraws(unaccounted(), RunKey.for_tests(0), DIGEST)
    with pytest.raises(ValueError, match="Expected 20 units, as in the plan, found 19"):
        PoissonBatches(range(19), draws, lambda rows: {}, lambda row: 1, 4)


# ---- units of several rows

UNITS = [[unit, 20 + unit, 40 + unit][: 1 + unit % 3] for unit in range(20)]
HELD = sorted(row for unit in UNITS for row in unit)
DENSE = {row: place for place, row in enumerate(HELD)}  # rows are numbered without holes


def unit_batches(microbatch_size: int, units: list[list[int]]) -> PoissonBatches:
    draws = PoissonDraws(unaccounted(epochs=20), RunKey.for_tests(0), DIGEST)
    rows = Rows(range(1 + max((row for unit in units for row in unit), default=0)))

    def collate(rows: list[int]) -> dict[str, Tensor]:
        return {"x": torch.tensor(rows)}

    return PoissonBatches(rows, draws, collate, lambda row: row % 7, microbatch_size, units)


@pytest.mark.parametrize("microbatch_size", [1, 4, 100])
def test_whole_units_are_drawn_and_none_is_cut(microbatch_size: int) -> None:
    """PRIVACY 37: all rows of a drawn unit are in one micro-batch, which names it, and no others are."""
    units = [[DENSE[row] for row in unit] for unit in UNITS]
    made = unit_batches(microbatch_size, units)
    for release in range(10):
        drawn: list[int] = []
        for part in made[release].micro_batches:
            assert isinstance(part, DrawnRows)
            rows, whose = part["x"].tolist(), list(part.examples)
            assert [(whose[i], part.places[i]) for i in range(len(rows))] == [
                (unit, units[unit].index(row)) for unit, row in zip(whose, rows, strict=True)
            ]
            for unit in dict.fromkeys(whose):
                assert [row for row, of in zip(rows, whose, strict=True) if of == unit] == units[unit]
            assert len(rows) <= microbatch_size or len(set(whose)) == 1
            drawn += dict.fromkeys(whose)
        assert sorted(drawn) == made.draws(release).tolist()


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([[i] for i in range(19)] + [[19, 3]], "row 3 to be of one unit, found it in 2"),
        ([[i] for i in range(19)] + [[20]], "row 19 to be of one unit, found it in 0"),
        ([[i] for i in range(19)] + [[]], "every unit to have a row"),
        ([[i] for i in range(19)], "Expected 20 units, as in the plan, found 19"),
    ],
    ids=["of two", "of none", "empty", "too few"],
)
def test_rows_are_dealt_out_to_units(units: list[list[int]], message: str) -> None:
    """PRIVACY 1 and 37: a row of two units would move two contributions."""
    with pytest.raises(ValueError, match=message):
        unit_batches(4, units)


def test_the_unit_of_each_row_counts_from_0() -> None:
    assert DrawnRows({}, 3, 0, [5, 9, 12]).unit_of_row is None
    units = DrawnRows({}, 4, 0, [9, 5, 9, 12], [0, 0, 1, 0]).unit_of_row
    assert units is not None
    assert units.tolist() == [1, 0, 1, 2]
