"""Models that are not one graph: forged module by module, in their own skeleton."""

import copy
import functools
import inspect
import io
import pickle
import threading
import types
from typing import ClassVar

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import forged_fx
from forged_fx.modes import fast_path_off
from forged_fx.sites import IN_FUNCTION, OTHER_CALL
from forged_fx.transform import ForgedModule


class DataBranch(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.a(x)
        return self.b(x) if x.mean() > -100 else x


class SharedLayer(DataBranch):
    def forward(self, x):
        return self.b(self.a(super().forward(self.a(x)).relu()))


class FunctionalCall(DataBranch):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        attention = super().forward(x) @ x.transpose(-1, -2)
        return F.linear(attention @ x, self.weight) @ self.a.weight


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)

    def forward(self, x):
        return self.encoder(x)


class AutocastInside(DataBranch):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.a(x)
        return self.b(x.float())


class OldWeightNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.utils.weight_norm(nn.Linear(4, 4))

    def forward(self, x):
        return self.a(x) if x.mean() > -100 else x


class Parametrized(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, x):
        return self.a(x) if x.mean() > -100 else x


class Loop(DataBranch):
    def forward(self, x):
        return torch.stack([super(Loop, self).forward(row) for row in x])


class TrainModeBranch(DataBranch):
    def forward(self, x):
        x = self.a(x)
        return self.b(F.dropout(x, 0.5) if self.training else x)


MODELS = {
    DataBranch: ["a", "b"],
    SharedLayer: ["a", "a#1", "b", "a#2", "b#1"],
    FunctionalCall: ["a", "b", "#2", "#3"],
    Attention: ["attention", "attention#1"],
    Encoder: [
        f"encoder.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn", "self_attn#1", "linear1", "linear2")
    ],
    AutocastInside: ["a", "b"],
    OldWeightNorm: ["a"],
    Parametrized: ["a"],
    Loop: ["a", "b", "a#1", "b#1", "a#2", "b#2"],
    TrainModeBranch: ["a", "b"],
}


@pytest.fixture(params=MODELS, ids=lambda kind: kind.__name__)
def model(request):
    torch.manual_seed(0)
    return request.param().eval()


@pytest.fixture
def x():
    return torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))


def _equal(a, b):
    return torch.equal(a.float(), b.float())


def test_every_site_is_forged(model, x):
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-3)
    rows = forged_fx.describe(forged)
    assert [row.site for row in rows if row.left_out is None] == MODELS[type(model)]
    assert not isinstance(forged, ForgedModule) and isinstance(forged, type(model))
    with torch.no_grad():
        assert not _equal(forged(x), model(x))
        forged_fx.set_ratio(forged, 0)
        with fast_path_off():
            assert _equal(forged(x), model(x))


@pytest.mark.parametrize("kind", [DataBranch, AutocastInside, OldWeightNorm, TrainModeBranch])
def test_it_agrees_with_hooks(kind, x):
    model = kind().eval()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-3)
    thresholds = {name: c / 8 for name, c in oracle.maxima(model, [x]).items()}
    with torch.no_grad(), oracle.forged(copy.deepcopy(model), thresholds) as expected:
        assert torch.equal(forged(x), expected(x))


def test_each_call_of_a_shared_layer_has_its_own_threshold(x):
    model = SharedLayer().eval()
    stats = forged_fx.calibrate(model, [x])
    forged = forged_fx.transform(model, stats, 2**-3)

    def f(site, x):
        return torch.where(x.abs() < stats.sites[site].c_max / 8, 0.0, x)

    with torch.no_grad():
        h = model.a(f("a", x))
        h = model.b(f("b", model.a(f("a#1", h)))).relu()
        expected = model.b(f("b#1", model.a(f("a#2", h))))
        for _ in range(2):  # the count starts again with each forward pass
            assert torch.equal(forged(x), expected)
        for _ in range(2):  # and outside of one, each run is a first one
            assert torch.equal(forged.a(x), model.a(f("a", x)))


class BeginsAtZero(DataBranch):
    """As RAFT's flow does: a layer that runs on a constant first, which is no site, and on data then."""

    def forward(self, x):
        return super().forward(x + self.a(self.a.weight.new_zeros(4)))


def test_a_call_of_a_shared_layer_that_is_no_site_has_no_threshold(x):
    model = BeginsAtZero().eval()
    stats = forged_fx.calibrate(model, [x])
    assert stats.sites["a"].left_out and not stats.sites["a#1"].left_out
    with torch.no_grad():
        assert torch.equal(forged_fx.transform(model, stats, 0)(x), model(x))


@pytest.mark.parametrize("where, last", [("linear+conv", "inner#3"), ("activations", "inner@1")])
def test_calls_of_a_module_that_runs_twice_are_counted_through_the_pass(where, last, x):
    class Inner(FunctionalCall):
        def forward(self, x):
            return torch.relu(super().forward(x)) - 0.5

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(self.inner(x))

    model = Twice().eval()
    stats = forged_fx.calibrate(model, [x], where="activations")
    forged = forged_fx.transform(model, stats, 0, where=where)  # audited: each threshold ran once
    assert {row.site: row.left_out for row in forged_fx.describe(forged)}[last] is None
    assert stats.sites[last].calls == 1 and torch.equal(forged(x), model(x))


