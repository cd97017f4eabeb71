"""A method is tried and brought to its device, whole or with its model dealt out to ranks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from privzoo.errors import UserError
from privzoo.methods.base import PrivateMethod
from privzoo.privacy.preflight import gates_open, tolerances
from privzoo.privacy.ranks import Ranks, held_here
from privzoo.privacy.sharding import DealtOut, part_like

FLOOR = 1e-2  # of the largest value of any parameter: smaller ones may be 0 but for rounding


def put_in_place(
    method: PrivateMethod, rows: Sequence[Any], device: torch.device, dealer: Callable[..., DealtOut] | None = None
) -> None:
    """Make the pre-flight, and bring the method to its device.

    With a dealer the frozen weights are dealt out to ranks, and if they are the fewer, those that are trained, too. Then the
    pre-flight comes first, where the model was loaded, as the definition needs whole gradients; and what the method makes of
    the parts is compared with what it made of the whole.

    Args:
        rows: encoded examples, the same on every rank.
        dealer: partial of `privzoo.privacy.sharding.deal_out`.
    Raises:
        UserError: for what the pre-flight finds, and for a method that cannot do with parts.
        RuntimeError: if these differ.
    """
    method.train()
    if dealer is not None and trains_most(method):
        _refuse_parts(method)
        method.preflight(rows)
        _refuse_parts(method)  # once more, with what it has shown
        with gates_open(method.model):
            alone, tolerance = method.trial(rows), max(tolerances(method.model))
        deal_out(method, dealer)
        method.to(device)
        with gates_open(method.model):
            check_parts(method.trial(rows), alone, tolerance, method.ranks)
        return
    if dealer is not None:
        deal_out(method, dealer)
    method.to(device)
    method.preflight(rows)
    close_layouts(method)


def trains_most(method: PrivateMethod) -> bool:
    """Whether more values are trained than frozen."""
    return 2 * sum(p.numel() for p in method.trainable.values()) > sum(p.numel() for p in method.model.parameters())


def deal_out(method: PrivateMethod, dealer: Callable[..., DealtOut]) -> None:
    """Let a dealer give each rank a part of the frozen weights, and of those that are trained if they are the most.

    Trained ones are dealt out after the pre-flight; their layouts are closed, see `close_layouts`.

    Raises:
        UserError: for a method that cannot do with parts.
    """
    _refuse_parts(method)
    of_trained = trains_most(method)
    method.dealt = dealer(method.model, method.trainable, whole=not of_trained)
    method.take_over(dict(method.model.named_parameters()))
    engine: Any = getattr(method, "engine", None)
    if of_trained and engine is not None:
        engine.dealt = method.dealt
        close_layouts(method)


def close_layouts(method: PrivateMethod) -> None:
    """After the pre-flight, which every rank has made with the same rows: no rank makes passes of its own."""
    engine = getattr(method, "engine", None)
    if method.dealt_out and engine is not None:
        engine.layouts.closed = True


def _refuse_parts(method: PrivateMethod) -> None:
    refuse_parts(getattr(method, "engine", None), len(method.trained_in), trains_most(method))


def refuse_parts(engine: Any, phases: int, of_trained: bool) -> None:
    """Refuse what would need the whole model at once.

    Args:
        engine: of a first-order method; None: the method has none.
        phases: how many it trains in.
        of_trained: whether what is trained would be dealt out, too.
    Raises:
        UserError: naming what it is.
    """
    if engine is not None and not getattr(engine, "even_passes", False):
        raise UserError(
            f"trainer.strategy=fsdp needs the same passes on every rank, and those of {type(engine).__name__} hang on the "
            "rows: take BookKeeping."
        )
    if not of_trained:
        return
    if phases > 1:
        found = "what is trained in phases"
    elif engine is None:
        return
    elif engine.groups != "all":
        found = "gradients that are clipped by layer"
    elif made := [key[0] for key in engine.layouts.proved if "#" in key[0]]:
        found = f"a parameter that others are made of ({made[0]})"
    else:
        return
    raise UserError(
        f"trainer.strategy=fsdp cannot deal out {found}: take trainer.strategy=replicas, or a method that trains less, such "
        "as dp_lora."
    )


def check_parts(found: Mapping[str, Tensor], alone: Mapping[str, Tensor], tolerance: float, ranks: Ranks) -> None:
    """Compare what ranks make together of a model that is dealt out with what one made of the whole, of the same rows.

    Passing means: every trained parameter is seen in the passes of parts (by its own size, but for those that are small
    beside the largest), and each rank gets its own part of a sum.

    Args:
        found: this rank's parts, see `PrivateMethod.trial`.
        alone: whole.
        tolerance: how far rounding may take a value, in parts of the parameter's largest one.
    Raises:
        RuntimeError: on all ranks, naming the first parameter that differs on any.
    """
    sizes = {name: float(value.abs().max()) if value.numel() else 0.0 for name, value in alone.items()}
    floor, wrong = FLOOR * max(sizes.values()), []
    for name, value in alone.items():
        here = held_here(found[name])
        expected = held_here(part_like(value, found[name])).to(here.device)
        if here.numel() and not float((here - expected).abs().max()) <= tolerance * max(sizes[name], floor):
            wrong.append(name)
    first = next((names[0] for names in ranks.all_of(wrong) if names), None)
    if first is not None:
        raise RuntimeError(f"With parts of a model {first} is not what it was: take trainer.strategy=replicas.")
