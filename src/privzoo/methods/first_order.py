"""First-order methods: the clipped, noisy sum of per-example gradients, given to an ordinary optimizer.

DP full fine-tuning, DP-BiTFiT, DP-LoRA and a linear probe are this module with another `trainable` or `adapter` (their yaml
files say which); without privacy (eps=inf) the plan has no noise and no clipping, and the same lines are ordinary mini-batch
training over Poisson draws.

Source: Abadi et al. 2016 (DP-SGD); Bu et al. 2022 (DP-BiTFiT); Yu et al. 2022 (DP-LoRA).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from privzoo.methods.base import Interrupted, PrivateMethod
from privzoo.privacy.clipping.engine import ClippedSums, zero_sums
from privzoo.privacy.plan import ReleaseSetting
from privzoo.privacy.preflight import check_engine
from privzoo.privacy.sampling import LogicalBatch, MicroBatch


class FirstOrder(PrivateMethod):
    """Query: the sum of per-example gradients, each clipped to the plan's clip_norm. Update: an optimizer's step.

    Args:
        engine: partial of a gradient engine, completed with the model.
        rest: as for `PrivateMethod`.
    """

    def __init__(self, *args: Any, engine: Callable[[nn.Module], Callable[..., ClippedSums]], **rest: Any) -> None:
        super().__init__(*args, **rest)
        self.engine = engine(self.model)

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
            found = self.engine(lambda each=micro_batch: self.losses(each), clip_norm, into=sums)
            losses.append(found.losses)
        if losses:
            self.private_metrics["private/loss"] = float(torch.cat(losses).mean())
        active = self.active
        sums |= zero_sums({name: p for name, p in active.items() if name not in sums})
        return {name: sums[name] for name in active}

    def update(self, noisy_sums: dict[str, Tensor], setting: ReleaseSetting) -> None:
        """One optimizer step with the noisy mean; it divides by the expected batch size.

        Args:
            noisy_sums: released sums, by parameter name; overwritten.
            setting: of the release that they are of.
        """
        for name, parameter in self.active.items():
            parameter.grad = noisy_sums[name].div_(setting.batch_size).to(parameter.dtype)
        self.finish_step()

    def preflight(self, rows: Sequence[Any]) -> None:
        """Compare the engine with the definition in every phase, see `check_engine`."""

        def losses(micro_batch: MicroBatch) -> Tensor:
            return self.losses(micro_batch)

        for number, phase in enumerate(self.mechanism.plan.phases):
            self.start_phase(number)
            check_engine(self.engine, self.model, losses, rows, self.task.collate, phase.clip_norm)
        self.start_phase(0)