def test_a_pass_begins_at_a_forward_that_only_the_instance_has(x):
    model = nn.Module()
    model.layer = nn.Linear(4, 4)
    model.forward = types.MethodType(lambda self, x: self.layer(self.layer(x).sin()), model)
    stats = forged_fx.calibrate(model, [x])
    forged = forged_fx.transform(model, stats, 0, graph=False)
    assert list(stats.sites) == ["layer", "layer#1"] and torch.equal(forged(x), model(x))


def test_a_layer_that_calls_itself_in_place_is_no_activation(x):
    class Flagged(nn.Linear):
        inplace = True

    model, before = Flagged(4, 4), x.clone()
    forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0.5, graph=False)(x)
    assert torch.equal(x, before)


def test_a_checkpoint_that_runs_a_layer_twice_recomputes_both(x):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.checkpointed = nn.Linear(4, 4), False

        def both(self, x):
            return self.layer(self.layer(x).sin())

        def forward(self, x):
            x = x.tanh() if x.sum() < 1e9 else x
            if not self.checkpointed:
                return self.both(x)
            return torch.utils.checkpoint.checkpoint(self.both, x, use_reentrant=False)

    torch.manual_seed(0)
    model, gradients = Twice().eval(), []
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0.5)
    for forged.checkpointed in (False, True):
        leaf = x.clone().requires_grad_()
        gradients += torch.autograd.grad(forged(leaf).square().sum(), (leaf, forged.layer.weight))
    assert torch.equal(gradients[0], gradients[2]) and torch.equal(gradients[1], gradients[3])


def test_a_call_that_calibration_never_saw_is_an_error(x):
    model = Loop()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]))
    with pytest.raises(RuntimeError, match=r"'a' makes its call number 3 .* calibration saw 3 at most.*exclude='a\*'"):
        forged(torch.randn(4, 5, 4))


def test_copies_are_complete(model, x):
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-3)
    twins = [copy.deepcopy(forged)]
    if not isinstance(model, Parametrized):  # PyTorch pickles no parametrized module, plain or forged
        buffer = io.BytesIO()
        torch.save(forged, buffer)
        buffer.seek(0)
        twins.append(torch.load(buffer, weights_only=False))
    with torch.no_grad():
        expected = forged(x)
        for twin in twins:
            assert _equal(twin(x), expected)
            assert str(forged_fx.describe(twin)) == str(forged_fx.describe(forged))
            forged_fx.set_ratio(twin, 0)
            assert not _equal(twin(x), expected) and _equal(forged(x), expected)


def test_it_remains_the_model_that_it_was(model, x):
    """Names, signatures, modes, checkpoints."""
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-3)
    assert [name for name, _ in forged.named_modules()] == [name for name, _ in model.named_modules()]
    for name, module in model.named_modules():  # (the class that parametrize injects is each module's own)
        plain = type(module).__base__ if type(module).__module__ == "torch.nn.utils.parametrize" else type(module)
        assert isinstance(forged.get_submodule(name), plain)
    for name, module in model.named_modules():
        assert inspect.signature(forged.get_submodule(name).forward) == inspect.signature(module.forward), name
    assert all(t.dtype == torch.float32 for k, t in forged.half().state_dict().items() if "forged" in k)
    forged.float()
    assert forged.load_state_dict(model.state_dict()) == ([], [])
    forged.load_state_dict(forged.state_dict())
    assert all(module.training for module in forged.train().modules())


def test_users_hooks_still_run(x):
    model, seen = DataBranch(), []
    model.register_forward_hook(lambda *_: seen.append("model"))
    model.b.register_forward_pre_hook(lambda module, args: seen.append("b"))
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]))
    seen.clear()
    forged(x)
    assert seen == ["b", "model"]


def test_hooks_alone_make_a_model_no_graph(x):
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_forward_hook(lambda module, args, result: result + 1)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0)
    assert torch.equal(forged(x), model(x))
    assert "has hooks" in str(forged_fx.describe(forged))


def test_gradients_true_and_straight_through(x):
    model = FunctionalCall()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-3)
    gradients = []
    for context in (torch.enable_grad(), forged_fx.straight_through()):
        leaf = x.clone().requires_grad_()
        with context:
            gradients.append(torch.autograd.grad(forged(leaf).sum(), leaf)[0])
    assert not torch.equal(*gradients)


def test_compiled_equals_eager(model, x):
    """Where weights do not tell a module's own calls, it stays eager; the rest is compiled around it."""
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-3)
    with torch.no_grad():
        assert torch.allclose(torch.compile(forged, backend="forged")(x).float(), forged(x).float(), atol=1e-6)


