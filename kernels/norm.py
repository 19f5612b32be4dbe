"""LayerNorm or RMSNorm, and the threshold behind it, in one pass over each row: `x -> add -> norm -> threshold`.

A row stays in registers between its statistics and its results, so it is read once. As in kernels/fused.py, the sum and
the norm are rounded to the tensor's dtype, as they are in kernels of their own; mean and variance are taken in two
steps, in float32. The threshold is the same device function as there.
"""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fused import rounded
from .kinds import forged, parameter
from .launch import Plan, dtypes, launch

OTHERS = ("residual", "weight", "bias")  # the kernel's tensors behind x, t, limit and its results
LONGEST = 2**14  # elements of a row that fit into the registers of a block
PER_THREAD = 32  # elements that a thread holds, so that a short row is one warp's, which needs no shared memory
FLOAT32_EPS = torch.finfo(torch.float32).eps


@triton.jit
def mean_of_rows(v, columns):
    # tl.sum by its body: Triton's own functions are not interpreted where these kernels alone are.
    return tl.reduce(v, 1, tl.standard._sum_combine, keep_dims=True) / columns


@triton.jit
def norm_threshold_kernel(
    x_ptr, t_ptr, limit_ptr, y_ptr, raw_ptr, residual_ptr, weight_ptr, bias_ptr, eps, rows, columns: tl.constexpr,
    RULE: tl.constexpr, RMS: tl.constexpr, RAW_SUM: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """A matrix of `rows` x `columns`; a program takes ROWS whole rows.

    Compiled for each number of columns, of which a model has few: then what lies beyond it costs nothing.
    """
    DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = column < columns
    mask = (row < rows) & inside
    offsets = row.to(INDEX) * columns + column

    v = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        v = rounded(v + tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32), DTYPE)
        if RAW_SUM:
            tl.store(raw_ptr + offsets, v.to(DTYPE), mask=mask)
    if not RMS:
        v = tl.where(inside, v - mean_of_rows(v, columns), 0.0)
        v = tl.where(inside, v - mean_of_rows(v, columns), 0.0)  # by what rounding has left of the mean
    variance = mean_of_rows(v * v, columns)
    v = v * tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=inside).to(tl.float32)
        if bias_ptr is not None:
            v = tl.fma(v, weight, tl.load(bias_ptr + column, mask=inside).to(tl.float32))
        else:
            v = v * weight
    elif bias_ptr is not None:
        v = v + tl.load(bias_ptr + column, mask=inside).to(tl.float32)
    v = v.to(DTYPE)
    if not RAW_SUM:
        if raw_ptr is not None:
            tl.store(raw_ptr + offsets, v, mask=mask)
    limit = parameter(limit_ptr, None, None, 1, 0)
    tl.store(y_ptr + offsets, forged(v, tl.load(t_ptr), limit, RULE), mask=mask)


def row_rule(rows: int, columns: int) -> dict:
    """How many rows a program takes, and with how many warps: the kernel's keyword arguments.

    Raises ValueError for rows of more than LONGEST elements.
    """
    if columns > LONGEST:
        raise ValueError(f"norm_threshold: a row of {columns} elements does not fit into registers ({LONGEST} do)")
    across = max(16, triton.next_power_of_2(columns))
    down = max(1, 32 * PER_THREAD // across)  # short rows share a program
    warps = min(16, across * down // (32 * PER_THREAD))
    last = triton.cdiv(rows, down) * down * columns + across  # at least the last offset, idle threads included
    index = tl.int64 if last > 2**31 else tl.int32
    return {"ROWS": down, "COLUMNS": across, "INDEX": index, "num_warps": warps}


def plan(y: Tensor, shape: list[int], eps: float | None, rms: bool, keep: str | None, function: str, **_: Any) -> Plan:
    """For a result as y, and the launcher's arguments by name."""
    columns = math.prod(shape)
    rows = y.numel() // columns
    rule = row_rule(rows, columns)
    numbers = {"eps": FLOAT32_EPS if eps is None else eps, "rows": rows, "columns": columns}
    constants = {"RULE": function, "RMS": rms, "RAW_SUM": keep == "sum"}
    return triton.cdiv(rows, rule["ROWS"]), {**numbers, **constants, **rule}


def launch_norm_threshold(
    x: Tensor,
    t: Tensor,
    shape: list[int],
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-5,
    rms: bool = False,
    keep: str | None = None,
    function: str = "threshold",
    limit: Tensor | None = None,
    channels_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`reference.norm_threshold` in one kernel launch; float16, bfloat16 or float32, rows of up to LONGEST elements.

    What does not lie in memory row by row is copied first.
    """
    if channels_first:
        x, residual = (v if v is None else v.movedim(1, -1) for v in (x, residual))
    x, residual, weight, bias = (v if v is None else v.contiguous() for v in (x, residual, weight, bias))
    y = torch.empty_like(x)
    raw = None if keep is None else torch.empty_like(x)
    if x.numel():
        tensors = (x, t, limit, y, raw, residual, weight, bias)
        decides = eps, rms, keep, function
        key = (x.numel(), *shape, *decides, *dtypes(tensors))
        launch(norm_threshold_kernel, tensors, key, functools.partial(plan, y, shape, *decides))
    return tuple(v.movedim(-1, 1) if channels_first and v is not None else v for v in (y, raw))
