"""The other forged functions (one-sided, shifted, soft, clamp, band, mean) and their gradients, as Triton kernels.

One kernel for each direction, compiled for each function: what tells them apart are the device functions `drops`, what
is dropped, and `other`, what takes its place and what becomes of the rest, with a branch in both per row of
`reference.RULES`. `forged` knows the threshold too, for the kernels that compute a producer ahead of any of them. The
layout is as in kernels/threshold.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .threshold import block_offsets, launch_blocks, threshold


@triton.jit
def wide_of(x):
    return x.to(tl.float64 if x.dtype == tl.float64 else tl.float32)


@triton.jit
def drops(x, a, b, RULE: tl.constexpr):
    """Whether a value, wide as its parameters are, is dropped. a, b: the function's parameters, in their order."""
    if RULE == "one_sided" or RULE == "shifted":
        dropped = x < tl.where(a > 0.0, a, -float("inf"))
    elif RULE == "soft":
        dropped = tl.abs(x) < a
    elif RULE == "clamp":
        dropped = tl.abs(x) > a
    elif RULE == "band":
        dropped = (tl.abs(x) < a) | (tl.abs(x) > b)
    else:
        tl.static_assert(RULE == "mean", "a function without a branch in drops()")
        dropped = (tl.abs(x - a) <= b) & (b > 0.0)
    return dropped


@triton.jit
def forged(x, a, b, RULE: tl.constexpr):
    """The function itself, in x's dtype."""
    if RULE == "threshold":
        y = threshold(x, a)
    else:
        y = other(x, a, b, RULE)
    return y


@triton.jit
def other(x, a, b, RULE: tl.constexpr):
    wide, a = wide_of(x), a.to(wide_of(x).dtype)
    if b is not None:
        b = b.to(wide.dtype)
    dropped = drops(wide, a, b, RULE)
    if RULE == "shifted":
        y = tl.where(dropped, 0.0, tl.where(a > 0.0, wide - a, wide)).to(x.dtype)
    elif RULE == "soft":
        rest = tl.where(wide < 0.0, wide + a, wide - a)
        y = tl.where(dropped, 0.0, tl.where(a > 0.0, rest, wide)).to(x.dtype)
    elif RULE == "clamp":
        # (Before version 3.8 Triton takes -a for 0 - a, which is another zero where a is one.)
        y = tl.where(dropped, tl.where(wide < 0.0, a * -1.0, a).to(x.dtype), x)
    elif RULE == "band":
        end = tl.where(wide < 0.0, b * -1.0, b).to(x.dtype)
        y = tl.where(dropped, tl.where(tl.abs(wide) < a, 0.0, end), x)
    elif RULE == "mean":
        y = tl.where(dropped, a.to(x.dtype), x)
    else:
        tl.static_assert(RULE == "one_sided", "a function without a branch in other()")
        y = tl.where(dropped, 0.0, x)
    return y


@triton.jit
def forged_backward(grad, x, a, b, RULE: tl.constexpr):
    wide = wide_of(x)
    if b is not None:
        b = b.to(wide.dtype)
    return tl.where(drops(wide, a.to(wide.dtype), b, RULE), 0.0, grad)


@triton.jit
def parameter(pointer, offsets, mask, INNER: tl.constexpr, CHANNELS: tl.constexpr):
    """A scalar, or (CHANNELS of them, INNER elements apart) the one of each element's channel."""
    if pointer is None:
        value = None
    elif CHANNELS == 0:
        value = tl.load(pointer)
    else:
        value = tl.load(pointer + (offsets // INNER) % CHANNELS, mask=mask)
    return value


@triton.jit
def kind_kernel(
    x_ptr, a_ptr, b_ptr, y_ptr, numel,
    RULE: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    offsets = block_offsets(tl.program_id(0), BLOCK, INDEX)
    mask = offsets < numel
    x = tl.load(x_ptr + offsets, mask=mask)
    a = parameter(a_ptr, offsets, mask, INNER, CHANNELS)
    b = parameter(b_ptr, offsets, mask, INNER, CHANNELS)
    tl.store(y_ptr + offsets, forged(x, a, b, RULE), mask=mask)


@triton.jit
def kind_backward_kernel(
    grad_ptr, x_ptr, a_ptr, b_ptr, y_ptr, numel,
    RULE: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    offsets = block_offsets(tl.program_id(0), BLOCK, INDEX)
    mask = offsets < numel
    grad = tl.load(grad_ptr + offsets, mask=mask)
    x = tl.load(x_ptr + offsets, mask=mask)
    a = parameter(a_ptr, offsets, mask, INNER, CHANNELS)
    b = parameter(b_ptr, offsets, mask, INNER, CHANNELS)
    tl.store(y_ptr + offsets, forged_backward(grad, x, a, b, RULE), mask=mask)


def launch(rule: str, x: Tensor, *parameters: Tensor | int) -> Tensor:
    """`reference.<rule>` in one kernel launch: same arguments, same result bit for bit, in any layout of x."""
    y = torch.empty_like(x)
    source = x if x.stride() == y.stride() else y.copy_(x)
    launch_blocks(kind_kernel, source, *_both(parameters), y, RULE=rule, **_channels(y, parameters))
    return y


def launch_backward(rule: str, grad: Tensor, x: Tensor, *parameters: Tensor | int) -> Tensor:
    """`reference.<rule>_backward` in one kernel launch: same arguments, same result bit for bit."""
    y = torch.empty_like(x)
    x = x if x.stride() == y.stride() else torch.empty_like(y).copy_(x)
    grad = grad if grad.stride() == y.stride() else y.copy_(grad)
    launch_blocks(kind_backward_kernel, grad, x, *_both(parameters), y, RULE=rule, **_channels(y, parameters))
    return y


def _both(parameters: tuple[Tensor | int, ...]) -> list[Tensor | None]:
    tensors = [p.contiguous() for p in parameters if isinstance(p, Tensor)]
    return [*tensors, *[None] * (2 - len(tensors))]


def _channels(y: Tensor, parameters: tuple[Tensor | int, ...]) -> dict[str, int]:
    """Where a dense tensor's channels lie in storage order, if the parameters are per channel."""
    *_, channel = parameters
    if isinstance(channel, Tensor):
        return {"INNER": 1, "CHANNELS": 0}
    return {"INNER": max(y.stride(channel), 1), "CHANNELS": y.shape[channel]}
