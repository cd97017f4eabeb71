"""One backward pass: trainable parameters leave autograd, and every use of one keeps what its gradient is made of.

Inside `forward` a `TorchFunctionMode` sees each functional use of a trainable parameter, runs the operation with the
parameter detached and puts a tap on its output. The backward pass brings the output gradient to the tap. Per-unit norms then
come from the cheaper of the Gram form and the instantiated form, and the clipped sum is one weighted matrix product a use.
A use that cannot be treated exactly raises `UnsupportedUse` with the operation and the parameter.

Sources: Goodfellow 2015 (per-example norms); Li et al. 2022 (ghost norm); Bu et al. 2022 (book-keeping).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from privzoo.errors import UserError
from privzoo.privacy.clipping.engine import (
    ClippedSums,
    Forward,
    checked_units,
    clip_factors,
    sum_dtype,
    trainable_parameters,
    zero_sums,
)
from privzoo.privacy.clipping.gradients import Book

ELEMENTWISE = {
    torch.add, Tensor.add, Tensor.__radd__, torch.sub, Tensor.sub, Tensor.__rsub__, torch.mul, Tensor.mul, Tensor.__rmul__,
    torch.Tensor.__add__, torch.Tensor.__mul__, torch.Tensor.__sub__,
}  # fmt: skip


class UnsupportedUse(UserError):
    """A trainable parameter is used in a way that this engine cannot treat exactly."""


class BookKeeping:
    """Clipped sums in one forward and one backward pass.

    Guarantee: equal to `Loop` up to rounding, or `UnsupportedUse`. It assumes that a tapped tensor's first axis is the
    example; the pre-flight check compares with `Loop` on the user's own model, so that a model that breaks this is refused.

    Args:
        model: its trainable parameters; linear, Conv1D (addmm), embedding, layer norm, conv2d and elementwise uses.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(
        self,
        forward: Forward,
        clip_norm: float,
        unit_of_row: Tensor | None = None,
        into: dict[str, Tensor] | None = None,
    ) -> ClippedSums:
        """Run `forward` and one backward pass; arguments and result as for `Loop`.

        Raises:
            UnsupportedUse: if a trainable parameter is used in a way that is not known here.
        """
        parameters = trainable_parameters(self.model)
        sums = zero_sums(parameters) if into is None else into
        book = Book({name: sum_dtype(p) for name, p in parameters.items()})
        interception = _Interception(parameters, book)
        with torch.enable_grad():
            with interception:
                losses = forward()
            units, count = checked_units(losses, unit_of_row)
            interception.check_rows(len(losses))
            book.open(len(losses), units if unit_of_row is not None else None, count)
            self._backward(losses, interception, book, parameters)
        # Under the caller's autocast the products below would be bf16, and norms too small by up to 2^-8.
        with torch.no_grad(), torch.autocast(losses.device.type, enabled=False):
            norms = book.squared_norms().sqrt()
            book.add_clipped(sums, clip_factors(norms, clip_norm))
        return ClippedSums(sums, norms, losses.detach())

    @staticmethod
    def _backward(losses: Tensor, interception: "_Interception", book: Book, parameters: dict[str, Any]) -> None:
        leaves = interception.leaves
        inputs = [interception.anchor, *(leaf for _, _, leaf in leaves), *parameters.values()]
        found = torch.autograd.grad(losses.sum(), inputs, allow_unused=True)
        for name, gradient in zip(parameters, found[1 + len(leaves) :], strict=True):
            if gradient is not None:  # parameters are detached wherever they are seen, so this use was not
                raise UnsupportedUse(f"{name} is used where BookKeeping sees nothing (TorchScript?): freeze it.")
        for (name, shape, _), gradient in zip(leaves, found[1:], strict=False):
            if gradient is not None:
                book.add_instantiated(name, gradient.reshape(-1, *shape))


