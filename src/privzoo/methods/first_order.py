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
from privzoo.methods.optimizers import tell_noise
from privzoo.privacy.clipping.adaptive import COUNT, AdaptiveClip
from privzoo.privacy.clipping.engine import ClippedSums, zero_sums
from privzoo.privacy.clipping.functions import FLAT
from privzoo.privacy.noise import Part
from privzoo.privacy.plan import ReleaseSetting
from privzoo.privacy.preflight import check_engine, check_units
from privzoo.privacy.sampling import LogicalBatch, MicroBatch


class FirstOrder(PrivateMethod):
    """Query: the sum of per-example gradients, each clipped to the plan's clip_norm. Update: an optimizer's step.

    Args:
        engine: partial of a gradient engine, completed with the model.
        adaptive: makes the clip norm follow a quantile of the gradient norms; None: the plan's clip_norm throughout.
        rest: as for `PrivateMethod`.
    """

    def __init__(
        self,
        *args: Any,
        engine: Callable[[nn.Module], Callable[..., ClippedSums]],
        adaptive: AdaptiveClip | None = None,
        **rest: Any,
    ) -> None:
        super().__init__(*args, **rest)
        self.engine = engine(self.model)
        self.adaptive = adaptive
        self.clip_norm = 0.0  # of the last release
        if adaptive is not None:
            adaptive.check(self.mechanism.plan)

    def query(self, batch: LogicalBatch) -> dict[str, Tensor]:
        """Clipped sum over the logical batch, by parameter name; zeros for an empty draw. With `adaptive`, its count too.

        Raises:
            Interrupted: between micro-batches, if this process `stops_here`.
        """
        setting = self.mechanism.plan.at(batch.release)
        clip_norm = setting.clip_norm if self.adaptive is None else self.adaptive.clip_norm(setting)
        self.clip_norm = clip_norm
        sums: dict[str, Tensor] = {}  # made by the first micro-batch: until then they would only take memory
        losses, norms = [], []
        self.private_metrics.clear()
        for micro_batch in batch.micro_batches:
            if self.stops_here:
                raise Interrupted
            units = self.unit_of_row(micro_batch)
            found = self.engine(lambda each=micro_batch: self.losses(each), clip_norm, unit_of_row=units, into=sums)
            losses.append(found.losses)
            norms.append(found.norms)
        for filler in batch.fillers:
            assert self.dealt is not None
            with self.dealt.without_own():  # where sums are dealt out, what others add to this rank's part comes in here
                into = sums if self.dealt.wholes else None
                self.engine(lambda each=filler: self.losses(each), clip_norm, into=into)
        if losses:
            self.private_metrics["private/loss"] = float(torch.cat(losses).mean())
        active = self.active
        copied = self.dealt.copied if self.dealt and not self.dealt.wholes else {}
        sums |= zero_sums({name: copied.get(name, p) for name, p in active.items() if name not in sums})
        count = {} if self.adaptive is None else {COUNT: self.adaptive.count(norms, setting)}
        return {name: sums[name] for name in active} | count

    @property
    def contribution(self) -> str:
        """See `PrivateMethod.contribution`."""
        if type(self).query is not FirstOrder.query:
            return super().contribution
        names = {"all": "as a whole", "layer": "layer by layer to shares C_l with sum of C_l^2 = C^2"}
        function = getattr(self.engine, "clipping", FLAT)
        by = getattr(function, "__qualname__", function)  # of a function, whose own words hold an address
        how = f"a gradient, scaled {names[getattr(self.engine, 'groups', 'all')]} by {by} to a norm of at most"
        if self.adaptive is None:
            return f"{how} clip_norm"
        return (
            f"{how} C_t, and 1/2 or -1/2 to a count, both accounted as one release; C_t follows quantile "
            f"{self.adaptive.quantile:g} of the norms by that count with its noise"
        )

    @property
    def public_metrics(self) -> dict[str, float]:
        """With `adaptive`, the clip norm of the last release."""
        return {} if self.adaptive is None or not self.mechanism.plan.private else {"clip_norm": self.clip_norm}

    def parts(self, release: int) -> list[Part] | None:
        """None, or with `adaptive` the gradients, clipped to C_t, and the count."""
        if self.adaptive is None:
            return None
        return self.adaptive.parts(self.active, self.mechanism.plan.at(release))

    def update(self, noisy_sums: dict[str, Tensor], setting: ReleaseSetting) -> None:
        """One optimizer step with the noisy mean; it divides by the expected batch size.

        Args:
            noisy_sums: released sums, by parameter name; overwritten.
            setting: of the release that they are of.
        """
        self._tell_noise(setting)
        if self.adaptive is not None:
            self.adaptive.update(noisy_sums.pop(COUNT), setting)
            if setting.index + 1 == setting.steps and setting.number + 1 < self.mechanism.plan.steps:
                self.adaptive.scale.fill_(1)  # the next phase has other parameters, hence other norms
        for name, parameter in self.active.items():
            parameter.grad = noisy_sums[name].div_(setting.batch_size).to(parameter.dtype)
        self.finish_step()

    def _tell_noise(self, setting: ReleaseSetting) -> None:
        """The standard deviation of the noise on the mean, to an optimizer that has use for it (DP-AdamBC)."""
        noise_std = 0.0
        if setting.noise_multiplier > 0:
            adaptive = self.adaptive
            of_gradients = setting.noise_multiplier if adaptive is None else adaptive.noise_multipliers(setting)[0]
            clip_norm = setting.clip_norm if adaptive is None else adaptive.clip_norm(setting)
            noise_std = of_gradients * clip_norm / setting.batch_size
        tell_noise(self._optimizer(), noise_std)

    def trial(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """The mean over ranks of the clipped sums, at a clip norm that is small, so that factors differ."""
        collate = self.dropout.naming(self.task.collate, rows)
        sums = self.engine(lambda: self.losses(collate(list(rows))), 1e-3).sums
        added_up = self.ranks.count if self.dealt is not None and self.dealt.wholes else 1
        return {name: value / added_up for name, value in sums.items()}

    def preflight(self, rows: Sequence[Any]) -> None:
        """Compare the engine with the definition in every phase, see `check_engine`."""

        def losses(micro_batch: MicroBatch) -> Tensor:
            return self.losses(micro_batch)

        for number, phase in enumerate(self.mechanism.plan.phases):
            self.start_phase(number)
            collate = self.dropout.naming(self.task.collate, rows)
            check_engine(self.engine, self.model, losses, rows, collate, phase.clip_norm)
            if self.task.rows_of_unit is not None:
                check_units(self.engine, self.model, losses, rows, collate, phase.clip_norm)
        self.start_phase(0)
