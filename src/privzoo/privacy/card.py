"""The privacy card: what was promised, what was spent, and what the promise does not cover. It is published."""

import math
from importlib.metadata import version
from typing import Any

from privzoo.privacy.accounting import GRID, cross_check, epsilon_spent
from privzoo.privacy.ledger import Ledger
from privzoo.privacy.plan import PrivacyPlan

LIMITS = (
    "The number of training examples is public.",
    "Only the training split is protected: metrics are computed on another split, which the plan does not cover.",
    "Choosing hyper-parameters by looking at several runs on the same data costs more than one run's epsilon.",
    "Noise is float32 from a keyed Philox generator: the guarantee is computational, and floating-point artefacts of "
    "Gaussian noise are not treated.",
    "Running time, speed and peak memory follow the sizes of the batches drawn and are not protected.",
    "Terminal output of private/... figures and anything logged with logger.private=true are outside the promise.",
)


def privacy_card(
    plan: PrivacyPlan,
    ledger: Ledger,
    is_test_key: bool,
    private_logged: bool,
    contribution: str,
    selection: str | None = None,
) -> dict[str, Any]:
    """Content of privacy.json, from the plan and from what the ledger recorded.

    Args:
        contribution: what one example adds to a release and what bounds it.
        selection: a further limit, where the examples are a part of their source, or other than its rows.

    Guarantees: `epsilon_spent` is the PLD figure of the recorded releases; `private` is false without noise or with a
    published noise seed. It holds no private quantity: no loss, norm, clip rate or realised batch size.
    """
    private = plan.private and not is_test_key
    releases = ledger.releases()
    spent = epsilon_spent(releases, plan.delta) if plan.private else None
    return {
        "statement": _statement(plan, spent, is_test_key),
        "private": private,
        "not_private_reason": why_not_private(plan, is_test_key),
        "plan": plan.as_record(),
        "contribution": contribution if plan.private else "a gradient or loss as it is: nothing is bounded",
        "epsilon_spent": spent if private else None,
        "delta": plan.delta,
        "accountant": f"PLD of dp-accounting {version('dp-accounting')}, discretisation {GRID:g}",
        "cross_check": cross_check(releases, plan.delta) if private else None,
        "releases_charged": len(ledger.entries),
        "releases_made": len({entry.release for entry in ledger.entries}),
        "configurations": len({entry.digest for entry in ledger.entries}),
        "run_key": "published test seed" if is_test_key else "256 bits from the operating system, deleted at the end",
        "private_figures_sent_to_loggers": private_logged,
        "limits": [*LIMITS, *([selection] if selection else [])],
    }


def why_not_private(plan: PrivacyPlan, is_test_key: bool) -> str | None:
    """Why a run with a finite epsilon has no guarantee; None if it has one, or never promised one."""
    return "privacy.noise_seed was set: anybody can compute the noise" if plan.private and is_test_key else None


def _statement(plan: PrivacyPlan, spent: float | None, is_test_key: bool) -> str:
    if not plan.private:
        return "NOT PRIVATE: eps=inf, no clipping and no noise."
    if is_test_key:
        return "NOT PRIVATE: privacy.noise_seed was set, so anybody can compute the noise."
    assert spent is not None
    assert math.isfinite(spent)
    return (
        f"Adding or removing one {plan.unit} of the {plan.num_examples} in training changes the distribution of "
        f"the released model by at most (epsilon={spent:.4g}, delta={plan.delta:g})."
    )
