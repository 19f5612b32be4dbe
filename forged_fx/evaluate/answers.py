"""What a model answered, and along which gradient, in a few numbers: whether its code is still what it was, its state
being the same."""

import torch
from torch import Tensor, nn

from forged_fx.bpda import callers_gradient_off
from forged_fx.evaluate.blocks import near
from forged_fx.evaluate.compiled import Eager, is_compiled
from forged_fx.evaluate.gradients import Context, Logits, centred, gradient
from forged_fx.evaluate.threat import Threat
from forged_fx.models import device_of

FEW, WAYS = 16, 8  # inputs whose gradient is kept, and along how many directions
TURN = 0.25  # of so many inputs another gradient by so much is another code: rounding to 10 bits turns fewer, and less


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


def slopes(model: nn.Module, x: Tensor, batch_size: int, context: Context) -> Tensor:
    """The gradient of the first few inputs along random directions, always the same: (few, ways) float64."""
    plain = model.module if isinstance(model, nn.DataParallel) else model
    few = x[:FEW].to(device_of(model, x.device))
    with torch.inference_mode(False), callers_gradient_off():
        logits = Logits(Eager(plain) if is_compiled(plain) else plain, batch_size, context)
        uphill = gradient(logits, few).flatten(1).double().nan_to_num(0.0, 0.0, 0.0).cpu()
    ways = torch.randn(uphill.shape[1], WAYS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return uphill @ ways


def same_slopes(before: Tensor, now: Tensor) -> bool:
    """Whether they are, but for what rounding turns: a unit near its kink, an element near its threshold."""
    if before.shape != now.shape:
        return False
    size = torch.maximum(before.norm(dim=1), now.norm(dim=1)).clamp_min(1e-30)
    turned = (before - now).norm(dim=1) / size > TURN
    return bool(turned.double().mean() <= TURN)
