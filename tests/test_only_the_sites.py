"""Nothing but the inputs of sites is changed: what else reads the same tensor reads it raw, whoever it is.

The oracle is a function mode over the plain model, which cuts the one operand in question, and nothing else.
"""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import forged_fx
from forged_fx.evaluate.surrogate import smooth
from forged_fx.stats import Stats

RATIO = 2**-1
OPERAND = {F.linear: 0, torch.addmm: 1}


class Cut(TorchFunctionMode):
    def __init__(self, t, operands=OPERAND):
        super().__init__()
        self.t, self.operands = t, operands

    def __torch_function__(self, function, types, args=(), kwargs=None):
        args = list(args)
        if (i := self.operands.get(function)) is not None:
            args[i] = torch.where(args[i].abs() < self.t, 0, args[i])
        return function(*args, **(kwargs or {}))


def same(a, b):
    pairs = list(zip(tree_leaves(a), tree_leaves(b), strict=True))
    return bool(pairs) and all(torch.equal(x, y) for x, y in pairs)


class Box:
    def __init__(self, value):
        self.value = value


class Tanh(nn.Module):
    def forward(self, input):
        value = input[0] if isinstance(input, list) else getattr(input, "value", input)
        return value.tanh()


@torch.jit.script
def scripted(x):
    return torch.sin(x) * 2


class Site(nn.Module):
    """A product with a weight of the module's own, on its first argument."""

    def __init__(self, forward):
        super().__init__()
        self.w, self.child, self.how = nn.Parameter(torch.randn(4, 4)), Tanh(), forward

    def forward(self, x):
        return self.how(self, x, F.linear(x, self.w))


def adds_its_input(module, args, output):
    return output + args[0]


def joins_its_input(module, args, output):
    return torch.cat([output, args[0]], -1)


def hooked(hook):
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(hook)
    return layer


class Addmm(Site):
    def forward(self, x):
        return torch.addmm(x, x, self.w)


# what else reads the input of a site: a function that makes the module
READERS = {
    "nothing": lambda: Site(lambda m, x, y: y),
    "a sum": lambda: Site(lambda m, x, y: y + x),
    "a list": lambda: Site(lambda m, x, y: torch.cat([x, y], -1)),
    "a tuple": lambda: Site(lambda m, x, y: torch.stack((x, y))),
    "a list without the result": lambda: Site(lambda m, x, y: y + torch.cat([x, x]).sum()),
    "a function of lists": lambda: Site(lambda m, x, y: y + torch._foreach_mul([x], 2.0)[0]),
    "the caller": lambda: Site(lambda m, x, y: (y, x)),
    "the caller, in a dict": lambda: Site(lambda m, x, y: {"y": y, "more": [x]}),
    "the same call": lambda: Addmm(None),
    "a child": lambda: Site(lambda m, x, y: y + m.child(x)),
    "a child, by name": lambda: Site(lambda m, x, y: y + m.child(input=x)),
    "a child, in a list": lambda: Site(lambda m, x, y: y + m.child([x])),
    "a child, in an object": lambda: Site(lambda m, x, y: y + m.child(Box(x))),
    "TorchScript": lambda: Site(lambda m, x, y: y + scripted(x)),
    "vmap": lambda: Site(lambda m, x, y: y + torch.vmap(torch.tanh)(x)),
    "a layer's hook": lambda: hooked(adds_its_input),
    "a layer's hook, in a list": lambda: hooked(joins_its_input),
}


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("make", READERS.values(), ids=READERS)
def test_what_else_reads_a_sites_input_reads_it_raw(make, graph):
    torch.manual_seed(0)
    model, x = nn.Sequential(make()).eval(), torch.randn(6, 4)
    stats = forged_fx.calibrate(model, [x])
    (site,) = stats.sites.values()
    forged = forged_fx.transform(model, stats, RATIO, graph=graph)
    given = x.clone()
    with torch.no_grad():
        with Cut(RATIO * torch.tensor(site.c_max)):
            expected = model(x)
        assert not same(expected, model(x))
        assert same(forged(given), expected) and torch.equal(given, x)


def test_a_layer_stays_one():
    """It is a call of its module in the graph, its threshold ahead; and module by module it compiles."""
    torch.manual_seed(0)
    layers = {"nothing": True} | dict.fromkeys(
        ("a list", "a child, by name", "a child, in a list", "the caller", "the caller, in a dict", "the same call"),
        False,
    )
    for reader, layer in layers.items():
        model = nn.Sequential(READERS[reader]()).eval()
        (site,) = forged_fx.calibrate(model, [torch.randn(6, 4)]).sites.values()
        assert site.layer is layer, reader


