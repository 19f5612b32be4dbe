"""Without gradients a threshold may take its input's memory, where that belongs to nobody else: seen by addresses."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import forged_fx

IN_PLACE = {"second": True, "joined": False, "branch": False, "head": True}


class Net(nn.Module):
    """A chain, a residual stream that is read again, a value that two sites read, one that is stretched."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1)
        self.joined, self.branch = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.pooled = nn.AdaptiveAvgPool2d(1)
        self.narrow, self.head = nn.Linear(8, 1), nn.Linear(8, 4)

    def forward(self, x):
        x = self.second(self.act(self.first(x)))
        x = x + self.joined(x)
        x = self.branch(x) + x
        x = self.pooled(x).flatten(1).clone()
        wide = self.narrow(x.clone()).expand(-1, 8)
        return self.head(nn.functional.gelu(x + wide)) + nn.functional.linear(wide, self.head.weight)


@pytest.fixture
def x():
    return torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def forged(x):
    torch.manual_seed(0)
    model = Net().eval()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), ratio=2**-2)
    assert isinstance(forged, torch.fx.GraphModule)
    return forged


def addresses(forged, run):
    """Site -> whether its layer was given the memory that the threshold read."""
    given, before = {}, {}

    def watched(function):
        def watch(value, *args, **kwargs):
            source = value.data_ptr()
            result = function(value, *args, **kwargs)
            before[result.data_ptr()] = source
            return result

        return watch

    def look(name):
        def hook(_, args):
            given.setdefault(name, before.get(args[0].data_ptr()) == args[0].data_ptr())

        return forged.get_submodule(name).register_forward_pre_hook(hook)

    handles = [look(name) for name in IN_PLACE]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("hardshrink", "threshold", "threshold_"):
            patch.setattr(torch, name, watched(getattr(torch, name)))
        run()
    for handle in handles:
        handle.remove()
    return given


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_values_are_the_recorded_runs(forged, x, mode):
    expected, kept = forged(x).detach(), x.clone()
    with mode():
        assert torch.equal(forged(x), expected)
        assert torch.equal(forged(x), expected)
    assert torch.equal(x, kept)


def test_on_other_devices_it_is_the_operator(forged, x):
    with torch.no_grad():
        shape = forged(x).shape
        assert forged.to("meta")(x.to("meta")).shape == shape


def test_only_memory_that_nobody_else_owns_is_taken(forged, x):
    with torch.no_grad():
        assert addresses(forged, lambda: forged(x)) == IN_PLACE
    assert not any(addresses(forged, lambda: forged(x)).values()), "a gradient needs the input as it was"


def counts(run, *operators):
    """How often each ran."""
    with torch.profiler.profile() as profile:
        run()
    names = [event.name for event in profile.events()]
    return tuple(names.count(f"aten::{name}") for name in operators)


def sums(run):
    """How many ran in place, and how many did not."""
    return counts(run, "add_", "add")


def test_sums_too_take_only_memory_that_nobody_else_owns(forged, x):
    expected = forged(x).detach()
    assert sums(lambda: forged(x)) == (0, 4), "a gradient may need what is added"
    with torch.no_grad():
        assert sums(lambda: forged(x)) == (3, 1)  # one of them is laid out in another way than what is added to it
        kept, handles = [], []
        for name in ("second", "branch"):
            layer = forged.get_submodule(name)
            handles.append(layer.register_forward_hook(lambda _, args, out: kept.append((out.view(-1), out.clone()))))
        assert sums(lambda: forged(x)) == (1, 3)
        for view, copied in kept:
            assert torch.equal(view, copied.flatten())
        for handle in handles:
            handle.remove()
        assert torch.equal(forged(x), expected)


@pytest.mark.parametrize("tail", [lambda y: y + y, lambda y: y + 1, lambda y: y + y[:1], lambda y: y + y.double()])
def test_sums_of_all_sorts(x, tail):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 8, 1)

        def forward(self, value):
            return tail(self.layer(value)), value.shape[0] + value.dim()

    model = Sum().eval()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), ratio=2**-2)
    expected, number = forged(x)
    with torch.no_grad():
        found, same_number = forged(x)
    assert torch.equal(found, expected) and found.dtype == expected.dtype and same_number == number


RELUS = {
    "module": nn.ReLU(),
    "module in place": nn.ReLU(inplace=True),
    "function": F.relu,
    "function in place": functools.partial(F.relu, inplace=True),
    "torch's": torch.relu,
    "torch's in place": torch.relu_,
    "method": lambda h: h.relu(),
    "method in place": lambda h: h.relu_(),
}


class Rectified(nn.Module):
    """A ReLU ahead of a layer, and what else is read in between."""

    def __init__(self, relu, between=None, make=torch.clone):
        super().__init__()
        self.make, self.relu, self.between, self.layer = make, relu, between, nn.Conv2d(4, 4, 1)

    def forward(self, x):
        h = self.make(x)
        y = self.relu(h)
        seen = () if self.between is None else (self.between(h, y),)
        return self.layer(y), *seen