class CallsAround(DataBranch):
    """Calls of its own ahead of a part, and behind it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.part = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))

    def forward(self, x):
        return F.linear(self.part(F.linear(super().forward(x), self.weight)), self.weight)


def test_any_number_of_classes_is_compiled(x):
    """Dynamo compiles a code a limited number of times: that of each forged class is its own."""
    torch._dynamo.reset()
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        kind = type("OfItsOwn", (nn.Sequential,), {})
        model = kind(nn.Linear(4, 4), nn.ReLU()).eval()
        forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), graph=False)
        with torch.no_grad():
            torch.compile(forged, backend="eager", fullgraph=True)(x)  # raises at the limit


@pytest.mark.parametrize("compiled_in_place", [False, True])
def test_a_part_is_compiled_once(compiled_in_place, x):
    torch.manual_seed(0)
    model = CallsAround().eval()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-3)
    with torch.no_grad():
        eager = forged(x)
        if compiled_in_place:
            forged.part.compile(backend="forged")
        else:
            forged.part = torch.compile(forged.part, backend="forged")
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        graphs = []
        for _ in range(3):
            assert torch.allclose(forged(x), eager, atol=1e-6)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] >= 1 and graphs == 3 * graphs[:1]


def test_what_a_hook_multiplies_is_a_call_of_who_called_the_module(x):
    model = CallsAround().eval()
    model.part.register_forward_hook(lambda module, args, output: output + F.linear(args[0], model.weight))
    stats = forged_fx.calibrate(model, [x])
    assert [site for site in stats.sites if site.startswith("#")] == ["#0", "#1", "#2"]
    forged = forged_fx.transform(model, stats, 2**-3)
    assert not _equal(forged(x), model(x))
    forged_fx.set_ratio(forged, 0)
    assert _equal(forged(x), model(x))


def test_checkpointing_repeats_the_forward(x):
    model = FunctionalCall()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-3)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    forged(leaves[0]).sum().backward()
    torch.utils.checkpoint.checkpoint(forged, leaves[1], use_reentrant=False).sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


class SharedUnderCheckpoints(nn.Module):
    """A shared block in checkpoints, in a nested one and in none: a backward recomputes some of its calls."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
        self.reentrant = reentrant

    def run(self, function, x):
        if self.reentrant is None:
            return function(x)
        return torch.utils.checkpoint.checkpoint(function, x, use_reentrant=self.reentrant)

    def twice(self, x):
        return self.run(self.block, self.block(x))

    def forward(self, x):
        return self.block(self.run(self.twice, self.run(self.block, self.block(x) if x.sum() < 1e9 else x)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_backward_recomputes_has_the_thresholds_of_its_first_run(x, reentrant):
    torch.manual_seed(0)
    models = [SharedUnderCheckpoints(), SharedUnderCheckpoints(reentrant)]
    models[1].load_state_dict(models[0].state_dict())
    stats = forged_fx.calibrate(models[0], [x])
    assert list(stats.sites)[-1] == "block.2#4"
    gradients = []
    for model in models:
        forged, leaf = forged_fx.transform(model, stats, 2**-2), x.clone().requires_grad_()
        for _ in range(2):
            leaf.grad = None  # (a reentrant checkpoint knows .backward() only)
            out = forged(leaf).square().sum()
            out.backward(retain_graph=not reentrant)
            gradients.append(leaf.grad.clone())
            if not reentrant:
                out.backward()
                gradients.append(leaf.grad / 2)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_attentions_fused_kernel_gives_way_where_its_layer_is_the_whole_model(x):
    model = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-3)
    assert [row.site for row in forged_fx.describe(forged)] == ["self_attn", "self_attn#1", "linear1", "linear2"]
    with torch.no_grad(), fast_path_off():
        expected = forged(x)
        assert not torch.equal(expected, model(x))
    with torch.no_grad():
        assert torch.equal(forged(x), expected)


def test_a_scripted_model_is_an_error(x):
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    model, stats = torch.jit.script(plain), forged_fx.calibrate(plain, [x])
    with pytest.raises(ValueError, match="calibrate the model that it was made from"):
        forged_fx.calibrate(model, [x])
    with pytest.raises(ValueError, match="forge the model that it was made from"):
        forged_fx.transform(model, stats)


@pytest.mark.parametrize("graph", [True, False], ids=["one graph", "module by module"])
def test_a_scripted_module_within_moves_along(graph, x):
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.BatchNorm1d(5)), nn.Linear(4, 2)).eval()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-3, graph=graph)
    expected = forged(x)
    assert forged.double().get_buffer("2.forged_threshold").dtype == torch.float32
    assert forged.get_buffer("1.running_mean").dtype == torch.float64 and torch.equal(forged.float()(x), expected)


class Quoted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({'a"b': nn.Linear(4, 4)})

    def forward(self, x):
        return self.layers['a"b'](x)


def test_a_name_that_torch_fx_cannot_write(x):
    model = Quoted()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0)
    assert torch.equal(forged(x), model(x))
    assert "cannot be written as Python" in str(forged_fx.describe(forged))


class Siamese(nn.Module):
    """What `embed` runs, runs twice in a forward pass."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), SharedLayer())
        self.head = nn.Linear(8, 2)

    def embed(self, x):
        return self.embedding(x)

    def forward(self, a, b):
        if a.shape[1] > 9:
            raise ValueError
        return self.head(torch.cat([self.embed(a), self.embed(9 * b)], -1)) if a.sum() < 1e9 else a


@torch.no_grad()
def test_a_pass_begins_wherever_the_model_is_entered(x):
    torch.manual_seed(0)
    model = Siamese().eval()
    stats = forged_fx.calibrate(model, [{"a": x, "b": x}])
    forged = forged_fx.transform(model, stats, 0.2)
    assert stats.sites["embedding.2.a#5"]
    seen = []
    hook = forged.head.register_forward_hook(lambda module, args, result: seen.append(args[0]))
    expected = forged(x, x)
    hook.remove()
    for _ in range(2):
        assert torch.equal(forged.embed(x), seen[0][..., :4])
        assert torch.equal(forged.forward(x, x), expected)
        assert torch.equal(forged(x, x), expected)
        with pytest.raises(ValueError):
            forged(x.repeat(1, 2, 1), x)
    assert not torch.equal(forged.embed(9 * x), seen[0][..., 4:])  # that was the second run
    part = forged.embedding[:1].half()  # it is of the forged class
    assert part(x.half()).dtype == torch.half


class OwnForward(DataBranch):
    """Its forward is the instance's."""

    def __init__(self):
        super().__init__()
        self.forward = self.fast

    def fast(self, x):
        return super().forward(x) @ self.a.weight

    @staticmethod
    def expected(f, x, model):
        return f("#0", model.b(f("b", model.a(f("a", x))))) @ model.a.weight


