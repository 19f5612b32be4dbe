"""A compiled model is attacked without compilation, where that is the same function.

An attack calls a model in many ways: with and without a gradient, under BPDA, with ever fewer inputs. Each can mean
another compilation, and a compiler that gives up runs something else than what was handed in. Eagerly the model
does what it says. What breaks it there is counted only if the compiled model, asked again, is wrong too.

Not every compiled model is the same function eagerly: `torch.compile(plain, backend="forged", options=...)` is forged
only when compiled. So the logits are compared, on every input; where they differ, the compiled model is attacked.
"""

import sys

import torch
from torch import Tensor, nn

from forged_fx.evaluate.gradients import centred
from forged_fx.modes import eagerly
from forged_fx.torch_internals import compiled_in_place

ROUNDING = 1e-4  # share of the largest logit by which a compiler's arithmetic may differ; in float32 it is about 1e-6


def is_compiled(model: nn.Module) -> bool:
    """Whether it, or a module within, went through `torch.compile` or `Module.compile`."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:  # nothing was compiled in this process
        return False
    parts = model.modules()
    return any(isinstance(part, dynamo.OptimizedModule) or compiled_in_place(part) for part in parts)


class Eager(nn.Module):
    """The model, uncompiled, with everything within."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with eagerly():
            return self.model(x)


def agree(compiled: Tensor, eager: Tensor) -> bool:
    """Whether the logits of both are the same, but for rounding."""
    compiled, eager = centred(compiled), centred(eager)
    return torch.allclose(compiled, eager, rtol=0, atol=ROUNDING * float(eager.abs().max()))