def test_a_module_around_a_layer_that_is_given_its_input_by_name_is_none():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return F.linear(x, self.fc.weight.t()) + self.fc(input=x)

    torch.manual_seed(0)
    model, x = nn.Sequential(Around()).eval(), torch.randn(6, 4)
    stats = forged_fx.calibrate(model, [x])
    assert {name: site.layer for name, site in stats.sites.items()} == {"0": False, "0.fc": False}
    with torch.no_grad(), Cut(RATIO * torch.tensor(stats.sites["0"].c_max)):
        expected = model(x)
    for graph in (True, False):
        assert torch.equal(forged_fx.transform(model, stats, RATIO, graph=graph)(x), expected)


class Swish(nn.Module):
    def forward(self, x):
        return F.silu(x)


class InPlace(nn.Module):
    def forward(self, x):
        return x.relu_()


def watched(module):
    module.register_forward_hook(lambda *_: None)
    return module


ACTIVATIONS = {
    "silu": nn.SiLU,
    "silu, watched": lambda: watched(nn.SiLU()),
    "silu, of another class": Swish,
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "relu in place, of another class": InPlace,
}


class ReadTwice(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.fc, self.act = nn.Linear(4, 4), act

    def forward(self, x):
        h = self.fc(x)
        return self.act(h) + h


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize(
    ("act", "known"), [*((act, True) for act in ACTIVATIONS), *((act, False) for act in ("silu", "relu in place"))]
)
def test_an_activations_input_is_written_to_where_the_activation_writes_there(act, graph, known):
    """As the plain model leaves it: the result of the one in place, or the raw value.

    known: the statistics say which it is. Files of older versions do not; then PyTorch's own modules are told apart.
    """
    torch.manual_seed(0)
    model, x = ReadTwice(ACTIVATIONS[act]()).eval(), torch.randn(6, 4)
    stats = forged_fx.calibrate(model, [x], where="activations")
    (name,) = (name for name in stats.sites if name.startswith("act"))
    if not known:
        stats.sites[name] = dataclasses.replace(stats.sites[name], in_place=None)
    forged = forged_fx.transform(model, stats, RATIO, where="activations", graph=graph)
    with torch.no_grad():
        h = model.fc(x)
        cut = torch.where(h.abs() < RATIO * torch.tensor(stats.sites[name].c_max), 0, h)
        result = model.act(cut)
        expected = result + (result if "in place" in act else h)
        assert torch.equal(forged(x), expected)


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("act", ["relu", "relu in place", "relu in place, of another class"])
def test_gradients_pass_an_activation_that_writes_where_its_threshold_read(act, graph, kind):
    torch.manual_seed(0)
    model, x = ReadTwice(ACTIVATIONS[act]()).eval(), torch.randn(6, 4, requires_grad=True)
    stats = forged_fx.calibrate(model, [x.detach()], where="activations")
    forged = forged_fx.transform(model, stats, RATIO, where="activations", graph=graph, kind=kind)
    t = RATIO * next(site.c_max for name, site in stats.sites.items() if name.startswith("act"))
    h = model.fc(x)
    cut = h.sign() * (h.abs() - t) if kind == "soft" else h
    result = torch.where(h.abs() < t, 0, cut).relu()
    (expected,) = torch.autograd.grad((result + (result if "in place" in act else h)).square().sum(), x)
    (found,) = torch.autograd.grad(forged(x).square().sum(), x)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["hard", "one_sided", "soft", "clamp"])
@pytest.mark.parametrize("graph", [True, False])
def test_a_surrogates_gradient_passes_an_activation_that_writes_where_its_threshold_read(graph, kind):
    torch.manual_seed(0)
    model, x = ReadTwice(nn.ReLU(inplace=True)).eval(), torch.randn(6, 4)
    stats = forged_fx.calibrate(model, [x], where="activations")
    forged = forged_fx.transform(model, stats, 0.3, where="activations", graph=graph, kind=kind)
    with smooth(0.1):
        forged(leaf := x.clone().requires_grad_()).square().sum().backward()
    assert leaf.grad.isfinite().all() and leaf.grad.any()