class OwnForwards(DataBranch):
    """A layer's, which makes more calls than its class's, and that of another, which runs its class's."""

    def __init__(self):
        super().__init__()
        self.a.A = nn.Parameter(torch.randn(4, 4))
        self.a.forward = types.MethodType(_low_rank, self.a)
        self.b.forward = functools.partial(_twice, self.b, self.b.forward)

    @staticmethod
    def expected(f, x, model):
        x = F.linear(f("a", x), model.a.weight) + f("a#1", x) @ model.a.A
        return 2 * F.linear(f("b", x), model.b.weight, model.b.bias)


def _low_rank(self, x):
    return F.linear(x, self.weight) + x @ self.A


def _twice(self, plain, x):
    return 2 * plain(x)


@torch.no_grad()
@pytest.mark.parametrize("kind", [OwnForward, OwnForwards])
@pytest.mark.parametrize("audited", [False, True])
def test_a_forward_of_the_instances_own_is_forged(kind, audited, x, tmp_path):
    torch.manual_seed(0)
    model = kind().eval()
    stats = forged_fx.calibrate(model, [x])
    stats.save(tmp_path / "stats")
    forged = forged_fx.transform(model, stats if audited else tmp_path / "stats", 2**-3)

    def f(site, x):
        return torch.where(x.abs() < stats.sites[site].c_max / 8, 0.0, x)

    expected = kind.expected(f, x, model)
    assert not torch.equal(expected, model(x))
    for twin in (forged, copy.deepcopy(forged)):
        assert torch.equal(twin(x), expected)
        twin.b.weight.zero_()  # its own
        assert not torch.equal(twin(x), expected)


class Named(nn.Linear):
    def forward(self, features, scale=1):
        return F.linear(features, self.weight, self.bias) * scale


class CallsByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = Named(4, 4)

    def forward(self, x):
        return self.a(x) if x.mean() < 1 else self.a(scale=2, features=x)


@torch.no_grad()
def test_a_layer_that_is_called_by_name_on_another_path(x):
    model = CallsByName().eval()
    stats = forged_fx.calibrate(model, [x])
    forged = forged_fx.transform(model, stats, 2**-1)
    shifted = x + 2
    cut = torch.where(shifted.abs() < stats.sites["a"].c_max / 2, 0.0, shifted)
    assert torch.equal(forged(shifted), 2 * model.a(cut)) and not torch.equal(cut, shifted)
    with pytest.raises(TypeError, match="'a' is called without 'features', which has a threshold"):
        forged.a(scale=2)


class Registered:
    kinds: ClassVar = []

    def __init_subclass__(cls, *, kind, **others):
        super().__init_subclass__(**others)
        cls.kinds.append(kind)


class OfAKind(Registered, nn.Linear, kind="layer"):
    pass


def test_what_a_class_asks_of_its_subclasses_is_not_asked_of_the_forged_one(x):
    model = DataBranch()
    model.a = OfAKind(4, 4)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]))
    assert isinstance(forged.a, OfAKind) and Registered.kinds == ["layer"]


class Paths(nn.Module):
    """One call of its own, another one on each path."""

    def __init__(self, other):
        super().__init__()
        self.weight, self.other = nn.Parameter(torch.randn(4, 4)), other

    def forward(self, x):
        return x @ self.weight if x.mean() > 0 else self.other(x, self.weight)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (lambda x, w: (w @ x.transpose(-1, -2)).transpose(-1, -2), "matmul with its data where a parameter was"),
        (lambda x, w: torch.einsum("...i,ij->...j", x, w), "einsum in the place of matmul"),
    ],
    ids=["another place", "another call"],
)
def test_a_call_that_is_another_one_on_another_path_is_an_error(other, says, x):
    model = Paths(other).eval()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x.abs()]), 2**-3)
    forged(x.abs())
    with pytest.raises(RuntimeError, match=f"calls {says}.*calibrate on data that takes both"):
        forged(-x.abs())


class Skips(nn.Module):
    """On one path it makes a call less, and all that follow have other numbers."""

    def __init__(self, first, then):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
        self.first, self.then = first, then

    def forward(self, x):
        return self.then(self, self.first(self, x) if x.mean() > 0 else x)


