"""Optimizers: any that needs nothing but `.grad`, by the yaml's `_target_`, and what some of them need besides.

An optimizer gets released quantities alone, so every choice is post-processing and costs nothing. Two needs are met by what
an optimizer shows, not by its name: a group key `noise_std` is told the noise of each release (`DPAdamBC`), and `train()`
and `eval()` are called around training and scoring (schedule-free).
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from privzoo.errors import UserError, first_line


def make_optimizer(
    make: Callable[..., torch.optim.Optimizer], groups: list[dict[str, Any]], lr: float, phases: int = 1
) -> torch.optim.Optimizer:
    """The optimizer over `groups`, ready for its first step.

    Args:
        make: partial of an optimizer class.
        groups: of parameters, each with its lr.
        lr: default of the groups.
        phases: of the plan.
    Raises:
        UserError: if it refuses the parameters or an argument, needs to see the loss again, wants sparse gradients, or has
            two points to be at and the plan several phases.
    """
    try:
        optimizer = make(groups, lr=lr)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"The optimizer cannot be made ({first_line(error)}): correct method.optimizer or take another."
        ) from error
    name = type(optimizer).__name__
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UserError(
            f"{name} evaluates the loss again within a step, on data that nobody pays for: take another optimizer."
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise UserError(f"{name} takes sparse gradients, but noise makes every gradient dense: take torch.optim.AdamW.")
    if has_modes(optimizer):
        if phases > 1:
            raise UserError(
                f"{name} averages over the whole run, but this plan has {phases} phases: take another optimizer."
            )
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def refuse_by_shape(make: Callable[..., torch.optim.Optimizer], lr: float) -> None:
    """Refuse an optimizer that treats a matrix otherwise than its values laid out flat, of which each rank holds a range.

    Raises:
        UserError: naming it.
    """
    stream = torch.Generator().manual_seed(0)
    gradients = [torch.randn(24, generator=stream) for _ in range(2)]
    moved: list[torch.Tensor] = []
    for shape in ((4, 6), (24,)):
        parameter = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 24).view(shape))
        optimizer = make_optimizer(make, [{"params": [parameter], "lr": lr}], lr)
        for gradient in gradients:
            parameter.grad = gradient.view(shape).clone()
            optimizer.step()
        moved.append(parameter.detach().view(-1))
    if not torch.allclose(moved[0], moved[1], rtol=1e-5, atol=1e-7):
        raise UserError(
            f"{type(optimizer).__name__} looks at the shape of what it trains, of which this trainer.strategy deals out "
            "flat ranges: take trainer.strategy=fsdp or replicas, or torch.optim.AdamW."
        )


def refuse_on_parts(make: Callable[..., torch.optim.Optimizer], lr: float, part: torch.nn.Parameter) -> None:
    """Refuse an optimizer that cannot step a parameter of which each rank holds a part (8-bit ones do not).

    Args:
        part: such a parameter; overwritten.
    Raises:
        UserError: naming it.
    """
    optimizer = make_optimizer(make, [{"params": [part], "lr": lr}], lr)
    part.grad = torch.zeros_like(part)
    try:
        optimizer.step()
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        raise UserError(
            f"{type(optimizer).__name__} cannot step what trainer.strategy deals out ({first_line(error)}): take "
            "trainer.strategy=replicas or torch.optim.AdamW."
        ) from error


def has_modes(optimizer: Any) -> bool:
    """Whether it trains at one point and is scored at another (schedule-free)."""
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))


def tell_noise(optimizer: Any, noise_std: float) -> None:
    """Tell an optimizer that asks for it the standard deviation of the noise on the gradients that it gets next."""
    for group in optimizer.param_groups:
        if "noise_std" in group:
            group["noise_std"] = noise_std
