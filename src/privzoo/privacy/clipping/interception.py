"""Sees every functional use of a trainable parameter, and takes parameters out of autograd.

Inside `forward`, and inside the recomputations of gradient checkpointing, a `TorchFunctionMode` looks at each operation:

- a known one (`operations.HANDLERS`) runs with the parameter detached, and a tap on its output receives the output gradient;
- an elementwise one with data gets a copy of the parameter for each row, an autograd leaf;
- one without data (`1 + weight`, weight norm, a slice, a table of relative positions) makes a *derived* parameter,
  whose uses are treated like a parameter's; per-unit gradients go back through autograd;
- anything else raises `UnsupportedUse`.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from privzoo.privacy.clipping.gradients import Book
from privzoo.privacy.clipping.grouped import GroupedBook
from privzoo.privacy.clipping.layouts import LAYOUTS, Layouts, UnsupportedUse, rows_first

Collect = Callable[..., None]


class Tap(torch.autograd.Function):
    """Identity that hands its output gradient, with the saved activations, to the interception."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, seen: "Interception", key: Hashable, collect: Collect,
                layouts: Sequence[str], *saved: Tensor) -> Tensor:  # fmt: skip
        ctx.seen, ctx.key, ctx.collect, ctx.layouts = seen, key, collect, layouts
        ctx.save_for_backward(anchor, *saved)  # through autograd: checkpointing can then recompute them
        # Not view_as: autograd forbids an in-place operation, such as ReLU(inplace=True), on a view made here.
        return torch.ops.aten._unsafe_view(output, output.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        anchor, *saved = ctx.saved_tensors
        # Off here too, whatever thread the backward pass runs in (on CUDA not the caller's).
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            ctx.seen.arrived(ctx.key, gradient, ctx.collect, ctx.layouts, *saved)
        passed_on = gradient if ctx.needs_input_grad[0] else None
        return passed_on, torch.zeros_like(anchor), None, None, None, None, *(None for _ in saved)


class Interception(TorchFunctionMode):
    """One forward pass and its backward passes.

    Args:
        parameters: trainable ones, by name.
        layouts: what is known of where the examples lie.
        operations: handlers by function, and the set of elementwise functions.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], layouts: Layouts, handlers: dict[Any, Any], elementwise: set[Any]
    ) -> None:
        super().__init__()
        self.handlers, self.elementwise = handlers, elementwise
        self.layouts = layouts
        self.names = {id(p): name for name, p in parameters.items()}
        self.derived: dict[str, Tensor] = {}  # by the name they got; kept, so that an id stays theirs
        self.leaves: list[tuple[Hashable, str, torch.Size | None, Tensor]] = []  # None: the parameter has rows itself
        self.uses: Counter[str] = Counter()
        self.elsewhere: set[str] = set()  # used in more ways than `uses` counts
        self.keys: set[Hashable] = set()
        self.rows: int | None = None  # of the first operation on data; checked against the losses
        self.needs_rows = False
        self.book: Book | GroupedBook | None = None
        self.turn: int | None = None  # of a proof, see Layouts.measure; None: gradients are collected
        self.hidden = False  # uses under reentrant checkpointing, which the backward pass shows first
        self.arrivals: set[Hashable] = set()
        self.anchor = torch.zeros((), requires_grad=True, device=next(iter(parameters.values())).device)

    # ---- forward

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.rows is None and func in self.handlers and func is not Tensor.expand:
            data = [*args, *kwargs.values()][1 if func is torch.addmm else 0]
            self.rows = data.shape[0] if data.dim() > 1 else None  # positions alone, (T,), tell nothing
        used = [value for value in tensors_in((args, kwargs)) if id(value) in self.names]
        if not used:
            return func(*args, **kwargs)
        if not torch.is_grad_enabled():  # under reentrant checkpointing the recomputation is what counts
            self.elsewhere.update(self.names[id(value)] for value in used)
            self.hidden = True
            return func(*args, **kwargs)
        handler = self.handlers.get(func)
        if handler is not None:
            output = handler(self, *args, **kwargs)
            if output is not NotImplemented:
                return output
        if func in self.elementwise:
            output = self._elementwise(func, args, kwargs)
            if output is not NotImplemented:
                return output
        return self._derive(func, used, args, kwargs)

    def name(self, value: Any) -> str | None:
        return self.names.get(id(value))

    def free(self, value: Any) -> Any:
        """The tensor without its graph, if it is a parameter or derived from some.

        One that autograd leaves alone goes as it is: another tensor would keep its values where they are let go in between.
        """
        return value.detach() if id(value) in self.names and value.requires_grad else value

    def tap(
        self, output: Tensor, names: list[str | None], collect: Collect, *saved: Tensor, layouts: Sequence[str] = LAYOUTS
    ) -> Tensor:
        """`output` with a tap: `collect(book, gradient, *saved)` is called in the backward pass, examples first."""
        key = self._key(*(name for name in names if name))
        return Tap.apply(output, self.anchor, self, key, collect, layouts, *(s.detach() for s in saved))

    def leaf(self, value: Tensor, data: Tensor) -> Tensor:
        """A copy of a parameter for each row of `data`, with a gradient of its own, that broadcasts as the parameter does.

        What is derived with a mask that has rows has rows itself: it is taken as it is.
        """
        name, dims = str(self.name(value)), data.dim()
        if self.rows is None or data.shape[0] % self.rows:
            raise UnsupportedUse(f"{name} meets shape {tuple(data.shape)}, expected {self.rows} rows or a multiple.")
        self.needs_rows = True
        repeats = data.shape[0] // self.rows
        if name in self.derived and value.dim() == dims and value.shape[0] == data.shape[0] > 1:
            leaf = value.detach().requires_grad_()
            self.leaves.append((self._key(name), name, None, leaf))
            return leaf
        if value.dim() > dims or (value.dim() == dims and value.shape[0] != 1):
            raise UnsupportedUse(f"{name} of shape {tuple(value.shape)} is not broadcast over examples.")
        inner = value.shape[1:] if value.dim() == dims else value.shape
        filled = (1,) * (dims - 1 - len(inner)) + tuple(inner)
        leaf = value.detach().reshape(filled).expand(self.rows, *filled).requires_grad_()
        self.leaves.append((self._key(name), name, value.shape, leaf))
        return leaf if repeats == 1 else leaf.unsqueeze(1).expand(self.rows, repeats, *filled).flatten(0, 1)

    def one_row_each(self, ids: Tensor) -> Tensor:
        """Position ids often come as (T,) or (1, T) for all rows; per-row gradients need a row each."""
        if self.rows is None:
            raise UnsupportedUse("A position embedding before any operation on data.")
        self.needs_rows = True
        return ids.reshape(1, -1).expand(self.rows, ids.shape[-1])

    def _key(self, *names: str) -> Hashable:
        self.uses.update(names)
        key = names[0], self.uses[names[0]]
        self.keys.add(key)
        return key

    def _elementwise(self, func: Any, args: Any, kwargs: Any) -> Any:
        others = [a for a in args if isinstance(a, Tensor) and id(a) not in self.names]
        ours = [a for a in args if id(a) in self.names]
        if len(others) != 1 or len(ours) != 1 or any(isinstance(value, Tensor) for value in kwargs.values()):
            return NotImplemented
        (other,), rows = others, self.rows
        if other.dim() == 0 or rows is None or other.shape[0] % rows or other.shape[0] == 0:
            return NotImplemented
        if other.shape[0] != rows and not other.requires_grad:
            return NotImplemented  # a constant whose length happens to be a multiple
        if id(args[0]) in self.names and func.__name__.endswith("_") and not func.__name__.startswith("__"):
            raise UnsupportedUse(f"{self.name(args[0])} is changed in place by {func.__name__}.")
        return func(*(self.leaf(a, other) if id(a) in self.names else a for a in args), **kwargs)

    def _derive(self, func: Any, used: list[Tensor], args: Any, kwargs: Any) -> Any:
        name = str(self.name(used[0]))
        data = [v for v in tensors_in((args, kwargs)) if id(v) not in self.names and v.requires_grad]
        output = func(*args, **kwargs)
        made = [value for value in tensors_in(output) if value.requires_grad]
        if made and data:
            raise UnsupportedUse(
                f"{name} meets data in {getattr(func, '__name__', func)}, which BookKeeping cannot treat exactly: freeze it "
                "(method.trainable=…) or take method.engine._target_=privzoo.privacy.clipping.Loop."
            )
        self.elsewhere.update(self.names[id(value)] for value in used)
        for value in made:
            if id(value) not in self.names:
                if self.book is not None:
                    raise UnsupportedUse(
                        f"{name} is made into another parameter inside gradient checkpointing, which its gradient cannot be "
                        "followed through: turn checkpointing off, or freeze it."
                    )
                self.names[id(value)] = f"{name}#{len(self.derived)}"
                self.derived[self.names[id(value)]] = value
        return output

    def used_once(self) -> set[str]:
        """Parameters whose whole gradient arrives at one tap."""
        return {name for name, count in self.uses.items() if count == 1} - self.elsewhere - self.derived.keys()

    # ---- backward

    def run_backward(self, losses: Tensor, weights: Tensor, keep_graph: bool) -> None:
        """A backward pass with the interception on, so that checkpointed parts are seen when they are recomputed."""
        uses, leaves = self.uses.copy(), len(self.leaves)
        # torch.autograd.backward would switch the mode off.
        engine = torch.autograd.Variable._execution_engine
        with self:
            engine.run_backward(
                (losses,), (weights.to(losses.dtype),), keep_graph, False, (), allow_unreachable=True, accumulate_grad=True
            )
        for key, name, shape, leaf in self.leaves:
            if leaf.grad is not None:
                with torch.no_grad():
                    self._arrived_at_leaf(key, name, shape, leaf.grad)
                leaf.grad = None
        del self.leaves[leaves:]
        self.uses = uses

    def arrived(self, key: Hashable, gradient: Tensor, collect: Collect, layouts: Sequence[str], *saved: Tensor) -> None:
        """An output gradient has come to a tap: measured in a proof, else read by what was proved and collected."""
        assert self.book is not None
        rows = self.book.rows
        if self.turn is not None:
            self.layouts.measure(key, gradient, rows, self.turn, layouts)
            return
        self.arrivals.add(key)
        if self.book.norms_only and gradient.dtype.itemsize < 4:
            raise UnsupportedUse(
                f"{key[0]} has gradients of {gradient.dtype}: the second pass would round on its own, beyond the clip norm; "  # type: ignore[index]
                "take BookKeeping or float32."
            )
        layout = self.layouts.of(key, gradient.shape, rows)
        collect(self.book, *(rows_first(value, rows, layout) for value in (gradient, *saved)))

    def _arrived_at_leaf(self, key: Hashable, name: str, shape: torch.Size | None, gradient: Tensor) -> None:
        assert self.book is not None
        rows = self.book.rows
        if self.turn is not None:
            self.layouts.measure(key, gradient.reshape(rows, -1), rows, self.turn, LAYOUTS[:1])
            return
        self.arrivals.add(key)
        if shape is not None:
            self.book.add_rows(name, gradient.reshape(rows, *shape))
        else:  # each row's own part, 0 elsewhere
            parts = gradient.reshape(rows, -1, *gradient.shape[1:])
            apart = gradient.new_zeros(rows, *parts.shape)
            apart[range(rows), range(rows)] = parts
            self.book.add_rows(name, apart.reshape(rows, *gradient.shape))


def tensors_in(values: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dictionaries."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from tensors_in(value)
