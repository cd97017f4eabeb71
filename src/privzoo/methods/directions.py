"""Random directions that are made anew whenever they are needed, and the optimizer that walks along them.

A direction is as large as what is trained. So it is never kept: whoever moves weights along it draws it again from its
stream, block by block, and needs the memory of one block.

Source: Malladi et al. 2023 (MeZO); Zhang et al. 2024 (DPZero).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from privzoo.privacy.noise import BLOCK
from privzoo.privacy.ranks import begins_here, held_here
from privzoo.privacy.streams import RunKey

KINDS = ("rademacher", "normal", "sphere")
_SIGN = -(1 << 31)  # the sign bit of an int32
_ONE = 0x3F800000  # the bits of 1.0 as a float32


class Direction:
    """One random direction u over some parameters: float32 values with mean 0 and E[u u^T] = I.

    "normal": independent N(0, 1). "sphere": uniform on the sphere of radius sqrt(d), d counting all parameters together.
    "rademacher": every value is 1 or -1 with equal chance; it lies on that sphere too. The same arguments give the same
    direction, whatever the device. Its stream has a purpose of its own, so it tells nothing about the noise of a release.

    Args:
        key: the run's secret.
        kind: one of KINDS.
        release: index of the release.
        digest: what determines the release's sum, the weights included.
        number: of the direction, where a release has several.
        parameters: contiguous tensors, by name.
    """

    def __init__(
        self, key: RunKey, kind: str, release: int, digest: str, number: int, parameters: Mapping[str, Tensor]
    ) -> None:
        self.key, self.kind, self.release, self.digest, self.number = key, kind, release, digest, number
        self.parameters = dict(parameters)
        self._names = {id(parameter): name for name, parameter in parameters.items()}

    def __contains__(self, parameter: Tensor) -> bool:
        return id(parameter) in self._names

    def blocks(self, parameter: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(place in the flat parameter, values on its device), block by block.

        Of a parameter that is dealt out to ranks these are the place in this rank's part, and what the whole has there.
        """
        scale = self._scale if self.kind == "sphere" else 1.0
        first, count = begins_here(parameter), held_here(parameter).numel()
        for place, values in self._drawn(parameter, first, first + count):
            yield place, values if scale == 1.0 else values.mul_(scale)

    @cached_property
    def _scale(self) -> float:
        squares = [
            float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
            for parameter in self.parameters.values()
            for _, values in self._drawn(parameter, 0, parameter.numel())
        ]
        return math.sqrt(sum(p.numel() for p in self.parameters.values()) / sum(squares))

    def _drawn(self, parameter: Tensor, first: int, end: int) -> Iterator[tuple[slice, Tensor]]:
        """Values from `first` to `end` of the flat parameter, with their places counted from `first`."""
        name = f"{self.number} {self._names[id(parameter)]}"
        draw = _signs if self.kind == "rademacher" else _normal
        for block in range(first // BLOCK, -(-end // BLOCK) if end > first else 0):
            start, stop = block * BLOCK, min((block + 1) * BLOCK, parameter.numel())
            begins, ends = max(first, start), min(end, stop)
            stream = self.key.stream("direction", self.release, self.digest, name, block)
            values = draw(stream, stop - start, held_here(parameter).device)
            yield slice(begins - first, ends - first), values[begins - start : ends - start]


def _normal(stream: np.random.Generator, count: int, device: torch.device) -> Tensor:
    drawn = np.empty(count, dtype=np.float32)
    stream.standard_normal(out=drawn, dtype=np.float32)
    return torch.from_numpy(drawn).to(device)


def _signs(stream: np.random.Generator, count: int, device: torch.device) -> Tensor:
    """A bit a value: only the bits cross to the device, where bit j of a word becomes the sign of a 1.0."""
    raw = stream.bit_generator.random_raw(-(-count // 64))
    words = torch.from_numpy(np.atleast_1d(raw).view(np.int32)).to(device)
    bits = torch.bitwise_left_shift(words, torch.arange(32, dtype=torch.int32, device=device)[:, None])
    return bits.bitwise_and_(_SIGN).bitwise_or_(_ONE).view(torch.float32).view(-1)[:count]


class SeededSGD(torch.optim.Optimizer):
    """SGD whose gradient is a few numbers times directions that are drawn again: no `.grad` is ever made.

    float32 and float64 parameters are moved in place. For those of lower precision a float32 copy is kept in the state
    ("exact"): the copy is what is trained, and the parameter its rounding, so that small updates add up.

    Args:
        params: as for every torch optimizer.
        lr: learning rate.
    """

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.slopes: list[tuple[Direction, float]] = []

    def exact(self, parameter: Tensor) -> Tensor:
        """What is trained: the parameter itself, or its float32 copy."""
        if parameter.element_size() >= 4:
            return parameter.detach()
        state = self.state[parameter]
        if "exact" not in state:
            state["exact"] = parameter.detach().float()
        return state["exact"]

    @torch.no_grad()
    def displace(self, direction: Direction, start: float, end: float) -> None:
        """Take the weights from theta + start u to theta + end u.

        In float32 this rounds: there and back again moves a weight by some units in the last place. Parameters with a
        float32 copy come back bit by bit.
        """
        for parameter in direction.parameters.values():
            flat = held_here(parameter.detach()).view(-1)
            if parameter.element_size() >= 4:
                for place, values in direction.blocks(parameter):
                    flat[place].add_(values, alpha=end - start)
            elif end == 0:
                flat.copy_(held_here(self.exact(parameter)).view(-1))
            else:
                exact = held_here(self.exact(parameter)).view(-1)
                for place, values in direction.blocks(parameter):
                    flat[place].copy_(values.mul_(end).add_(exact[place]))
        torch.clear_autocast_cache()  # it holds bf16 copies of the weights as they were

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """theta <- theta - lr * sum of slope * direction over `slopes`, which is empty afterwards."""
        found = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                exact = self.exact(parameter)
                for direction, slope in self.slopes:
                    if parameter in direction:
                        for place, values in direction.blocks(parameter):
                            held_here(exact).view(-1)[place].add_(values, alpha=-group["lr"] * slope)
                if exact.dtype != parameter.dtype:
                    parameter.copy_(exact)
        self.slopes = []
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which alone would round the float32 copies to the parameter's dtype."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, state in state_dict["state"].items():
            parameter = parameters[number]
            self.state[parameter]["exact"] = state["exact"].detach().clone().to(parameter.device)
