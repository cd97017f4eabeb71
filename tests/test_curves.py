"""Epsilon along a run is never below what the ledger says, also where releases were paid for twice."""

from collections import Counter

import pytest

from privzoo.curves import EpsilonCurve
from privzoo.privacy.accounting import epsilon_spent
from privzoo.privacy.callback import affordable, charged_twice
from privzoo.privacy.ledger import Entry, Ledger
from privzoo.privacy.plan import Phase, PrivacyPlan

ONE = PrivacyPlan(num_examples=2000, batch_size=250, epochs=1, delta=1e-5, epsilon=3.0)
DEAR_FIRST = PrivacyPlan(
    num_examples=2000, batch_size=200, epochs=0.5, delta=1e-5, noise_multiplier=0.8, then=(Phase(100, 0.5, 1.0, 0.7),)
)


def pay(plan: PrivacyPlan, ledger: Ledger, release: int, digest: str) -> None:
    setting = plan.at(release)
    ledger.charge(Entry(release, setting.sample_rate, setting.noise_multiplier, 1.0, digest, f"w{release}"))


@pytest.mark.parametrize("plan", [ONE, DEAR_FIRST], ids=["one phase", "a dear phase first"])
@pytest.mark.parametrize("lost", [0, 3])
def test_it_never_understates(plan: PrivacyPlan, lost: int, tmp_path) -> None:
    """PRIVACY lines 35 and 39: after every release at least what an accountant makes of the ledger, at most the plan's."""
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        for release in range(lost):
            pay(plan, ledger, release, "old")
        count = affordable(plan, ledger, "new", 0)
        curve = EpsilonCurve(plan, charged_twice(plan, ledger, "new", 0))
        values = [curve(0)]
        for release in range(count):
            pay(plan, ledger, release, "new")
            values.append(curve(release + 1))
            assert values[-1] >= epsilon_spent(ledger.releases(), plan.delta) - 1e-9
    assert (values[0] > 0) is (lost > 0)
    assert values == sorted(values)
    assert values[-1] <= plan.epsilon * 1.0001  # reckoned on a finer grid


def test_what_is_charged_twice(tmp_path) -> None:
    """Not the checkpoint's releases, nor those that are computed again under their own digest."""
    plan = DEAR_FIRST
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        for release, digest in ((0, "old"), (1, "old"), (2, "old"), (1, "new"), (2, "new"), (3, "new")):
            pay(plan, ledger, release, digest)
        assert charged_twice(plan, ledger, "new", 1) == [(plan.at(0).release, 2)]
        assert charged_twice(plan, ledger, "old", 3) == [(plan.at(0).release, 3)]
        assert sum(Counter(dict(charged_twice(plan, ledger, "third", 2))).values()) == 4
