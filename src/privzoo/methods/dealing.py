"""A method is tried and brought to its device, whole or with its model dealt out to ranks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from privzoo.errors import UserError
from privzoo.methods.base import PrivateMethod
from privzoo.privacy.preflight import gates_open, tolerances
from privzoo.privacy.ranks import Ranks, held_here
from privzoo.privacy.sharding import part_like
from privzoo.privacy.strategies import Dealer

FLOOR = 1e-2  # of the largest value of any parameter: smaller ones may be 0 but for rounding


def put_in_place(method: PrivateMethod, rows: Sequence[Any], device: torch.device, dealer: Dealer | None = None) -> None:
    """Make the pre-flight, and bring the method to its device.

    With a dealer weights are dealt out to ranks. If trained ones are, the pre-flight comes first, as the definition needs
    whole gradients, where the model was loaded if the device may be too small for it; and what the method makes of the parts
    is compared with what it made of the whole.

    Args:
        rows: encoded examples, the same on every rank.
        device: where this rank computes.
        dealer: None: every rank holds the whole model.
    Raises:
        UserError: for what the pre-flight finds, and for a method that cannot do with parts.
        RuntimeError: if these differ.
    """
    method.train()
    if dealer is not None and dealer.deals_out_trained(method.model, method.trainable):
        _refuse_parts(method, dealer)
        if dealer.keeps_weights_whole:
            method.to(device)
        method.preflight(rows)
        _refuse_parts(method, dealer)  # once more, with what it has shown
        with gates_open(method.active):
            alone, tolerance = method.trial(rows), max(tolerances(method.model))
        deal_out(method, dealer)
        method.to(device)
        close_layouts(method)
        assert method.dealt is not None
        with gates_open(method.active):
            method.dealt.spread()
            check_parts(method.trial(rows), alone, tolerance, method.ranks)
        method.dealt.spread()
        return
    if dealer is not None:
        deal_out(method, dealer)
    method.to(device)
    method.preflight(rows)
    close_layouts(method)


def deal_out(method: PrivateMethod, dealer: Dealer) -> None:
    """Let a dealer give each rank its part of the model, which the method trains from now on.

    Raises:
        UserError: for a method that cannot do with parts.
    """
    _refuse_parts(method, dealer)
    method.dealt = dealer(method.model, method.trainable)
    method.take_over(method.dealt.parts)
    engine: Any = getattr(method, "engine", None)
    if method.dealt.wholes and engine is not None:
        engine.dealt = method.dealt


def close_layouts(method: PrivateMethod) -> None:
    """After the pre-flight, which every rank has made with the same rows: no rank makes passes of its own."""
    engine = getattr(method, "engine", None)
    if method.level and engine is not None:
        engine.layouts.closed = True


def _refuse_parts(method: PrivateMethod, dealer: Dealer) -> None:
    of_trained = dealer.deals_out_trained(method.model, method.trainable)
    if dealer.strategy == "zero1":
        return  # engines see nothing of it
    refuse_parts(dealer.strategy, getattr(method, "engine", None), len(method.trained_in), of_trained)


def refuse_parts(strategy: str, engine: Any, phases: int, of_trained: bool) -> None:
    """Refuse what would need the whole model at once.

    Args:
        strategy: of `trainer.strategy`.
        engine: of a first-order method; None: the method has none.
        phases: how many it trains in.
        of_trained: whether what is trained would be dealt out, too.
    Raises:
        UserError: naming what it is.
    """
    if engine is not None and not getattr(engine, "even_passes", False):
        raise UserError(
            f"trainer.strategy={strategy} needs the same passes on every rank, and those of {type(engine).__name__} hang on "
            "the rows: take BookKeeping."
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
        f"trainer.strategy={strategy} cannot deal out {found}: take trainer.strategy=replicas, or a method that trains "
        "less, such as dp_lora."
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
