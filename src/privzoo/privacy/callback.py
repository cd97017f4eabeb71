"""The privacy callback: it observes, accounts and refuses. Without it a run would be as noisy, but nobody would count."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler, LearningRateFinder

from privzoo.errors import RunLost, UserError
from privzoo.privacy.accounting import Releases, epsilon_spent
from privzoo.privacy.ledger import Entry, Ledger
from privzoo.privacy.noise import NoiseMechanism, fingerprint
from privzoo.privacy.plan import PrivacyPlan
from privzoo.privacy.ranks import ALONE, Ranks
from privzoo.privacy.replicas import Replicas
from privzoo.privacy.sampling import LogicalBatch, PoissonBatches, ReleaseOrder

MOVED_BY = 4  # releases after which every trainable tensor must have moved


class PrivateModule(Protocol):
    """What the callback asks of a method."""

    mechanism: NoiseMechanism
    weights: str  # fingerprint of the trainable parameters that the next release is taken at
    exact: Mapping[str, torch.Tensor]  # what is trained, in the precision in which updates add up
    active: dict[str, torch.nn.Parameter]  # those of them that the phase at hand trains
    ranks: Ranks


class PrivacyCallback(Callback):
    """Pays for each release in the ledger before it is made, stops at epsilon, and refuses set-ups in which it can't hold.

    Args:
        plan: the public numbers; the same object that sampler and mechanism hold.
        ledger: open ledger of the run.
        digest: `RunKey.digest` of the run, as given to sampler and mechanism.
    """

    def __init__(self, plan: PrivacyPlan, ledger: Ledger, digest: str) -> None:
        self.plan = plan
        self.ledger = ledger
        self.digest = digest
        self.left = 0
        self._before: dict[str, str] = {}
        self._made = self._phase_began = 0

    # ---- before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_callbacks(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_unsafe(trainer, self.plan, self.digest, _private(pl_module).mechanism, _private(pl_module).ranks)
        self.left = affordable(self.plan, self.ledger, self.digest, trainer.global_step)
        self._before = _fingerprints(_private(pl_module))

    # ---- each release

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Write the release into the ledger before it is made; refuse one that the plan or epsilon has no room for."""
        if not isinstance(batch, LogicalBatch):
            raise UserError(f"Expected a LogicalBatch from private_loader, found {type(batch).__name__}.")
        if batch.release != trainer.global_step:
            raise RuntimeError(f"Expected release {trainer.global_step}, the loader gave release {batch.release}.")
        entry = self._entry(batch.release, _private(pl_module).weights)
        if self.plan.at(batch.release).index == 0:
            self._before, self._phase_began = _fingerprints(_private(pl_module)), self._made
        if self.left == 0 and entry not in self.ledger.entries:
            raise RuntimeError(f"Release {batch.release} would go past epsilon={self.plan.epsilon}.")
        try:
            self.left -= self.ledger.charge(entry)
        except ValueError as error:
            self.ledger.branch(str(error))
            raise RunLost(
                f"Release {batch.release} was lost and cannot be computed again exactly: resume once more, and it is drawn "
                "afresh and paid for again."
            ) from error

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hold optimizer steps, noise draws and ledger entries against each other, and stop where epsilon ends."""
        self._made += 1
        if trainer.global_step != batch.release + 1 or _private(pl_module).mechanism.draws != self._made:
            raise RuntimeError(
                f"Release {batch.release}: {trainer.global_step} optimizer steps and "
                f"{_private(pl_module).mechanism.draws} noise draws, expected {batch.release + 1} and {self._made}."
            )
        if self._made - self._phase_began == min(MOVED_BY, self.plan.at(batch.release).steps):
            self._check_moved(_private(pl_module))
        upcoming = self._entry(batch.release + 1, _private(pl_module).weights) if self._more(batch.release) else None
        if self.left == 0 and upcoming is not None and upcoming not in self.ledger.entries:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len({e.release for e in self.ledger.entries}) < trainer.global_step:
            raise RuntimeError(f"{trainer.global_step} optimizer steps, fewer releases in {self.ledger.path}.")

    # ---- parts

    def epsilon_spent(self) -> float:
        """Epsilon of everything in the ledger, at the plan's delta (PLD)."""
        return epsilon_spent(self.ledger.releases(), self.plan.delta)

    def _more(self, release: int) -> bool:
        return release + 1 < self.plan.steps

    def _entry(self, release: int, weights: str) -> Entry:
        setting = self.plan.at(release)
        clip_norm = setting.clip_norm if math.isfinite(setting.clip_norm) else 0.0  # 0: no clipping, no noise
        return Entry(release, setting.sample_rate, setting.noise_multiplier, clip_norm, self.digest, weights, setting.noise)

    def _check_moved(self, module: PrivateModule) -> None:
        now = _fingerprints(module)
        still = [name for name in module.active if self._before.get(name) == now[name]]
        on_ranks = module.ranks.all_of(still)  # of a tensor that is dealt out another rank's part may have moved
        still = [name for name in still if all(name in others for others in on_ranks)]
        if still:
            raise UserError(
                f"{len(still)} trainable tensors have not moved after {self._made - self._phase_began} releases, first "
                f"{still[0]}: they get no gradient; freeze them (method.trainable=…) or correct the model."
            )


def _private(module: LightningModule) -> Any:
    return module


def _fingerprints(module: PrivateModule) -> dict[str, str]:
    return {name: fingerprint([(name, p)]) for name, p in module.exact.items()}


