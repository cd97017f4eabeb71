"""What is left to spend when a run goes on, in its own configuration or in another one."""

from typing import Any

import torch

from privzoo.privacy.accounting import epsilon_spent
from privzoo.privacy.callback import affordable, makeable
from privzoo.privacy.ledger import Entry
from privzoo.privacy.plan import Phase, PrivacyPlan

ROWS = torch.ones(20, 3, dtype=torch.float64)


def some_plan(**changes: Any) -> PrivacyPlan:
    """8 releases at epsilon 0.2."""
    numbers = {"num_examples": 20, "batch_size": 5, "epochs": 2, "delta": 1e-3, "epsilon": 0.2}
    return PrivacyPlan(**{**numbers, **changes})


def paid(run: Any, releases: range, digest: str) -> None:
    for t in releases:
        setting = run.plan.at(t)
        run.ledger.charge(Entry(t, setting.sample_rate, setting.noise_multiplier, setting.clip_norm, digest, f"w{t}"))


def test_all_of_a_fresh_plan_and_the_rest_of_a_resumed_one_are_affordable(tiny_run) -> None:
    """PRIVACY 35: releases paid in this configuration are not paid twice."""
    run = tiny_run(some_plan(), ROWS)
    assert affordable(run.plan, run.ledger, run.digest, 0) == 8
    paid(run, range(3), run.digest)
    assert affordable(run.plan, run.ledger, run.digest, 3) == 5
    assert affordable(run.plan, run.ledger, run.digest, 0) == 5  # the checkpoint was lost: 0 to 2 are paid, made again
    assert makeable(run.plan, run.ledger, run.digest, 2)


def test_the_rest_of_a_resumed_plan_is_affordable_where_sigma_was_given(tiny_run) -> None:
    run = tiny_run(some_plan(epsilon=None, noise_multiplier=8.0), ROWS)
    paid(run, range(3), run.digest)
    assert affordable(run.plan, run.ledger, run.digest, 3) == 5


def test_releases_of_another_configuration_are_paid_for_too(tiny_run) -> None:
    """PRIVACY 35 and 39: 3 lost releases elsewhere leave 5 of 8; the run ends early, within its epsilon."""
    run = tiny_run(some_plan(), ROWS)
    paid(run, range(3), "e" * 64)
    assert affordable(run.plan, run.ledger, run.digest, 0) == 5
    trainer = run.fit()
    assert trainer.global_step == run.mechanism.draws == 5
    assert len(run.ledger.entries) == 8
    assert 0.99 * 0.2 <= run.guard.epsilon_spent() <= 0.2
    assert run.guard.epsilon_spent() == epsilon_spent(run.plan.releases(), 1e-3)


def test_nothing_is_affordable_when_epsilon_is_spent(tiny_run) -> None:
    run = tiny_run(some_plan(), ROWS)
    paid(run, range(8), "e" * 64)
    assert affordable(run.plan, run.ledger, run.digest, 0) == 0
    assert not makeable(run.plan, run.ledger, run.digest, 0)


def test_releases_paid_for_are_not_paid_again(tiny_run) -> None:
    """PRIVACY 35: after 8 small releases a dear one is left; made again from the first on, they cost nothing more.

    Were they paid again, what is left would go to several small ones instead of the dear one.
    """
    later = (Phase(batch_size=20, epochs=1, noise_multiplier=16.0),)
    run = tiny_run(some_plan(epsilon=None, noise_multiplier=32.0, then=later), ROWS)
    paid(run, range(8), run.digest)
    assert affordable(run.plan, run.ledger, run.digest, 0) == 1
