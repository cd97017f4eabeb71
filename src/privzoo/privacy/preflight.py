"""Checks before the first release: engine and losses are right on this very model, and no example influences another."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from privzoo.errors import UserError
from privzoo.privacy.clipping.engine import ClippedSums, trainable_parameters
from privzoo.privacy.clipping.functions import FLAT, check_function
from privzoo.privacy.clipping.loop import Loop
from privzoo.privacy.ranks import held_here
from privzoo.privacy.sampling import MicroBatch
from privzoo.privacy.sharding import part_like, whole

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
OR_THE_ENGINE = (
    " or the engine misreads the model; take method.engine._target_=privzoo.privacy.clipping.Loop to find out which"
)


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
        rows: encoded examples, the first four of which are used; the last of those is the longest.
    Raises:
        UserError: naming what differs.
    """
    check_function(getattr(engine, "clipping", FLAT))
    together = [rows[i] for i in range(min(4, len(rows)))]
    losses = _leaving_weights_alone(model, losses)
    with _sound(model), gates_open(trainable_parameters(model)):
        _compare_with_loop(engine, model, losses, together, collate, clip_norm)
    _refuse_unused(model, losses(collate(together)))


def check_units(
    engine: Callable[..., ClippedSums],
    model: nn.Module,
    losses: Callable[[MicroBatch], Tensor],
    rows: Sequence[Any],
    collate: Callable[[list[Any]], MicroBatch],
    clip_norm: float,
) -> None:
    """For tasks whose units have several rows: the same comparison of pairs of rows, each one unit.

    Args:
        rest: as for `check_engine`, which comes before.
    Raises:
        UserError: naming what differs.
    """
    clip_norm = min(1e-3, clip_norm)  # see below
    together = [rows[i] for i in range(min(4, len(rows)))]
    units = torch.arange(len(together), device=next(model.parameters()).device) // 2
    loop, sums, norms = _loop_like(engine, model), None, []
    with gates_open(trainable_parameters(model)):
        found = engine(lambda: losses(collate(together)), clip_norm=clip_norm, unit_of_row=units)
        for pair in (together[i : i + 2] for i in range(0, len(together), 2)):
            alone = loop(lambda pair=pair: losses(collate(pair)), clip_norm, units[: len(pair)] * 0, sums)  # type: ignore[misc]
            norms.append(alone.norms)
            sums = alone.sums
    assert sums is not None
    _compare_gradients(found, torch.cat(norms).to(found.norms.dtype), sums, loop, clip_norm, tolerances(model)[1])


def check_losses(
    model: nn.Module,
    losses: Callable[[MicroBatch], Tensor],
    rows: Sequence[Any],
    collate: Callable[[list[Any]], MicroBatch],
    allowed: float = math.inf,
) -> None:
    """Look at the losses of a few real rows, for methods that need no gradients.

    Passing means: losses are one a row, rows do not influence one another (but for rounding, and by that not more than is
    `allowed`), the same weights give the same losses twice (no dropout), other weights give others (no module keeps weights
    of before), no buffer keeps anything of the data, and trained tensors hold floating-point numbers. The weights are
    afterwards what they were, bit by bit.

    Args:
        losses: micro-batch to losses (R,), on the model's device.
        rows: encoded examples, the first four of which are used; the last of those is the longest.
        allowed: how far a row's loss may differ between a batch and the row alone. Who divides differences of losses by a
            small number makes rounding large: one example's absence would move what the others contribute.
    Raises:
        UserError: naming what is wrong.
    """
    for name, parameter in trainable_parameters(model).items():
        if not parameter.is_floating_point():
            raise UserError(f"{name} holds {parameter.dtype}, which cannot be moved by a little: freeze it.")
    together = [rows[i] for i in range(min(4, len(rows)))]
    losses = _leaving_weights_alone(model, losses)
    with _sound(model), torch.no_grad():
        before = _compare_with_rows_alone(model, losses, together, collate, allowed)
        with gates_open(trainable_parameters(model)), _nudged(model):
            torch.clear_autocast_cache()
            nudged = _compare_with_rows_alone(model, losses, together, collate, allowed)
    torch.clear_autocast_cache()  # copies of nudged weights
    if torch.equal(before, nudged):
        raise UserError("Pre-flight: losses stay the same when weights move: a module keeps a copy of them; take it out.")


