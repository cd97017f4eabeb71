"""The callback: what it refuses before the first release, what it counts, and when it stops."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, LearningRateFinder
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, TensorDataset, WeightedRandomSampler

from privzoo.errors import UserError
from privzoo.methods.first_order import FirstOrder
from privzoo.privacy.callback import MOVED_BY, refuse_unsafe
from privzoo.privacy.noise import NoiseMechanism
from privzoo.privacy.plan import PrivacyPlan
from privzoo.privacy.ranks import Ranks
from privzoo.privacy.sampling import LogicalBatch, PoissonDraws, ReleaseOrder, private_loader
from privzoo.privacy.streams import RunKey

ROWS = torch.ones(20, 3, dtype=torch.float64)


def some_plan(**changes: Any) -> PrivacyPlan:
    """8 releases."""
    numbers = {"num_examples": 20, "batch_size": 5, "epochs": 2, "delta": 1e-3, "noise_multiplier": 8.0}
    return PrivacyPlan(**{**numbers, **changes})


def refused(run: Any, message: str, kind: type[Exception] = UserError) -> None:
    """The run is refused before anything happens: no line in the ledger, no draw of noise, weights as they were."""
    with pytest.raises(kind, match=message):
        run.fit()
    assert (run.ledger.entries, run.mechanism.draws, run.watch.sizes) == ([], 0, [])
    assert not run.method.model.weight.any()


class Automatic(FirstOrder):
    """A user's module without manual optimization, for which Lightning itself would accept these settings."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.automatic_optimization = True


class TwoOptimizers(FirstOrder):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([self.model.weight], lr=1.0) for _ in range(2)]


# ---- refusals


@pytest.mark.parametrize(
    "option",
    [
        {"max_epochs": 2}, {"max_epochs": -1}, {"overfit_batches": 2}, {"overfit_batches": 0.5},
        {"limit_train_batches": 1}, {"limit_train_batches": 8}, {"limit_train_batches": 0.5},
        {"fast_dev_run": True}, {"fast_dev_run": 3}, {"use_distributed_sampler": True},
        {"reload_dataloaders_every_n_epochs": 1}, {"gradient_clip_val": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_trainer_settings_that_break_the_account_are_refused(tiny_run, option: dict[str, Any]) -> None:
    """PRIVACY 24 and 25: more, fewer or other batches than the plan's."""
    refused(tiny_run(some_plan(), ROWS, trainer=option), next(iter(option)))


@pytest.mark.parametrize("option", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 1.0}], ids=str)
def test_accumulation_and_clipping_by_lightning_are_refused(tiny_run, option: dict[str, Any]) -> None:
    """PRIVACY 11 and 5: by us where Lightning would accept them, by Lightning for our own modules."""
    refused(tiny_run(some_plan(), ROWS, trainer=option, method_class=Automatic), next(iter(option)))
    refused(tiny_run(some_plan(), ROWS, trainer=option), next(iter(option)), Exception)


def test_grad_scaler_is_refused(tiny_run) -> None:
    """PRIVACY 10: precision=16-mixed brings a GradScaler. Off CUDA Lightning makes none, so it is given one for the CPU."""
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    refused(tiny_run(some_plan(), ROWS, trainer={"plugins": [plugin]}), "GradScaler")


def test_several_processes_are_refused(tiny_run) -> None:
    """PRIVACY 18: two processes that know nothing of each other, share no draw, or add up for themselves; nothing is
    started for this test."""
    run = tiny_run(some_plan(), ROWS)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, use_distributed_sampler=False, logger=False
    )
    for ranks, message in (
        (Ranks(), r"world_size=1.* found 2"),
        (Ranks(1, 2), r"global_rank=1.* found 0"),
        (Ranks(0, 2), r"strategy=Replicas .* found DDPStrategy"),
    ):
        with pytest.raises(UserError, match=message):
            refuse_unsafe(trainer, run.plan, run.digest, run.mechanism, ranks)


def test_a_loader_of_another_share_is_refused(tiny_run) -> None:
    """PRIVACY 18: half of a draw on one process would be half of the sum."""
    run = tiny_run(some_plan(), ROWS)
    run.batches.ranks = Ranks(0, 2)
    refused(run, r"the loader to be of Ranks\(rank=0, count=1\)")


def test_two_optimizers_are_refused(tiny_run) -> None:
    """PRIVACY 24: one step is one release."""
    refused(tiny_run(some_plan(), ROWS, method_class=TwoOptimizers), "optimizers=1 .* found 2")


