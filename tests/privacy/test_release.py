"""One release from draw to update, in real runs with sums that can be checked by hand."""

import dataclasses
import math
from typing import Any

import dp_accounting
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from scipy.stats import chi2
from torch import Tensor

from privzoo.methods.first_order import FirstOrder
from privzoo.privacy.ledger import Ledger
from privzoo.privacy.noise import fingerprint
from privzoo.privacy.plan import PrivacyPlan, ReleaseSetting
from privzoo.privacy.sampling import MicroBatch
from privzoo.privacy.streams import RunKey

WIDTH = 625  # times 8 releases: 5,000 draws of noise


def noisy_plan(**changes: Any) -> PrivacyPlan:
    """8 releases, sigma C = 8 * 0.25 = 2."""
    numbers = {"num_examples": 20, "batch_size": 5, "epochs": 2, "delta": 1e-3, "noise_multiplier": 8.0, "clip_norm": 0.25}
    return PrivacyPlan(**{**numbers, **changes})


def bare_plan(**changes: Any) -> PrivacyPlan:
    return noisy_plan(noise_multiplier=None, clip_norm=1.0, epsilon=math.inf, **changes)


def ones(num_examples: int, width: int = 1) -> Tensor:
    return torch.ones(num_examples, width, dtype=torch.float64)


def in_bounds(drawn: Tensor) -> bool:
    """Whether the sum of squares of standard normal values lies in the central 1 - 2e-6 of its chi-square."""
    return bool(chi2.ppf(1e-6, drawn.numel()) < float(drawn.square().sum()) < chi2.isf(1e-6, drawn.numel()))


def test_mean_divides_by_the_expected_batch_size(tiny_run) -> None:
    """PRIVACY 3: rows are 1 and B = 5, so draws of 3 and of 7 rows move the weight by 3/5 and 7/5, not by 1."""
    run = tiny_run(bare_plan(epochs=10), ones(20))
    run.fit()
    assert {3, 5, 7} <= set(run.watch.sizes)
    assert [move.item() for move in run.watch.moves()] == pytest.approx([size / 5 for size in run.watch.sizes], abs=1e-12)


@pytest.mark.parametrize("num_examples", [95, 96, 97, 98])
def test_divisor_does_not_depend_on_the_number_of_examples(tiny_run, num_examples: int) -> None:
    """PRIVACY 4: 8 for N-1, N and N+1, where N // steps would be 7 or 8."""
    run = tiny_run(bare_plan(num_examples=num_examples, batch_size=8, epochs=1), ones(num_examples))
    run.fit()
    assert [move.item() for move in run.watch.moves()] == pytest.approx([size / 8 for size in run.watch.sizes], abs=1e-12)


def test_noise_of_the_update(tiny_run) -> None:
    """PRIVACY 6: (update * B - clipped sum) / C over 8 releases * 625 coordinates has standard deviation sigma.

    A row is 0.4 in each of 625 coordinates, of norm 10, clipped to 0.25: 0.01 in each.
    """
    run = tiny_run(noisy_plan(), ones(20, WIDTH) * 0.4)
    run.fit()
    noise = [move * 5 - size * 0.01 for move, size in zip(run.watch.moves(), run.watch.sizes, strict=True)]
    assert len(noise) == 8
    assert in_bounds(torch.stack(noise) / (8 * 0.25))
    assert abs(torch.stack(noise).mean().item()) < 5 * 2 / math.sqrt(5000)


def test_noise_of_one_release_is_not_that_of_another(tiny_run) -> None:
    """PRIVACY 36: differences of two releases' noise have twice the variance, so that none of it cancels."""
    run = tiny_run(noisy_plan(), ones(20, WIDTH) * 0.4)
    run.fit()
    noise = [move * 5 - size * 0.01 for move, size in zip(run.watch.moves(), run.watch.sizes, strict=True)]
    assert all(in_bounds((noise[i] - noise[j]) / (2 * math.sqrt(2))) for i in range(8) for j in range(i))


def test_micro_batches_make_one_release(tiny_run) -> None:
    """PRIVACY 11: cut into 1, 2 or 100 rows, the same weights to 1e-10, the same epsilon, one draw of noise a release."""
    rows = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    runs = [tiny_run(noisy_plan(), rows, microbatch_size=size) for size in (100, 2, 1)]
    for run in runs:
        run.fit()
        assert run.mechanism.draws == 8
        assert [len(run.ledger.entries), run.watch.sizes] == [8, runs[0].watch.sizes]
        assert run.guard.epsilon_spent() == runs[0].guard.epsilon_spent()
        for weights, expected in zip(run.watch.weights, runs[0].watch.weights, strict=True):
            assert torch.allclose(weights, expected, rtol=0, atol=1e-10)
    assert max(runs[0].watch.micro_batches) == 1
    assert max(runs[2].watch.micro_batches) >= 5