SKIPS = {
    "a product of data": (lambda m, x: x @ (x.mT @ x), lambda m, x: x @ m.b),
    "another kind": (lambda m, x: x @ (x.mT @ x), lambda m, x: F.linear(x, m.b)),
    "a parameter": (lambda m, x: x @ m.a, lambda m, x: x @ m.b),
    "a view": (lambda m, x: x @ m.a.t(), lambda m, x: x @ m.b.t()),
    "one parameter twice": (lambda m, x: x @ m.a, lambda m, x: x @ m.a.t()),
    "parameters of which one is the same": (
        lambda m, x: torch.einsum("...i,ij,jk->...k", x, m.a, m.b), lambda m, x: torch.einsum("...i,ij->...j", x, m.b),
    ),
    "what is made of one": (lambda m, x: x @ F.normalize(m.a), lambda m, x: x @ F.normalize(m.b)),
    "one helper": (lambda m, x: helped(x, m.a), lambda m, x: helped(x, m.b)),
    "a loop": (lambda m, x: functools.reduce(helped, [m.a] * 3, x), lambda m, x: helped(x, m.b)),
}  # fmt: skip


class Stack(nn.Module):
    """Weights in one parameter. skip: the call that is left out."""

    def __init__(self, parts):
        super().__init__()
        self.w, self.parts, self.skip = nn.Parameter(torch.randn(4, 4, 4)), parts, None

    def forward(self, x):
        for i, w in enumerate(self.parts(self.w)):
            if i != self.skip:
                x = torch.einsum("...i,ij->...j", x, w)
        return x


PARTS_OF_ONE = {
    "an index": lambda w: (w[i] for i in range(4)),
    "unbound": lambda w: w.unbind(0),
    "gone through": lambda w: w,
    "another dimension": lambda w: (w[:, i].t() for i in range(4)),
    "parts of a part": lambda w: w[1:].chunk(3),
}


@pytest.mark.parametrize("parts", PARTS_OF_ONE.values(), ids=PARTS_OF_ONE)
def test_parts_of_one_parameter_are_told_apart(parts, x, tmp_path):
    def squeezed(w):
        return (part.squeeze(0) for part in parts(w))

    model = Stack(squeezed).eval()
    stats = forged_fx.calibrate(model, [x])
    stats.save(tmp_path / "stats")
    read = forged_fx.Stats.load(tmp_path / "stats")
    assert read.ways == stats.ways
    flat = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    for taken in (stats, read):
        forged = forged_fx.transform(model, taken, 2**-3, graph=False, example=((x,), {}))
        expected = forged(x)
        nn.utils.vector_to_parameters(torch.cat([flat[:8], flat])[8:], forged.parameters())  # elsewhere in memory
        given = {name: p.detach().clone() for name, p in forged.named_parameters()}
        assert torch.equal(forged(x), expected)
        assert torch.equal(torch.func.functional_call(forged, given, (x,)), expected)
        forged.skip = 3
        forged(x)  # a loop may be shorter
        forged.skip = 1
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode(), pytest.raises(RuntimeError, match=r"call number 1 .* on another part of a parameter"):
                forged(x)
    stats.ways = {  # as from a file of an earlier version
        call: tuple((place, *(weight.partition("[")[0] for weight in met)) for place, *met in ways)
        for call, ways in stats.ways.items()
    }
    forged_fx.transform(model, stats, 2**-3, graph=False)
    model.skip = 1
    forged_fx.transform(model, stats, 2**-3, graph=False, example=((x,), {}))(x)


def test_a_part_may_be_longer_or_be_picked_by_data(x):
    class Picks(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.p = nn.Parameter(torch.randn(4, 4, 4)), nn.Parameter(torch.randn(9, 4))

        def forward(self, x):
            for hit in (x.sum((0, 1)) > 0).nonzero():
                x = x @ self.w[hit[0]]
            start = 5 - x.shape[1]
            return x @ self.p[start : start + 3].t() + x @ self.p[5:8].t()

    torch.manual_seed(0)
    model = Picks().eval()
    one, other = x.abs() * torch.tensor([1.0, 1, -1, -1]), x.abs()[:, :4] * torch.tensor([-1.0, 1, 1, -1])
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [one]), 0.0, graph=False)
    assert torch.equal(forged(one), model(one)) and torch.equal(forged(other), model(other))
    assert {site.left_out for site in forged_fx.calibrate(model, [one, other]).sites.values()} == {None}


def helped(x, weight):
    return x @ F.normalize(weight)


@pytest.mark.parametrize(("first", "then"), SKIPS.values(), ids=SKIPS)
def test_a_call_that_is_left_out_does_not_shift_the_thresholds_of_others(first, then, x):
    model = Skips(first, then).eval()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x.abs()]), 2**-3)
    forged(x.abs())
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"call number 0 .* in another place of its code"):
        forged(-x.abs())


class Twice(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x, y):
        return self.part(x) + self.part(y)


def test_nor_where_a_module_runs_several_times(x):
    model = Twice(Skips(*SKIPS["what is made of one"])).eval()
    stats = forged_fx.calibrate(model, [{"x": x.abs(), "y": x.abs()}])
    forged = forged_fx.transform(model, stats, 2**-3, graph=False)
    forged(x.abs(), x.abs())
    with pytest.raises(RuntimeError, match=r"'part' makes its call number 2 .* in another place of its code"):
        forged(x.abs(), -x.abs())


class SecondView(nn.Module):
    """In train mode it looks at its input twice."""

    def __init__(self, part):
        super().__init__()
        self.part, self.last = part, nn.Linear(4, 2)

    def forward(self, x):
        h = self.part(x)
        if self.training:
            h = h + self.part(-x)
        return self.last(h)

    def features(self, x):
        return self.part(x) + self.part(-x)


