"""Adam without the bias that the noise brings into its second moment.

Source: Tang, Shpilevskiy, Lécuyer 2024, "DP-AdamBC: Your DP-Adam Is Actually DP-SGD (Unless You Apply Bias Correction)".
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class DPAdamBC(torch.optim.Optimizer):
    r"""DP-AdamBC: w <- w - lr m / (sqrt(max(v - s^2, floor s^2)) + eps), with Adam's bias-corrected moments m and v.

    Each coordinate of a noisy mean is g + N(0, s^2), s = sigma C / B, so E[v] = E[g^2] + s^2. Where s^2 is the larger term,
    Adam divides all coordinates by about s: it is SGD with momentum. Here s^2 is taken off. If s changes from release to
    release, so does what is taken off: the same moving average of s^2 as v is of g^2.

    With noise_std = 0 it equals torch.optim.Adam (AdamW with weight_decay). It is post-processing: s is public.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root, as in Adam.
        floor: smallest corrected second moment, in parts of s^2; the paper's gamma' is floor * s^2. Small values take large
            steps along coordinates that hold nothing but noise.
        weight_decay: decoupled, as in AdamW.
    Raises:
        ValueError: for a value out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        floor: float = 0.1,
        weight_decay: float = 0.0,
    ) -> None:
        first, second = betas
        if not (0 <= first < 1 and 0 <= second < 1):
            raise ValueError(f"Expected betas={tuple(betas)} in [0, 1).")
        if not (eps >= 0 and 0 < floor < math.inf and weight_decay >= 0):
            raise ValueError(f"Expected eps={eps} >= 0, floor={floor} > 0 and weight_decay={weight_decay} >= 0.")
        super().__init__(
            params,
            {"lr": lr, "betas": (first, second), "eps": eps, "floor": floor, "weight_decay": weight_decay, "noise_std": 0.0},
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step with the gradients at hand; the method has set `noise_std` of every group for them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_of(parameter, parameter.grad, group)
        return loss

    def _step_of(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"], state["noise_square"] = 0, 0.0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        first, second = group["betas"]
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        state["noise_square"] = second * state["noise_square"] + (1 - second) * group["noise_std"] ** 2
        correction = 1 - second ** state["step"]
        noise_square = state["noise_square"] / correction
        squares = (state["exp_avg_sq"] / correction - noise_square).clamp_(min=group["floor"] * noise_square)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        step_size = group["lr"] / (1 - first ** state["step"])
        parameter.addcdiv_(state["exp_avg"], squares.sqrt_().add_(group["eps"]), value=-step_size)
