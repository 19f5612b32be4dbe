"""BPDA with a smooth surrogate: a forged function's forward, and the backward of one that changes gradually.

The straight-through gradient calls a threshold the identity, which is right far above it and wrong below. Between the
two lies `x * sigmoid((|x| - t) / (T t))`: as the temperature T falls it becomes the threshold itself, as T rises half
the identity. In the same way a limit's slope falls as `sigmoid((limit - |x|) / (T limit))`, where the clamp's own
gradient ends at once. Athalye, Carlini and Wagner (ICML 2018, section 4.1) let the backward be that of any function
that is close to the forward; no single choice is best for every model, so several temperatures are tried.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from forged_fx.bpda import Backward
from forged_fx.kernels.reference import per_channel
from forged_fx.ops import BY_OPERATOR, DECOMPOSITIONS, THRESHOLD_OPS, Function

TEMPERATURES = (1.0, 0.3, 0.1)


def slope(x: Tensor, t: Tensor, temperature: float) -> Tensor:
    """d/dx of x * sigmoid((|x| - t) / (temperature * t)), in x's shape; 1 where t is 0: nothing is cut."""
    return _gated(x.abs(), t, temperature)


def _gated(magnitude: Tensor, t: Tensor, temperature: float) -> Tensor:
    """d/dx of x * sigmoid((magnitude - t) / (temperature * t)), where the magnitude is |x|, or x itself."""
    width = temperature * t
    gate = torch.sigmoid((magnitude - t) / width)
    return torch.where(t > 0, gate + magnitude / width * gate * (1 - gate), 1)


def _opening(magnitude: Tensor, t: Tensor, temperature: float) -> Tensor:
    """A slope that rises from 0 below t to 1 above: of a function that is shifted by t rather than cut there."""
    return torch.where(t > 0, torch.sigmoid((magnitude - t) / (temperature * t)), 1)


def _closing(x: Tensor, limit: Tensor, temperature: float) -> Tensor:
    """A slope that falls from 1 below the limit to 0 above."""
    return torch.where(limit < torch.inf, torch.sigmoid((limit - x.abs()) / (temperature * limit)), 1)


# Function of forged_fx/ops.py -> the slope of its smooth surrogate, from x, its parameters and the temperature.
SLOPES: dict[str, Callable[..., Tensor]] = {
    "threshold": slope,
    "one_sided": _gated,
    "shifted": _opening,
    "soft": lambda x, t, temperature: _opening(x.abs(), t, temperature),
    "clamp": _closing,
    "band": lambda x, t, limit, temperature: slope(x, t, temperature) * _closing(x, limit, temperature),
    "mean": lambda x, mean, width, temperature: slope(x - mean, width, temperature),
}


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Function, temperature: float, *arguments: Any) -> Tensor:
        parameters = [p for p in arguments if isinstance(p, Tensor)]
        if function.channels:
            parameters = [per_channel(p, x, arguments[-1]) for p in parameters]
        ctx.save_for_backward(x, *parameters)
        ctx.name, ctx.temperature = function.name, temperature
        return function.op(x, *arguments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, *parameters = ctx.saved_tensors
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # in float16 a small threshold's width rounds to 0
        slopes = SLOPES[ctx.name](wide, *parameters, ctx.temperature).to(x.dtype)
        return grad * slopes, *(None,) * (len(ctx.needs_input_grad) - 1)


class smooth(Backward):
    """A context manager, as `forged_fx.straight_through`: within it, forged functions have the gradient of their smooth
    surrogates. For eager models; values stay as they are."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in THRESHOLD_OPS:
            return func(*args, **kwargs)
        op: Any = getattr(func, "default", func)
        if op in DECOMPOSITIONS:  # a producer and its threshold: their chain, which comes here for the threshold
            with self:
                return DECOMPOSITIONS[op](*args, **kwargs)
        function = BY_OPERATOR[op]
        return _Gate.apply(args[0], function, self.temperature, *args[1 : 1 + function.arguments])
