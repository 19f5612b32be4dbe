"""calibrate: what it records, what it leaves alone, what it refuses."""

import contextlib
import copy

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from captured import AsItIs
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

import forged_fx
from forged_fx.modes import same_bits
from forged_fx.sites import (
    COMPLEX,
    CONSTANT_INPUT,
    FIXED_FILTER,
    NOT_DENSE,
    OTHER_CALL,
    OTHER_DTYPE,
    OTHER_WEIGHT,
    RECURRENT,
    UNSEEN,
    VMAPPED,
)
from forged_fx.thresholds import thresholds_of


class Small(nn.Module):
    """A convolution, a shared layer used twice, a functional call, a product with a parameter."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        x = self.conv(x).relu().mean((2, 3))
        x = self.fc(self.fc(x).relu())
        return F.linear(x, self.weight) @ self.weight.T


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Small()


@pytest.fixture
def x():
    return torch.randn(6, 3, 8, 8)


def test_names_kinds_and_order(model, x):
    stats = forged_fx.calibrate(model, [x])
    assert [(name, site.kind) for name, site in stats.sites.items()] == [
        ("conv", "conv2d"),
        ("fc", "linear"),
        ("fc#1", "linear"),
        ("#0", "linear"),
        ("#1", "matmul"),
    ]
    assert [site.layer for site in stats.sites.values()] == [True, True, True, False, False]
    assert stats.sites["conv"].shape == (6, 3, 8, 8)
    assert stats.sites["conv"].weight_shape == (4, 3, 3, 3)


def test_c_max_equals_hooks(assets):
    model = assets.load("cifar_resnet20_std")
    images, _ = assets.images("cifar10jpeg_test", 60)
    batches = images.split(25)
    stats = forged_fx.calibrate(model, batches)
    assert {name: site.c_max for name, site in stats.sites.items()} == oracle.maxima(model, batches)
    assert stats.sites["1.conv1"].elements == images.numel()
    assert stats.sites["1.conv1"].shape == (-1, 3, 32, 32)


@pytest.mark.parametrize(
    "form",
    [lambda x: x, lambda x: (x, torch.zeros(2)), lambda x: [x], lambda x: {"x": x}],
    ids="tensor tuple list dict".split(),
)
def test_forms_of_a_batch(model, x, form):
    assert forged_fx.calibrate(model, [form(x)]) == forged_fx.calibrate(model, [x])


def test_a_data_loader_is_an_iterable_of_batches(model, x):
    data = torch.utils.data.TensorDataset(x, torch.zeros(6))
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    assert forged_fx.calibrate(model, loader) == forged_fx.calibrate(model, x.split(2))


def test_max_batches_stops_the_scan(model, x):
    def endless():
        while True:
            yield x

    assert forged_fx.calibrate(model, endless(), max_batches=3).batches == 3


def test_the_model_is_left_as_it_was(model, x):
    model.add_module("bn", nn.BatchNorm1d(4))
    model.train()
    model.fc.eval()
    model.fc.weight.grad = torch.ones(4, 4)
    called = []
    model.fc.register_forward_hook(lambda *_: called.append(torch.is_grad_enabled()))
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    rng = torch.get_rng_state()
    forged_fx.calibrate(model, [x])
    assert called == [False, False]
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(model.fc.weight.grad, torch.ones(4, 4)) and torch.equal(rng, torch.get_rng_state())


def test_the_model_is_left_as_it_was_when_it_raises(model):
    model.train()
    with pytest.raises(RuntimeError):
        forged_fx.calibrate(model, [torch.randn(2, 5, 8, 8)])
    assert all(module.training for module in model.modules())
    assert not torch.nn.modules.module._global_forward_pre_hooks
    assert not torch.nn.modules.module._global_forward_hooks
    assert torch.backends.mha.get_fastpath_enabled()


def test_runs_under_the_callers_autocast(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stats = forged_fx.calibrate(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), [x])
    second = stats.sites["1"].c_max
    assert second == torch.tensor(second).bfloat16().item()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_input_is_named_with_its_site_and_batch(model, x, bad):
    poisoned = x.clone()
    poisoned[1, 2, 3, 4] = bad
    with pytest.raises(ValueError, match=r"'conv' \(conv2d\).* batch 1 "):
        forged_fx.calibrate(model, [x, poisoned])


@pytest.mark.parametrize("batches, message", [([], "got no batch"), ([3], "got int"), ([()], "got tuple")])
def test_batches_of_no_use(model, batches, message):
    with pytest.raises(ValueError, match=message):
        forged_fx.calibrate(model, batches)


def test_what_looks_like_batches(model, x):
    with pytest.raises(TypeError, match=r"batches is one tensor.*\[x\]"):
        forged_fx.calibrate(model, x)
    with pytest.raises(ValueError, match="max_batches=0: at least 1"):
        forged_fx.calibrate(model, [x], max_batches=0)
    with pytest.raises(TypeError, match=r"a batch gives image, label, and \w+\.forward takes \(.*by name"):
        forged_fx.calibrate(model, [{"image": x, "label": 0}])
    with pytest.raises(ValueError, match="'meta'"):
        forged_fx.calibrate(copy.deepcopy(model).to("meta"), [x.to("meta")])


class Oddities(nn.Module):
    """One call of each kind that is no site, or none by default."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Linear(2, 4)
        self.register_buffer("grid", torch.randn(4, 2))
        self.register_buffer("blur", torch.ones(4, 1, 3) / 3)
        self.hidden = [nn.Linear(4, 4)]
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        x = x + self.positions(self.grid)
        x = F.conv1d(x.transpose(1, 2), self.blur, padding=1, groups=4).transpose(1, 2)
        x = torch.einsum("bij,bkj->bik", x, x) @ x
        x = torch.from_numpy(self.hidden[0](x).numpy())
        return self.attention(*[self.lstm(x)[0]] * 3, need_weights=False)[0]


