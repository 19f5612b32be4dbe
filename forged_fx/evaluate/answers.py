"""What a model answered, in a few numbers: whether its code is still what it was, its state being the same."""

import torch
from torch import Tensor

from forged_fx.evaluate.blocks import ROUNDING
from forged_fx.evaluate.threat import Threat


def summary(logits: Tensor) -> list[float]:
    """Per class, the mean of the logits (n, classes) and that of their magnitudes: signs may cancel, and sizes bound
    rounding. What is no finite number counts as 0."""
    logits = logits.double().nan_to_num(0.0, 0.0, 0.0)
    return torch.cat([logits.mean(0), logits.abs().mean(0)]).tolist()


def moved(x: Tensor, threat: Threat) -> Tensor:
    """The inputs, a step of the ball away, always in the same direction: two models may agree on all that they were
    given, and on what attacks found on one of them."""
    way = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    return threat.step(x, way.to(x.device))


def same(before: list[float], now: list[float]) -> bool:
    """Whether they are, but for rounding."""
    old, new = torch.tensor(before, dtype=torch.float64), torch.tensor(now, dtype=torch.float64)
    return old.shape == new.shape and bool(((old - new).abs() <= ROUNDING * old.abs().max()).all())
