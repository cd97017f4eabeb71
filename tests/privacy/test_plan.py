"""The plan: who may have which numbers, and that they agree with each other."""

import dataclasses
import json
import math

import pytest

from privzoo.errors import UserError
from privzoo.privacy.accounting import Release, epsilon_spent
from privzoo.privacy.plan import Phase, PrivacyPlan, default_delta


def cheap(**changes: object) -> PrivacyPlan:
    """A plan whose account takes little time: much noise, few releases."""
    numbers = {"num_examples": 20, "batch_size": 5, "epochs": 2, "delta": 1e-3, "noise_multiplier": 8.0}
    return PrivacyPlan(**{**numbers, **changes})


# ---- number of releases


@pytest.mark.parametrize(
    ("num_examples", "batch_size", "epochs", "steps"),
    [
        (20, 5, 2, 8),  # 40 / 5
        (20, 6, 1, 4),  # 20 / 6 = 3.33
        (20, 6, 2, 7),  # 40 / 6 = 6.67
        (67_349, 1000, 3, 203),  # 202.047
        (20, 20, 0.5, 1),  # half a pass in one release
        (10, 1, 0.1, 1),  # exactly one; 0.1 as a binary fraction is a little more than a tenth
        (100, 1, 0.07, 7),  # 0.07 * 100 in floating point is 7.000000000000001
        (300, 10, 0.1, 3),  # 0.1 * 300 / 10 in floating point: 3.0000000000000004
        (1000, 7, 0.007, 1),  # exactly one
        (1000, 7, 0.0071, 2),  # 1.014
    ],
)
def test_steps_are_rounded_up_exactly(num_examples: int, batch_size: int, epochs: float, steps: int) -> None:
    """PRIVACY 24: T = ceil(epochs * N / B), by hand, also where floating point would be off by one."""
    plan = PrivacyPlan(num_examples=num_examples, batch_size=batch_size, epochs=epochs, delta=1e-9, epsilon=math.inf)
    assert plan.steps == steps


def test_release_after_the_last_does_not_exist() -> None:
    """PRIVACY 24: the plan gives numbers for T releases and for no other."""
    plan = cheap()
    assert [plan.at(t).sample_rate for t in range(8)] == [0.25] * 8
    for release in (8, 9, -1):
        with pytest.raises(IndexError, match=f"release={release}"):
            plan.at(release)


# ---- epsilon or sigma


def test_reference_noise_of_the_table() -> None:
    """PRIVACY 39, last paragraph: N = 67,349, B = 1000, 3 epochs, epsilon 8, delta 1e-5 ask for sigma 0.5394."""
    plan = PrivacyPlan(num_examples=67_349, batch_size=1000, epochs=3, delta=1e-5, epsilon=8.0)
    assert plan.steps == 203
    assert plan.noise_multiplier == pytest.approx(0.5394, rel=0.005)
    assert plan.epsilon == 8.0  # the target stays what was asked for


def test_epsilon_follows_from_sigma() -> None:
    plan = cheap()
    assert plan.epsilon == epsilon_spent([(Release(0.25, 8.0), 8)], 1e-3)
    assert plan.private


def test_sigma_from_epsilon_spends_epsilon() -> None:
    """PRIVACY 39: the calibrated plan spends at most its target and at least 99 % of it."""
    plan = cheap(noise_multiplier=None, epsilon=0.5, batch_size=20, epochs=1)
    assert 0.99 * 0.5 <= epsilon_spent([(Release(1.0, plan.noise_multiplier), 1)], 1e-3, 1e-4) <= 0.5


def test_both_or_neither_of_epsilon_and_sigma() -> None:
    with pytest.raises(UserError, match="not both"):
        cheap(epsilon=3.0)
    with pytest.raises(UserError, match="not both"):
        cheap(noise_multiplier=None)


def test_without_privacy_there_is_neither_noise_nor_clipping() -> None:
    plan = PrivacyPlan(num_examples=20, batch_size=5, epochs=2, delta=1e-3, epsilon=math.inf,
                       then=(Phase(batch_size=10, epochs=1),))  # fmt: skip
    assert not plan.private
    assert {(plan.at(t).noise_multiplier, plan.at(t).clip_norm) for t in range(plan.steps)} == {(0.0, math.inf)}
    assert json.loads(json.dumps(plan.as_record(), allow_nan=False))["epsilon"] is None


def test_epsilon_after_some_releases_grows_to_the_whole() -> None:
    plan = cheap()
    curve = [plan.epsilon_after(t) for t in range(9)]
    assert curve[0] == 0
    assert curve == sorted(set(curve))
    assert curve[8] == pytest.approx(plan.epsilon, rel=1e-3)


# ---- delta


def test_careless_delta_is_refused() -> None:
    """PRIVACY 21: delta >= 1/N is refused (1/20 = 0.05), as are values that are no probability."""
    for delta in (0.05, 0.06, 1.0, 0.0, -1e-5, math.nan):
        with pytest.raises(UserError, match="delta"):
            cheap(delta=delta)
    assert cheap(delta=0.049).delta == 0.049


