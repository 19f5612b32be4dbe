"""`x += y` in a forward: a graph does what the model does, whoever else has x."""

import copy
import pickle

import pytest
import torch
from torch import nn

import forged_fx
from forged_fx.effects import UNSEEN
from forged_fx.evaluate.surrogate import smooth
from forged_fx.graph_calls import AUGMENTED, to_be_kept


class Net(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.gate = nn.Parameter(torch.zeros(3))
        self.register_buffer("total", torch.ones(6))
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def of_a_view(m, x):
    y = x * 1
    half = y[:, :3]
    half += m.gate  # 0, until weights are loaded
    return m.a(y)


def of_what_is_viewed(m, x):
    y = m.a(x)
    half = y[:, :3]
    y *= m.gate[0] + 2
    return m.b(y) + half.sum()


def of_the_callers(m, x):
    x -= 0.5
    return m.a(x)


def after_a_layer_has_read_it(m, x):
    y = m.a(x)
    z = m.b(y)
    y += z
    return y


def of_numbers(m, x):
    n = x.shape[0]
    k = n
    n += 3
    n //= 2
    return m.a(x) * n + k


def of_a_wider_dtype(m, x):
    y = m.a(x)
    y += m.total
    return y


def of_what_is_returned(m, x):
    y = m.a(x)
    z = m.b(y)
    w = y.flatten()
    w **= 2
    return z, y


FORWARDS = [
    of_a_view, of_what_is_viewed, of_the_callers, after_a_layer_has_read_it, of_numbers, of_a_wider_dtype,
    of_what_is_returned,
]  # fmt: skip


def same(found, expected):
    for one, other in zip(*(v if isinstance(v, tuple) else (v,) for v in (found, expected)), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.fixture(params=FORWARDS, ids=lambda forward: forward.__name__)
def made(request):
    torch.manual_seed(0)
    model = Net(request.param).eval()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [torch.rand(8, 6)]), 0)
    assert not forged.forging.not_whole
    weights = {**model.state_dict(), "gate": torch.ones(3)}
    for module in (model, forged):
        module.load_state_dict(weights)
    return model, forged


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_a_graph_is_the_model(made, grad, autocast):
    model, forged = made
    again = pickle.loads(pickle.dumps(forged))
    for copied in (forged, copy.deepcopy(forged), again):
        x = torch.rand(5, 6)
        given, others = x.clone(), x.clone()
        with torch.set_grad_enabled(grad), torch.autocast("cpu", enabled=autocast):
            same(copied(given), model(others))
        assert torch.equal(given, others) and torch.equal(copied.total, model.total)


def test_compiled_too(made):
    model, forged = made
    x = torch.rand(5, 6)
    given, others = x.clone(), x.clone()
    with torch.no_grad():
        fast = torch.compile(forged, backend="forged")(given)
        torch.testing.assert_close(fast, model(others))
    assert torch.equal(given, others)


def test_gradients_are_the_models(made):
    model, forged = made
    found = []
    for module in (model, forged):
        module.requires_grad_(False)  # (else the linear layer ahead would have kept what is written to)
        x = torch.rand(5, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = module(x * 1)
        (gradient,) = torch.autograd.grad((y[0] if isinstance(y, tuple) else y).sum(), x)
        found.append(gradient)
    assert torch.equal(*found)


def by_another_name(m, x):
    y = m.a(x)
    z = m.b(y)
    y = m.drop(y)  # in eval mode, y itself
    y += z
    return y


def of_the_callers_size(m, x):
    rows, columns = x.shape
    y = m.a(x).reshape(rows, columns)
    z = m.b(y)
    y += z
    return y


def by_a_view_twice(m, x):
    y = m.a(x)
    flat = y.view(-1)
    z = m.b(y)
    flat += z.view(-1)
    flat *= 1
    return y


@pytest.mark.parametrize("kind", ["hard", "soft", "clamp"])
@pytest.mark.parametrize("forward", [after_a_layer_has_read_it, by_another_name, of_the_callers_size, by_a_view_twice])
def test_what_a_threshold_has_read_may_be_written_to(kind, forward):
    """Its backward looks at what it read; so it reads a copy, where gradients are recorded."""
    torch.manual_seed(0)
    model, x = Net(forward).eval().requires_grad_(False), torch.rand(5, 6)
    model.drop = nn.Dropout(0.1).eval()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-2, kind=kind)
    assert sum(node.target is to_be_kept for node in forged.graph.nodes) == 1
    (gradient,) = torch.autograd.grad(forged(x.requires_grad_()).sum(), x)
    other = copy.deepcopy(model)
    other.run = lambda m, x: (y := m.a(x)) + m.b(y)
    plainly = forged_fx.transform(other, forged_fx.calibrate(other, [x.detach()]), 2**-2, kind=kind)
    assert torch.equal(gradient, torch.autograd.grad(plainly(x).sum(), x)[0])
    with smooth(0.3):
        torch.autograd.grad(forged(x).sum(), x)


@pytest.mark.parametrize(
    "made",
    [
        lambda m: m.total.clone(),
        lambda m: m.gate.repeat(2) / 2,
        lambda m: m.gate.exp().repeat(2),
        lambda m: torch.softmax(m.total, 0),
        lambda m: m.total[torch.arange(6)],
        lambda m: m.total.abs().mean(),
        lambda m: m.gate.shape[0],
    ],
)
def test_what_is_computed_from_a_buffer_is_no_buffer(made):
    def forward(m, x):
        scale = made(m)
        scale += 1
        return m.a(x * scale)

    model, x = Net(forward).eval(), torch.rand(5, 6)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [torch.rand(8, 6)]), 0)
    assert not forged.forging.not_whole
    for _ in range(2):
        assert torch.equal(forged(x), model(x)) and torch.equal(forged.total, torch.ones(6))


def test_what_nobody_else_has_counts_as_no_write():
    """So that passes may do with it what they do with `x + y`."""
    seen = {}
    for forward in FORWARDS:
        model = Net(forward).eval()
        forged = forged_fx.transform(model, forged_fx.calibrate(model, [torch.rand(8, 6)]), 0)
        assignments = [node for node in forged.graph.nodes if node.target in AUGMENTED.values()]
        seen[forward.__name__] = [bool(node.meta.get(UNSEEN)) for node in assignments]
    assert seen == {
        "of_a_view": [False],
        "of_what_is_viewed": [False],
        "of_the_callers": [False],
        "after_a_layer_has_read_it": [True],
        "of_numbers": [False, False],
        "of_a_wider_dtype": [True],
        "of_what_is_returned": [False],
    }


def test_a_buffer_that_is_written_to_is_in_no_graph():
    def forward(m, x):
        total = m.total
        total += x.detach().mean(0)
        return m.a(x - total)

    model = Net(forward).eval()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [torch.rand(8, 6)]), 0)
    assert forged.forging.not_whole == "its forward writes into 'total', which a graph would not do"
    for _ in range(3):
        x = torch.rand(5, 6)
        assert torch.equal(forged(x), model(x)) and torch.equal(forged.total, model.total)