PARTS = {
    "a layer": lambda: nn.Linear(4, 4),
    "an activation": nn.ReLU,
    "calls of its own": lambda: ByHand(F.linear),
    "a layer within": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
}


def second_view(part, x):
    torch.manual_seed(0)
    model = SecondView(PARTS[part]()).eval()
    if part == "calls of its own":
        model.part.last = nn.Identity()
    stats = forged_fx.calibrate(model, [x.abs()], where="activations")
    where = "activations" if part == "an activation" else "linear+conv"
    return forged_fx.transform(model, stats, 2**-3, where=where, graph=False)


@pytest.mark.parametrize("part", PARTS)
def test_a_module_that_runs_more_often_than_in_calibration_is_an_error(part, x):
    forged = second_view(part, x)
    forged(x)
    forged.train()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"'part.*' makes its call number 1 .* calibration saw 1 at most"):
            forged(x.abs())
    assert torch.equal(forged.eval()(x), forged(x))


def test_it_is_one_compiled_too(x):
    forged = second_view("a layer", x)
    expected = forged(x)
    compiled = torch.compile(forged, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected) and torch.equal(compiled(x), expected)
    with pytest.raises(RuntimeError, match="calibration saw 1 at most"):
        torch.compile(forged.train(), backend="eager")(x)


@pytest.mark.parametrize("part", PARTS)
def test_each_run_that_a_user_makes_is_a_first_one(part, x):
    forged = second_view(part, x)
    expected = forged.part(x)
    assert torch.equal(forged.part(x), expected)
    assert torch.equal(forged.features(x), expected + forged.part(-x))
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        forged(torch.ones(2, 5))
    assert torch.equal(forged(x), forged.last(expected))


@pytest.mark.parametrize("part", PARTS)
def test_what_a_hook_calls_is_no_run_of_the_models(part, x):
    """A probe, say, of what is within."""
    forged = second_view(part, x)
    expected, seen = forged(x), []
    handle = forged.part.register_forward_pre_hook(lambda module, args: seen.append(forged.last(args[0])))
    assert torch.equal(forged(x), expected) and len(seen) == 1
    handle.remove()
    with pytest.raises(RuntimeError, match="calibration saw 1 at most"):
        forged.train()(x.abs())


