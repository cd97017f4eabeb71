"""Operations that take a trainable parameter: how each runs without it, and what its gradient is made of.

A handler is called as the operation is, with the interception first. It returns the output, or NotImplemented where the
operation has no data in it. Its `collect` gets the output gradient and the saved activation with the examples first.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from privzoo.privacy.clipping.gradients import Book
from privzoo.privacy.clipping.interception import Interception
from privzoo.privacy.clipping.layouts import LAYOUTS, UnsupportedUse

SMALL = 1 << 19  # numbers: what stays in a processor's cache is sooner copied than looped over
ELEMENTWISE: set[Any] = {
    getattr(place, name)
    for place, names in (
        (torch, ("add", "sub", "mul", "div")),
        (Tensor, ("add", "sub", "mul", "div", "add_", "sub_", "mul_", "div_", "__add__", "__radd__", "__iadd__", "__sub__",
                  "__rsub__", "__isub__", "__mul__", "__rmul__", "__imul__", "__truediv__", "__rtruediv__", "__itruediv__")),
    )
    for name in names
}  # fmt: skip


def linear(seen: Interception, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """input @ weight^T + bias."""
    if seen.name(input):
        return NotImplemented
    weight_name, bias_name = seen.name(weight), seen.name(bias)
    output = F.linear(input, seen.free(weight), seen.free(bias))

    def collect(book: Book, gradient: Tensor, *saved: Tensor) -> None:
        _add_bias(book, bias_name, gradient)
        if weight_name:
            book.add_pair(weight_name, saved[0], gradient)

    return seen.tap(output, [weight_name, bias_name], collect, *([input] if weight_name else []))


def matrix_product(seen: Interception, input: Tensor, other: Tensor) -> Any:
    """data @ parameter (d, p)."""
    name = seen.name(other)
    if seen.name(input) or not name or other.dim() != 2:
        return NotImplemented

    def collect(book: Book, gradient: Tensor, *saved: Tensor) -> None:
        book.add_pair(name, saved[0], gradient, transposed=True)

    return seen.tap(torch.matmul(input, seen.free(other)), [name], collect, input)


def addmm(seen: Interception, bias: Tensor, input: Tensor, weight: Tensor, **scales: Any) -> Any:
    """bias + input @ weight, with the weight (d, p): a Conv1D of transformers."""
    weight_name, bias_name = seen.name(weight), seen.name(bias)
    if seen.name(input) or scales or bias.dim() != 1:
        return NotImplemented
    output = torch.addmm(seen.free(bias), input, seen.free(weight))

    def collect(book: Book, gradient: Tensor, *saved: Tensor) -> None:
        _add_bias(book, bias_name, gradient)
        if weight_name:
            book.add_pair(weight_name, saved[0], gradient, transposed=True)

    return seen.tap(output, [weight_name, bias_name], collect, *([input] if weight_name else []))


def embedding(
    seen: Interception, input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Any:  # fmt: skip
    """A look-up: one-hot rows times a table; `padding_idx` gets no gradient."""
    name = seen.name(weight)
    if name is None or max_norm is not None or scale_grad_by_freq or sparse:
        raise UnsupportedUse(f"An embedding with max_norm, scale_grad_by_freq or sparse gradients: {name}.")
    if input.dim() == 1:
        return NotImplemented  # positions (T,), the same for all; one id a row, (R,), comes to the same
    if input.shape[0] == 1:
        input = seen.one_row_each(input)
    elif seen.rows is not None and input.shape[0] % seen.rows:
        return NotImplemented  # a table of relative positions, (T, T): no example axis
    output = F.embedding(input, seen.free(weight), padding_idx)
    padding = None if padding_idx is None else padding_idx % weight.shape[0]

    def collect(book: Book, gradient: Tensor, ids: Tensor) -> None:
        if padding is not None:
            gradient = gradient.masked_fill((ids == padding).unsqueeze(-1), 0)
        book.add_pair(name, ids, gradient, transposed=True)

    return seen.tap(output, [name], collect, input)


def layer_norm(
    seen: Interception, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:  # fmt: skip
    """Layer norm with scale and shift."""
    if seen.name(input):
        return NotImplemented
    weight_name, bias_name = seen.name(weight), seen.name(bias)
    output = F.layer_norm(input, normalized_shape, seen.free(weight), seen.free(bias), eps)
    shape = list(normalized_shape)

    def collect(book: Book, gradient: Tensor, *saved: Tensor) -> None:
        if weight_name:
            scale, shift = _layer_norm_gradients(_wide(gradient), _wide(saved[0]), shape, eps)
            book.add_rows(weight_name, scale)
        else:
            shift = _wide(gradient).reshape(len(gradient), -1, *shape).sum(1)
        if bias_name:
            book.add_rows(bias_name, shift)
        book.allow_for(_wide(gradient).reshape(len(gradient), -1, math.prod(shape)), math.sqrt(math.prod(shape)))

    return seen.tap(output, [weight_name, bias_name], collect, *([input] if weight_name else []))


def _layer_norm_gradients(gradient: Tensor, input: Tensor, shape: list[int], eps: float) -> tuple[Tensor, Tensor]:
    """Per-row gradients (R, *shape) of scale and shift: by the native kernel row by row, which makes no copy of the
    normalised input; where that would be a small one, all rows at once."""
    if input.numel() <= SMALL:
        normalised = F.layer_norm(input, shape, None, None, eps)
        parts = (len(input), -1, *shape)
        return (gradient * normalised).reshape(parts).sum(1), gradient.reshape(parts).sum(1)
    ones, zeros = input.new_ones(shape), input.new_zeros(shape)
    gradient, input = gradient.contiguous(), input.contiguous()
    found = []
    for row in range(len(input)):
        _, mean, deviation = torch.native_layer_norm(input[row], shape, None, None, eps)
        _, scale, shift = torch.ops.aten.native_layer_norm_backward(
            gradient[row], input[row], shape, mean, deviation, ones, zeros, [False, True, True]
        )
        found.append((scale, shift))
    return torch.stack([scale for scale, _ in found]), torch.stack([shift for _, shift in found])


def group_norm(
    seen: Interception, input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:  # fmt: skip
    """Group norm of (R * k, C, …) with scale and shift by channel."""
    if seen.name(input):
        return NotImplemented
    weight_name, bias_name = seen.name(weight), seen.name(bias)
    output = F.group_norm(input, num_groups, seen.free(weight), seen.free(bias), eps)

    shape = input.shape[1:]

    def collect(book: Book, gradient: Tensor, *saved: Tensor) -> None:
        each = _wide(gradient).reshape(-1, *shape)
        book.allow_for(each.flatten(2).transpose(1, 2).reshape(len(gradient), -1, shape[0]), math.sqrt(math.prod(shape)))
        if weight_name:
            normalised = F.group_norm(_wide(saved[0]).reshape(-1, *shape), num_groups, None, None, eps)
            book.add_rows(weight_name, _by_channel(each * normalised, len(gradient)))
        if bias_name:
            book.add_rows(bias_name, _by_channel(each, len(gradient)))

    kept = [input] if weight_name else []
    return seen.tap(output, [weight_name, bias_name], collect, *kept, layouts=LAYOUTS[:1])


def _by_channel(value: Tensor, rows: int) -> Tensor:
    """(R * k, C, …) to (R, C)."""
    return value.flatten(2).sum(2).reshape(rows, -1, value.shape[1]).sum(1)


def conv2d(
    seen: Interception, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Any:  # fmt: skip
    """Convolution of (R * k, C, H, W); without groups, a linear layer on the windows."""
    weight_name, bias_name = seen.name(weight), seen.name(bias)
    if isinstance(padding, str):
        raise UnsupportedUse(f"conv2d with padding={padding!r} on {weight_name or bias_name}: give it as a number.")
    if seen.name(input) or input.dim() != 4:
        return NotImplemented
    output = torch.conv2d(input, seen.free(weight), seen.free(bias), stride, padding, dilation, groups)
    window = {"kernel_size": weight.shape[2:], "stride": stride, "padding": padding, "dilation": dilation}
    size, shape = weight.shape, input.shape[1:]

    def collect(book: Book, gradient: Tensor, *saved: Tensor) -> None:
        rows = len(gradient)
        places = gradient.flatten(-2).transpose(-1, -2).reshape(rows, -1, size[0])
        _add_bias(book, bias_name, places)
        if not weight_name:
            return
        images = saved[0].reshape(-1, *shape)  # k of a row
        if groups == 1:
            book.add_pair(weight_name, F.unfold(images, **window).transpose(1, 2).reshape(rows, places.shape[1], -1), places)
            return
        maps = gradient.reshape(-1, *gradient.shape[-3:])
        pairs = zip(images.chunk(rows), maps.chunk(rows), strict=True)
        one = [conv2d_weight(x, size, g, stride, padding, dilation, groups) for x, g in pairs]
        book.add_rows(weight_name, torch.stack(one))

    kept = [input] if weight_name else []
    return seen.tap(output, [weight_name, bias_name], collect, *kept, layouts=LAYOUTS[:1])


def expand(seen: Interception, value: Tensor, *sizes: Any) -> Any:
    """A class token, (1, …) to (R, …): a copy for each row."""
    size = list(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else list(sizes)
    if value.dim() == 0 or value.shape[0] != 1 or len(size) != value.dim() or size[0] != seen.rows:
        return NotImplemented
    return seen.leaf(value, value.new_empty((size[0], *(1 for _ in size[1:])))).expand(size)


def attention_with_bias(
    seen: Interception, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Any:
    """Scaled dot-product attention whose mask is a table of relative positions, (1, H, T, T)."""
    if attn_mask is None or not seen.name(attn_mask) or any(map(seen.name, (query, key, value))):
        return NotImplemented
    return F.scaled_dot_product_attention(query, key, value, seen.leaf(attn_mask, query), *args, **kwargs)


def multi_head_attention(seen: Interception, *args: Any, **kwargs: Any) -> Any:
    """nn.MultiheadAttention: one function to torch, whose inside is looked at operation by operation."""
    with seen, _looked_into():
        return F.multi_head_attention_forward(*args, **kwargs)


@contextmanager
def _looked_into() -> Iterator[None]:
    """torch.nn.functional's Python functions run their bodies instead of asking the mode again."""
    asks = F.has_torch_function  # type: ignore[attr-defined]
    F.has_torch_function = lambda _: False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        F.has_torch_function = asks  # type: ignore[attr-defined]


def _add_bias(book: Book, name: str | None, gradient: Tensor) -> None:
    if name:
        parts = _wide(gradient).reshape(len(gradient), -1, gradient.shape[-1])
        book.add_rows(name, parts.sum(1))
        book.allow_for(parts)


def _wide(value: Tensor) -> Tensor:
    """In float32 at least."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: linear,
    torch.matmul: matrix_product,
    Tensor.matmul: matrix_product,
    Tensor.__matmul__: matrix_product,
    torch.mm: matrix_product,
    torch.addmm: addmm,
    F.embedding: embedding,
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
    torch.conv2d: conv2d,
    Tensor.expand: expand,
    F.scaled_dot_product_attention: attention_with_bias,
    F.multi_head_attention_forward: multi_head_attention,
}
