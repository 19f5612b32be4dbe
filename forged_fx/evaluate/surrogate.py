"""BPDA with a smooth surrogate: the threshold's forward, and the backward of a gate that opens gradually.

The straight-through gradient calls a threshold the identity, which is right far above it and wrong below. Between the
two lies `x * sigmoid((|x| - t) / (T t))`: as the temperature T falls it becomes the threshold itself, as T rises half
the identity. Athalye, Carlini and Wagner (ICML 2018, section 4.1) let the backward be that of any function that is
close to the forward; no single choice is best for every model, so several temperatures are tried.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

TEMPERATURES = (1.0, 0.3, 0.1)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(x, t)
        ctx.temperature = temperature
        return torch.ops.forged_fx.threshold(x, t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, t = ctx.saved_tensors
        return grad * slope(x, t, ctx.temperature), None, None


def slope(x: Tensor, t: Tensor, temperature: float) -> Tensor:
    """d/dx of x * sigmoid((|x| - t) / (temperature * t)), in x's shape and dtype; 1 where t is 0: nothing is cut."""
    magnitude, width = x.abs(), (temperature * t).to(x.dtype)
    gate = torch.sigmoid((magnitude - t) / width)
    return torch.where(t > 0, gate + magnitude / width * gate * (1 - gate), 1).to(x.dtype)


class smooth(TorchFunctionMode):
    """A context manager, as `forged_fx.straight_through`: within it, thresholds have the gradient of the smooth gate.
    For eager models; values stay as they are."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from forged_fx.ops import DECOMPOSITIONS, THRESHOLD_OPS

        kwargs = kwargs or {}
        if func in (torch.ops.forged_fx.threshold, torch.ops.forged_fx.threshold.default):
            return _Gate.apply(*args[:2], self.temperature)
        if func in THRESHOLD_OPS:  # a producer and its threshold: their chain, which comes here for the threshold
            with self:
                return DECOMPOSITIONS[getattr(func, "default", func)](*args, **kwargs)
        return func(*args, **kwargs)