class Forces(nn.Module):
    """It asks for a gradient in its forward, for which a checkpoint runs its layers again."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.run = nn.Linear(4, 4), nn.Linear(4, 1), lambda function, x: function(x)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            h = self.run(lambda x: self.first(x).tanh(), x)
            self.last(h).sum().backward()
        return x.grad


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_a_backward_within_the_forward_recomputes_is_the_same_run(reentrant, x):
    torch.manual_seed(0)
    model = Forces().eval()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0.2, graph=False)
    expected = forged(x)
    forged.run = functools.partial(checkpoint, use_reentrant=reentrant)
    assert torch.equal(forged(x), expected) and not torch.equal(expected, model(x))


def test_statistics_of_all_paths_know_the_calls_of_each(x):
    first, then = SKIPS["a product of data"]
    model = Skips(first, then).eval()
    stats = forged_fx.calibrate(model, [x.abs()]).merge(forged_fx.calibrate(model, [-x.abs()]))
    assert stats == forged_fx.calibrate(model, [x.abs(), -x.abs()])
    # what is a weight's call on one path only has no threshold; what runs on one path alone keeps its own
    assert {name: site.left_out for name, site in stats.sites.items()} == {"#0": OTHER_CALL, "#2": None}
    forged = forged_fx.transform(model, stats, 0.0)
    assert torch.equal(forged(x.abs()), model(x.abs())) and torch.equal(forged(-x.abs()), model(-x.abs()))


def test_activations_that_are_left_out_do_not_shift_the_thresholds_of_others(x):
    model = Skips(lambda m, x: F.relu(x @ m.a), lambda m, x: F.relu(x - 1) @ m.b).eval()
    stats = forged_fx.calibrate(model, [x.abs()], where="activations")
    forged = forged_fx.transform(model, stats, 2**-3, where="activations")
    forged(x.abs())
    with pytest.raises(RuntimeError, match=r"call number 0 .* in another place of its code"):
        forged(-x.abs())


class Unrolled(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        h = torch.zeros(4)
        for one in x.unbind(-2):
            h = torch.tanh(self.fc(one) + h) @ self.fc.weight
        return h


@pytest.mark.parametrize("where", ["activations", "linear+conv"])
def test_a_loop_may_be_shorter_than_in_calibration(where, x):
    model = Unrolled().eval()
    stats = forged_fx.calibrate(model, [x], where="activations")
    forged = forged_fx.transform(model, stats, 0.0, where=where, graph=False)
    assert torch.equal(forged(x[..., :2, :]), model(x[..., :2, :]))


def test_a_call_may_be_reached_by_another_way(x):
    class Checkpoints(Skips):
        def run(self, function, x):
            return checkpoint(function, x, use_reentrant=False) if self.checkpointed else function(x)

        def forward(self, x):
            return self.run(lambda x: self.first(self, x), x) if x.mean() > 0 else x

    model = Checkpoints(lambda m, x: x @ F.normalize(m.a), None).eval()
    model.checkpointed = True
    stats = forged_fx.calibrate(model, [x.abs()])
    model.checkpointed = False
    forged = forged_fx.transform(model, stats, 0.0)
    assert torch.equal(forged(x.abs()), model(x.abs()))


def test_attention_may_be_given_a_mask_or_none(x):
    model, mask = nn.MultiheadAttention(4, 2, batch_first=True).eval(), torch.zeros(x.shape[:-1], dtype=torch.bool)

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = model

        def forward(self, x, mask=None):
            return self.attention(x, x, x, key_padding_mask=mask)[0]

    forged = forged_fx.transform(plain := Masked().eval(), forged_fx.calibrate(plain, [x]), 0.0, graph=False)
    assert torch.equal(forged(x, mask), plain(x, mask)) and torch.equal(forged(x), plain(x))


def test_code_that_was_changed_since_calibration_is_taken_as_it_is(x):
    """(Statistics are of files; of code of another digest no place is known.)"""
    model = Skips(*SKIPS["what is made of one"]).eval()
    stats = forged_fx.calibrate(model, [x.abs()])
    assert all("forward@" in place for ways in stats.ways.values() for place, *_ in ways)
    stats.ways = {
        call: tuple((place.replace("forward@", "forward@0"), *rest) for place, *rest in ways)
        for call, ways in stats.ways.items()
    }
    forged_fx.transform(model, stats, 2**-3)(-x.abs())
    stats.ways = {}  # as from a file of an earlier version
    forged_fx.transform(model, stats, 2**-3)(-x.abs())


def test_parameters_in_one_memory_are_told_apart(x):
    model = Skips(lambda m, x: x @ m.a, lambda m, x: x @ m.b).eval()
    flat = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    nn.utils.vector_to_parameters(flat, model.parameters())
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x.abs()]), 0.0, graph=False)
    assert torch.equal(forged(x.abs()), model(x.abs()))


def test_attention_that_takes_another_path_is_an_error(x):
    class Weighs(Attention):
        def forward(self, x, weights=True):
            return self.attention(x, x, x, need_weights=weights)[0]

    model = Weighs().eval()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-3, graph=False)
    forged(x)
    with pytest.raises(RuntimeError, match=r"'attention' makes its call number 1 .* in another place of its code"):
        forged(x, weights=False)


def test_a_call_that_is_left_alone_may_be_another_one_but_for_one_with_a_threshold(x):
    class Leaves(Skips):
        def __init__(self):
            super().__init__(None, None)
            self.c = nn.Parameter(torch.randn(4, 4))

        def forward(self, x, skip=False):
            if skip:
                return x @ self.b
            h = x @ self.a if x.mean() > 0 else x @ self.c
            return h @ self.b

    model = Leaves().eval()
    stats = forged_fx.calibrate(model, [x.abs()])
    forged = forged_fx.transform(model, stats, 0.0, exclude="#0", graph=False)
    assert torch.equal(forged(-x.abs()), model(-x.abs()))
    with pytest.raises(RuntimeError, match=r"call number 0 .* in another place"):
        forged_fx.transform(model, stats, 0.0, graph=False)(-x.abs())


@pytest.mark.parametrize("graph", [True, False], ids=["one graph", "module by module"])
def test_parametrizations_can_be_taken_off_again(graph):
    def make():
        torch.manual_seed(0)
        made = nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal
        return nn.Sequential(*(ahead(nn.Linear(4, 4)) for ahead in made), nn.Linear(4, 2)).eval()

    model, x = make(), torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-2, graph=graph)
    expected = forged(x)
    for layer in (forged.get_submodule("0"), forged.get_submodule("1")):
        nn.utils.parametrize.remove_parametrizations(layer, "weight")
        assert isinstance(layer.weight, nn.Parameter) and not nn.utils.parametrize.is_parametrized(layer)
        assert torch.allclose(forged(x), expected, atol=1e-6) and not torch.allclose(forged(x), model(x), atol=1e-3)
        assert torch.equal(model(x), make()(x))
    assert torch.equal(copy.deepcopy(forged)(x), forged(x))
    forged_fx.set_ratio(forged, 0)
    assert torch.allclose(forged(x), model(x), atol=1e-6)
    last = forged.get_submodule("2")
    nn.utils.parametrize.register_parametrization(last, "weight", nn.Identity())
    with pytest.raises(RuntimeError, match="Serialization of parametrized modules is only supported through state_di"):
        copy.copy(last)


class CallsItself(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x, depth=2):
        if depth:
            x = F.linear(self(x / 2, depth - 1), self.w).relu()
        return F.linear(x, self.w)


def test_each_call_of_a_module_that_calls_itself_is_counted_once():
    torch.manual_seed(0)
    model, x = CallsItself().eval(), torch.randn(3, 4)
    stats = forged_fx.calibrate(model, [x])
    assert list(stats.sites) == ["#0", "#1", "#2", "#3", "#4"]
    whole, by_module = (forged_fx.transform(model, stats, 2**-2, graph=graph) for graph in (True, False))
    assert isinstance(whole, torch.fx.GraphModule)
    assert torch.equal(by_module(x), whole(x)) and not torch.equal(by_module(x), model(x))


def test_a_forward_that_is_set_on_a_forged_module_comes_with_a_warning():
    """It may take the thresholds' place, or run them: a wrapper calls the forward that it replaces."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(6, 4)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0.5, graph=False)
    expected, inner = forged(x), forged[2].forward
    with pytest.warns(UserWarning, match="lost unless the new one calls that"):
        forged[2].forward = lambda x: 2 * inner(x)
    assert torch.equal(forged(x), 2 * expected)


