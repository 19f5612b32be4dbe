"""The two backwards that an attack may see, and the model as attacks call it.

A hard threshold sends no gradient through what it zeroed: an attack that follows the true gradient does not learn
that these elements matter. BPDA (Athalye, Carlini, Wagner, ICML 2018) keeps the forward and lets the backward
pass as if the threshold were the identity.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

Context = Callable[[], AbstractContextManager]


def straight_through() -> Context:
    """The library's own context: BPDA for every threshold op in any model."""
    from forged_fx.ops import straight_through

    return straight_through


class Logits:
    """A model as attacks call it: float32 logits (n, classes) that they may write into.

    The Square attack does write into the logits, which may be the model's own memory or a view of its input. A
    model that cuts the graph altogether gets a zero gradient, as one that rounds does: autograd would raise.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Tensor:
        logits = self.model(x).float()
        if not torch.is_grad_enabled() or not x.requires_grad:
            return logits.clone()
        return logits if logits.requires_grad else logits + 0 * x.flatten(1).sum(1, keepdim=True)


def differ(model: nn.Module, x: Tensor, bpda: Context, batch_size: int, device: torch.device) -> bool:
    """Does BPDA change any gradient on x at all? If not, its rows would be the true gradient's over again.

    Compared bit for bit, for a random combination of the logits: a loss may saturate, so that both of its
    gradients are 0 and the comparison says nothing.
    """
    logits = Logits(model)
    weights: Tensor | None = None

    def gradient(batch: Tensor) -> Tensor:
        nonlocal weights
        batch = batch.detach().clone().requires_grad_()
        with torch.enable_grad():
            out = logits(batch)
            if weights is None:
                weights = torch.randn(out.shape[1], generator=torch.Generator().manual_seed(0)).to(out)
            (grad,) = torch.autograd.grad(out @ weights, batch, torch.ones_like(out[:, 0]))
        return grad

    for batch in x.split(batch_size):
        batch = batch.to(device)
        true = gradient(batch)
        with bpda():
            through = gradient(batch)
        if not torch.equal(true, through):  # NaN differs from itself: then the rows are run
            return True
    return False
