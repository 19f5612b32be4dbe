"""The specification: plain torch for every kernel in this folder.

Tests and benchmarks compare with it, bit for bit and stride for stride.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# ---- forged functions: what is dropped, what takes its place, and what becomes of the rest
#
# To add one: a rule here, and a row in `RULES`; docs/extending.md has what else belongs to it.
#
# The gradient is 0 where a value is dropped and 1 where it is kept, and nothing else (`_backward`, every kernel,
# Inductor's code). So what takes a value's place may not depend on x but by its sign, and what is kept is x, or x and
# something that does not depend on x but by its sign. `test_the_gradient_is_the_slope` tries every row.
#
# On values in the dtype of the comparison. `o` has the elementwise functions: torch, or Inductor's own, so that
# compiled code is generated from the specification itself. NaN is never dropped, and a parameter that is not above 0 (a
# limit that is infinite) drops nothing and changes nothing.


def _signed(o: Any, x: Any, magnitude: Any) -> Any:
    return o.where(o.lt(x, 0), o.neg(magnitude), magnitude)


def _threshold(o: Any, x: Any, t: Any) -> tuple:
    """`0 where |x| < t, else x`."""
    return o.lt(o.abs(x), t), 0, x


def _one_sided(o: Any, x: Any, t: Any) -> tuple:
    """`0 where x < t, else x`, for t > 0; the identity for any other t."""
    return o.logical_and(o.lt(x, t), o.gt(t, 0)), 0, x


def _shifted(o: Any, x: Any, t: Any) -> tuple:
    """The shifted ReLU `max(x - t, 0)`, for t > 0: `0 where x < t, else x - t`; the identity for any other t.

    The difference is taken in the dtype of the comparison and rounded to x's.
    """
    dropped, zero, _ = _one_sided(o, x, t)
    return dropped, zero, o.where(o.gt(t, 0), o.sub(x, t), x)


def _soft(o: Any, x: Any, t: Any) -> tuple:
    """Soft thresholding `sign(x) max(|x| - t, 0)` (Donoho 1995), for t > 0; the identity for any other t.

    The difference is taken in the dtype of the comparison and rounded to x's.
    """
    dropped, zero, _ = _threshold(o, x, t)
    return dropped, zero, o.where(o.gt(t, 0), o.sub(x, _signed(o, x, t)), x)


def _clamp(o: Any, x: Any, limit: Any) -> tuple:
    """`limit, with x's sign, where |x| > limit, else x`; limit = inf is the identity. The limit is rounded to x's
    dtype."""
    return o.gt(o.abs(x), limit), _signed(o, x, limit), x


def _band(o: Any, x: Any, t: Any, limit: Any) -> tuple:
    """`0 where |x| < t; limit, with x's sign, where |x| > limit; else x`."""
    (small, zero, _), (large, end, _) = _threshold(o, x, t), _clamp(o, x, limit)
    return o.logical_or(small, large), o.where(small, zero, end), x


def _mean(o: Any, x: Any, mean: Any, width: Any) -> tuple:
    """`mean where |x - mean| <= width, else x`, for width > 0; the identity for any other width."""
    return o.logical_and(o.le(o.abs(o.sub(x, mean)), width), o.gt(width, 0)), mean, x


RULES: dict[str, Callable[..., tuple]] = {
    "threshold": _threshold,
    "one_sided": _one_sided,
    "shifted": _shifted,
    "soft": _soft,
    "clamp": _clamp,
    "band": _band,
    "mean": _mean,
}


def __getattr__(name: str) -> Callable[..., Tensor]:
    """`<rule>` and `<rule>_backward` of the rows without functions of their own below: those of one with scalars. What
    `threshold` says of layouts and dtypes holds for them, too."""
    for run, rule in ((_forward, name), (_backward, name.removesuffix("_backward"))):
        if rule in RULES:
            globals()[name] = functools.partial(run, rule)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def threshold(x: Tensor, t: Tensor) -> Tensor:
    """The forged function: `0 where |x| < t, else x` (section 3 of arXiv 2406.19622).

    Written this way round so that NaN passes through, and so that t = 0 is the identity bit for bit, -0.0
    included. Values that are dropped become +0.0.

    x: floating point, any shape and layout.
    t: floating-point scalar (0-dim), on x's device.
    Returns a new tensor of x's shape and dtype, with the strides of `torch.empty_like(x)`.
    """
    return _forward("threshold", x, t)


def threshold_backward(grad: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The true gradient of `threshold`: `0 where |x| < t, else grad`.

    grad: x's shape, dtype and device; its strides may be others. The rest is as in `threshold`.
    """
    return _backward("threshold", grad, x, t)


def mean(x: Tensor, mean: Tensor, width: Tensor, channel: int) -> Tensor:
    """MeanSparse (Amini et al., arXiv 2406.05927): per channel, `mean where |x - mean| <= width, else x`.

    mean, width: floating point, an element for each of the channels, which lie along x's dimension `channel`. A channel
    whose width is not above 0 stays as it is, bit for bit. The mean is rounded to x's dtype. Else as `threshold`.
    """
    return _forward("mean", x, *(per_channel(p, x, channel) for p in (mean, width)))