def rectified(relu, x, t=0.25, between=None):
    model = Rectified(relu, between).to(x.dtype).eval()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x.nan_to_num(0, 1, 0)]), 2**-2)
    assert isinstance(forged, torch.fx.GraphModule)
    forged.layer.forged_threshold.fill_(t)
    return forged


@pytest.mark.parametrize("between", [None, lambda h, y: h + 0, lambda h, y: y])
@pytest.mark.parametrize("relu", RELUS.values(), ids=RELUS)
@pytest.mark.parametrize("t", [0.25, 2**-140, 0.0, -1.0, torch.nan])
def test_a_relu_and_a_threshold_give_what_they_give_one_by_one(relu, t, between):
    special = [0.25, -0.25, 0.2499, 0.0, -0.0, 2**-140, torch.inf, -torch.inf, torch.nan, -torch.nan]
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x = torch.cat([torch.tensor(special), torch.randn(54)]).reshape(1, 4, 4, 4).to(dtype)
        forged = rectified(relu, x, t, between)
        given = []
        forged.layer.register_forward_pre_hook(lambda _, args: given.append(args[0].clone()))  # noqa: B023
        seen = [forged(x)[-1]]
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                seen.append(forged(x)[-1])
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        for values in (given, seen) if between else (given,):
            expected, *found = [each.detach().view(bits) for each in values]
            assert len(found) == 2 and all(torch.equal(each, expected) for each in found)


@pytest.mark.parametrize("relu", RELUS.values(), ids=RELUS)
def test_a_relu_and_a_threshold_are_one_pass(relu):
    x = torch.randn(2, 4, 6, 6)
    forged = rectified(relu, x)
    with torch.no_grad():
        assert counts(lambda: forged(x), "relu", "relu_", "hardshrink", "threshold", "threshold_") == (0, 0, 0, 0, 1)


@pytest.mark.parametrize("relu", [nn.ReLU(), nn.ReLU(inplace=True)])
def test_a_relu_is_a_relu_when_it_runs(relu, monkeypatch):
    """Another module in its place, hooks, what PyTorch's is patched with, and who else has its input's memory are asked
    for in each run."""
    x = torch.randn(2, 4, 6, 6)
    forged = rectified(relu, x)
    operators = ("relu", "relu_", "hardshrink", "threshold", "threshold_")
    apart = (0, 1, 1, 0, 0) if relu.inplace else (1, 0, 1, 0, 0)

    def both_ways(count):
        with torch.no_grad():
            assert counts(lambda: forged(x), *operators) == count
            found = forged(x)[0]
        assert torch.equal(found, forged(x)[0])

    seen = []
    handle = forged.relu.register_forward_hook(lambda _, args, out: seen.append(out))
    both_ways(apart)
    handle.remove()
    assert len(seen) == 3
    handle = torch.nn.modules.module.register_module_forward_hook(lambda _, args, out: None)
    both_ways(apart)
    handle.remove()
    forged.relu = nn.LeakyReLU()
    both_ways((0, 0, 1, 0, 0))
    forged.relu = type("Doubled", (nn.ReLU,), {"forward": lambda self, h: 2 * h})(relu.inplace)
    both_ways((0, 0, 1, 0, 0))
    forged.relu = relu
    relu.forward = lambda h: 2 * h
    both_ways((0, 0, 1, 0, 0))
    del relu.forward
    both_ways((0, 0, 0, 0, 1))
    for owner, name in ((nn.ReLU, "forward"), (F, "relu")):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, lambda *args, **_: 2 * next(a for a in args if isinstance(a, torch.Tensor)))
            both_ways((0, 0, 1, 0, 0))
    both_ways((0, 0, 0, 0, 1))


@pytest.mark.parametrize("keep", [lambda out: out, lambda out: out.view(-1)], ids=["itself", "a view"])
@pytest.mark.parametrize("relu", [nn.ReLU(), nn.ReLU(inplace=True)])
def test_a_relu_writes_where_it_is_said_to(relu, keep, x):
    """Its input as a hook kept it: what a ReLU in place leaves there, or as it was."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), relu, nn.Conv2d(4, 4, 1)).eval()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-1)
    kept = []
    forged.get_submodule("0").register_forward_hook(lambda _, args, out: kept.append(keep(out)))
    with torch.no_grad():
        forged(x)
    forged(x)
    assert torch.equal(*kept) and bool((kept[0] < 0).any()) is not relu.inplace


LAYOUTS = {
    "gaps": lambda h: h[..., ::2],
    "stretched": lambda h: h[:, :, :1].expand(-1, -1, 6, -1),
    "moved": lambda h: h.permute(0, 1, 3, 2),
    "channels last": lambda h: h.contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_relu_and_a_threshold_leave_the_layout_that_they_leave_one_by_one(layout):
    model, x = Rectified(nn.ReLU(), make=layout).eval(), torch.randn(2, 4, 6, 6)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-2)
    given = []
    forged.layer.register_forward_pre_hook(lambda _, args: given.append((args[0].stride(), args[0].tolist())))
    forged(x)
    with torch.no_grad():
        forged(x)
    assert given[0] == given[1]


def test_modules_are_those_of_the_moment(forged, x):
    """A graph's modules are looked up anew in each run, and wherever attribute access would find them."""
    with torch.no_grad():
        expected = forged(x)
        forged.second = torch.compile(forged.second, backend="eager")  # holds the layer and its threshold further down
        assert torch.equal(forged(x), expected)
        forged.second = nn.Sequential(forged.second._orig_mod)
        with pytest.raises(AttributeError, match="forged_threshold"):
            forged(x)