class _Tap(torch.autograd.Function):
    """Identity that hands its output gradient, with the saved activations, to the book."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, collect: Callable[..., None], *saved: Tensor) -> Tensor:
        ctx.collect = collect
        ctx.save_for_backward(anchor, *saved)
        # Not view_as: autograd forbids an in-place operation, such as ReLU(inplace=True), on a view made here.
        return torch.ops.aten._unsafe_view(output, output.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        anchor, *saved = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):
            ctx.collect(gradient, *saved)
        passed_on = gradient if ctx.needs_input_grad[0] else None
        return passed_on, torch.zeros_like(anchor), None, *(None for _ in saved)


class _Interception(TorchFunctionMode):
    """Sees every functional use of a trainable parameter."""

    def __init__(self, parameters: dict[str, nn.Parameter], book: Book) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in parameters.items()}
        self.book = book
        self.rows: int | None = None  # leading dimension of the first operation on data; checked against the losses
        self.expanded = False
        self.leaves: list[tuple[str, torch.Size, Tensor]] = []
        self.anchor = torch.zeros((), requires_grad=True, device=next(iter(parameters.values())).device)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.rows is None and func in HANDLERS and func is not Tensor.expand:
            self.rows = [*args, *kwargs.values()][1 if func is torch.addmm else 0].shape[0]
        used = [self.names[id(a)] for a in tree_leaves((args, kwargs)) if id(a) in self.names]
        if not used:
            return func(*args, **kwargs)
        if func in HANDLERS or func in ELEMENTWISE:
            if not torch.is_grad_enabled():
                raise UnsupportedUse(
                    f"{used[0]} is used where gradients are off (reentrant gradient checkpointing?): turn checkpointing off."
                )
            handler = HANDLERS.get(func)
            return handler(self, *args, **kwargs) if handler else self._elementwise(func, used, args, kwargs)
        output = func(*args, **kwargs)
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(output)):
            raise UnsupportedUse(
                f"{used[0]} is used by {getattr(func, '__name__', func)}, which BookKeeping cannot treat exactly: "
                "freeze it (method.trainable=…) or take method.engine._target_=privzoo.privacy.clipping.Loop."
            )
        return output

    def check_rows(self, rows: int) -> None:
        if self.expanded and self.rows != rows:
            raise UnsupportedUse(f"Expected {rows} rows (one a loss) at the first operation, found {self.rows}.")

    def _name(self, value: Any) -> str | None:
        return self.names.get(id(value))

    @staticmethod
    def _free(value: Any) -> Any:
        return value.detach() if isinstance(value, nn.Parameter) else value

    def _tap(self, output: Tensor, collect: Callable[..., None], *saved: Tensor) -> Tensor:
        return _Tap.apply(output, self.anchor, collect, *(s.detach() for s in saved))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output = F.linear(self._free(input), self._free(weight), self._free(bias))
        weight_name, bias_name, book = self._name(weight), self._name(bias), self.book
        self._refuse_as_data(input, "linear")

        def collect(gradient: Tensor, *saved: Tensor) -> None:
            if weight_name:
                book.add_outer(weight_name, gradient, saved[0])
            if bias_name:
                book.add_instantiated(bias_name, book.summed(gradient))

        return self._tap(output, collect, *([input] if weight_name else []))

    def _addmm(self, bias: Tensor, input: Tensor, weight: Tensor, **scales: Any) -> Tensor:
        if scales:
            raise UnsupportedUse(f"addmm with {sorted(scales)} on {self._name(weight) or self._name(bias)}.")
        output = torch.addmm(self._free(bias), self._free(input), self._free(weight))
        weight_name, bias_name, book = self._name(weight), self._name(bias), self.book
        self._refuse_as_data(input, "addmm")

        def collect(gradient: Tensor, *saved: Tensor) -> None:
            gradient = book.split_rows(gradient)
            if weight_name:
                book.add_outer(weight_name, book.split_rows(saved[0]), gradient)
            if bias_name:
                book.add_instantiated(bias_name, book.summed(gradient))

        return self._tap(output, collect, *([input] if weight_name else []))

    def _embedding(
        self, input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
        norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
    ) -> Tensor:  # fmt: skip
        name, book = self._name(weight), self.book
        if name is None or max_norm is not None or scale_grad_by_freq or sparse:
            raise UnsupportedUse(f"An embedding with max_norm, scale_grad_by_freq or sparse gradients: {name}.")
        input = self._one_row_each(input)
        output = F.embedding(input, weight.detach(), padding_idx)
        padding = None if padding_idx is None else padding_idx % weight.shape[0]

        def collect(gradient: Tensor, ids: Tensor) -> None:
            if padding is not None:
                gradient = gradient.masked_fill((ids == padding).unsqueeze(-1), 0)
            book.add_rows_of_table(name, ids, gradient)

        return self._tap(output, collect, input)

    def _layer_norm(
        self, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:  # fmt: skip
        output = F.layer_norm(self._free(input), normalized_shape, self._free(weight), self._free(bias), eps)
        weight_name, bias_name, book = self._name(weight), self._name(bias), self.book
        self._refuse_as_data(input, "layer_norm")
        shape = torch.Size(normalized_shape)

        def collect(gradient: Tensor, *saved: Tensor) -> None:
            gradient = book.checked(gradient)
            if weight_name:
                normalised = F.layer_norm(book.checked(saved[0]), shape, None, None, eps)
                products = (gradient * normalised).reshape(len(gradient), -1, *shape).sum(1)
                book.add_instantiated(weight_name, products)
            if bias_name:
                book.add_instantiated(bias_name, gradient.reshape(len(gradient), -1, *shape).sum(1))

        return self._tap(output, collect, *([input] if weight_name else []))

    def _conv2d(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1,
    ) -> Tensor:  # fmt: skip
        weight_name, bias_name, book = self._name(weight), self._name(bias), self.book
        if groups != 1 or isinstance(padding, str):
            raise UnsupportedUse(f"conv2d with groups or named padding on {weight_name or bias_name}.")
        self._refuse_as_data(input, "conv2d")
        output = torch.conv2d(input, self._free(weight), self._free(bias), stride, padding, dilation, groups)
        window = {"kernel_size": weight.shape[2:], "stride": stride, "padding": padding, "dilation": dilation}

        def collect(gradient: Tensor, *saved: Tensor) -> None:
            gradient = gradient.flatten(2).transpose(1, 2)
            if weight_name:
                book.add_outer(weight_name, gradient, F.unfold(saved[0], **window).transpose(1, 2))
            if bias_name:
                book.add_instantiated(bias_name, book.summed(gradient))

        return self._tap(output, collect, *([input] if weight_name else []))

    def _elementwise(self, func: Any, used: list[str], args: Any, kwargs: Any) -> Tensor:
        tensors = [a for a in args if isinstance(a, Tensor)]
        others = [a for a in tensors if self._name(a) is None]
        if len(used) != 1 or len(others) != 1 or not all(not isinstance(v, Tensor) for v in kwargs.values()):
            raise UnsupportedUse(f"{used[0]} meets another parameter in {func.__name__}: BookKeeping cannot treat that.")
        dims = others[0].dim()
        if dims == 0 or others[0].shape[0] != self.rows:
            raise UnsupportedUse(f"{used[0]} meets shape {tuple(others[0].shape)}, expected ({self.rows}, …): no row each.")
        return func(*(self._leaf(a, dims) if self._name(a) else a for a in args), **kwargs)

    def _expand(self, parameter: Tensor, *sizes: Any) -> Tensor:
        size = list(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else list(sizes)
        if parameter.shape[0] != 1 or len(size) != parameter.dim() or size[0] != self.rows:
            raise UnsupportedUse(f"{self._name(parameter)} is expanded to {size}, expected ({self.rows}, …).")
        return self._leaf(parameter, parameter.dim()).expand(size)

    def _leaf(self, parameter: Tensor, dims: int) -> Tensor:
        """A copy of the parameter for each row, with a gradient of its own, that broadcasts as the parameter does."""
        name = self._name(parameter)
        if self.rows is None or parameter.dim() > dims or (parameter.dim() == dims and parameter.shape[0] != 1):
            raise UnsupportedUse(f"{name} of shape {tuple(parameter.shape)} is not broadcast over examples.")
        self.expanded = True
        inner = parameter.shape[1:] if parameter.dim() == dims else parameter.shape
        filled = (1,) * (dims - 1 - len(inner)) + tuple(inner)
        leaf = parameter.detach().reshape(filled).expand(self.rows, *filled).requires_grad_()
        self.leaves.append((str(name), parameter.shape, leaf))
        return leaf

    def _one_row_each(self, ids: Tensor) -> Tensor:
        """Position ids often come as (T,) or (1, T) for all rows; per-row gradients need a row each."""
        if ids.dim() == 1 or ids.shape[0] == 1:
            if self.rows is None:
                raise UnsupportedUse("A position embedding before any operation on data.")
            self.expanded = True
            ids = ids.reshape(1, -1).expand(self.rows, ids.shape[-1])
        return ids

    def _refuse_as_data(self, input: Tensor, operation: str) -> None:
        if self._name(input):
            raise UnsupportedUse(f"{self._name(input)} is the data of {operation}: BookKeeping cannot treat that.")


# Functions, not bound methods of an interception: a reference cycle would keep a micro-batch's activations alive until
# the garbage collector comes by.
HANDLERS: dict[Any, Callable[..., Tensor]] = {
    F.linear: _Interception._linear,
    torch.addmm: _Interception._addmm,
    F.embedding: _Interception._embedding,
    F.layer_norm: _Interception._layer_norm,
    torch.conv2d: _Interception._conv2d,
    Tensor.expand: _Interception._expand,
}
