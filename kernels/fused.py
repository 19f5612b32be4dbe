"""A producer and the threshold behind it in one kernel: `x -> affine -> add -> activation -> threshold`.

Each step may be left out, and the addition may come ahead of the affine map instead. The threshold is the device
function of kernels/threshold.py, or any other that kernels/kinds.py forges by.

Every step is computed in float32 and rounded to the tensor's dtype, as the same steps in kernels of their own are. So
the threshold decides on the value that it would have been given there, even where a sum cancels.

The launcher wants CUDA tensors. Under TRITON_INTERPRET=1 it takes CPU tensors too (for bfloat16, Triton 3.8's
interpreter truncates where a GPU rounds to nearest).
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kinds import forged, parameter
from .launch import Plan, dtypes, launch
from .threshold import NUM_WARPS, VECTOR_BYTES

OTHERS = ("residual", "mean", "var", "weight", "bias")  # the kernel's tensors behind x, t, limit and its results
ACTIVATIONS = ("none", "relu", "relu6", "gelu", "gelu_tanh", "silu", "hardswish")
VECTORS_PER_THREAD = 4  # at most: a channel's parameters are loaded and prepared once for all of them
BLOCKS = 512  # smaller blocks rather than fewer than these

LOG2E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.693145751953125)  # few enough bits that its products with small integers are exact
LN2_LOW = tl.constexpr(1.42860682030941723212e-6)
SQRT_HALF = tl.constexpr(0.7071067811865476)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)


@triton.jit
def rounded(v, DTYPE: tl.constexpr):
    """What is left of a float32 value once it has been stored as DTYPE."""
    return v.to(DTYPE).to(tl.float32)


@triton.jit
def exp(v):
    """e^v to about 2 ulp. tl.exp is one instruction and loses a bit for each doubling of |v|."""
    v = tl.where(v < -104.0, -104.0, tl.where(v > 89.0, 89.0, v))  # 0 and inf from here on; NaN stays
    n = tl.floor(v * LOG2E + 0.5)
    rest = tl.fma(n, -LN2_LOW, tl.fma(n, -LN2_HIGH, v))
    return tl.exp2(rest * LOG2E) * tl.exp2(n)


@triton.jit
def divide(a, b, DTYPE: tl.constexpr):
    """a / b; the fast division's 2 ulp of float32 show in a float32 result only."""
    if DTYPE == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def activation(v, NAME: tl.constexpr, DTYPE: tl.constexpr):
    """float32 in and out. NaN passes through each of them."""
    if NAME == "relu":
        v = tl.where(v < 0.0, 0.0, v)
    elif NAME == "relu6":
        v = tl.where(v < 0.0, 0.0, tl.where(v > 6.0, 6.0, v))
    elif NAME == "gelu":
        v = v * 0.5 * (1.0 + tl.erf(v * SQRT_HALF))
    elif NAME == "gelu_tanh":  # (1 + tanh(u)) / 2 is 1 / (1 + e^-2u), which does not cancel
        u = SQRT_2_OVER_PI * (v + 0.044715 * v * v * v)
        v = divide(v, 1.0 + exp(-2.0 * u), DTYPE)
    elif NAME == "silu":
        v = divide(v, 1.0 + exp(-v), DTYPE)
    elif NAME == "hardswish":
        gate = v + 3.0
        gate = tl.where(gate < 0.0, 0.0, tl.where(gate > 6.0, 6.0, gate))
        sixth = gate * (1.0 / 6.0)
        v = v * tl.fma(tl.fma(sixth, -6.0, gate), 1.0 / 6.0, sixth)  # gate / 6, rounded correctly
    else:
        tl.static_assert(NAME == "none")
    return v


@triton.jit
def affine(v, channel, mask, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, DTYPE: tl.constexpr):
    """A BatchNorm in eval mode where there are a mean and a variance, else a product and a sum, per channel."""
    if mean_ptr is not None:
        v = v - tl.load(mean_ptr + channel, mask=mask).to(tl.float32)
        scale = tl.sqrt_rn(tl.load(var_ptr + channel, mask=mask, other=1.0).to(tl.float32) + eps)
        if weight_ptr is not None:
            scale = tl.div_rn(tl.load(weight_ptr + channel, mask=mask).to(tl.float32), scale)
        else:
            scale = tl.div_rn(1.0, scale)
        if bias_ptr is not None:
            v = tl.fma(v, scale, tl.load(bias_ptr + channel, mask=mask).to(tl.float32))
        else:
            v = v * scale
        v = rounded(v, DTYPE)
    else:
        if weight_ptr is not None:
            v = rounded(v * tl.load(weight_ptr + channel, mask=mask).to(tl.float32), DTYPE)
        if bias_ptr is not None:
            v = rounded(v + tl.load(bias_ptr + channel, mask=mask).to(tl.float32), DTYPE)
    return v


