"""Checks before the first release: no module couples examples, and the engine is exact on this very model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from privzoo.errors import UserError
from privzoo.privacy.clipping.engine import ClippedSums, trainable_parameters
from privzoo.privacy.clipping.functions import FLAT, check_function
from privzoo.privacy.clipping.loop import Loop
from privzoo.privacy.sampling import MicroBatch

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


def refuse_coupling_modules(model: nn.Module) -> None:
    """Refuse modules whose output for one example depends on others, frozen or not, and dropout.

    Raises:
        UserError: naming the module.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) or (isinstance(module, _InstanceNorm) and module.track_running_stats):
            raise UserError(
                f"{name} is a {type(module).__name__}: its statistics mix examples, so no example's influence is bounded; "
                "replace it by GroupNorm or LayerNorm."
            )
        if isinstance(module, _DropoutNd) and module.p > 0:
            raise UserError(f"{name} has dropout p={module.p:g}, expected 0 in this version: set model.dropout=0.")


def check_engine(
    engine: Callable[..., ClippedSums],
    model: nn.Module,
    losses: Callable[[MicroBatch], Tensor],
    rows: Sequence[Any],
    collate: Callable[[list[Any]], MicroBatch],
    clip_norm: float,
) -> None:
    """Compare the engine on a few real rows together with the definition on each row alone.

    Passing means: the clipping function keeps its bound, losses are one a row, rows do not influence one another (a batch
    mean, padding or a wrong example axis would show), every trainable parameter takes part, the engine's norms and clipped
    sums are those of the loop, and no buffer keeps anything of the data. The weights are afterwards what they were.

    Args:
        engine: the engine in use.
        losses: micro-batch to losses (R,), on the model's device.
        rows: encoded examples; the first four are used.
    Raises:
        UserError: naming what differs.
    """
    if any(not torch.isfinite(p).all() for p in model.parameters()):
        raise UserError("The model's weights are not all finite: take another checkpoint.")
    check_function(getattr(engine, "clipping", FLAT))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    together = [rows[i] for i in range(min(4, len(rows)))]
    with _gates_open(model):
        _compare_with_loop(engine, model, losses, together, collate, clip_norm)
    for name, buffer in model.named_buffers():
        if not torch.equal(buffer, buffers[name]):
            raise UserError(f"{name} is a buffer that changes with the data: it would publish them; take it out.")
    _refuse_unused(model, losses(collate(together)))


@contextmanager
def _gates_open(model: nn.Module) -> Iterator[None]:
    """Gives trainable tensors that are (nearly) 0 random values meanwhile: a gate, LoRA matrix or head that starts from 0
    stops every gradient behind it, and an engine that is wrong there would be found right."""
    generator = torch.Generator().manual_seed(0)
    shut = [p for p in trainable_parameters(model).values() if float(p.detach().abs().max()) < 1e-2]
    kept = [p.detach().clone() for p in shut]
    for parameter in shut:
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    try:
        yield
    finally:
        for parameter, value in zip(shut, kept, strict=True):
            parameter.data.copy_(value)


def _compare_with_loop(
    engine: Callable[..., ClippedSums],
    model: nn.Module,
    losses: Callable[[MicroBatch], Tensor],
    together: list[Any],
    collate: Callable[[list[Any]], MicroBatch],
    clip_norm: float,
) -> None:
    clip_norm = min(clip_norm, 1e-3)  # small, so that factors differ: a row in another's place would not show in a plain sum
    found = engine(lambda: losses(collate(together)), clip_norm=clip_norm)
    if len(found.losses) != len(together):
        raise UserError(f"Expected {len(together)} losses for {len(together)} rows, found {len(found.losses)}.")
    groups, clipping = getattr(engine, "groups", "all"), getattr(engine, "clipping", FLAT)
    loop, sums, alone = Loop(model, groups, clipping), None, []
    for row in together:
        alone.append(loop(lambda row=row: losses(collate([row])), clip_norm=clip_norm, into=sums))  # type: ignore[misc]
        sums = alone[-1].sums
    assert sums is not None
    norms = torch.cat([one.norms for one in alone]).to(found.norms.dtype)
    finite = torch.isfinite(norms)  # an example without a finite gradient contributes nothing: nothing to compare
    if not finite.any():
        raise UserError(f"None of {len(together)} examples has a finite gradient: check model and data, or take float32.")
    tolerance = TOLERANCE[next(iter(trainable_parameters(model).values())).dtype]
    _compare("losses", found.losses[finite], torch.cat([one.losses for one in alone])[finite], tolerance)
    _compare("gradient norms", found.norms[finite], norms[finite], tolerance)
    contributions = float((norms * clipping(norms, clip_norm))[finite].sum())
    largest = max(float(value.abs().max()) for value in sums.values())
    # By the tensor's own size, so that a wrong part with small gradients shows; but some are 0 but for rounding, which
    # group-wise clipping makes larger beside the rest, and rows that are alike with unlike labels cancel.
    floor = max((1e-2 if groups == "all" else 1e-1) * largest, 1e-4 * contributions)
    for name, expected in sums.items():
        scale = max(float(expected.abs().max()), floor)
        _compare(f"the clipped sum of {name}", found.sums[name], expected, tolerance, scale)


def _compare(what: str, found: Tensor, expected: Tensor, tolerance: float, scale: float | None = None) -> None:
    scale = float(expected.abs().max()) if scale is None else scale
    if not bool(((found - expected).abs() <= tolerance * max(scale, 1e-12)).all()):
        worst = float((found - expected).abs().max())
        raise UserError(
            f"Pre-flight: {what} of a batch and of its rows alone differ by {worst:.3g} (scale {scale:.3g}): examples "
            "influence one another or the engine misreads the model; take method.engine._target_="
            "privzoo.privacy.clipping.Loop to find out which."
        )


def _refuse_unused(model: nn.Module, losses: Tensor) -> None:
    parameters = trainable_parameters(model)
    gradients = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
    unused = [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]
    if unused:
        raise UserError(
            f"{len(unused)} trainable tensors take no part in the loss, first {unused[0]}: they would only collect noise; "
            "freeze them (method.trainable=…)."
        )
