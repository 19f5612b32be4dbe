"""Attacks whose examples are made on one model to be shown to another.

Autoattack's examples stop where they first fool the model that they were made on, and fit it alone. These two keep on
and fit it less, so that they transfer better. Each gives the last iterate, fooling or not.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from forged_fx.evaluate.gradients import loss_gradient

MOMENTUM_STEPS = 10  # Dong et al.: 10 steps of eps / 10, decay 1
DIVERSE_STEPS = 20  # Xie et al.: 1.25 eps in all, in steps of 1/255 (18 at eps = 15/255)
SHRINK = 0.9  # a diverse input has at least this share of each side; the rest is zeros
DIVERSE_RATE = 0.5


def mi_fgsm(tools: Any, x: Tensor, y: Tensor) -> Tensor:
    """MI-FGSM: Dong, Liao, Pang, Su, Zhu, Hu, Li, Boosting adversarial attacks with momentum, CVPR 2018, sections 3.1
    (Linf) and 3.3 (L2)."""
    step, adv, velocity = tools.epsilon / MOMENTUM_STEPS, x, torch.zeros_like(x)
    for _ in range(MOMENTUM_STEPS):
        grad = loss_gradient(tools.model, adv, y)
        velocity = velocity + grad / _length(grad, 1)
        adv = _climb(tools, x, adv, velocity, step)
    return adv


def di_fgsm(tools: Any, x: Tensor, y: Tensor) -> Tensor:
    """DI2-FGSM: Xie, Zhang, Zhou, Bai, Wang, Ren, Yuille, Improving transferability of adversarial examples with input
    diversity, CVPR 2019, section 3.3. Inputs shrink instead of growing, as a model may take one size only."""
    torch.manual_seed(tools.get_seed())
    step, adv = 1.25 * tools.epsilon / DIVERSE_STEPS, x
    for _ in range(DIVERSE_STEPS):
        adv = _climb(tools, x, adv, loss_gradient(lambda at: tools.model(_diverse(at)), adv, y), step)
    return adv


def _diverse(x: Tensor) -> Tensor:
    """With probability `DIVERSE_RATE` the batch, smaller and somewhere within zeros; else as it is."""
    if torch.rand(()).item() >= DIVERSE_RATE:
        return x
    height, width = x.shape[-2:]
    share = SHRINK + (1 - SHRINK) * torch.rand(()).item()
    small = (round(share * height), round(share * width))
    top, left = (int(torch.randint(whole - part + 1, ())) for whole, part in zip((height, width), small, strict=True))
    inner = F.interpolate(x, size=small, mode="nearest")
    return F.pad(inner, (left, width - small[1] - left, top, height - small[0] - top))


def _length(delta: Tensor, p: int) -> Tensor:
    """Of each row, shaped to divide it; never 0."""
    return delta.flatten(1).norm(p, dim=1).clamp_min(1e-30).view(-1, *[1] * (delta.dim() - 1))


def _climb(tools: Any, x: Tensor, adv: Tensor, direction: Tensor, step: float) -> Tensor:
    """A step of the ball's own steepest ascent, and back into the ball and the box."""
    if tools.norm == "Linf":
        adv = adv + step * direction.sign()
        return adv.clamp(x - tools.epsilon, x + tools.epsilon).clamp(0, 1)
    delta = adv + step * direction / _length(direction, 2) - x
    return (x + delta * (tools.epsilon / _length(delta, 2)).clamp_max(1)).clamp(0, 1)
