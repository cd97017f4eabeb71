"""Averages of the weights over releases: they are made of what was released, so they cost no privacy.

Source: Polyak and Juditsky 1992 (averaging); De et al. 2022 (exponential averages under DP).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from privzoo.errors import UserError
from privzoo.methods.optimizers import has_modes


class ExponentialAverage(nn.Module):
    """a_1 = w_1, a_t = decay a_{t-1} + (1 - decay) w_t after release t, for the trained parameters alone.

    Guarantee: post-processing. Training goes on from the weights, never from their average; only what is scored and saved is
    the average. It is a copy of the trained part in float32 at least (in bf16 small changes would be lost), lies in the
    checkpoint and its seal, and does not key the noise.

    Args:
        decay: in [0, 1); it looks back about 1 / (1 - decay) releases. 0 is the last weights.
    Raises:
        UserError: for a decay out of range.
    """

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        if not isinstance(decay, (int, float)) or not 0 <= decay < 1:
            raise UserError(f"Expected 0 <= method.average.decay={decay} < 1.")
        self.decay = decay

    def follow(self, parameters: Mapping[str, Tensor]) -> None:
        """Begin with nothing averaged yet."""
        alone = {name: parameter.detach().clone() for name, parameter in parameters.items()}  # of a view it copies all
        average = AveragedModel(_wide(alone), multi_avg_fn=get_ema_multi_avg_fn(self.decay))
        self.averaged = average.requires_grad_(False)

    def update(self, parameters: Mapping[str, Tensor]) -> None:
        """Take in the weights after a release, in the order of `follow`."""
        self.averaged.update_parameters(_wide(parameters))

    @property
    def begun(self) -> bool:
        return int(self.averaged.n_averaged) > 0

    @torch.no_grad()
    def copy_to(self, parameters: Mapping[str, Tensor]) -> None:
        for parameter, value in zip(parameters.values(), self.averaged.module.parameters(), strict=True):
            parameter.copy_(value)


@contextmanager
def weights_to_publish(
    parameters: Mapping[str, Tensor], optimizer: Any, average: ExponentialAverage | None
) -> Iterator[None]:
    """Meanwhile the parameters hold what is scored and saved: their average, or where an optimizer with two modes says.

    Afterwards they hold what they held before, bit for bit: to score must not change the next release, and going to and fro
    would round.
    """
    averaged, modes = average is not None and average.begun, has_modes(optimizer)
    if not averaged and not modes:
        yield
        return
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    if modes:
        optimizer.eval()
    if averaged:
        average.copy_to(parameters)  # type: ignore[union-attr]
    try:
        yield
    finally:
        if modes:
            optimizer.train()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])


def _wide(parameters: Mapping[str, Tensor]) -> nn.ParameterList:
    """The parameters as a module, in float32 at least; no copy where they are so already."""
    return nn.ParameterList(p.detach().to(torch.promote_types(p.dtype, torch.float32)) for p in parameters.values())