def test_modules_within_others_that_were_exchanged(x):
    inner = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))
    model = nn.Sequential(inner, nn.ReLU()).eval()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), ratio=2**-2)
    with torch.no_grad():
        expected = forged(x)
        for way in (torch.jit.script, lambda module: torch.compile(module, backend="eager")):
            other = forged_fx.transform(model, forged_fx.calibrate(model, [x]), ratio=2**-2)
            setattr(other, "0", way(other.get_submodule("0")))
            assert torch.equal(other(x), expected)


def test_that_dynamo_runs_the_calls_changes_nothing(forged, x):
    @torch.compile(backend="eager")
    def inside(value):
        torch._dynamo.graph_break()  # what follows runs uncompiled, below Dynamo
        return run(value)

    run = torch._dynamo.disable(lambda value: addresses(forged, lambda: forged(value)))
    with torch.no_grad():
        assert inside(x) == IN_PLACE == addresses(forged, lambda: forged(x))


def test_what_a_hook_keeps_stays_as_it_was(forged, x):
    def features(keep):
        kept = []
        handle = forged.act.register_forward_hook(lambda _, args, out: kept.append(keep(out)))
        with torch.no_grad():
            found = addresses(forged, lambda: forged(x))
        handle.remove()
        return kept[0], found

    copied, found = features(torch.clone)
    assert found == IN_PLACE
    for keep in (lambda out: out, lambda out: out.view(-1), lambda out: out.untyped_storage()):
        kept, found = features(keep)
        assert not found["second"]
        values = kept.flatten() if isinstance(kept, torch.Tensor) else torch.tensor([]).set_(kept)
        assert torch.equal(values, copied.flatten())


def test_what_was_made_in_inference_mode_is_written_to_there_alone(forged, x):
    with torch.no_grad():
        expected = forged(x)
    twice = torch.inference_mode()(lambda _, args, out: out * 1)
    handles = [forged.get_submodule(name).register_forward_hook(twice) for name in ("act", "joined", "pooled")]
    with torch.no_grad():
        assert torch.equal(forged(x), expected)
    with torch.inference_mode():
        assert torch.equal(forged(x), expected)
        assert addresses(forged, lambda: forged(x))["second"]
    assert len(handles) == 3


def test_memory_of_another_library_is_not_taken(x):
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.values = x.flatten(1).numpy().copy()

        def forward(self, x):
            return torch.from_numpy(self.values)

    model = nn.Sequential(Table(), nn.Linear(108, 2)).eval()
    before = model[0].values.copy()
    stats = forged_fx.calibrate(model, [x])
    forged = forged_fx.transform(model, stats, 2**-1)
    assert isinstance(forged, torch.fx.GraphModule)
    with torch.no_grad():
        forged(x)
    assert (forged.get_submodule("0").values == before).all()


def test_a_module_that_hands_its_input_on_is_noticed(forged, x):
    """Exchanged after the graph was made: nothing is assumed of what a module returns."""
    forged.act = nn.Identity()
    kept = []
    forged.first.register_forward_hook(lambda _, args, out: kept.append(out))
    with torch.no_grad():
        plain = forged.first.forward(torch.ops.forged_fx.threshold(x, forged.first.forged_threshold))
        forged(x)
    assert torch.equal(kept[0], plain)


def test_who_watches_sees_thresholds(forged, x):
    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen = []
    with torch.no_grad(), Watch():
        forged(x)
    assert seen.count(torch.ops.forged_fx.threshold.default) == len(forged.threshold_buffers)
    with torch.no_grad():
        retraced = torch.fx.symbolic_trace(forged)
        compiled = torch.compile(forged, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), forged(x))
    found = retraced.graph.find_nodes(op="call_function", target=torch.ops.forged_fx.threshold.default)
    assert len(found) == len(forged.threshold_buffers)


def test_what_is_no_tensor_is_the_operators_to_refuse(forged, x):
    """Another module in the place of one may return anything."""
    forged.act = nn.Module()
    forged.act.forward = lambda h: (h, h)
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded), pytest.raises(RuntimeError, match="Expected a value of type 'Tensor'"):
            forged(x)


def test_errors_are_the_operators(forged, x):
    with torch.no_grad(), pytest.raises(TypeError, match="cast it to one of"):
        forged.double().to(torch.float16).to(torch.complex64)(x.to(torch.complex64))
