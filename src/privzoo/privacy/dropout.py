"""Dropout whose masks are keyed by release, example and place in the model.

A mask is a function of the run's secret key, the release, the example's number (and the row's, in an example of several),
and how many dropouts came before in the forward pass. From one generator for all rows it would hang on who else is in the
batch: without one example of a draw, every later one would get its neighbour's mask. Here, given the masks, an example moves
the sum of a draw by its own clipped contribution alone; and as masks are independent draws of a key that no output shows,
they may be taken as given when an example comes to the data or leaves them (the numbers of later ones then shift, which
changes no distribution). Both losses of a slope and all passes of an engine see the same masks; sizes of micro-batches,
padding and a resume change nothing.

Source: Srivastava et al. 2014 (dropout).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from privzoo.errors import UserError
from privzoo.privacy.sampling import DrawnRows, MicroBatch
from privzoo.privacy.streams import RunKey

PREFLIGHT = -1  # the release that the pre-flight's masks belong to
# Attention that drops probabilities itself, and where its dropout_p stands among its arguments.
_AT_PLACE: dict[Any, int] = {F.scaled_dot_product_attention: 4, F.multi_head_attention_forward: 10}


class KeyedDropout(TorchFunctionMode):
    """Within it, `torch.nn.functional.dropout` (and so every `nn.Dropout`) takes keyed masks for its rows.

    A mask's first positions do not hang on how many follow, so that rows padded to another length on the right keep theirs.
    That holds for (R, d) and (R, T, d) alone: others are refused.

    Args:
        key: the run's secret.
        digest: `RunKey.digest` of the run.
        rows: the micro-batch; knows release and examples.
    """

    def __init__(self, key: RunKey, digest: str, rows: DrawnRows) -> None:
        super().__init__()
        self.key, self.digest, self.rows = key, digest, rows
        self.uses = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func in _AT_PLACE and kwargs.get("training", True):
            p = (args[_AT_PLACE[func] :] or [kwargs.get("dropout_p", 0.0)])[0]
            if p > 0:
                raise UserError(_refusal(f"{func.__name__} with dropout_p={p:g}"))
        return func(*args, **kwargs)

    def _dropout(self, value: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return value
        if value.dim() not in (2, 3) or len(value) != len(self.rows.examples):
            raise UserError(_refusal(f"dropout of shape {tuple(value.shape)} for {len(self.rows.examples)} rows"))
        whose = zip(self.rows.examples, self.rows.places, strict=True)
        kept = np.stack([self._mask(example, place, value.shape[1:], p) for example, place in whose])
        self.uses += 1
        mask = torch.from_numpy(kept).to(value.device)
        scaled = mask.to(value.dtype).div_(1 - p)
        return value.mul_(scaled) if inplace else value * scaled

    def _mask(self, example: int, place: int, shape: torch.Size, p: float) -> np.ndarray:
        name = f"{example}/{place}" if place else str(example)
        stream = self.key.stream("dropout", self.rows.release, self.digest, name, block=self.uses)
        return stream.random(tuple(shape), dtype=np.float32) >= p


def _refusal(found: str) -> str:
    return (
        f"Found {found}; expected rows first and their positions next, (R, d) or (R, T, d), where masks can be keyed by "
        "example: set that dropout (of attention probabilities?) to 0."
    )


def drops(model: nn.Module) -> bool:
    """Whether any module of the model has a dropout above 0, as an `nn.Dropout` or as a number of its own."""
    return any(_probability(module) > 0 for module in model.modules())


def _probability(module: nn.Module) -> float:
    own = [value for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]
    return max([*own, module.p if isinstance(module, nn.Dropout) else 0.0])


class DropoutByExample:
    """What a method asks for where its model has dropout; where it has none, nothing happens.

    Args:
        model: as it is trained, adapters and all.
        key, digest: of the run, see `KeyedDropout`.
    """

    def __init__(self, model: nn.Module, key: RunKey, digest: str) -> None:
        self.model, self.key, self.digest = model, key, digest

    @cached_property
    def on(self) -> bool:
        """Whether the model has any."""
        return drops(self.model)

    def of(self, micro_batch: MicroBatch) -> AbstractContextManager[Any]:
        """Keyed masks for the rows of a draw.

        Raises:
            UserError: if the micro-batch does not say which examples its rows are.
        """
        if not self.on:
            return nullcontext()
        if not isinstance(micro_batch, DrawnRows) or len(micro_batch.examples) != micro_batch.rows:
            raise UserError(
                "Dropout is keyed by example, and this micro-batch does not name its examples: set every dropout to 0."
            )
        return KeyedDropout(self.key, self.digest, micro_batch)

    def naming(self, collate: Callable[[list[Any]], MicroBatch], rows: Sequence[Any]) -> Callable[[list[Any]], MicroBatch]:
        """`collate` for some of these rows, which are numbered: the pre-flight's own batches."""
        number = {id(row): i for i, row in enumerate(rows)}

        def named(part: list[Any]) -> MicroBatch:
            return DrawnRows(collate(part), len(part), PREFLIGHT, [number[id(row)] for row in part])

        return named if self.on else collate