def test_what_is_no_site_and_why():
    stats = forged_fx.calibrate(Oddities(), [torch.randn(2, 4, 4)])
    assert {name: (site.kind, site.left_out) for name, site in stats.sites.items()} == {
        "positions": ("linear", CONSTANT_INPUT),
        "#0": ("conv1d", FIXED_FILTER),
        "#3": ("linear", None),  # the layer in a plain list counts as its caller's own; #1 and #2 are products of data
        "lstm": ("recurrent", RECURRENT),
        "attention": ("linear", None),
        "attention#1": ("linear", None),
    }


class TwoProducts(nn.Linear):
    def forward(self, x):
        return super().forward(x) + F.linear(x, self.weight)


class Residual(nn.Linear):
    def forward(self, x):
        return super().forward(x) + x


class LowRank(nn.Linear):
    def __init__(self, n):
        super().__init__(n, n)
        self.down = nn.Linear(n, 2)

    def forward(self, x):
        return super().forward(x) + self.down(x).sum(-1, keepdim=True)


class Checked(nn.Linear):
    def forward(self, x):
        if x.dim() != 2 or x.shape[1] != self.in_features or not x.is_floating_point():
            raise ValueError(x.dtype)
        return super().forward(x)


@pytest.mark.parametrize("kind, layer", [(TwoProducts, False), (Residual, False), (Checked, True)])
def test_a_layer_does_one_thing_with_its_input(kind, layer):
    """A threshold ahead of the whole module would also cut what the module does not feed to a product."""
    stats = forged_fx.calibrate(nn.Sequential(kind(4, 4)), [torch.randn(2, 4)])
    assert {site.layer for site in stats.sites.values()} == {layer}


def test_a_layer_keeps_its_input_from_other_layers():
    sites = forged_fx.calibrate(nn.Sequential(LowRank(4)), [torch.randn(2, 4)]).sites
    assert {name: site.layer for name, site in sites.items()} == {"0": False, "0.down": True}


