"""Several threads at once: which of two runs first at each step is forced, not left to chance."""

import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

import forged_fx
from forged_fx.modes import module_hooks

STEPS: dict[tuple[str, str], Callable] = {}  # (thread's name, place) -> what it does there


def at(place):
    STEPS.get((threading.current_thread().name, place), int)()


def wait(event):
    assert event.wait(20)


@pytest.fixture(autouse=True)
def _no_steps():
    yield
    STEPS.clear()


class Inside(nn.Module):
    def forward(self, x):
        at("inside")
        return x.relu()


class OwnCalls(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))
        self.inside = Inside()

    def forward(self, x):
        x = x @ self.a
        at("between")
        x = self.inside(x) if x.sum() < 1e9 else x
        at("behind")
        return x @ self.b


class SharedLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.inside = nn.Linear(4, 4), Inside()

    def forward(self, x):
        x = self.inside(self.a(x)) if x.sum() < 1e9 else x
        at("between")
        return self.a(4 * x)


class SharedCalls(nn.Module):
    def __init__(self):
        super().__init__()
        self.own = OwnCalls()

    def forward(self, x):
        return self.own(4 * self.own(x))


@pytest.fixture(params=[OwnCalls, SharedLayer, SharedCalls], ids=lambda kind: kind.__name__)
def model(request):
    torch.manual_seed(0)
    return request.param().eval()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 4, generator=generator) for _ in range(2)]


def run(**calls):
    """Each call in a thread of its name; what they return, in order."""
    found = {}

    def keep(name):
        try:
            found[name] = calls[name]()
        except Exception as error:
            found[name] = error

    threads = [threading.Thread(target=keep, args=(name,), name=name) for name in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for value in found.values():
        if isinstance(value, Exception):
            raise value
    return [found[name] for name in calls]


@torch.no_grad()
def quietly(model, x):
    return model(x)


def forge(model, batches):
    forged = forged_fx.transform(model, forged_fx.calibrate(model, batches), 2**-2)
    assert forged.forging.not_whole
    return forged, [quietly(forged, x) for x in batches]


def replica(module):
    """What nn.DataParallel makes of a module for each GPU; here for the CPU."""
    made = module._replicate_for_data_parallel()
    made._parameters = dict(module._parameters)
    made._modules = {name: replica(child) for name, child in module._modules.items()}
    return made


@pytest.mark.parametrize("replicated", [False, True])
def test_each_thread_counts_its_own_calls(model, batches, replicated):
    forged, expected = forge(model, batches)
    both = threading.Barrier(2)
    STEPS.update(dict.fromkeys([("one", "between"), ("two", "between")], lambda: both.wait(20)))
    one, two = (replica(forged) if replicated else forged for _ in range(2))
    found = run(one=lambda: quietly(one, batches[0]), two=lambda: quietly(two, batches[1]))
    assert all(map(torch.equal, found, expected))


def test_a_submodule_that_runs_in_another_thread_is_none_of_this_ones(batches):
    torch.manual_seed(0)
    forged, expected = forge(OwnCalls().eval(), batches)
    began, entered, done = threading.Event(), threading.Event(), threading.Event()
    STEPS["one", "between"] = lambda: (began.set(), wait(entered))
    STEPS["two", "between"] = lambda: wait(began)
    STEPS["two", "inside"] = lambda: (entered.set(), wait(done))

    def one():
        try:
            return quietly(forged, batches[0])
        finally:
            done.set()

    found = run(one=one, two=lambda: quietly(forged, batches[1]))
    assert all(map(torch.equal, found, expected))


def test_a_model_is_watched_while_another_runs(batches):
    """A module that is entered while the first batch is watched, and left while the second one is."""
    torch.manual_seed(0)
    model, other = OwnCalls().eval(), Inside()
    expected = forged_fx.calibrate(model, batches)
    first, entered, second, left = (threading.Event() for _ in range(4))
    steps = iter([lambda: (first.set(), wait(entered)), lambda: (second.set(), wait(left))])
    STEPS["scan", "between"] = lambda: next(steps)()
    STEPS["other", "inside"] = lambda: (entered.set(), wait(second))

    def run_other():
        wait(first)
        other(batches[0])
        left.set()

    stats, _ = run(scan=lambda: forged_fx.calibrate(model, batches), other=run_other)
    assert stats.sites == expected.sites


def test_compiled_code_is_watched_too():
    """Dynamo reads what tells the thread that watches from others."""
    entered = []
    layer = nn.ReLU()
    fast = torch.compile(lambda x: layer(x), backend="eager")
    with module_hooks(lambda module, args: entered.append("in"), lambda *_: entered.append("out")):
        fast(torch.ones(1))
    assert entered == ["in", "out"]


class OneGraph(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        at("traced")
        return self.a(x).relu()


def test_a_model_that_runs_while_another_is_traced_is_none_of_its_graph(batches):
    model, other = OneGraph().eval(), OneGraph().eval()
    stats = forged_fx.calibrate(model, batches)
    expected, found = quietly(other, batches[0]), []

    def beside():
        found.extend(run(beside=lambda: (quietly(other, batches[0]), quietly(model, batches[0]))))

    STEPS["one", "traced"] = beside
    (forged,) = run(one=lambda: forged_fx.transform(model, stats, 0))
    assert forged.forging.not_whole is None
    assert all(torch.equal(theirs, expected) and torch.equal(own, quietly(forged, batches[0])) for theirs, own in found)
    assert len(found) > 4


def test_two_threads_forge_one_after_the_other(batches):
    models = [OneGraph().eval() for _ in range(2)]
    stats = [forged_fx.calibrate(model, batches) for model in models]
    begun, first_is_done = threading.Event(), threading.Event()
    STEPS["one", "traced"] = lambda: (begun.set(), time.sleep(0.05))
    STEPS["two", "begins"] = lambda: wait(begun)
    STEPS["one", "ends"] = first_is_done.set
    STEPS["two", "traced"] = lambda: wait(first_is_done)

    def forge_one(k):
        at("begins")
        forged = forged_fx.transform(models[k], stats[k], 2**-2)
        at("ends")
        return forged

    for k, forged in enumerate(run(one=lambda: forge_one(0), two=lambda: forge_one(1))):
        assert forged.forging.not_whole is None
        assert torch.equal(
            quietly(forged, batches[0]), quietly(forged_fx.transform(models[k], stats[k], 2**-2), batches[0])
        )
