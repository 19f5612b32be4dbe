"""What a model answered, in a few numbers: whether its code is still what it was, its state being the same."""

import torch
from torch import Tensor

from forged_fx.evaluate.blocks import near
from forged_fx.evaluate.gradients import centred
from forged_fx.evaluate.threat import Threat


def summary(logits: Tensor) -> list[float]:
    """Per class, the mean of the `centred` logits (n, classes) and that of their magnitudes: signs may cancel, and
    sizes bound rounding. Then both of what the classes share. What is no finite number counts as 0."""
    logits = logits.double().nan_to_num(0.0, 0.0, 0.0)
    return _means(centred(logits)) + _means(logits.mean(1, keepdim=True))


def _means(values: Tensor) -> list[float]:
    return torch.cat([values.mean(0), values.abs().mean(0)]).tolist()


def moved(x: Tensor, threat: Threat) -> Tensor:
    """The inputs, a step of the ball away, always in the same direction: two models may agree on all that they were
    given, and on what attacks found on one of them."""
    way = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    return threat.step(x, way.to(x.device))


def same(before: list[float], logits: Tensor) -> bool:
    """Whether these logits have that summary, but for rounding. One of an earlier version is of logits as they are."""
    by_class = 2 * logits.shape[1]
    now = summary(logits) if len(before) > by_class else _means(logits.double().nan_to_num(0.0, 0.0, 0.0))
    old, new = torch.tensor(before, dtype=torch.float64), torch.tensor(now, dtype=torch.float64)
    return near(old, new) and near(old[:by_class], new[:by_class])
