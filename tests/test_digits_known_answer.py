"""Forging seems to make three small digits networks more robust, and does not: known before this library began.

Attacked with the true gradient, complete AutoAttack finds 9 to 12 of 200 images fewer than on the base. BPDA finds
them all. An evaluator that does not show both is wrong.
"""

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import forged_fx
from forged_fx.digits import EPS, train_digits

RATIO = 2**-7


pytestmark = pytest.mark.usefixtures("single_thread")


class _Cut(torch.autograd.Function):
    through = False

    @staticmethod
    def forward(ctx, x, t):
        keep = ~(x.abs() < t)
        ctx.save_for_backward(keep)
        ctx.through = _Cut.through
        return torch.where(keep, x, 0.0)

    @staticmethod
    def backward(ctx, grad):
        (keep,) = ctx.saved_tensors
        return (grad if ctx.through else grad * keep), None


@contextmanager
def through():
    before, _Cut.through = _Cut.through, True
    try:
        yield
    finally:
        _Cut.through = before


def forged_by_hooks(model, x_train, ratio):
    """The method in a dozen lines, sharing no code with the library."""
    model, peak = copy.deepcopy(model), {}

    def watch(layer, args):
        peak[layer] = max(peak.get(layer, 0.0), args[0].abs().max().item())

    layers = [layer for layer in model if isinstance(layer, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_pre_hook(watch) for layer in layers]
    with torch.no_grad():
        model(x_train)
    for handle in handles:
        handle.remove()
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, args: (_Cut.apply(args[0], ratio * peak[layer]),))
    return model


def forged_by_library(model, x_train, ratio):
    return forged_fx.transform(model, forged_fx.calibrate(model, [x_train]), ratio=ratio)


def shows_masking(result):
    true, base_true = result.model.accuracy("true gradient"), result.base.accuracy("true gradient")
    taken = sum(row.broken for row in result.model.rows if row.kind in ("BPDA", "transfer"))
    assert true * result.n >= base_true * result.n + 4, "the true gradient shows a gain"
    assert taken >= 5, "BPDA and transfer take it"
    assert result.worst_case * result.n <= result.base_worst_case * result.n + 1, "nothing is left of it"
    assert result.verdict == "masking"


@pytest.mark.slow
def test_the_gain_that_is_not_there():
    """Complete AutoAttack on 200 images. Measured: base 118, true gradient 129, worst case 118; and with the seeds 1
    and 2 in its place 116, 128, 116 and 122, 131, 121."""
    model, x_train, _, x, y = train_digits(0)
    result = forged_fx.evaluate(forged_by_library(model, x_train, RATIO), base=model, x=x, y=y, eps=EPS)
    shows_masking(result)
    assert result.model.accuracy("natural") > 0.9 and 0.5 < result.base_worst_case < 0.7
    seconds = {kind: sum(r.seconds for r in result.model.rows if r.kind == kind) for kind in ("true gradient", "BPDA")}
    assert seconds["BPDA"] < seconds["true gradient"]  # Square is not repeated, and the broken are not attacked again


def test_library_and_hooks_are_judged_alike():
    model, x_train, _, x, y = train_digits(1)
    options = {"x": x[:70], "y": y[:70], "eps": EPS, "attacks": "quick"}
    library = forged_fx.evaluate(forged_by_library(model, x_train, RATIO), base=model, **options)
    shows_masking(library)
    assert not any(row.broken for row in library.model.rows if row.kind == "transfer")  # so that hooks need none
    hooks = forged_fx.evaluate(forged_by_hooks(model, x_train, RATIO), bpda=through, **options)
    assert torch.equal(library.model.broken_by, hooks.model.broken_by)
    assert torch.equal(library.model.examples, hooks.model.examples)


def test_another_network():
    """The gradient attacks alone. Measured: base 122, true gradient 136, worst case 121; complete: 122, 131, 121."""
    model, x_train, _, x, y = train_digits(2)
    forged = forged_by_library(model, x_train, RATIO)
    shows_masking(forged_fx.evaluate(forged, base=model, x=x[:80], y=y[:80], eps=EPS, attacks="quick"))
