"""First-order methods: the clipped, noisy sum of per-example gradients, given to an ordinary optimizer.

DP full fine-tuning and DP-BiTFiT are this module with another `trainable` (their yaml files say which); without privacy
(eps=inf) the plan has no noise and no clipping, and the same lines are ordinary mini-batch training over Poisson draws.

Source: Abadi et al. 2016 (DP-SGD); Bu et al. 2022 (DP-BiTFiT).
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from privzoo.errors import UserError
from privzoo.methods.trainable import select_trainable
from privzoo.privacy.clipping.engine import ClippedSums, zero_sums
from privzoo.privacy.noise import GaussianMechanism, fingerprint
from privzoo.privacy.sampling import LogicalBatch, MicroBatch
from privzoo.privacy.streams import RunKey
from privzoo.tasks.base import Task


class Interrupted(Exception):
    """The run was asked to stop; raised between micro-batches, where weights and optimizer are whole."""


class FirstOrder(LightningModule):
    """One release a training step: query, noise, update.

    Formal guarantee: private data are touched in `query` alone, whose result moves by at most clip_norm when one example
    comes or goes; everything after `mechanism.release` is post-processing.

    Args:
        model: the pretrained model.
        task: gives losses (R,) and the unit of each row.
        mechanism: holds plan and noise.
        trainable: what to train, see `select_trainable`.
        new_head: names of freshly initialised parameters.
        engine: partial of a gradient engine, completed with the model.
        optimizer: partial of a torch optimizer, completed with parameters and lr.
        lr: learning rate at its highest.
        schedule: "linear" (to 0 at the plan's last release) or "constant".
        warmup: part of the releases over which lr rises from 0.
        head_lr_factor: the new head learns at so many times `lr`.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        mechanism: GaussianMechanism,
        trainable: str,
        new_head: Iterable[str],
        engine: Callable[[nn.Module], Callable[..., ClippedSums]],
        optimizer: Callable[..., torch.optim.Optimizer],
        lr: float,
        schedule: str = "linear",
        warmup: float = 0.0,
        head_lr_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints hold the trained part; on_load_checkpoint checks it
        if schedule not in ("linear", "constant"):
            raise UserError(f"Expected method.schedule={schedule} to be linear or constant.")
        if not isinstance(warmup, (int, float)) or not 0 <= warmup < 1:
            raise UserError(f"Expected 0 <= method.warmup={warmup} < 1.")
        if not isinstance(head_lr_factor, (int, float)) or not 0 < head_lr_factor < math.inf:
            raise UserError(f"Expected method.head_lr_factor={head_lr_factor} to be a number above 0.")
        self.model = model
        self.task = task
        self.mechanism = mechanism
        self.new_head, self.head_lr_factor = tuple(new_head), head_lr_factor
        self.trainable = select_trainable(model, trainable, self.new_head)
        self.engine = engine(model)
        self.make_optimizer = optimizer
        self.lr, self.schedule, self.warmup = lr, schedule, warmup
        self.weights = ""
        self.private_metrics: dict[str, float] = {}
        self.stop_requested = False

    # ---- one release

    def training_step(self, batch: LogicalBatch, batch_idx: int) -> None:
        sums = self.query(batch)
        # ---- private data end here ----
        self.mechanism.release(sums, batch.release, self.weights)
        self.update(sums, self.mechanism.plan.at(batch.release).batch_size)

    def query(self, batch: LogicalBatch) -> dict[str, Tensor]:
        """Clipped sum over the logical batch, by parameter name; zeros for an empty draw.

        Raises:
            Interrupted: between micro-batches, if a stop was asked for.
        """
        clip_norm = self.mechanism.plan.at(batch.release).clip_norm
        sums: dict[str, Tensor] = {}  # made by the first micro-batch: until then they would only take memory
        losses = []
        self.private_metrics.clear()
        for micro_batch in batch.micro_batches:
            if self.stop_requested:
                raise Interrupted
            losses.append(self._add_clipped(micro_batch, clip_norm, sums))
        if losses:
            self.private_metrics["private/loss"] = float(torch.cat(losses).mean())
        unmoved = {name: p for name, p in self.trainable.items() if name not in sums}
        sums |= zero_sums(unmoved)
        return {name: sums[name] for name in self.trainable}

    def _add_clipped(self, micro_batch: MicroBatch, clip_norm: float, sums: dict[str, Tensor]) -> Tensor:
        on_device = {name: value.to(self.device) for name, value in micro_batch.items()}
        if self.task.unit_of_row(on_device) is not None:
            raise UserError(
                "The task has units of several rows, but rows are drawn one by one in this version: one unit would move the "
                "sum by more than clip_norm; take one row a unit."
            )
        found = self.engine(lambda: self.task.losses(self.model, on_device), clip_norm, into=sums)
        return found.losses

    def update(self, noisy_sums: dict[str, Tensor], batch_size: int) -> None:
        """One optimizer step with the noisy mean; it divides by the expected batch size.

        Args:
            noisy_sums: released sums, by parameter name; overwritten.
            batch_size: B of the plan.
        """
        for name, parameter in self.trainable.items():
            parameter.grad = noisy_sums[name].div_(batch_size).to(parameter.dtype)
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.lr_schedulers().step()  # type: ignore[union-attr]
        self.weights = fingerprint(self.trainable.items())

    # ---- Lightning

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self._parameter_groups(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _parameter_groups(self) -> list[dict[str, Any]]:
        body = [parameter for name, parameter in self.trainable.items() if name not in self.new_head]
        head = [self.trainable[name] for name in self.new_head]
        groups = [{"params": body, "lr": self.lr}, {"params": head, "lr": self.lr * self.head_lr_factor}]
        return [group for group in groups if group["params"]]

    def lr_factor(self, release: int) -> float:
        """Part of `lr` used for a release; depends on its public index alone."""
        steps = self.mechanism.plan.steps
        rising = math.ceil(self.warmup * steps)
        if release < rising:
            return (release + 1) / (rising + 1)
        return 1.0 if self.schedule == "constant" else max(0.0, (steps - release) / (steps - rising))

    def on_train_start(self) -> None:
        self._take_over_lr()
        self.weights = fingerprint(self.trainable.items())

    def _take_over_lr(self) -> None:
        """A resumed run may have another lr; the optimizer's state brought the old one along."""
        schedule, optimizer = self.lr_schedulers(), self.optimizers()
        highest = [self.lr, self.lr * self.head_lr_factor]
        schedule.base_lrs = highest[: len(schedule.base_lrs)]  # type: ignore[union-attr]
        for group, lr in zip(optimizer.param_groups, highest, strict=False):  # type: ignore[union-attr]
            group["initial_lr"], group["lr"] = lr, lr * self.lr_factor(self.global_step)

    def transfer_batch_to_device(self, batch: LogicalBatch, device: torch.device, dataloader_idx: int) -> LogicalBatch:
        return batch  # micro-batches move one at a time, in query

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        wanted = {f"model.{name}" for name in self.trainable}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in wanted}
        checkpoint["seal"] = seal_of(checkpoint, self.mechanism.key)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        expected = {f"model.{name}" for name in self.trainable}
        if checkpoint["state_dict"].keys() != expected:
            raise UserError(
                f"The checkpoint holds {len(checkpoint['state_dict'])} tensors, expected the {len(expected)} that this "
                "method trains: resume with the run's own configuration."
            )
        groups = [len(group["params"]) for group in checkpoint["optimizer_states"][0]["param_groups"]]
        if groups != [len(group["params"]) for group in self._parameter_groups()]:
            raise UserError(
                "The checkpoint's optimizer has other groups of parameters: another version made it; start again."
            )


def seal_of(checkpoint: dict[str, Any], key: RunKey) -> str:
    """A code over what a checkpoint lets into a run (step, weights, optimizer state) that only this run can make."""
    leaves = [leaf for leaf in tree_leaves(checkpoint["optimizer_states"]) if isinstance(leaf, Tensor)]
    tensors = [*checkpoint["state_dict"].items(), *((str(i), leaf) for i, leaf in enumerate(leaves))]
    return key.seal(f"{checkpoint['global_step']} {fingerprint(tensors)}")
