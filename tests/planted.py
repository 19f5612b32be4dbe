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


def hurry(monkeypatch) -> None:
    """pyautoattack's standard attacks with fewer steps, whoever runs them."""
    standard = AutoAttack._set_version

    def shortened(self, version):
        standard(self, version)
        self.square.n_queries, self.fab.n_iter, self.apgd.n_iter, self.apgd_targeted.n_iter = 100, 10, 25, 25

    monkeypatch.setattr(AutoAttack, "_set_version", shortened)
