"""DPZero: a private step from losses alone. Without privacy (eps=inf) it is MeZO.

For each of K random directions u the weights stand at theta + lambda u and at theta - lambda u while the losses of the
batch are taken, without gradients. One example's contribution is the K-vector of (l+ - l-) / (2 lambda), clipped to norm C;
noise goes on the sum, a vector of K numbers, and the weights move along the directions.

Source: Zhang et al. 2024, "DPZero: Private Fine-Tuning of Language Models without Backpropagation", Algorithm 2; Malladi et
al. 2023 (MeZO).
"""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from privzoo.errors import UserError
from privzoo.methods.base import Interrupted, PrivateMethod
from privzoo.methods.directions import KINDS, Direction, SeededSGD
from privzoo.privacy.accounting import LAPLACE
from privzoo.privacy.clipping.engine import checked_units, clip_factors
from privzoo.privacy.plan import ReleaseSetting
from privzoo.privacy.preflight import check_losses
from privzoo.privacy.sampling import LogicalBatch, MicroBatch

GRID = 2.0**-23  # the distance of two float32 numbers between 1 and 2


class ZerothOrder(PrivateMethod):
    """Query: the sum of per-example slopes along K directions, each K-vector clipped. Update: a step along them.

    Formal guarantee: the directions are drawn from a stream of their own, before the data are looked at; one example's
    K-vector has L2 norm at most clip_norm, so that a release is one Poisson-sampled Gaussian event, whatever K; with
    Laplace noise it has L1 norm at most clip_norm, and a release is one Poisson-sampled Laplace event. The weights are
    moved while the losses are taken, and back by the end of the query.

    Args:
        smoothing: lambda > 0, how far the weights are moved along a direction; rounded to a multiple of 2^-23, so that
            float32 weights below 2 take a Rademacher step there and back without drifting: they round once, by at most
            half a unit in the last place.
        directions: K, directions a release.
        direction_kind: "rademacher", "normal" or "sphere", see `Direction`.
        rest: as for `PrivateMethod`; `optimizer` is a partial of `SeededSGD`.
    """

    noises = ("gaussian", "laplace")
    asks_again = False  # memory that runs out on the way may leave weights displaced, and another way there and back rounds

    def __init__(
        self,
        *args: Any,
        smoothing: float = 1e-3,
        directions: int = 1,
        direction_kind: str = "rademacher",
        **rest: Any,
    ) -> None:
        super().__init__(*args, **rest)
        if not isinstance(smoothing, (int, float)) or not 0 < smoothing < math.inf:
            raise UserError(f"Expected method.smoothing={smoothing} to be a number above 0.")
        if not isinstance(directions, int) or directions < 1:
            raise UserError(f"Expected method.directions={directions} to be a whole number of at least 1.")
        if direction_kind not in KINDS:
            raise UserError(f"Expected method.direction_kind={direction_kind} to be one of {', '.join(KINDS)}.")
        self.smoothing = max(1, round(smoothing / GRID)) * GRID
        self.directions, self.direction_kind = directions, direction_kind
        self._rows: Sequence[Any] = ()
        self._made: tuple[Any, list[Direction]] = (None, [])
        for parameter in self.trainable.values():
            parameter.data = parameter.data.contiguous()  # directions run along the flat view

    def query(self, batch: LogicalBatch) -> dict[str, Tensor]:
        """Sum over the logical batch of the clipped slopes, `{"directions": (K,)}` in float64; zeros for an empty draw.

        For an empty draw too the weights go there and back: float32 weights round on the way, and ones that have not rounded
        would tell that nothing was drawn.

        An example with a slope that is not finite contributes nothing. Weights in float32 come back to within rounding.

        Raises:
            Interrupted: before the weights are moved, if this process `stops_here`. Not later: after a move the weights are
                no longer those that the release's noise is keyed by, and a checkpoint of them would be of no release.
        """
        if self.stops_here:
            raise Interrupted
        self.private_metrics.clear()
        both = torch.stack([self._losses_on_both_sides(batch, d) for d in self._directions(batch.release)])  # (K, 2, U)
        if batch.micro_batches:
            self.private_metrics["private/loss"] = float(both.mean())
        slopes = (both[:, 0] - both[:, 1]).t() / (2 * self.smoothing)  # (U, K)
        return {"directions": clipped_sum(slopes, self.mechanism.plan.at(batch.release).clip_norm, self._order)}

    def update(self, noisy_sums: dict[str, Tensor], setting: ReleaseSetting) -> None:
        """theta <- theta - lr / K * sum over k of (noisy sum k / B) u_k, with the expected batch size B.

        Args:
            noisy_sums: released sums, `{"directions": (K,)}`.
            setting: of the release that they are of.
        """
        slopes = (noisy_sums["directions"] / (setting.batch_size * self.directions)).tolist()
        self.walker.slopes = list(zip(self._directions(setting.number), slopes, strict=True))
        self.finish_step()

    @torch.no_grad()
    def trial(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Their losses."""
        return {"losses": self.losses(self.dropout.naming(self.task.collate, rows)(list(rows)))}

    def preflight(self, rows: Sequence[Any]) -> None:
        """Look at a few rows' losses, together and alone, in every phase, see `check_losses`."""
        _ = self.walker  # a wrong optimizer is found here
        self._rows = rows
        for number, phase in enumerate(self.mechanism.plan.phases):
            self.start_phase(number)
            self._check_rows(phase.clip_norm, phase.batch_size)
        self.start_phase(0)

    def on_train_start(self) -> None:
        """Under the Trainer's autocast losses are rounded otherwise than in pre-flight: look at the rows again."""
        super().on_train_start()
        plan = self.mechanism.plan
        with self.trainer.precision_plugin.forward_context():
            if torch.is_autocast_enabled(self.device.type) and self.dealt is not None and self.dealt.wholes:
                raise UserError(
                    "trainer.precision=bf16-mixed beside trainer.strategy=fsdp: how losses round cannot be looked at where "
                    "all weights are dealt out; take trainer.precision=32-true."
                )
            if self._rows and torch.is_autocast_enabled(self.device.type):
                setting = plan.at(min(self.global_step, plan.steps - 1))
                self._check_rows(setting.clip_norm, setting.batch_size)

    def _check_rows(self, clip_norm: float, batch_size: int) -> None:
        def losses(micro_batch: MicroBatch) -> Tensor:
            return self.losses(micro_batch)

        # The longest row of a micro-batch decides how the others are padded, and so how they round. A loss that moves by r
        # moves a slope by up to r / lambda; 2 B of them, of either sign, come to less than 4 sqrt(2 B) r / lambda, which may
        # be 0.02 C.
        rows = max(map(len, self.task.rows_of_unit or [[0]]))  # of a unit, whose losses are added up
        allowed = 0.02 * clip_norm * self.smoothing / (4 * math.sqrt(2 * batch_size) * rows)
        collate = self.dropout.naming(self.task.collate, self._rows)
        check_losses(self.model, losses, self._rows, collate, allowed)

    @property
    def _order(self) -> int:
        return 1 if self.mechanism.plan.noise == LAPLACE else 2

    @property
    def exact(self) -> Mapping[str, Tensor]:
        return {name: self.walker.exact(parameter) for name, parameter in self.trainable.items()}

    @property
    def contribution(self) -> str:
        """See `PrivateMethod.contribution`."""
        many = "the slope" if self.directions == 1 else f"the {self.directions} slopes, together,"
        return f"{many} of the loss along random directions, scaled down to an L{self._order} norm of at most clip_norm"

    def _exact_copies(self) -> list[tuple[str, Tensor]]:
        parameters = [parameter for group in self.walker.param_groups for parameter in group["params"]]
        return [(f"exact.{i}", self.walker.exact(p)) for i, p in enumerate(parameters) if p.element_size() < 4]

    @cached_property
    def walker(self) -> SeededSGD:
        """The optimizer; the query moves the weights with it too, as it holds their float32 copies."""
        made = super().new_optimizer()
        if not isinstance(made, SeededSGD):
            raise UserError(
                f"Expected method.optimizer to be privzoo.methods.directions.SeededSGD, found {type(made).__name__}: it "
                "would want gradients, and there are none."
            )
        return made

    def new_optimizer(self) -> torch.optim.Optimizer:
        return self.walker

    def take_over(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        super().take_over(parameters)
        self.__dict__.pop("walker", None)
        self._made = None, []

    def forget_moments(self) -> None:
        """There are none; the optimizer's state is the float32 copies of the weights."""

    def _directions(self, release: int) -> list[Direction]:
        wanted = (release, self.weights, tuple(self.active))
        if self._made[0] != wanted:
            key, digest = self.mechanism.key, self.mechanism.digest + self.weights
            numbers, kind = range(self.directions), self.direction_kind
            self._made = wanted, [Direction(key, kind, release, digest, number, self.active) for number in numbers]
        return self._made[1]

    def _losses_on_both_sides(self, batch: LogicalBatch, direction: Direction) -> Tensor:
        """Losses of units at theta + lambda u and at theta - lambda u, shape (2, U), float64 on the CPU."""
        at, found = 0.0, []
        try:
            for place in (self.smoothing, -self.smoothing):
                self.walker.displace(direction, at, place)
                at = place
                found.append(self._losses(batch))
        finally:
            self.walker.displace(direction, at, 0.0)
        return torch.stack(found)

    @torch.no_grad()
    def _losses(self, batch: LogicalBatch) -> Tensor:
        found = [self._by_unit(micro_batch) for micro_batch in batch.micro_batches]
        for filler in batch.fillers:
            self.losses(filler)
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)

    def _by_unit(self, micro_batch: MicroBatch) -> Tensor:
        """The losses of each unit's rows added up, (U,)."""
        losses = self.losses(micro_batch)
        units, count = checked_units(losses, self.unit_of_row(micro_batch))
        sums = torch.zeros(count, dtype=torch.float64)
        return sums.index_add_(0, units.cpu(), losses.to("cpu", torch.float64))


def clipped_sum(slopes: Tensor, clip_norm: float, order: int = 2) -> Tensor:
    """Sum over rows of the rows, each scaled to a norm of at most clip_norm.

    Adding or removing a row moves the result by at most clip_norm in that norm, up to rounding of float64. A row that is
    not finite contributes nothing.

    Args:
        slopes: of R examples along K directions, shape (R, K).
        clip_norm: C > 0; inf turns clipping off.
        order: of the norm, 1 or 2.
    Returns:
        Shape (K,).

    >>> clipped_sum(torch.tensor([[3.0, 4.0], [0.0, 0.5], [float("nan"), 1.0]]), clip_norm=1.0)
    tensor([0.6000, 1.3000])
    """
    factors = clip_factors(torch.linalg.vector_norm(slopes, ord=order, dim=1), clip_norm)[:, None]
    return torch.where(factors > 0, slopes * factors, torch.zeros_like(slopes)).sum(0)
