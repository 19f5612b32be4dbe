"""A caller within a mode that chooses the gradient: what names its gradients itself finds what it finds outside."""

from functools import partial

import planted
import pytest
import torch
from torch.overrides import TorchFunctionMode

import forged_fx
from forged_fx.bpda import callers_gradient_off, straight_through_enabled
from forged_fx.digits import EPS, one_thread
from forged_fx.evaluate.surrogate import smooth
from forged_fx.torch_internals import function_modes

MODES = {"straight-through": forged_fx.straight_through, "smooth": partial(smooth, 0.1)}


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    planted.hurry(monkeypatch, steps=8)
    with one_thread():
        yield


@pytest.fixture(scope="module")
def digits():
    with one_thread():
        model, x, y = planted.small()
        stats = forged_fx.calibrate(model, [x])
        return model, stats, forged_fx.transform(model, stats, 0.25), x[:24], y[:24]


def rows(result):
    return [(row.kind, row.attack, row.attacked, row.broken) for row in result.rows]


def trials(found):
    return [(trial.standing, trial.margin, trial.natural) for trial in (found.base, *found.trials)]


CALLS = {
    "evaluate": lambda model, stats, forged, x, y: rows(
        forged_fx.evaluate(forged, model, x=x, y=y, eps=EPS, attacks=["apgd-ce"])
    ),
    "sweep": lambda model, stats, forged, x, y: [
        (point.true, point.worst)
        for point in forged_fx.sweep(
            model, stats, x, y, eps=EPS, ratios=[0.25], attacks=["apgd-ce"], rounds=0
        ).points
    ],
    "search": lambda model, stats, forged, x, y: trials(
        forged_fx.search(model, stats, x, y, eps=EPS, budget=1, kinds=["hard"], attacks=["apgd-ce"], max_natural_loss=1)
    ),
    "lipschitz": lambda model, stats, forged, x, y: list(
        forged_fx.lipschitz(model, forged, x[:4], eps=EPS, steps=2)
    ),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", CALLS)
def test_it_does_not_reach_in(call, mode, digits):
    outside = CALLS[call](*digits)
    with MODES[mode]():
        before = function_modes()
        inside = CALLS[call](*digits)
        assert function_modes() == before
    assert inside == outside


def test_an_example_where_it_would_be_seen(digits):
    """With the gradient that passes through, apgd-ce breaks more than with the true one."""
    *_, forged, x, y = digits
    call = partial(forged_fx.evaluate, forged, x=x, y=y, eps=EPS, attacks=["apgd-ce"])
    with forged_fx.straight_through():
        result = call()
    broken = {row.kind: row.broken for row in result.rows if row.attack == "apgd-ce"}
    assert broken["BPDA"] > 0, "nothing was masked: the network or the ratio is no test of this"


class Other(TorchFunctionMode):
    pass


def test_other_modes_stay_and_an_error_puts_everything_back():
    with Other() as other, forged_fx.straight_through() as through, Other() as last:
        with pytest.raises(KeyError), callers_gradient_off():
            assert function_modes() == [other, last] and not straight_through_enabled()
            with forged_fx.straight_through():
                assert straight_through_enabled()
            raise KeyError
        assert function_modes() == [other, through, last]


def test_a_compiled_model_has_its_own_gradient_within():
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 3)).eval(), torch.randn(5, 4)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0.5)
    compiled = torch.compile(forged, backend="aot_eager")

    def gradient(f):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(f(leaf).sum(), leaf)[0]

    with forged_fx.straight_through():
        through = gradient(compiled)
        with callers_gradient_off():
            own = gradient(compiled)
    assert torch.equal(own, gradient(forged)) and not torch.equal(own, through)