@pytest.mark.parametrize("kind", ["hard", "one_sided", "soft"])
@pytest.mark.parametrize("graph", [True, False])
def test_gradients_pass_an_activation_that_writes_where_the_threshold_wrote(graph, kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.SiLU(inplace=True), nn.Linear(4, 2)).eval()
    x = torch.randn(6, 4, requires_grad=True)
    stats = forged_fx.calibrate(model, [x.detach()], where="activations")
    forged = forged_fx.transform(model, stats, RATIO, where="activations", graph=graph, kind=kind)
    (site,) = forged_fx.describe(forged)
    h = model[0](x)
    value = h.sign() * (h.abs() - site.threshold) if kind == "soft" else h
    small = (h if kind == "one_sided" else h.abs()) < site.threshold
    (expected,) = torch.autograd.grad(model[2](nn.functional.silu(torch.where(small, 0, value))).sum(), x)
    (found,) = torch.autograd.grad(forged(x).sum(), x)
    assert small.any() and torch.allclose(found, expected, atol=1e-6)


class AddsInPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.one(x)
        x += self.two(x)
        return x


@pytest.mark.parametrize("graph", [True, False])
def test_gradients_pass_a_threshold_whose_input_is_overwritten(graph):
    """As they pass the plain model's layers, which keep no input where their weights are frozen."""
    torch.manual_seed(0)
    model, x = AddsInPlace().eval().requires_grad_(False), torch.randn(6, 4, requires_grad=True)
    stats = forged_fx.calibrate(model, [x.detach()])
    forged = forged_fx.transform(model, stats, RATIO, graph=graph)
    t = {site.site: site.threshold for site in forged_fx.describe(forged)}
    h = model.one(torch.where(x.abs() < t["one"], 0, x))
    (expected,) = torch.autograd.grad((h + model.two(torch.where(h.abs() < t["two"], 0, h))).sum(), x)
    (found,) = torch.autograd.grad(forged(x).sum(), x)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("act", [name for name in ACTIVATIONS if "in place" not in name])
def test_the_users_input_stays_as_it_is_ahead_of_an_activation(act, graph):
    torch.manual_seed(0)
    model, x = nn.Sequential(ACTIVATIONS[act](), nn.Linear(4, 2)).eval(), torch.randn(6, 4)
    stats = forged_fx.calibrate(model, [x], where="activations")
    forged = forged_fx.transform(model, stats, RATIO, where="activations", graph=graph)
    given = x.clone()
    with torch.no_grad():
        forged(given)
    assert torch.equal(given, x)
    forged(given.requires_grad_()).sum().backward()
    assert given.grad is not None


def test_statistics_say_which_activations_work_in_place(tmp_path):
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.GELU()), torch.randn(6, 4)
    stats = forged_fx.calibrate(model, [x], where="activations")
    stats.save(tmp_path / "stats")
    for found in (stats, Stats.load(tmp_path / "stats"), stats.merge(copy.deepcopy(stats))):
        assert {name: site.in_place for name, site in found.sites.items()} == {"0": False, "1@0": True, "2@0": False}


class OfTasks(nn.Module):
    """Its own product meets the weight of the task that is asked for."""

    def __init__(self):
        super().__init__()
        self.fc, self.heads = nn.Linear(6, 8), nn.ParameterDict({"a": torch.randn(3, 8), "b": torch.randn(3, 8)})

    def forward(self, x, task="a"):
        return F.linear(self.fc(x), self.heads[task])


@pytest.mark.parametrize("compiled", [False, True])
def test_a_threshold_is_of_the_parameter_that_its_data_met(compiled):
    torch._dynamo.reset()
    model, x = OfTasks().eval(), torch.randn(16, 6)
    stats = forged_fx.calibrate(model, [{"x": x, "task": "a"}])
    assert stats.sites["#0"].weight == "heads.a"
    expected = forged_fx.transform(model, stats, 0.1, graph=False)
    forged = expected
    if compiled:
        forged = torch.compile(model, backend="forged", options={"stats": stats, "ratio": 0.1})
    with torch.no_grad():
        assert torch.allclose(forged(x, task="a"), expected(x, task="a"), atol=1e-6)
        with pytest.raises(Exception, match=r"met the parameter 'heads.a' in calibration, and meets 'heads.b'"):
            forged(x, task="b")
        assert torch.allclose(forged(x, task="a"), expected(x, task="a"), atol=1e-6)
