"""scikit-learn's handwritten digits (8x8, real scans) and a small CNN trained against an attack on them."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from forged_fx.extras import need
from forged_fx.progress import track

EPS = 0.15  # Linf, of pixels in [0, 1]
TEST = 200  # images kept for testing, of 1,797
SHAPE = (1, 8, 8)  # of one image


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_train (1597, 1, 8, 8), y_train, x_test (200, 1, 8, 8), y_test; x float32 in [0, 1], y int64.

    The split is the same on every machine. ImportError: `pip install forged_fx[demo]`.
    """
    digits = need("sklearn.datasets", "demo").load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x = torch.from_numpy(digits.images[order]).float().div(16).unsqueeze(1)
    y = torch.from_numpy(digits.target[order]).long()
    return x[TEST:], y[TEST:], x[:TEST], y[:TEST]


def cnn() -> nn.Sequential:
    """An untrained network: (n, 1, 8, 8) -> logits (n, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip


def pgd(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, step: float) -> Tensor:
    """Inputs in the Linf ball of radius `eps` around x and in [0, 1] that raise the loss; same shape as x."""
    adv = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(steps):
        adv.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(adv), y), adv)
        adv = (adv.detach() + step * grad.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    return adv


def train_digits(seed: int, epochs: int = 12) -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """A CNN trained on PGD examples (Madry et al. 2018) in some five seconds; in eval mode, and its data: `load`.

    Twelve epochs leave it right on about 97 % of the test images and on 60 % of them in the worst case at `EPS`.
    """
    x, y, x_test, y_test = load()
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(seed)
        model = cnn()
        steps = epochs * -(-len(x) // 64)
        optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
        for _ in track(range(epochs), "training"):
            for batch in torch.randperm(len(x)).split(64):
                adv = pgd(model, x[batch], y[batch], EPS, steps=7, step=EPS / 4)
                optimiser.zero_grad(set_to_none=True)
                F.cross_entropy(model(adv), y[batch]).backward()
                optimiser.step()
                schedule.step()
    model.zero_grad(set_to_none=True)
    return model.eval(), x, y, x_test, y_test


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch on one CPU thread within: work this small is not worth sharing.

    On two busy cores a second thread makes it ten times slower, as each waits for the other at every operation. And
    sums are taken in one order, so that the outcome does not depend on the number of cores.
    """
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(was)