@contextmanager
def _sound(model: nn.Module) -> Iterator[None]:
    """Refuses weights that are not finite before, and buffers that have changed after."""
    if any(not torch.isfinite(held_here(p)).all() for p in model.parameters()):
        raise UserError("The model's weights are not all finite: take another checkpoint.")
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    yield
    for name, buffer in model.named_buffers():
        if not torch.equal(buffer, buffers[name]):
            raise UserError(f"{name} is a buffer that changes with the data: it would publish them; take it out.")


def _leaving_weights_alone(model: nn.Module, losses: Callable[[MicroBatch], Tensor]) -> Callable[[MicroBatch], Tensor]:
    """`losses`, refused if a module changes weights in place meanwhile, as an embedding with max_norm does: by the rows that
    it sees, without noise."""

    def watched(micro_batch: MicroBatch) -> Tensor:
        before = {id(p): p._version for p in model.parameters()}
        found = losses(micro_batch)
        for name, parameter in model.named_parameters():  # of one that is dealt out to ranks another may stand here now
            if parameter._version != before.get(id(parameter), parameter._version):
                raise UserError(f"{name} is changed by the rows that it sees (max_norm of an embedding?): take that out.")
        return found

    return watched


@contextmanager
def gates_open(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Gives trainable tensors that are (nearly) 0 random values meanwhile: a gate, LoRA matrix or head that starts from 0
    stops every gradient behind it, and an engine that is wrong there would be found right."""
    generator = torch.Generator().manual_seed(0)
    shut = [p for p in parameters.values() if float(whole(p.detach()).abs().max()) < 1e-2]
    kept = [p.detach().clone() for p in shut]
    for parameter in shut:
        drawn = 0.1 * torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(part_like(drawn, parameter.data))
    try:
        yield
    finally:
        for parameter, value in zip(shut, kept, strict=True):
            parameter.data.copy_(value)


@contextmanager
def _nudged(model: nn.Module) -> Iterator[None]:
    """Flips a middle bit of every trainable value meanwhile, which moves it by about a thousandth of its size (bfloat16: its
    last bit, a hundredth); a bit that is flipped twice is the same bit, so that no copy of the weights is needed."""
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    views = []
    for parameter in trainable_parameters(model).values():
        digits = round(-math.log2(torch.finfo(parameter.dtype).eps))
        views.append((parameter.detach().view(whole[parameter.element_size()]), 1 << max(0, digits - 10)))
    for view, bit in views:
        view.bitwise_xor_(bit)
    try:
        yield
    finally:
        for view, bit in views:
            view.bitwise_xor_(bit)


def _compare_with_rows_alone(
    model: nn.Module,
    losses: Callable[[MicroBatch], Tensor],
    together: list[Any],
    collate: Callable[[list[Any]], MicroBatch],
    allowed: float,
) -> Tensor:
    """The losses of the rows together, if they are those of each row alone."""
    found = losses(collate(together))
    if found.shape != (len(together),):
        raise UserError(f"Expected {len(together)} losses for {len(together)} rows, found shape {tuple(found.shape)}.")
    if not torch.equal(found.nan_to_num(), losses(collate(together)).nan_to_num()):
        raise UserError("Pre-flight: the same rows have other losses the second time: set every dropout to 0.")
    alone = torch.cat([losses(collate([row])) for row in together])
    finite = torch.isfinite(alone)
    if not finite.any():
        raise UserError(f"None of {len(together)} examples has a finite loss: check model and data, or take float32.")
    fine, coarse = tolerances(model)
    coarse = TOLERANCE[torch.bfloat16] if torch.is_autocast_enabled(found.device.type) else coarse
    way_out = ", by a mean, by padding or through a module"
    _compare("losses", found[finite], alone[finite], coarse, way_out=way_out)
    for place, batch in _among_others(together, collate) if fine < coarse else ():
        if finite[place]:
            among = losses(batch)[place : place + 1]
            _compare("losses", among, found[place : place + 1], fine, way_out=way_out)
    rounding = float((found - alone)[finite].abs().max())
    if rounding > allowed:
        raise UserError(
            f"Pre-flight: rounding moves a row's loss by {rounding:.2g} when other rows are beside it, expected at most "
            f"{allowed:.2g}, as differences of losses are divided by twice the smoothing: take float32, or a larger "
            "method.smoothing or clip_norm."
        )
    return found


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
    loop, sums, alone = _loop_like(engine, model), None, []
    for row in together:
        alone.append(loop(lambda row=row: losses(collate([row])), clip_norm=clip_norm, into=sums))  # type: ignore[misc]
        sums = alone[-1].sums
    assert sums is not None
    norms = torch.cat([one.norms for one in alone]).to(found.norms.dtype)
    finite = torch.isfinite(norms)  # an example without a finite gradient contributes nothing: nothing to compare
    if not finite.any():
        raise UserError(f"None of {len(together)} examples has a finite gradient: check model and data, or take float32.")
    fine, coarse = tolerances(model)
    _compare("losses", found.losses[finite], torch.cat([one.losses for one in alone])[finite], coarse)
    _compare_gradients(found, norms, sums, loop, clip_norm, coarse)
    if fine < coarse:
        sound = [row for row, good in zip(together, finite.tolist(), strict=True) if good]
        _compare_at_one_shape(engine, loop, losses, sound, collate, clip_norm, fine)


def _loop_like(engine: Callable[..., ClippedSums], model: nn.Module) -> Loop:
    """The definition, clipping as the engine does."""
    groups, clipping = getattr(engine, "groups", "all"), getattr(engine, "clipping", FLAT)
    return Loop(model, groups, clipping, getattr(engine, "shares", None))


def _compare_at_one_shape(
    engine: Callable[..., ClippedSums],
    loop: Loop,
    losses: Callable[[MicroBatch], Tensor],
    rows: list[Any],
    collate: Callable[[list[Any]], MicroBatch],
    clip_norm: float,
    tolerance: float,
) -> None:
    """Where the base rounds coarsely, rows of other lengths round otherwise, but the same shape rounds alike: so the engine
    is held against the definition on the very same forward pass, and each row against itself among other rows."""
    found = engine(lambda: losses(collate(rows)), clip_norm=clip_norm)
    expected = loop(lambda: losses(collate(rows)), clip_norm=clip_norm)
    _compare("losses", found.losses, expected.losses, tolerance)
    _compare_gradients(found, expected.norms, expected.sums, loop, clip_norm, tolerance)
    for place, batch in _among_others(rows, collate):
        one = loop(lambda place=place, batch=batch: losses(batch)[place : place + 1], clip_norm=clip_norm)  # type: ignore[misc]
        _compare("losses", one.losses, expected.losses[place : place + 1], tolerance)
        _compare("gradient norms", one.norms, expected.norms[place : place + 1], tolerance)


def _among_others(together: list[Any], collate: Callable[[list[Any]], MicroBatch]) -> Iterator[tuple[int, MicroBatch]]:
    """Each row at its place, with copies of one row in all other places: the last one, which is the longest."""
    for place, row in enumerate(together):
        rows = [together[-1]] * len(together)
        rows[place] = row
        yield place, collate(rows)


def _compare_gradients(
    found: ClippedSums, norms: Tensor, sums: dict[str, Tensor], loop: Loop, clip_norm: float, tolerance: float
) -> None:
    finite = torch.isfinite(norms)
    _compare("gradient norms", found.norms[finite], norms[finite], tolerance)
    contributions = float((norms * loop.clipping(norms, clip_norm))[finite].sum())
    largest = max(float(value.abs().max()) for value in sums.values())
    # By the tensor's own size, so that a wrong part with small gradients shows; but some are 0 but for rounding, which
    # group-wise clipping makes larger beside the rest, and rows that are alike with unlike labels cancel.
    floor = max((1e-2 if loop.groups == "all" else 1e-1) * largest, 1e-4 * contributions)
    for name, expected in sums.items():
        scale = max(float(expected.abs().max()), floor)
        _compare(f"the clipped sum of {name}", found.sums[name], expected, tolerance, scale)


def tolerances(model: nn.Module) -> tuple[float, float]:
    """Of the trained parameters' format, and of the coarsest one in which the model computes: a frozen base in bfloat16
    rounds what trained float32 parts get. A 4-bit layer stores no floats and names its format itself."""
    fine = TOLERANCE[next(iter(trainable_parameters(model).values())).dtype]
    formats: set[Any] = {parameter.dtype for parameter in model.parameters()}
    formats |= {getattr(module, "compute_dtype", None) for module in model.modules()}
    return fine, max(TOLERANCE[known] for known in formats if known in TOLERANCE)


def _compare(
    what: str, found: Tensor, expected: Tensor, tolerance: float, scale: float | None = None, way_out: str = ""
) -> None:
    scale = float(expected.abs().max()) if scale is None else scale
    if not bool(((found - expected).abs() <= tolerance * max(scale, 1e-12)).all()):
        worst = float((found - expected).abs().max())
        raise UserError(
            f"Pre-flight: {what} of a batch and of its rows alone differ by {worst:.3g} (scale {scale:.3g}): examples "
            f"influence one another{way_out or OR_THE_ENGINE}."
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