class Counts(nn.Module):
    """In buffers that are written to behind PyTorch's back."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("runs", torch.zeros(()))
        self.register_buffer("top", torch.tensor([-0.0, torch.nan]))
        self.register_buffer("conjugate", torch.randn(3, dtype=torch.complex64).conj())

    def forward(self, x):
        self.runs.data.add_(1)
        self.top.data.abs_()
        return self.fc(x)


def test_buffers_are_left_as_they_were_however_they_are_written_to():
    model, x = Counts().eval(), torch.randn(5, 4)
    before = [buffer.clone() for buffer in model.buffers()]
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]))
    for one in (model, forged):
        for plain, kept in zip(before, (one.runs, one.top, one.conjugate), strict=True):
            assert same_bits(plain, kept)


def test_what_a_buffer_is_made_to_hold_is_data():
    class Sets(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("held", torch.zeros(5, 4))

        def forward(self, x):
            self.held.data = x * 2
            return self.fc(self.held)

    assert forged_fx.calibrate(Sets().eval(), [torch.randn(5, 4)]).sites["fc"].left_out is None


def test_an_input_is_measured_as_it_was_when_it_entered():
    """A model may write into what a layer has read, and the samples are counted after the run."""

    class Overwrites(nn.Module):
        def __init__(self, overwrites):
            super().__init__()
            self.layer, self.overwrites = nn.Linear(4, 4), overwrites

        def forward(self, x):
            x = x + 1
            y = self.layer(x)
            return x.zero_() + y if self.overwrites else x + y

    torch.manual_seed(0)
    model = Overwrites(False)
    x = torch.rand(8, 4)
    expected = forged_fx.calibrate(model, [x]).sites["layer"]
    model.overwrites = True
    assert forged_fx.calibrate(model, [x]).sites["layer"] == expected and expected.zeros == 0


@pytest.mark.parametrize(
    "write",
    [
        lambda y, h: y[:, :4].copy_(h),
        lambda y, h: y[:, 2:6].add_(h),
        lambda y, h: y.narrow(1, 0, 4).__iadd__(h),
        lambda y, h: y.__setitem__((slice(None), slice(4)), h),
        lambda y, h: y.unbind(1)[0].copy_(h[:, 0]),
        lambda y, h: torch.add(h, 1, out=y[:, :4]),
        lambda y, h: y.data[:, :4].copy_(h),
        lambda y, h: y.detach()[:, :4].copy_(h),
    ],
)
@pytest.mark.parametrize("calibrating", [torch.enable_grad, torch.inference_mode])
def test_data_written_into_a_part_of_a_constant_makes_it_data(write, calibrating):
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(8, 3)

        def forward(self, x):
            y = torch.zeros((x.shape[0], 8))
            seen_before = y.view(-1)
            with torch.no_grad():
                write(y, self.first(x))
            return self.second(seen_before.view(-1, 8))

    model, x = Padded().eval(), torch.randn(5, 4)
    with calibrating():
        stats = forged_fx.calibrate(model, [x, x])
    assert {name: site.left_out for name, site in stats.sites.items()} == {"first": None, "second": None}
    forged = forged_fx.transform(model, stats, 2**-2)
    assert [*thresholds_of(forged)] == ["first", "second"]


def test_what_a_run_writes_into_the_model_is_a_constant_again_when_the_next_one_begins():
    """A site is one, or is none, in the first batch as in those behind it."""

    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = nn.Linear(4, 4), None
            self.register_buffer("memory", torch.randn(4, 4))

        def forward(self, x):
            y = self.layer(x @ self.memory)
            self.memory.copy_(y[:4])
            z = y @ self.memory  # a product of two activations
            self.last = y[:4] if self.last is None else self.last
            return z @ self.last  # and another one

    stats = forged_fx.calibrate(Remembers().eval(), [torch.randn(5, 4) for _ in range(3)])
    assert {name: (site.calls, site.left_out is None) for name, site in stats.sites.items()} == {
        "#0": (3, False), "layer": (3, True)
    }  # fmt: skip


@pytest.mark.parametrize(
    "one, other, why",
    [
        (lambda m, x: x @ m.u, lambda m, x: (m.u @ x.T).T, OTHER_CALL),
        (lambda m, x: x @ m.u, lambda m, x: F.linear(x, m.u), OTHER_CALL),
        (lambda m, x: x @ m.u, lambda m, x: x @ m.w, OTHER_WEIGHT),
        (lambda m, x: x @ m.u.t(), lambda m, x: x @ m.w.t(), OTHER_WEIGHT),
        (lambda m, x: x @ m.u[:, 1:], lambda m, x: x @ m.u[:, :-1], None),
        (lambda m, x: x @ m.u, lambda m, x: x.relu() @ m.u, None),
    ],
)
def test_a_call_that_is_another_one_in_another_batch_has_no_threshold(one, other, why):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.u, self.w = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return one(self, x) if x.sum() > 0 else other(self, x)

    model, x = Branches().eval(), torch.rand(5, 4)
    stats = forged_fx.calibrate(model, [x, -x])
    merged = forged_fx.calibrate(model, [x]).merge(forged_fx.calibrate(model, [-x]))
    assert stats == merged and stats.sites["#0"].left_out == why
    forged = forged_fx.transform(model, stats, 0.5)
    if why is not None:
        assert torch.equal(forged(x), model(x)) and torch.equal(forged(-x), model(-x))


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return torch.cond(x.sum() > 0, self.a, self.b, (x,))


class Flexible(nn.Module):
    def forward(self, x):
        return flex_attention(*[x.view(1, 1, -1, 4)] * 3)


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


def test_a_child_that_is_called_like_torch_compiles_is_no_compiled_part():
    model = Residual(nn.Linear(4, 4)).eval()
    model._orig_mod = nn.Identity()
    assert list(forged_fx.calibrate(nn.Sequential(model), [torch.randn(3, 4)]).sites) == ["0.inner"]


@pytest.mark.parametrize("name", ["", "inner"])
def test_parts_that_are_compiled_in_place_are_watched_as_they_are_written(name):
    model = Residual(Residual(nn.Linear(4, 4))).eval()
    x = torch.randn(3, 4)
    stats = forged_fx.calibrate(model, [x, -x])
    model.get_submodule(name).compile(backend="eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert forged_fx.calibrate(model, [x, -x]) == stats
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    model(x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_a_part_that_is_compiled_is_watched_as_it_is_written():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    model[0] = fast = torch.compile(model[0], backend="eager")
    forward = fast.forward
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert list(forged_fx.calibrate(model, [torch.randn(3, 4)]).sites) == ["0._orig_mod", "1"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0 and fast.forward is forward


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inner", [Conditional, Flexible])
def test_what_compiles_a_part_of_itself_is_named_in_a_line(inner):
    model = nn.Sequential(inner(), nn.Linear(4, 4)).eval()
    with pytest.raises(RuntimeError, match=r"^'0' runs a part of itself through torch.compile.*\)$"):
        forged_fx.calibrate(model, [torch.randn(5, 4)])


def test_a_batch_of_two_inputs_wants_names():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, y):
            return self.layer(x) + y

    x = torch.randn(5, 4)
    with pytest.raises(TypeError, match=r"the first item alone.*a dict of its arguments.*argument: 'y'"):
        forged_fx.calibrate(Two(), [(x, x)])
    for many in ("3", 2.5):
        with pytest.raises(TypeError, match=r"max_batches=.*a whole number"):
            forged_fx.calibrate(Two(), [{"x": x, "y": x}], max_batches=many)


MASK, BLUR = torch.ones(6, 4), torch.full((4, 4), 0.25)


@pytest.mark.parametrize(
    "weight",
    {
        "made of Python's numbers": lambda model: model.weight * torch.tensor(0.5),
        "masked from a list": lambda model: model.weight * model.masks[0],
        "masked by a global": lambda model: MASK * model.weight,
        "masked from numpy": lambda model: model.weight * torch.from_numpy(np.ones((6, 4), np.float32)),
    }.values(),
)
@pytest.mark.parametrize("call", [F.linear, lambda x, w: x @ w.T], ids=["layer", "product"])
def test_a_weight_of_which_a_part_comes_from_nowhere_is_a_weight(weight, call):
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.masks = nn.Parameter(torch.randn(6, 4)), [torch.ones(6, 4)]

        def forward(self, x):
            return call(x, weight(self))

    model, x = Weighted().eval(), torch.randn(5, 4)
    stats = forged_fx.calibrate(model, [x])
    assert {name: site.left_out for name, site in stats.sites.items()} == {"#0": None}
    forged = forged_fx.transform(model, stats, 0.5)
    expected = call(x * (x.abs() >= 0.5 * x.abs().max()), weight(model))
    assert torch.equal(forged(x), expected)
    compiled = torch.compile(model, backend="forged", options={"stats": stats, "ratio": 0.5})
    assert torch.allclose(compiled(x), expected, atol=1e-6)


class Experts(nn.Module):
    """Weights in one tensor, of which data picks one; and what data picks from a table."""

    def __init__(self):
        super().__init__()
        self.gate, self.step = nn.Linear(4, 3), nn.Linear(4, 4)
        self.up, self.table = nn.Parameter(torch.randn(3, 4, 4)), nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        expert = self.gate(x).mean(0).argmax()
        return x @ self.up[expert] + F.linear(x, self.up[expert]).sum() + self.step(self.table[expert])


def test_what_data_picks_is_a_weight_where_it_is_used_as_one():
    torch.manual_seed(0)
    model, x = Experts().eval(), torch.randn(5, 4)
    stats = forged_fx.calibrate(model, [x])
    assert {name: site.left_out for name, site in stats.sites.items()} == dict.fromkeys(["gate", "#0", "#1", "step"])
    forged = forged_fx.transform(model, stats, 0.25)
    cut = lambda v: torch.where(v.abs() < 0.25 * v.abs().max(), 0, v)  # noqa: E731
    k, h = model.gate(cut(x)).mean(0).argmax(), cut(x)
    expected = h @ model.up[k] + F.linear(h, model.up[k]).sum() + model.step(cut(model.table[k]))
    assert torch.equal(forged(x), expected) and not torch.equal(model(x), expected)


ON_THE_WAY = {
    "vmap": torch.vmap(lambda row: row * 2),
    "numpy": lambda keys: torch.from_numpy(keys.numpy() * 2),
    "a list": lambda keys: torch.tensor(keys.tolist()),
    "dlpack": torch.from_dlpack,
}


@pytest.mark.parametrize("way", ON_THE_WAY)
@pytest.mark.parametrize("then", ["nothing", "norm", "layer"])
def test_a_product_of_activations_is_none_though_one_was_lost_sight_of(way, then):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.layer = (nn.Linear(4, 4) for _ in range(3))
            self.norm, self.nothing = nn.LayerNorm(4), nn.Identity()

        def forward(self, x):
            return self.q(x) @ getattr(self, then)(ON_THE_WAY[way](self.k(x))).mT

    sites = forged_fx.calibrate(Attention().eval(), [torch.randn(5, 4)]).sites
    layers = dict.fromkeys(["q", "k", "layer"] if then == "layer" else ["q", "k"])
    assert {n: s.left_out for n, s in sites.items()} == layers | ({"#0": UNSEEN} if then == "nothing" else {})


def test_a_filter_from_nowhere_is_fixed_and_numbers_from_the_input_are_data():
    class Filtered(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            x = torch.from_numpy(2 * F.linear(F.linear(x, BLUR), torch.tensor(BLUR.tolist())).numpy())
            return self.layer(x @ x.mT.mul(torch.tensor(2.0)) @ x)

    stats = forged_fx.calibrate(Filtered().eval(), [torch.randn(5, 4)])
    assert {name: site.left_out for name, site in stats.sites.items()} == {
        "#0": FIXED_FILTER, "#1": FIXED_FILTER, "layer": None
    }  # fmt: skip


def test_buffers_that_a_forward_replaces_are_handed_back():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("count", torch.zeros(1))
            self.register_buffer("last", None)

        def forward(self, x):
            self.count, self.last = self.count + 1, x.mean(0)
            return self.layer(x * self.count)

    model, x = Counts().eval(), torch.randn(5, 4)
    count = model.count
    stats = forged_fx.calibrate(model, [x, x])
    forged = forged_fx.transform(model, stats, 0)
    assert model.count is count and count == 0 and model.last is None
    assert forged.forging.not_whole == "its forward writes into 'count', which a graph would not do"
    for _ in range(3):
        assert torch.equal(forged(x), model(x))


def test_a_model_that_takes_a_gradient_is_told_that_there_is_none():
    class Force(nn.Module):
        def __init__(self, context):
            super().__init__()
            self.fc, self.context = nn.Linear(8, 1), context

        def forward(self, x):
            with self.context():
                x = x.detach().requires_grad_()
                return torch.autograd.grad(self.fc(x).sum(), x)[0]

    x = torch.randn(4, 8)
    with pytest.raises(RuntimeError, match=r"takes a gradient in its forward.*torch.enable_grad\(\) around"):
        forged_fx.calibrate(Force(contextlib.nullcontext), [x])
    assert "fc" in forged_fx.calibrate(Force(torch.enable_grad), [x]).sites


@pytest.mark.parametrize(
    "call, why",
    [
        (lambda x, w: (torch.fft.rfft(x) @ torch.complex(w, w)).abs(), COMPLEX),
        (lambda x, w: x.to_sparse() @ w, NOT_DENSE),
        (lambda x, w: torch.vmap(lambda row: row @ w)(x), VMAPPED),
        (lambda x, w: torch.vmap(lambda part: F.linear(x, part.mT))(w[None])[0], VMAPPED),
        (lambda x, w: ((10 * x).long() @ (10 * w).long()).float(), OTHER_DTYPE),
    ],
)
def test_what_cannot_be_measured_is_left_out_with_the_reason(call, why):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(5, 3)
            self.weight = nn.Parameter(torch.randn(5 if why is COMPLEX else 8, 5))

        def forward(self, x):
            return self.last(call(self.first(x), self.weight))

    model, x = Odd().eval(), torch.randn(4, 8)
    stats = forged_fx.calibrate(model, [x, x])
    assert {name: site.left_out for name, site in stats.sites.items()} == {"first": None, "#0": why, "last": None}
    assert torch.equal(forged_fx.transform(model, stats, 0)(x), model(x))
    assert [*thresholds_of(forged_fx.transform(model, stats, 0.5))] == ["first", "last"]


OUT_OF_SIGHT = {
    "vmap": lambda x, w: torch.vmap(lambda part: F.linear(x, part))(w[None])[0],
    "a function's result": lambda x, w: F.linear(x, AsItIs.apply(w)),
    "numpy": lambda x, w: F.linear(x, torch.from_numpy(w.detach().numpy())),
    "a copy": lambda x, w: F.linear(x, copy.deepcopy(w.detach())),
    "a derivative": lambda x, w: F.linear(x, torch.func.grad(lambda v: (v * v).sum())(w)),
}


@pytest.mark.parametrize("product", OUT_OF_SIGHT.values(), ids=OUT_OF_SIGHT)
def test_a_tensor_made_out_of_sight_is_not_taken_for_one_that_is_gone(product):
    """It may have the id of one that was data."""

    class Busy(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.weight = nn.Linear(8, 8), nn.Parameter(torch.randn(5, 8))

        def forward(self, x):
            x = self.first(x)
            gone = [x * i for i in range(200)]
            del gone
            return product(x, self.weight)

    for _ in range(10):
        assert [*forged_fx.calibrate(Busy(), [torch.randn(4, 8)]).sites] == ["first", "#0"]


def test_float64_statistics_are_what_their_file_says(tmp_path):
    x = torch.tensor([[1.0, 1 + 2**-40], [-(2 + 2**-40), 0]], dtype=torch.float64)
    stats = forged_fx.calibrate(nn.Linear(2, 3).double(), [x])
    stats.save(tmp_path / "stats")
    assert forged_fx.Stats.load(tmp_path / "stats") == stats
    assert stats.sites["#0"].c_max == 2 and stats.sites["#0"].lowest == -2
    with pytest.raises(ValueError, match="holds inf in batch 0"):
        forged_fx.calibrate(nn.Linear(2, 3).double(), [1e300 * x])


def test_a_forged_model_is_not_calibrated():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(5, 4)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]))
    for given in (forged, nn.Sequential(forged), torch.compile(forged)):
        with pytest.raises(ValueError, match="calibrate the plain one"):
            forged_fx.calibrate(given, [x])


def test_batches_without_an_element_are_refused_though_a_site_is_left_out():
    class Filtered(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(F.linear(x, BLUR))

    with pytest.raises(ValueError, match="saw no element"):
        forged_fx.calibrate(Filtered(), [torch.empty(0, 4)])


class Branch(nn.Module):
    """Another call in the same place, or none, where the batch is small."""

    def __init__(self, small):
        super().__init__()
        self.weight, self.small = nn.Parameter(torch.randn(4, 4)), small

    def forward(self, x):
        return F.linear(x, self.weight) if len(x) > 2 else self.small(x, self.weight)


SMALL = {
    "no call": lambda x, w: 2 * x,
    "a product of data": lambda x, w: x @ (x.mT @ x),
    "a linear call of data": lambda x, w: F.linear(x, x.mT @ x),
    "more calls": lambda x, w: F.linear(F.linear(x, w), w),
    "its input besides": lambda x, w: F.linear(x, w) + x,
}


@pytest.mark.parametrize("order", [(0, 1, 0), (1, 0, 1)])
@pytest.mark.parametrize("small", SMALL)
def test_what_one_batch_says_of_a_module_holds_in_all_of_a_scan(small, order, tmp_path):
    """In one go, batch by batch, and merged; and the forged model is the plain one with thresholds ahead of sites."""
    torch.manual_seed(0)
    model = nn.Sequential(Branch(SMALL[small]), nn.Linear(4, 3)).eval()
    batches = [(torch.randn(6, 4), torch.randn(2, 4))[i] for i in order]
    stats = forged_fx.calibrate(model, batches)
    parts = [forged_fx.calibrate(model, [batch]) for batch in batches]
    stats.save(tmp_path / "stats")
    assert stats == parts[0].merge(parts[1]).merge(parts[2]) == parts[0].merge(parts[1].merge(parts[2]))
    assert stats == forged_fx.calibrate(model, batches, checkpoint=tmp_path / "scan")
    assert stats == forged_fx.Stats.load(tmp_path / "stats")
    forged = forged_fx.transform(model, stats, 0.5)
    t = {row.site: row.threshold for row in forged_fx.describe(forged) if row.left_out is None}
    plain = F.linear

    def linear(x, weight, bias=None):
        names = ["1"] if weight is model[1].weight else ["0", "0#1"] if weight is model[0].weight else []
        cut = next((t[n] for n in names[calls.count(id(weight)) :] if n in t), 0)
        calls.append(id(weight))
        return plain(torch.where(x.abs() < cut, 0, x), weight, bias)

    for x in batches:
        calls = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "linear", linear)
            expected = model(x)
        assert torch.equal(forged(x), expected)


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x + torch.randn_like(x))


def test_random_generators_are_left_as_they_were(tmp_path):
    """What a model draws for a batch is the same wherever it is scanned."""
    model, batches = Noisy(4, 4).eval(), [torch.randn(5, 4) for _ in range(3)]
    before = torch.get_rng_state()
    stats = forged_fx.calibrate(model, batches)
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(9)
    assert forged_fx.calibrate(model, batches, checkpoint=tmp_path / "scan") == stats
    forged, before = forged_fx.transform(model, stats), torch.get_rng_state()
    forged_fx.sparsity(forged, batches)
    forged_fx.describe(forged, cost=True)
    assert torch.equal(torch.get_rng_state(), before)


class Shifts(nn.Embedding):
    """Writes into what it is given."""

    def forward(self, ids):
        ids += 2
        return super().forward(ids)


def test_the_example_is_the_batch_as_it_was_given():
    torch.manual_seed(0)
    model, ids = nn.Sequential(Shifts(8, 4), nn.Linear(4, 2)).eval(), torch.tensor([[4, 5]])
    stats = forged_fx.calibrate(model, [ids])
    assert torch.equal(stats.example[0][0], torch.tensor([[4, 5]])) and torch.equal(ids, torch.tensor([[4, 5]]))
    assert forged_fx.transform(model, stats).training is False  # the audit takes it


class Masked(nn.Module):
    """A product of a constant that holds an infinity."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.register_buffer("mask", torch.tensor([[-torch.inf, 0.0, 0.0]]))

    def forward(self, x):
        return self.fc(x) + F.linear(self.mask, self.fc.weight.abs()).exp()


def test_an_infinite_constant_is_no_input_of_a_site():
    model = Masked().eval()
    stats = forged_fx.calibrate(model, [torch.randn(2, 3)])
    assert {name: site.left_out for name, site in stats.sites.items()} == {"fc": None, "#0": CONSTANT_INPUT}
    forged_fx.transform(model, stats)


def test_one_parameter_among_the_weights_is_enough_and_a_layer_of_unseen_tensors_says_why_it_is_none():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))
            self.register_buffer("c", torch.randn(4, 4))
            self.unseen = [torch.randn(3, 4), torch.randn(4, 4)]

        def forward(self, x):
            return torch.einsum("ij,jk,kl->il", x, self.w, self.c) + F.linear(*self.unseen)

    sites = forged_fx.calibrate(Model(), [torch.randn(3, 4)]).sites
    assert {name: site.left_out for name, site in sites.items()} == {"#0": None, "#1": FIXED_FILTER}
