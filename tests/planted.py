"""Classifiers with a known weakness, and a stand-in for a threshold op whose backward has two modes."""

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

import forged_fx
from forged_fx.digits import train_digits


class _Hide(torch.autograd.Function):
    """The identity; its backward is 0, or the identity while `straight_through` is on when the forward runs."""

    on = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.on = _Hide.on
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad if ctx.on else torch.zeros_like(grad)


@contextmanager
def straight_through() -> Iterator[None]:
    before, _Hide.on = _Hide.on, True
    try:
        yield
    finally:
        _Hide.on = before


class Hidden(nn.Module):
    """`inner` behind a gradient that is 0 unless straight-through."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(_Hide.apply(x))


class Cut(Hidden):
    """`inner` without a graph: no gradient in either mode."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.detach())


class Changed(nn.Module):
    """`after(inner(before(x)))`."""

    def __init__(self, inner: nn.Module, before=lambda x: x, after=lambda logits: logits) -> None:
        super().__init__()
        self.inner, self.before, self.after = inner, before, after
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(self.before(x)))


def loud(inner: nn.Module) -> nn.Module:
    """Logits so large that the cross-entropy and its gradient are 0."""
    return Changed(inner, after=lambda logits: 1e4 * logits)


def quantised(inner: nn.Module) -> nn.Module:
    """Inputs in steps of 1/50: a gradient of 0 almost everywhere."""
    return Changed(inner, before=lambda x: (x * 50).round() / 50)


def randomised(inner: nn.Module) -> nn.Module:
    return Changed(inner, before=lambda x: x + 0.01 * torch.randn_like(x))


def strong_and_weak() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Which quadrant is bright? Read off its mean, or off its mean and a checkerboard that cancels in clean images.

    Margin 0.6. Within eps = 0.1 (Linf) an attack reaches 0.2 of the first model, and 1.16 of the second.
    """
    strong = linear(4, shape=(1, 8, 8))
    quadrant = torch.zeros(4, 8, 8)
    for k in range(4):
        quadrant[k, 4 * (k // 2) : 4 * (k // 2) + 4, 4 * (k % 2) : 4 * (k % 2) + 4] = 1
    checkers = torch.tensor([1.0, -1.0] * 4 + [-1.0, 1.0] * 4).repeat(4).view(8, 8)
    with torch.no_grad():
        strong[1].weight.copy_((quadrant / 16).flatten(1))
        strong[1].bias.zero_()
        weak = copy.deepcopy(strong)
        weak[1].weight += 0.3 * (quadrant * checkers).flatten(1)
    y = torch.arange(24) % 4
    return strong, weak, 0.2 + 0.6 * quadrant[y].unsqueeze(1) + inputs(24, (1, 8, 8), -0.01, 0.01), y


def overshooting(n: int = 24) -> tuple[nn.Module, Tensor, Tensor]:
    """Which quadrant is bright? And a hidden unit that no clean image moves, and that an attack drives far beyond what
    any unit was seen to reach: limiting the second layer's inputs ("3") makes up for it, nothing else does.

    Margin 0.6, of which an attack within 0.1 (Linf) takes 0.2; the unit then reaches 3.3, of which 0.3 go to class 0.
    """
    strong, _, x, y = strong_and_weak()
    checkers = torch.tensor([1.0, -1.0] * 4 + [-1.0, 1.0] * 4).repeat(4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 4)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.cat([strong[1].weight, 0.5 * checkers[None]]))
        model[3].weight.copy_(torch.cat([torch.eye(4), torch.tensor([[0.3], [0.0], [0.0], [0.0]])], 1))
        model[1].bias.copy_(torch.tensor([0, 0, 0, 0, 0.1]))  # so that its ReLU lets a gradient through
        model[3].bias.zero_()
    more = inputs(n, (1, 8, 8), -0.01, 0.01)
    return model, x[torch.arange(n) % len(x)] + more, y[torch.arange(n) % len(y)]


def linear(classes: int = 10, seed: int = 0, shape: tuple[int, ...] = (1, 6, 6)) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        size = int(torch.tensor(shape).prod())
        return nn.Sequential(nn.Flatten(), nn.Linear(size, classes)).eval()


def inputs(n: int, shape: tuple[int, ...] = (1, 6, 6), low: float = 0.2, high: float = 0.8) -> Tensor:
    """Away from the box's walls, so that the ball alone limits an attack."""
    return torch.empty(n, *shape).uniform_(low, high, generator=torch.Generator().manual_seed(1))


def evaluate(model, base=None, *, x, y, eps=0.1, bpda=straight_through, **options):
    return forged_fx.evaluate(model, base=base, x=x, y=y, eps=eps, bpda=bpda, **options)


@functools.cache
def _trained() -> tuple:
    return train_digits(0, epochs=2)


def small() -> tuple[nn.Module, Tensor, Tensor]:
    """A digits CNN of two epochs, and 45 test images: some wrong, some breakable, some not."""
    model, _, _, x, y = _trained()
    return copy.deepcopy(model), x[:45].clone(), y[:45].clone()


def hurry(monkeypatch, queries: int = 100, steps: int = 25) -> None:
    """pyautoattack's standard attacks with fewer steps, whoever runs them."""
    standard = AutoAttack._set_version

    def shortened(self, version):
        standard(self, version)
        self.square.n_queries, self.fab.n_iter = queries, min(steps, 10)
        self.apgd.n_iter = self.apgd_targeted.n_iter = steps

    monkeypatch.setattr(AutoAttack, "_set_version", shortened)
