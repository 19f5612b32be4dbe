"""The specification: plain torch for every kernel in this folder.

Tests and benchmarks compare with it, bit for bit and stride for stride.
"""

import torch
from torch import Tensor


def threshold(x: Tensor, t: Tensor) -> Tensor:
    """The forged function: `0 where |x| < t, else x` (section 3 of arXiv 2406.19622).

    Written this way round so that NaN passes through, and so that t = 0 is the identity bit for bit, -0.0
    included. Values that are dropped become +0.0.

    x: floating point, any shape and layout.
    t: floating-point scalar (0-dim), on x's device.
    Returns a new tensor of x's shape and dtype, with the strides of `torch.empty_like(x)`.
    """
    return _where_kept(x, x, t)


def threshold_backward(grad: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The true gradient of `threshold`: `0 where |x| < t, else grad`.

    grad: x's shape, dtype and device; its strides may be others. The rest is as in `threshold`.
    """
    return _where_kept(grad, x, t)


def comparison_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the comparison, for x's dtype: wide, so that every implementation decides alike on every element."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _where_kept(value: Tensor, x: Tensor, t: Tensor) -> Tensor:
    wide = comparison_dtype(x.dtype)
    dropped = x.to(wide).abs() < t.to(wide)
    return torch.empty_like(x).copy_(torch.where(dropped, 0, value))
