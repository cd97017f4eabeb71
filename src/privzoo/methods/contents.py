"""What a checkpoint holds of a method: what it trains, its own state and its optimizer's, under a seal."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from privzoo.errors import UserError
from privzoo.privacy.noise import fingerprint
from privzoo.privacy.sharding import DealtOut, part_like, whole
from privzoo.privacy.streams import RunKey


def pack(checkpoint: dict[str, Any], wanted: set[str], weights: str, key: RunKey, dealt: DealtOut | None) -> None:
    """Leave out what a method does not train, put together what is dealt out to ranks, and seal the rest; in place.

    Args:
        checkpoint: Lightning's.
        wanted: names of the state that is kept.
        weights: fingerprint of what the next release is taken at.
        key: the run's secret.
        dealt: of a method whose model is dealt out.
    """
    state = checkpoint["state_dict"]
    if dealt is not None:
        state |= {f"model.{name}": dealt.whole_of(name) for name in dealt.parts}
    checkpoint["state_dict"] = {name: whole(value) for name, value in state.items() if name in wanted}
    checkpoint["optimizer_states"] = tree_map(whole, checkpoint["optimizer_states"])
    checkpoint["weights"] = weights
    checkpoint["seal"] = seal_of(checkpoint, key)


def unpack(
    checkpoint: dict[str, Any], now: Mapping[str, Tensor], groups: Sequence[Mapping[str, Any]], dealt: DealtOut | None
) -> None:
    """Make a checkpoint fit the method as it stands: what is dealt out to ranks there is dealt out here; in place.

    Trained weights that are dealt out are loaded at once, and taken out of it: modules may hold nothing between passes.

    Args:
        now: the state that the method keeps.
        groups: of its optimizer's parameters.
        dealt: of a method whose model is dealt out.
    Raises:
        UserError: unless the checkpoint holds exactly what the method keeps, in the same groups.
    """
    held = checkpoint["state_dict"]
    if held.keys() != now.keys():
        raise UserError(
            f"The checkpoint holds {len(held)} tensors, expected the {len(now)} that this method trains: resume with the "
            "run's own configuration."
        )
    if [len(group["params"]) for group in checkpoint["optimizer_states"][0]["param_groups"]] != [
        len(group["params"]) for group in groups
    ]:
        raise UserError("The checkpoint's optimizer has other groups of parameters: another version made it; start again.")
    if dealt is not None and (dealt.flat or dealt.wholes):
        for name in dealt.parts:
            dealt.put(name, held.pop(f"model.{name}"))
    checkpoint["state_dict"] = {name: _as_it_lies(value, now[name]) for name, value in held.items()}
    parameters = [parameter for group in groups for parameter in group["params"]]
    states = checkpoint["optimizer_states"][0]["state"]
    for number, state in states.items():
        states[number] = {name: _as_it_lies(value, parameters[number]) for name, value in state.items()}


def _as_it_lies(value: Any, like: Tensor) -> Any:
    """What is of a parameter, in its shape (another strategy may lay it out flat) and dealt out as it is."""
    if isinstance(value, Tensor) and value.dim() == 1 and value.numel() == like.numel():
        value = value.reshape(like.shape)
    return part_like(value, like)


def seal_of(checkpoint: dict[str, Any], key: RunKey) -> str:
    """A code over what a checkpoint lets into a run (step, weights, their fingerprint, the method's and optimizer's state)
    that only this run can make."""
    leaves = tree_leaves(checkpoint["optimizer_states"])
    held = [(str(i), leaf) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    numbers = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    state = fingerprint([*checkpoint["state_dict"].items(), *held])
    return key.seal(f"{checkpoint['global_step']} {checkpoint.get('weights')} {state} {numbers}")