class Sparse(PrivacyPlan):
    """A plan whose draws are empty: q = 1e-9."""

    def at(self, release: int) -> ReleaseSetting:
        return dataclasses.replace(super().at(release), sample_rate=1e-9)


def test_empty_draws_release_noise_and_are_paid_for(tiny_run) -> None:
    """PRIVACY 19: q = 1e-9 gives T updates of nothing but noise, and T entries in the account."""
    plan = Sparse(num_examples=20, batch_size=5, epochs=2, delta=1e-3, noise_multiplier=8.0, clip_norm=0.25)
    run = tiny_run(plan, ones(20, WIDTH))
    trainer = run.fit()
    assert run.watch.sizes == [0] * 8
    assert trainer.global_step == run.mechanism.draws == 8
    assert [(e.release, e.sample_rate) for e in run.ledger.entries] == [(t, 1e-9) for t in range(8)]
    assert in_bounds(torch.stack(run.watch.moves()) * 5 / 2)


@pytest.mark.parametrize(("epochs", "steps"), [(2, 8), (0.3, 2), (2.01, 9)])
def test_steps_draws_and_account_agree_at_exit(tiny_run, epochs: float, steps: int) -> None:
    """PRIVACY 10, 24 and 39: optimizer steps = noise draws = ledger lines = T, and PLD of the ledger on disk is the plan's.

    ceil(0.3 * 20 / 5) = ceil(1.2) = 2 and ceil(2.01 * 4) = ceil(8.04) = 9.
    """
    run = tiny_run(noisy_plan(epochs=epochs), ones(20))
    stepped: list[int] = []

    def counting(parameters: list[Tensor], lr: float) -> torch.optim.SGD:
        optimizer = torch.optim.SGD(parameters, lr=lr)
        optimizer.register_step_post_hook(lambda *_: stepped.append(1))
        return optimizer

    run.method.make_optimizer = counting
    trainer = run.fit()
    assert (len(stepped), trainer.global_step, run.mechanism.draws, run.plan.steps) == (steps,) * 4
    with Ledger(run.ledger.path) as ledger:
        assert [entry.release for entry in ledger.entries] == list(range(steps))
        accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
        for entry in ledger.entries:
            gaussian = dp_accounting.GaussianDpEvent(entry.noise_multiplier)
            accountant.compose(dp_accounting.PoissonSampledDpEvent(entry.sample_rate, gaussian))
    recorded = accountant.get_epsilon(1e-3)
    assert recorded <= run.guard.epsilon_spent() <= recorded + 5e-4  # its grid is the finer one
    assert 0.99 * run.plan.epsilon <= recorded <= run.plan.epsilon * (1 + 1e-6)


def test_same_key_same_run_and_fresh_key_another_one(tiny_run) -> None:
    """PRIVACY 36: the run key alone decides; two runs of one configuration with keys of their own share no move."""
    keys = [RunKey.for_tests(3), RunKey.for_tests(3), RunKey.fresh()]
    runs = [tiny_run(noisy_plan(), ones(20, WIDTH), key=key) for key in keys]
    for run in runs:
        run.fit()
    first, second, fresh = (run.watch.moves() for run in runs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any((a == b).any() for a, b in zip(first, fresh, strict=True))


class Labelled(FirstOrder):
    """Notes at which weights each sum was taken and with which the noise was keyed."""

    def losses(self, micro_batch: MicroBatch) -> Tensor:
        self.taken_at = self.model.weight.detach().clone()
        return super().losses(micro_batch)


def test_noise_is_keyed_by_the_weights_that_the_sum_was_taken_at(tiny_run, monkeypatch: pytest.MonkeyPatch) -> None:
    """PRIVACY 35: T different fingerprints, the very ones in the ledger, each that of the weights in the query."""
    run = tiny_run(noisy_plan(), ones(20), method_class=Labelled)
    keyed, release = [], run.mechanism.release

    def watched(sums: dict[str, Tensor], number: int, weights: str, parts: None) -> None:
        keyed.append(weights)
        assert weights == fingerprint([("weight", run.method.taken_at)])
        release(sums, number, weights, parts)

    monkeypatch.setattr(run.mechanism, "release", watched)
    run.fit()
    assert all(run.watch.sizes)  # no empty draw: every release made a query
    assert [entry.weights for entry in run.ledger.entries] == keyed
    assert len(set(keyed)) == 8