class LayerAroundLayers(nn.Module):
    """Its own one call is a layer's; and the layers within it run several times."""

    def __init__(self):
        super().__init__()
        self.weight, self.twice, self.last = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = F.linear(x, self.weight)
        return self.last(self.twice(20 * self.twice(h).relu()))


def test_a_root_that_is_like_a_layer_counts_the_runs_of_those_within(tmp_path):
    torch.manual_seed(0)
    model, x = LayerAroundLayers().eval(), torch.randn(6, 4)
    stats = forged_fx.calibrate(model, [x])
    stats.save(tmp_path / "stats")
    graph = forged_fx.transform(model, stats, 0.3)
    with pytest.warns(UserWarning, match="without an audit"):
        unaudited = forged_fx.transform(model, tmp_path / "stats", 0.3, graph=False)
    for forged in (forged_fx.transform(model, stats, 0.3, graph=False), unaudited):
        assert torch.equal(forged(x), graph(x)) and not torch.equal(forged(x), model(x))


class Locked(nn.Module):
    """What cannot be pickled is left out by its own account."""

    def __init__(self):
        super().__init__()
        self.fc, self.lock = nn.Linear(4, 2), threading.Lock()

    def __getstate__(self):
        return {key: value for key, value in vars(self).items() if key != "lock"}

    def __setstate__(self, state):
        assert "lock" not in state
        super().__setstate__(state)
        self.lock = threading.Lock()

    def forward(self, x):
        with self.lock:
            return F.linear(F.linear(x, self.fc.weight.T @ self.fc.weight), self.fc.weight, self.fc.bias)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_made_of_what_the_class_says_is_its_state(copied):
    torch.manual_seed(0)
    model, x = Locked().eval(), torch.randn(6, 4)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0.5, graph=False)
    assert torch.equal(copied(forged)(x), forged(x)) and not torch.equal(forged(x), model(x))


def test_data_may_be_a_parameter_of_the_callers():
    torch.manual_seed(0)
    model, x = Locked().eval(), torch.randn(6, 4)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0.5, graph=False)
    image = nn.Parameter(x.clone())
    assert torch.equal(forged(image), forged(x))


class Squares(torch.autograd.Function):
    """A layer by hand."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x


class ByHand(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.weight, self.last, self.run = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 2), run

    def forward(self, x):
        return self.last(self.run(x, self.weight).tanh())


def test_what_runs_within_a_function_with_a_backward_of_its_own_is_no_site():
    """A threshold there would be in no gradient."""
    torch.manual_seed(0)
    model, x = ByHand(Squares.apply).eval(), torch.randn(6, 4)
    stats = forged_fx.calibrate(model, [x])
    assert {name: site.left_out for name, site in stats.sites.items()} == {"#0": IN_FUNCTION, "last": None}
    with pytest.raises(ValueError, match=r"no site is left to forge \('#0': within a torch\.autograd\.Function"):
        forged_fx.transform(model, stats, 0.5, include="#0")


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_of_a_modules_own_calls_is_an_error_and_no_other_gradient(reentrant):
    """They run anew in the backward, when the module does not."""
    torch.manual_seed(0)
    model = ByHand(lambda x, w: checkpoint(F.linear, x, w, use_reentrant=reentrant)).eval()
    x = torch.randn(6, 4)
    stats = forged_fx.calibrate(model, [x])
    assert {name: site.left_out for name, site in stats.sites.items()} == {"#0": None, "last": None}
    forged = forged_fx.transform(model, stats, 0.5)
    with torch.no_grad():
        assert not torch.equal(forged(x), model(x))
    with pytest.raises(
        RuntimeError, match=r"'the model' checkpoints calls that it makes itself: .* no threshold reaches"
    ):
        forged(x.clone().requires_grad_())
    within = nn.Sequential(ByHand(F.linear), nn.Linear(2, 2)).eval()
    forged = forged_fx.transform(within, forged_fx.calibrate(within, [x]), 0.5, graph=False)
    found = []
    for run in (forged[0], lambda x: checkpoint(forged[0], x, use_reentrant=reentrant)):
        run(leaf := x.clone().requires_grad_()).square().sum().backward()
        found.append(leaf.grad)
    assert torch.equal(*found)


class TwiceInTraining(nn.Linear):
    def forward(self, x):
        return F.linear(2 * x if self.training else x, self.weight, self.bias)


@torch.no_grad()
@pytest.mark.parametrize("graph", [True, False])
def test_what_statistics_call_a_layer_may_branch_in_the_model_that_is_forged(graph):
    """They are of another class's modules, or of code that has changed since."""
    torch.manual_seed(0)
    plain, own = (nn.Sequential(kind(4, 4)).eval() for kind in (nn.Linear, TwiceInTraining))
    x = torch.randn(6, 4)
    own.load_state_dict(plain.state_dict())
    stats = forged_fx.calibrate(plain, [x])
    assert stats.sites["0"].layer
    forged = forged_fx.transform(own, stats, 2**-1, graph=graph, example=((x,), {})).train()
    cut = torch.where((2 * x).abs() < stats.sites["0"].c_max / 2, 0.0, 2 * x)
    assert torch.equal(forged(x), F.linear(cut, own[0].weight, own[0].bias))