def mean_backward(grad: Tensor, x: Tensor, mean: Tensor, width: Tensor, channel: int) -> Tensor:
    """`0 where |x - mean| <= width, else grad`, in channels of a width above 0; else grad."""
    return _backward("mean", grad, x, *(per_channel(p, x, channel) for p in (mean, width)))


def per_channel(parameter: Tensor, x: Tensor, channel: int) -> Tensor:
    """A 1-dim parameter in a shape that broadcasts along x's dimension `channel`."""
    return parameter.reshape([-1 if d == channel % x.dim() else 1 for d in range(x.dim())])


def comparison_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the comparison, for x's dtype: wide, so that every implementation decides alike on every element."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _forward(name: str, x: Tensor, *parameters: Tensor) -> Tensor:
    dropped, instead, kept = _decide(name, x, parameters)
    return torch.empty_like(x).copy_(torch.where(dropped, instead, kept))


def _backward(name: str, grad: Tensor, x: Tensor, *parameters: Tensor) -> Tensor:
    dropped, _, _ = _decide(name, x, parameters)
    return torch.empty_like(x).copy_(torch.where(dropped, 0, grad))


def _decide(name: str, x: Tensor, parameters: tuple[Tensor, ...]) -> tuple:
    wide = comparison_dtype(x.dtype)
    return RULES[name](torch, x.to(wide), *(p.to(wide) for p in parameters))


# ---- a producer and the threshold behind it

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
    function: str = "threshold",
    limit: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`x -> affine -> add -> activation -> threshold`; each step in float32, and rounded to x's dtype.

    The affine map has one parameter per channel, 1-dim tensors of x.shape[channel] elements of any floating dtype.
    With mean and var, both or neither, it is a BatchNorm in eval mode, rounded once,
    `(x - mean) * (weight / sqrt(var + eps)) + bias`; without them a product and a sum, each rounded. What is None is
    left out.

    residual: of x's shape and dtype, added behind the affine map, or ahead of it (add_first).
    activation: a key of `ACTIVATIONS`; gelu is the exact one, by erf, gelu_tanh its approximation.
    keep: the second result: None, "value", what the threshold is given, or "sum", what add_first adds up to.
    function: what stands in the threshold's place, a key of `RULES` but "mean"; t is its first parameter, limit the
        second one of "band".
    Returns two new tensors of x's shape and dtype, with the strides of `torch.empty_like(x)`; the second may be None.
    """
    wide = comparison_dtype(x.dtype)

    def rounded(v: Tensor) -> Tensor:
        return v.to(x.dtype).to(wide)

    def of_channel(parameter: Tensor) -> Tensor:
        return per_channel(parameter.to(wide), x, channel)

    v = x.to(wide)
    if residual is not None and add_first:
        v = rounded(v + residual)
    kept = v
    if mean is not None:
        scale = (1 if weight is None else of_channel(weight)) / _sqrt(of_channel(var) + eps)
        v = rounded(_fma(v - of_channel(mean), scale, None if bias is None else of_channel(bias)))
    else:
        v = v if weight is None else rounded(v * of_channel(weight))
        v = v if bias is None else rounded(v + of_channel(bias))
    if residual is not None and not add_first:
        v = rounded(v + residual)
    v = rounded(ACTIVATIONS[activation](v))
    return _results(x, v, {None: None, "value": v, "sum": kept}[keep], function, t, limit)


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
    function: str = "threshold",
    limit: Tensor | None = None,
    channels_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`x -> add -> LayerNorm or RMSNorm -> threshold`, in float32; the sum and the norm are rounded to x's dtype.

    Over the last dimensions, which are `shape`: `(x - mean) / sqrt(variance + eps) * weight + bias`, and with rms
    (Zhang and Sennrich 2019, arXiv 1910.07467) `x / sqrt(mean of squares + eps) * weight`; eps=None is float32's.

    residual: of x's shape and dtype. weight, bias: of the shape `shape`. keep, function, limit: as in
    `elementwise_threshold`. channels_first: the norm is over dimension 1 instead (a LayerNorm2d).
    Returns two new tensors of x's shape and dtype, contiguous but that dimension 1 lies innermost with channels_first;
    the second may be None.
    """
    if channels_first:
        x, residual = (v if v is None else v.movedim(1, -1) for v in (x, residual))
        results = norm_threshold(x, t, shape, residual, weight, bias, eps, rms, keep, function, limit)
        return tuple(v if v is None else v.movedim(-1, 1) for v in results)
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
    return _results(x, v, {None: None, "value": v, "sum": kept}[keep], function, t, limit)


def _fma(a: Tensor, b: Tensor, c: Tensor | None) -> Tensor:
    """a * b + c, rounded once (for float32: float64 holds the product exactly)."""
    return a * b if c is None else (a.double() * b.double() + c.double()).to(a.dtype)


def _sqrt(v: Tensor) -> Tensor:
    """Rounded correctly, which torch.sqrt of a float32 tensor on the CPU is not always."""
    return torch.sqrt(v.double()).to(v.dtype)


def _results(
    x: Tensor, v: Tensor, kept: Tensor | None, function: str, *parameters: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """In x's dtype and layout: the value behind the forged function, and the one that is kept."""
    y = _forward(function, torch.empty_like(x).copy_(v), *(p for p in parameters if p is not None))
    return y, None if kept is None else torch.empty_like(x).copy_(kept)
