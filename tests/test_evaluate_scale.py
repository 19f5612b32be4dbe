"""The same outcome whatever the batch size."""

import planted
import pytest
import torch
from planted import Hidden, evaluate, inputs, straight_through
from torch import nn

from forged_fx.evaluate import blocks
from forged_fx.evaluate.gradients import Logits

pytestmark = pytest.mark.usefixtures("single_thread")


class Rowwise(nn.Module):
    """Two layers whose arithmetic for one input is the same, bit for bit, whatever else is in the batch.

    A matrix product is not so: BLAS picks its kernel by the number of rows. Remembers the largest batches.
    """

    def __init__(self, classes=4, features=36, noise=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(12, features, generator=generator) / 6)
        self.second = nn.Parameter(torch.randn(classes, 12, generator=generator))
        self.noise, self.largest, self.largest_with_graph = noise, 0, 0

    def forward(self, x):
        self.largest = max(self.largest, len(x))
        if torch.is_grad_enabled() and x.requires_grad:
            self.largest_with_graph = max(self.largest_with_graph, len(x))
        if self.noise:
            x = x + self.noise * torch.randn_like(x)
        hidden = (x.flatten(1)[:, None] * self.first).sum(-1).relu()
        return (hidden[:, None] * self.second).sum(-1)


@pytest.mark.parametrize("inner", [{}, {"noise": 0.1}])
@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_gradients_in_batches(batch_size, through, inner):
    model, x = Rowwise(**inner), inputs(20)
    context = straight_through if through else Logits(model).context
    weights = torch.randn(20, 4, generator=torch.Generator().manual_seed(2))

    def gradient(size):
        torch.manual_seed(0)
        leaf = x.clone().requires_grad_()
        logits = Logits(Hidden(model), size, context)(leaf)
        after = torch.rand(3)
        (grad,) = torch.autograd.grad(logits, leaf, weights, retain_graph=True)
        assert torch.equal(grad, torch.autograd.grad(logits, leaf, weights)[0])
        return logits, grad, after, torch.rand(3)  # the random numbers: a backward leaves them alone

    whole = gradient(None)
    model.largest = model.largest_with_graph = 0
    parts = gradient(batch_size)
    if not model.noise or batch_size >= 20:
        assert all(map(torch.equal, whole, parts))
    assert bool(parts[1].any()) is through
    assert model.largest_with_graph == model.largest == min(batch_size, 20)


def test_a_random_model_draws_the_same_again():
    """With noise, logits and gradient belong together only if the backward's forward draws the forward's noise."""
    model, x = Rowwise(noise=0.5), inputs(20)
    leaf = x.clone().requires_grad_()
    torch.manual_seed(0)
    logits = Logits(model, 7)(leaf)
    (grad,) = torch.autograd.grad(logits.sum(), leaf)
    torch.manual_seed(0)
    for part, its_logits, its_grad in zip(x.split(7), logits.split(7), grad.split(7), strict=True):
        leaf = part.clone().requires_grad_()
        expected = model(leaf)
        assert torch.equal(expected, its_logits)
        assert torch.equal(torch.autograd.grad(expected.sum(), leaf)[0], its_grad)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_any_batch_size_has_the_same_outcome(batch_size, monkeypatch):
    planted.hurry(monkeypatch)
    monkeypatch.setattr(blocks, "BLOCK", 10)
    model, x = Rowwise(), inputs(21)
    y = model(x).argmax(1)
    y[::9] = (y[::9] + 1) % 4
    call = {"x": x, "y": y, "eps": 0.05, "attacks": ["apgd-ce", "fab-t", "square"]}
    expected = evaluate(Hidden(model), model, **call)
    model.largest_with_graph = 0
    result = evaluate(Hidden(model), model, **call, batch_size=batch_size)
    assert model.largest_with_graph == min(batch_size, 10)
    assert 5 < len(expected.model.broken) < 20
    for ours, theirs in zip(result.sides, expected.sides, strict=True):
        assert torch.equal(ours.broken_by, theirs.broken_by)
        assert torch.equal(ours.examples, theirs.examples)