def test_record_shows_delta_beside_the_number_of_examples() -> None:
    """PRIVACY 21: N and delta * N are printed."""
    record = cheap().as_record()
    assert record["num_examples"] == 20
    assert record["delta_times_num_examples"] == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("num_examples", "delta"),
    # 1/2, 1/4 = 0.25, 1/100, 1/1000 (log10 is exact), 1/998 = 0.001002, 7.42e-6, 1/138, 2 * 55,556 = 111,112: 8.99e-6
    [(1, 0.5), (2, 0.2), (50, 0.01), (500, 1e-3), (499, 1e-3), (67_349, 7e-6), (69, 7e-3), (55_556, 8e-6)],
)
def test_default_delta_is_half_of_one_over_n_rounded_down(num_examples: int, delta: float) -> None:
    """PRIVACY 21: by hand; it never exceeds 1/(2N)."""
    assert default_delta(num_examples) == delta


def test_default_delta_is_never_rounded_up() -> None:
    """PRIVACY 21: for many N, delta <= 1/(2N) < 2 * delta."""
    for num_examples in range(1, 20_000):
        assert 0.5 < 2 * num_examples * default_delta(num_examples) <= 1 + 1e-12


# ---- divisor, relation, phases, frozen


def test_batch_size_is_the_same_for_neighbouring_data_sets() -> None:
    """PRIVACY 4: the divisor is B for N-1, N and N+1 (Opacus divided by 8 at N = 96 and by 7 at N = 97)."""
    for num_examples in (95, 96, 97, 98):
        plan = cheap(num_examples=num_examples, batch_size=8, epochs=1)
        assert {plan.at(t).batch_size for t in range(plan.steps)} == {8}
        assert plan.at(0).sample_rate == 8 / num_examples


def test_neighbouring_relation_unit_and_accountant_are_stated() -> None:
    """PRIVACY 20 and 37: what one unit is, and how data sets may differ, stands in the plan and its record."""
    plan = cheap(unit="question")
    record = plan.as_record()
    found = [record[name] for name in ("neighbours", "unit", "accountant", "sampling")]
    assert found == ["add_or_remove_one", "question", "pld", "poisson"]
    with pytest.raises(TypeError):
        PrivacyPlan(num_examples=20, batch_size=5, epochs=2, delta=1e-3, epsilon=1.0, neighbours="replace_one")  # type: ignore[call-arg]


def test_phases_are_composed_in_one_account() -> None:
    plan = cheap(then=(Phase(batch_size=10, epochs=1, clip_norm=0.5, noise_multiplier=9.0),))
    assert plan.steps == 8 + 2
    assert [(plan.at(t).phase, plan.at(t).batch_size, plan.at(t).sample_rate, plan.at(t).noise_multiplier,
             plan.at(t).clip_norm) for t in (0, 7, 8, 9)] == [
        (0, 5, 0.25, 8.0, 1.0), (0, 5, 0.25, 8.0, 1.0), (1, 10, 0.5, 9.0, 0.5), (1, 10, 0.5, 9.0, 0.5)]  # fmt: skip
    parts = [(Release(0.25, 8.0), 8), (Release(0.5, 9.0), 2)]
    assert list(plan.releases()) == parts
    assert plan.epsilon == epsilon_spent(parts, 1e-3)
    assert max(epsilon_spent([part], 1e-3, 1e-4) for part in parts) < plan.epsilon
    assert list(plan.releases(9)) == [parts[0], (Release(0.5, 9.0), 1)]
    assert [plan.expected_examples(count) for count in (0, 8, 9, 10)] == [0, 40, 50, 60]


def test_calibration_covers_all_phases() -> None:
    """PRIVACY 39: with two phases, both together spend the target, and share one noise multiplier."""
    plan = cheap(noise_multiplier=None, epsilon=0.5, batch_size=20, epochs=1, then=(Phase(batch_size=10, epochs=0.5),))
    noise = plan.noise_multiplier
    assert {plan.at(t).noise_multiplier for t in range(2)} == {noise}
    spent = epsilon_spent([(Release(1.0, noise), 1), (Release(0.5, noise), 1)], 1e-3, 1e-4)
    assert 0.99 * 0.5 <= spent <= 0.5


def test_phases_say_clearly_who_gives_the_noise() -> None:
    with pytest.raises(UserError, match="one of the two decides"):
        cheap(noise_multiplier=None, epsilon=1.0, then=(Phase(5, 1, noise_multiplier=1.0),))
    with pytest.raises(UserError, match="in every phase"):
        cheap(then=(Phase(5, 1),))


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(PrivacyPlan)])
def test_plan_is_frozen(name: str) -> None:
    """PRIVACY 1: sampler, noise and accountant read one record, which nobody can change after it was accounted."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(cheap(), name, getattr(cheap(), name))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_examples": 0}, {"batch_size": 0}, {"batch_size": 21}, {"epochs": 0}, {"epochs": -1}, {"epochs": math.inf},
        {"epochs": math.nan}, {"clip_norm": 0.0}, {"clip_norm": -1.0}, {"clip_norm": math.inf}, {"clip_norm": math.nan},
        {"noise_multiplier": 0.0}, {"noise_multiplier": -1.0}, {"noise_multiplier": math.inf},
        {"noise_multiplier": math.nan}, {"noise_multiplier": None, "epsilon": 0.0},
        {"noise_multiplier": None, "epsilon": -1.0}, {"noise_multiplier": None, "epsilon": math.nan},
        {"then": (Phase(21, 1, noise_multiplier=1.0),)}, {"then": (Phase(5, 1, math.inf, 1.0),)},
    ],
    ids=str,
)  # fmt: skip
def test_values_out_of_range_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(UserError, match="Expected"):
        cheap(**changes)