@triton.jit
def elementwise_threshold_kernel(
    x_ptr, t_ptr, limit_ptr, y_ptr, raw_ptr, residual_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps,
    rows, columns, channels, RULE: tl.constexpr,
    CHANNEL: tl.constexpr, INNER: tl.constexpr, CHANNELS: tl.constexpr,
    ADD_FIRST: tl.constexpr, RAW_SUM: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """A matrix of `rows` x `columns`, in storage order; a tile per program.

    The channel is the "column", or the "row" modulo `channels`, or, where neither is wide enough for 128-bit accesses,
    found from the offset ("flat"): compiled for INNER elements in a row and CHANNELS channels, as division is slow.
    """
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    across = (columns + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0)
    row = (tile // across) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (column < columns)
    offsets = row.to(INDEX) * columns + column

    v = tl.load(x_ptr + offsets, mask=mask).to(tl.float32)
    if ADD_FIRST:
        v = rounded(v + tl.load(residual_ptr + offsets, mask=mask).to(tl.float32), DTYPE)
        if RAW_SUM:
            tl.store(raw_ptr + offsets, v.to(DTYPE), mask=mask)
    if CHANNEL == "row":
        v = affine(v, row % channels, row < rows, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, DTYPE)
    elif CHANNEL == "column":
        v = affine(v, column, column < columns, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, DTYPE)
    elif CHANNEL == "flat":
        channel = (offsets // INNER) % CHANNELS
        v = affine(v, channel, mask, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, DTYPE)
    if not ADD_FIRST:
        if residual_ptr is not None:
            v = rounded(v + tl.load(residual_ptr + offsets, mask=mask).to(tl.float32), DTYPE)
    v = activation(v, ACTIVATION, DTYPE).to(DTYPE)
    if not RAW_SUM:
        if raw_ptr is not None:
            tl.store(raw_ptr + offsets, v, mask=mask)
    limit = parameter(limit_ptr, None, None, 1, 0)
    tl.store(y_ptr + offsets, forged(v, tl.load(t_ptr), limit, RULE), mask=mask)


def tile_rule(dtype: torch.dtype, rows: int, columns: int) -> dict:
    """How the kernel cuts a matrix of `dtype` into tiles: its keyword arguments.

    A tile is as wide as the widest power of two that leaves at most an eighth of the threads idle, if there is one.
    """
    vector = VECTOR_BYTES // dtype.itemsize
    block = NUM_WARPS * 32 * vector * VECTORS_PER_THREAD
    while block > NUM_WARPS * 32 * vector and rows * columns < BLOCKS * block:
        block //= 2
    idle = {2**i: triton.cdiv(columns, 2**i) * 2**i / columns - 1 for i in range(4, block.bit_length())}
    across = max(width for width in idle if idle[width] <= max(1 / 8, min(idle.values())))
    down = block // across
    last = triton.cdiv(rows, down) * down * columns + across  # at least the last offset, idle threads included
    index = tl.int64 if last > 2**31 else tl.int32
    return {"ROWS": down, "COLUMNS": across, "INDEX": index, "num_warps": NUM_WARPS}


def as_matrix(y: Tensor, channel: int | None) -> tuple[int, int, int, dict]:
    """A dense tensor in storage order: rows, columns, channels, and the kernel's arguments that say where these are."""
    if channel is None or y.shape[channel] == 1:
        return 1, y.numel(), 1, {"CHANNEL": "none" if channel is None else "row", "INNER": 1, "CHANNELS": 1}
    channels, inner = y.shape[channel], y.stride(channel)
    rows = y.numel() // (channels * inner)
    if (channels if inner == 1 else inner) % 16:  # a multiple that the compiler knows of: see Triton's specialisation
        return 1, y.numel(), 1, {"CHANNEL": "flat", "INNER": inner, "CHANNELS": channels}
    if inner == 1:
        return rows, channels, 1, {"CHANNEL": "column", "INNER": 1, "CHANNELS": 1}
    return rows * channels, inner, channels, {"CHANNEL": "row", "INNER": 1, "CHANNELS": 1}


def plan(
    y: Tensor, channel: int, eps: float, add_first: bool, activation: str, keep: str | None, function: str, **more: Any
) -> Plan:
    """For a result as y, and the launcher's arguments by name."""
    has_channels = any(more[name] is not None for name in OTHERS[1:])
    rows, columns, channels, where = as_matrix(y, channel if has_channels else None)
    rule = tile_rule(y.dtype, rows, columns)
    constants = {"RULE": function, "ADD_FIRST": add_first, "RAW_SUM": keep == "sum", "ACTIVATION": activation}
    programs = triton.cdiv(rows, rule["ROWS"]) * triton.cdiv(columns, rule["COLUMNS"])
    numbers = {"eps": eps, "rows": rows, "columns": columns, "channels": channels}
    return programs, {**numbers, **constants, **where, **rule}


def launch_elementwise_threshold(
    x: Tensor,
    t: Tensor,
    residual: Tensor | None = None,
    add_first: bool = False,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    channel: int = 1,
    activation: str = "none",
    keep: str | None = None,
    function: str = "threshold",
    limit: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`reference.elementwise_threshold` in one kernel launch; float16, bfloat16 or float32.

    A non-overlapping and dense x, in whatever order of dimensions, is read and written in storage order, without a
    copy. Any other (expanded, or with gaps) is copied into the result's layout first, and so is a residual that does
    not have it.
    """
    y = torch.empty_like(x)
    x, residual = (v if v is None or v.stride() == y.stride() else torch.empty_like(y).copy_(v) for v in (x, residual))
    raw = None if keep is None else torch.empty_like(y)
    if y.numel():
        mean, var, weight, bias = (p if p is None else p.contiguous() for p in (mean, var, weight, bias))
        tensors = (x, t, limit, y, raw, residual, mean, var, weight, bias)
        key = (y.shape, y.stride(), channel, eps, add_first, activation, keep, function, *dtypes(tensors))
        planned = functools.partial(
            plan, y, channel, eps, add_first, activation, keep, function, mean=mean, var=var, weight=weight, bias=bias
        )
        launch(elementwise_threshold_kernel, tensors, key, planned)
    return y, raw