@pytest.mark.parametrize(
    ("other", "message"),
    [(GradientAccumulationScheduler({0: 2}), "Scheduler"), (EarlyStopping("private/loss"), "private/loss, which is")],
)
def test_callbacks_that_break_the_account_are_refused(tiny_run, other: Any, message: str) -> None:
    """PRIVACY 11 and 22: accumulation in disguise, and decisions by private figures."""
    refused(tiny_run(some_plan(), ROWS, others=[other]), message)


def test_finders_are_refused_before_their_first_step(tiny_run) -> None:
    """PRIVACY 24: LearningRateFinder trains on private data before training starts, with all other callbacks put aside."""
    refused(tiny_run(some_plan(), ROWS, others=[LearningRateFinder(num_training_steps=5)]), "LearningRateFinder")


def shuffled(run: Any) -> DataLoader:
    return DataLoader(TensorDataset(ROWS), batch_size=5, shuffle=True)


def weighted(run: Any) -> DataLoader:
    return DataLoader(TensorDataset(ROWS), batch_size=5, sampler=WeightedRandomSampler([1.0] * 20, 20))


def draws_in_random_order(run: Any) -> DataLoader:
    return DataLoader(run.batches, batch_size=None, sampler=RandomSampler(run.batches))


def weighted_draws(run: Any) -> DataLoader:
    return DataLoader(run.batches, batch_size=None, sampler=WeightedRandomSampler([1.0] * 8, 8))


def several_draws_in_one(run: Any) -> DataLoader:
    return DataLoader(run.batches, batch_size=2, sampler=ReleaseOrder(8), collate_fn=lambda draws: draws[0])


def other_rows_in_our_order(run: Any) -> DataLoader:
    return DataLoader([run.batches[release] for release in range(8)], batch_size=None, sampler=ReleaseOrder(8))


def draws_of_another_plan(run: Any) -> DataLoader:
    run.batches.draws = PoissonDraws(some_plan(batch_size=10, epochs=4), run.key, run.digest)
    return private_loader(run.batches)


def draws_of_another_digest(run: Any) -> DataLoader:
    run.batches.draws = PoissonDraws(run.plan, run.key, "e" * 64)
    return private_loader(run.batches)


@pytest.mark.parametrize(
    "foreign",
    [shuffled, weighted, draws_in_random_order, weighted_draws, several_draws_in_one, other_rows_in_our_order,
     draws_of_another_plan, draws_of_another_digest],
)  # fmt: skip
def test_every_loader_but_ours_is_refused(tiny_run, foreign: Callable[[Any], Any]) -> None:
    """PRIVACY 1 and 25: shuffled, weighted, reordered or otherwise planned batches raise."""
    run = tiny_run(some_plan(), ROWS)
    run.loader = foreign(run)
    refused(run, "found another sampler" if foreign.__name__.startswith("draws_of") else "the loader of private_loader")


@pytest.mark.parametrize("other", [{"plan": some_plan(noise_multiplier=4.0)}, {"digest": "e" * 64}], ids=["plan", "digest"])
def test_noise_of_another_plan_is_refused(tiny_run, other: dict[str, Any]) -> None:
    """PRIVACY 1: mechanism, sampler and accountant hold one plan and one digest."""
    run = tiny_run(some_plan(), ROWS)
    mechanism = NoiseMechanism(**{"plan": run.plan, "key": RunKey.for_tests(0), "digest": run.digest, **other})
    run.method.mechanism = run.mechanism = mechanism
    refused(run, "found another noise")


# ---- counting


def test_a_release_is_paid_for_on_disk_before_it_is_made(tiny_run, monkeypatch: pytest.MonkeyPatch) -> None:
    """PRIVACY 35: when private data are first touched, the ledger on disk already holds the line."""
    run = tiny_run(some_plan(), ROWS)
    query, seen = run.method.query, []

    def watched(batch: LogicalBatch) -> dict[str, Tensor]:
        seen.append([json.loads(line)["release"] for line in run.ledger.path.read_text().splitlines()])
        return query(batch)

    monkeypatch.setattr(run.method, "query", watched)
    run.fit()
    assert seen == [list(range(release + 1)) for release in range(8)]


def test_a_ledger_that_cannot_be_written_stops_the_run(tiny_run, monkeypatch: pytest.MonkeyPatch) -> None:
    """PRIVACY 35: nothing is released that is not paid for."""
    run = tiny_run(some_plan(), ROWS)
    monkeypatch.setattr(run.ledger, "charge", lambda entry: (_ for _ in ()).throw(OSError("disk full")))
    refused(run, "disk full", OSError)


