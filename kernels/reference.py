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


ACTIVATIONS = {
    "none": lambda v: v,
    "relu": lambda v: torch.where(v < 0, 0, v),
    "relu6": lambda v: torch.where(v < 0, 0, torch.where(v > 6, 6, v)),
    "gelu": lambda v: v * 0.5 * (1 + torch.erf(v * 0.5**0.5)),
    "gelu_tanh": lambda v: v * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (v + 0.044715 * v**3)),
    "silu": lambda v: v / (1 + torch.exp(-v)),
    "hardswish": lambda v: v * ((v + 3).clamp(0, 6) / 6),
}


def elementwise_threshold(
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
) -> tuple[Tensor, Tensor | None]:
    """`x -> affine -> add -> activation -> threshold`; each step in float32, and rounded to x's dtype.

    The affine map has one parameter per channel, 1-dim tensors of x.shape[channel] elements of any floating dtype.
    With mean and var, both or neither, it is a BatchNorm in eval mode, rounded once,
    `(x - mean) * (weight / sqrt(var + eps)) + bias`; without them a product and a sum, each rounded. What is None is
    left out.

    residual: of x's shape and dtype, added behind the affine map, or ahead of it (add_first).
    activation: a key of `ACTIVATIONS`; gelu is the exact one, by erf, gelu_tanh its approximation.
    keep: the second result: None, "value", what the threshold is given, or "sum", what add_first adds up to.
    Returns two new tensors of x's shape and dtype, with the strides of `torch.empty_like(x)`; the second may be None.
    """
    wide = comparison_dtype(x.dtype)

    def rounded(v: Tensor) -> Tensor:
        return v.to(x.dtype).to(wide)

    def per_channel(parameter: Tensor) -> Tensor:
        return parameter.to(wide).reshape([-1 if d == channel % x.dim() else 1 for d in range(x.dim())])

    v = x.to(wide)
    if residual is not None and add_first:
        v = rounded(v + residual)
    kept = v
    if mean is not None:
        scale = (1 if weight is None else per_channel(weight)) / _sqrt(per_channel(var) + eps)
        v = rounded(_fma(v - per_channel(mean), scale, None if bias is None else per_channel(bias)))
    else:
        v = v if weight is None else rounded(v * per_channel(weight))
        v = v if bias is None else rounded(v + per_channel(bias))
    if residual is not None and not add_first:
        v = rounded(v + residual)
    v = rounded(ACTIVATIONS[activation](v))
    return _results(x, v, t, {None: None, "value": v, "sum": kept}[keep])


def norm_threshold(
    x: Tensor,
    t: Tensor,
    shape: list[int],
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-5,
    rms: bool = False,
    keep: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`x -> add -> LayerNorm or RMSNorm -> threshold`, in float32; the sum and the norm are rounded to x's dtype.

    Over the last dimensions, which are `shape`: `(x - mean) / sqrt(variance + eps) * weight + bias`, and with rms
    (Zhang and Sennrich 2019, arXiv 1910.07467) `x / sqrt(mean of squares + eps) * weight`; eps=None is float32's.

    residual: of x's shape and dtype. weight, bias: of the shape `shape`. keep: as in `elementwise_threshold`.
    Returns two new contiguous tensors of x's shape and dtype; the second may be None.
    """
    wide = comparison_dtype(x.dtype)
    x = x.contiguous()
    v = x.to(wide)
    if residual is not None:
        v = (v + residual).to(x.dtype).to(wide)
    kept = v
    over = tuple(range(-len(shape), 0))
    if not rms:
        v = v - v.mean(over, keepdim=True)
        v = v - v.mean(over, keepdim=True)  # by what rounding has left of the mean
    variance = (v * v).mean(over, keepdim=True)
    v = v * (1 / _sqrt(variance + (torch.finfo(wide).eps if eps is None else eps)))
    if weight is not None:
        v = _fma(v, weight.to(wide), None if bias is None else bias.to(wide))
    elif bias is not None:
        v = v + bias.to(wide)
    return _results(x, v, t, {None: None, "value": v, "sum": kept}[keep])


def _fma(a: Tensor, b: Tensor, c: Tensor | None) -> Tensor:
    """a * b + c, rounded once (for float32: float64 holds the product exactly)."""
    return a * b if c is None else (a.double() * b.double() + c.double()).to(a.dtype)


def _sqrt(v: Tensor) -> Tensor:
    """Rounded correctly, which torch.sqrt of a float32 tensor on the CPU is not always."""
    return torch.sqrt(v.double()).to(v.dtype)


def _results(x: Tensor, v: Tensor, t: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """In x's dtype and layout: the value behind the threshold, and the one that is kept."""
    y = threshold(torch.empty_like(x).copy_(v), t)
    return y, None if kept is None else torch.empty_like(x).copy_(kept)


def comparison_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the comparison, for x's dtype: wide, so that every implementation decides alike on every element."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _where_kept(value: Tensor, x: Tensor, t: Tensor) -> Tensor:
    wide = comparison_dtype(x.dtype)
    dropped = x.to(wide).abs() < t.to(wide)
    return torch.empty_like(x).copy_(torch.where(dropped, 0, value))
