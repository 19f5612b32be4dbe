"""The forged functions on a CPU, as plain torch: one pass over memory where torch has one, else the reference."""

import functools

import torch
from torch import Tensor

from forged_fx.kernels import reference


def threshold(x: Tensor, t: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.hardshrink(x, largest_below(t.item(), x.dtype), out=torch.empty_like(x) if out is None else out)


def threshold_backward(grad: Tensor, x: Tensor, t: Tensor) -> Tensor:
    # hardshrink_backward would be one pass, but it zeroes the gradient where x is NaN.
    magnitude = torch.abs(x, out=torch.empty_like(x))
    limit = largest_below(t.item(), x.dtype)
    return torch.ops.aten.threshold_backward.grad_input(grad, magnitude, limit, grad_input=magnitude)


def one_sided(x: Tensor, t: Tensor) -> Tensor:
    limit, result = largest_below(t.item(), x.dtype), torch.empty_like(x)
    return result.copy_(x) if limit < 0 else torch.ops.aten.threshold.out(x, limit, 0, out=result)


def one_sided_backward(grad: Tensor, x: Tensor, t: Tensor) -> Tensor:
    limit, result = largest_below(t.item(), x.dtype), torch.empty_like(x)
    if limit < 0:
        return result.copy_(grad)
    return torch.ops.aten.threshold_backward.grad_input(grad, x, limit, grad_input=result)


def shifted(x: Tensor, t: Tensor) -> Tensor:
    wide = reference.comparison_dtype(x.dtype)
    if x.dtype != wide or not _positive(t, x):  # a difference that is rounded twice
        return reference.shifted(x, t)
    return torch.sub(x, t.to(wide), out=torch.empty_like(x)).relu_()


def soft(x: Tensor, t: Tensor) -> Tensor:
    wide = reference.comparison_dtype(x.dtype)
    if x.dtype != wide or not _positive(t, x):
        return reference.soft(x, t)
    t = t.to(wide).item()  # softshrink would be one pass, but it leaves -0.0 where it drops
    inside = torch.clamp(x, -t, t, out=torch.empty_like(x))
    return torch.sub(x, inside, out=inside)


def clamp(x: Tensor, limit: Tensor) -> Tensor:
    if not _positive(limit, x):
        return reference.clamp(x, limit)
    end = limit.to(reference.comparison_dtype(x.dtype)).to(x.dtype).item()  # what lies beyond it rounds to it
    return torch.clamp(x, -end, end, out=torch.empty_like(x))


def clamp_backward(grad: Tensor, x: Tensor, limit: Tensor) -> Tensor:
    if not _positive(limit, x):
        return reference.clamp_backward(grad, x, limit)
    # hardtanh_backward would be one pass, but it zeroes the gradient where x is NaN.
    negative = torch.copysign(x, -1.0, out=torch.empty_like(x))
    beyond = smallest_above(limit.item(), x.dtype)
    return torch.ops.aten.threshold_backward.grad_input(grad, negative, -beyond, grad_input=negative)


def band(x: Tensor, t: Tensor, limit: Tensor) -> Tensor:
    if not _positive(limit, x):
        return reference.band(x, t, limit)
    kept = threshold(x, t)
    end = limit.to(reference.comparison_dtype(x.dtype)).to(x.dtype).item()
    return kept.clamp_(-end, end)


def band_backward(grad: Tensor, x: Tensor, t: Tensor, limit: Tensor) -> Tensor:
    return clamp_backward(threshold_backward(grad, x, t), x, limit)


def _positive(t: Tensor, x: Tensor) -> bool:
    """Whether a parameter is above 0 in the dtype of the comparison, which a float64 next to 0 is not in float32."""
    return bool(t.to(reference.comparison_dtype(x.dtype)) > 0)


@functools.lru_cache(maxsize=4096)
def largest_below(t: float, dtype: torch.dtype) -> float:
    """The largest value of `dtype` below t; -1 where no magnitude is (t <= 0, or NaN).

    torch's one-pass functions compare by `<=`, in x's dtype, and `|x| < t` is `|x| <= largest_below(t)`.
    """
    limit = torch.tensor(t, dtype=reference.comparison_dtype(dtype), device="cpu")
    if not limit > 0:
        return -1.0
    below = limit.to(dtype)  # to nearest: it may be above the limit as well as on it
    if below.to(limit.dtype) >= limit:
        below = torch.nextafter(below, torch.zeros_like(below))
    return below.item()


@functools.lru_cache(maxsize=4096)
def smallest_above(limit: float, dtype: torch.dtype) -> float:
    """The smallest value of `dtype` above the limit; NaN, which nothing equals, where there is none."""
    wide = torch.tensor(limit, dtype=reference.comparison_dtype(dtype), device="cpu")
    above = wide.to(dtype)
    if above.to(wide.dtype) <= wide:
        infinity = torch.full_like(above, torch.inf)
        above = torch.nextafter(above, infinity) if above < infinity else infinity * 0
    return above.item()