def test_uncharged_releases_are_noticed(tiny_run, monkeypatch: pytest.MonkeyPatch) -> None:
    """PRIVACY 24: at exit the ledger holds a line for every step."""
    run = tiny_run(some_plan(), ROWS)
    monkeypatch.setattr(run.ledger, "charge", lambda entry: True)
    with pytest.raises(RuntimeError, match="8 optimizer steps, fewer releases"):
        run.fit()


class StepsTwice(FirstOrder):
    def training_step(self, batch: LogicalBatch, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        self.optimizers().step()


class DrawsTwice(FirstOrder):
    def training_step(self, batch: LogicalBatch, batch_idx: int) -> None:
        self.mechanism.release({}, batch.release, self.weights)
        super().training_step(batch, batch_idx)


class ForgetsNoise(FirstOrder):
    def training_step(self, batch: LogicalBatch, batch_idx: int) -> None:
        self.update(self.query(batch), self.mechanism.plan.at(batch.release))


@pytest.mark.parametrize(("wrong", "found"), [(StepsTwice, "2 optimizer steps and 1 "), (DrawsTwice, "1 .* and 2 noise"),
                                              (ForgetsNoise, "1 .* and 0 noise")])  # fmt: skip
def test_steps_and_noise_draws_must_agree_after_every_release(tiny_run, wrong: type, found: str) -> None:
    """PRIVACY 10 and 24: one step, one draw of noise; anything else stops the run at its first release."""
    run = tiny_run(some_plan(), ROWS, method_class=wrong)
    with pytest.raises(RuntimeError, match=f"Release 0: {found}"):
        run.fit()
    assert len(run.ledger.entries) == 1


def test_no_release_beyond_the_plan(tiny_run) -> None:
    """PRIVACY 24: release T + 1 is neither drawn, nor paid for, nor made."""
    run = tiny_run(some_plan(), ROWS)
    run.loader = DataLoader(run.batches, batch_size=None, sampler=ReleaseOrder(9), collate_fn=lambda batch: batch)
    with pytest.raises(IndexError, match="steps=8"):
        run.fit()
    assert (len(run.ledger.entries), run.mechanism.draws) == (8, 8)
    trainer = SimpleNamespace(global_step=8)
    with pytest.raises(IndexError, match="steps=8"):
        run.guard.on_train_batch_start(trainer, run.method, LogicalBatch(8, ()), 8)
    assert len(run.ledger.entries) == 8


def test_wrong_batches_are_refused_one_by_one(tiny_run) -> None:
    """PRIVACY 25: also where a loader passed for ours gives something else."""
    run = tiny_run(some_plan(), ROWS)
    trainer = SimpleNamespace(global_step=3)
    with pytest.raises(UserError, match="Expected a LogicalBatch from private_loader, found dict"):
        run.guard.on_train_batch_start(trainer, run.method, {"x": ROWS}, 3)
    with pytest.raises(RuntimeError, match="Expected release 3, the loader gave release 4"):
        run.guard.on_train_batch_start(trainer, run.method, LogicalBatch(4, ()), 3)
    with pytest.raises(RuntimeError, match="Release 3 would go past epsilon"):
        run.guard.on_train_batch_start(trainer, run.method, LogicalBatch(3, ()), 3)  # nothing left: it never started
    assert run.ledger.entries == []


# ---- every tensor moves


@pytest.mark.parametrize("elsewhere", [True, False])
def test_what_moved_on_another_rank_has_moved(tiny_run, monkeypatch, elsewhere: bool) -> None:
    """PRIVACY 16: of a tensor that is dealt out each rank sees its own part alone; here the other rank's answer is given."""
    run = tiny_run(some_plan(epochs=2), ROWS, unused=True)
    run.method.make_optimizer = lambda groups, lr: torch.optim.SGD(groups[0]["params"][:1], lr=lr)
    monkeypatch.setattr(Ranks, "all_of", lambda _, still: [still, [] if elsewhere else still])
    with nullcontext() if elsewhere else pytest.raises(UserError, match="first unused"):
        run.fit()


@pytest.mark.parametrize(("epochs", "releases"), [(2, MOVED_BY), (0.5, 2)])
def test_tensor_that_never_moves_is_reported(tiny_run, epochs: float, releases: int) -> None:
    """PRIVACY 16: a trainable tensor that the optimizer does not know is named after 4 releases, or at the end."""
    run = tiny_run(some_plan(epochs=epochs), ROWS, unused=True)
    run.method.make_optimizer = lambda groups, lr: torch.optim.SGD(groups[0]["params"][:1], lr=lr)
    with pytest.raises(UserError, match=f"1 trainable tensors have not moved after {releases} releases, first unused"):
        run.fit()
    assert len(run.ledger.entries) == releases
