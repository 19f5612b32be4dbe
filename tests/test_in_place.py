"""Without gradients a threshold may take its input's memory, where that belongs to nobody else: seen by addresses."""

import pytest
import torch
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
    hardshrink = torch.hardshrink

    def watch(value, limit, out):
        before[out.data_ptr()] = value.data_ptr()
        return hardshrink(value, limit, out=out)

    def look(name):
        def hook(_, args):
            given.setdefault(name, before.get(args[0].data_ptr()) == args[0].data_ptr())

        return forged.get_submodule(name).register_forward_pre_hook(hook)

    handles = [look(name) for name in IN_PLACE]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "hardshrink", watch)
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


def sums(run):
    """How many ran in place, and how many did not."""
    with torch.profiler.profile() as profile:
        run()
    names = [event.name for event in profile.events()]
    return names.count("aten::add_"), names.count("aten::add")


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


def test_errors_are_the_operators(forged, x):
    with torch.no_grad(), pytest.raises(TypeError, match="cast it to one of"):
        forged.double().to(torch.float16).to(torch.complex64)(x.to(torch.complex64))