def affordable(plan: PrivacyPlan, ledger: Ledger, digest: str, start: int) -> int:
    """How many of the releases from `start` on can be paid for within the plan's epsilon, besides those paid already.

    For a fresh run all of the plan's. After a resume in another configuration some releases were charged twice, and the
    last ones can't be afforded.
    """
    paid = {entry.release for entry in ledger.entries if entry.digest == digest}
    wanted = [plan.at(release).release for release in range(start, plan.steps) if release not in paid]
    if not plan.private or not ledger.entries:
        return len(wanted)
    target = plan.epsilon
    assert target is not None

    def within(count: int) -> bool:
        counts = Counter(dict(ledger.releases()))
        counts.update(wanted[:count])
        return epsilon_spent(list(counts.items()), plan.delta) <= target

    if within(len(wanted)):
        return len(wanted)
    low, high = 0, len(wanted) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if within(middle) else (low, middle - 1)
    return low


def charged_twice(plan: PrivacyPlan, ledger: Ledger, digest: str, start: int) -> Releases:
    """Releases in the ledger beyond those of the checkpoint and those that this session computes again at no cost."""
    counts = Counter(dict(ledger.releases()))
    counts.subtract(plan.at(release).release for release in range(start))
    counts.subtract(plan.at(e.release).release for e in ledger.entries if e.digest == digest and e.release >= start)
    return [(release, count) for release, count in counts.items() if count > 0]


def makeable(plan: PrivacyPlan, ledger: Ledger, digest: str, start: int) -> bool:
    """True if release `start` was paid for already in this configuration, or can be."""
    paid = any(entry.release == start and entry.digest == digest for entry in ledger.entries)
    return paid or affordable(plan, ledger, digest, start) > 0


def refuse_unsafe(trainer: Any, plan: PrivacyPlan, digest: str, mechanism: NoiseMechanism, ranks: Ranks = ALONE) -> None:
    """Refuse every Trainer setting under which the plan's account would be false.

    Raises:
        UserError: naming the setting found, the one expected, and why.
    """
    expected = {
        "accumulate_grad_batches": (trainer.accumulate_grad_batches, 1, "a logical batch is one release"),
        "gradient_clip_val": (trainer.gradient_clip_val, None, "contributions are clipped one by one, not their noisy sum"),
        "max_epochs": (trainer.max_epochs, 1, "the plan's releases are one pass over the loader"),
        "overfit_batches": (trainer.overfit_batches, 0.0, "it replaces the Poisson sampler"),
        "fast_dev_run": (bool(trainer.fast_dev_run), False, "it cuts releases that the plan pays for"),
        "limit_train_batches": (str(trainer.limit_train_batches), "1.0", "it cuts releases that the plan pays for"),
        "world_size": (trainer.world_size, ranks.count, "each process treats its share of a draw, by the ranks it was told"),
        "global_rank": (trainer.global_rank, ranks.rank, "two processes would treat the same share of a draw"),
        "strategy": (
            type(trainer.strategy).__name__, Replicas.__name__ if ranks.count > 1 else type(trainer.strategy).__name__,
            "another may add up gradients of its own, which are not clipped"),
        "use_distributed_sampler": (
            trainer._accelerator_connector.use_distributed_sampler, False, "it replaces the Poisson sampler"),
        "reload_dataloaders_every_n_epochs": (trainer.reload_dataloaders_every_n_epochs, 0, "it draws anew"),
        "a GradScaler": (getattr(trainer.precision_plugin, "scaler", None), None, "it skips steps; take bf16 or float32"),
        "number of optimizers": (len(trainer.optimizers), 1, "one step is one release"),
    }  # fmt: skip
    for setting, (found, wanted, reason) in expected.items():
        if found != wanted:
            raise UserError(f"Expected {setting}={wanted} under privacy, found {found}: {reason}.")
    _refuse_loader(trainer.train_dataloader, plan, digest, mechanism, ranks)


def refuse_callbacks(trainer: Any) -> None:
    """Refuse callbacks that take steps of their own (before `on_train_start`, with all other callbacks off) or that decide
    by private figures.

    Raises:
        UserError: naming the callback.
    """
    for callback in trainer.callbacks:
        if isinstance(callback, BatchSizeFinder | LearningRateFinder | GradientAccumulationScheduler):
            raise UserError(f"{type(callback).__name__} takes steps that nobody pays for: remove it.")
        monitored = getattr(callback, "monitor", None)
        if isinstance(monitored, str) and monitored.startswith("private/"):
            raise UserError(f"{type(callback).__name__} decides by {monitored}, which is private: monitor a public split.")


def _refuse_loader(loader: Any, plan: PrivacyPlan, digest: str, mechanism: NoiseMechanism, ranks: Ranks) -> None:
    batches, order = getattr(loader, "dataset", None), getattr(loader, "sampler", None)
    if not isinstance(batches, PoissonBatches) or not isinstance(order, ReleaseOrder) or loader.batch_size is not None:
        raise UserError(
            f"Expected the loader of private_loader (Poisson draws), found a {type(loader).__name__} over "
            f"{type(batches).__name__} with {type(order).__name__}: the accountant would be wrong for it."
        )
    if batches.ranks != ranks:
        raise UserError(
            f"Expected the loader to be of {ranks}, as the method is, found {batches.ranks}: shares would not add up."
        )
    for name, holder in (("sampler", batches.draws), ("noise", mechanism)):
        if holder.plan is not plan or holder.digest != digest:
            raise UserError(f"Expected {name}, ledger and callback to share one plan and one digest, found another {name}.")
