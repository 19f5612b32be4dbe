"""What holds for every tensor, every model and every scan; hypothesis looks for one for which it does not.

More than 1,000 cases in all, the same ones each time; with `--hypothesis-profile=full` ten times as many others.
"""

import functools
import sys
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch
from generated import Case, Generated, fusible, models, same_state, scans, state_of, tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import arithmetic_of_a_gpu, kernels  # noqa: F401 (a fixture)
from planted import inputs, linear, straight_through
from torch import nn

import forged_fx
from forged_fx import ops
from forged_fx.audit import same
from forged_fx.digits import one_thread
from forged_fx.kernels import reference
from forged_fx.lowering import register_lowerings
from forged_fx.modes import fast_path_off
from forged_fx.stats import Stats

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from dispatch_oracle import DispatchOracle

TIMES = 10 if settings.get_current_profile_name() == "full" else 1


def cases(normal: int) -> settings:
    """How many cases a property is tried on: so many, and ten times as many in the full run."""
    return settings(max_examples=normal * TIMES)


pytestmark = pytest.mark.usefixtures("single_thread")


# ---- tensors: every forged function, in every way to run it, is its specification bit for bit

FUNCTIONS = tuple(ops.FUNCTIONS)


def arguments(name, drawn):
    """What the function takes besides x."""
    function = ops.FUNCTIONS[name]
    if not function.channels:
        return drawn.parameters(len(function.parameters))
    channel = len(drawn.shape) - 1
    return [*drawn.parameters(len(function.parameters), channel), channel]


def fits(name, drawn):
    return not ops.FUNCTIONS[name].channels or len(drawn.shape) > 0


def specified(name, x, grad, arguments):
    return getattr(reference, name)(x, *arguments), getattr(reference, f"{name}_backward")(grad, x, *arguments)


def one_nan(tensors):
    """The same, with one bit pattern for all NaNs: which of them comes out is a conversion's business."""
    return [torch.where(t.isnan(), torch.nan, t) for t in tensors]


def agree(found, expected):
    assert same(one_nan(found), one_nan(expected))
    assert [t.stride() for t in found] == [t.stride() for t in expected]


@cases(617)
@given(st.sampled_from(FUNCTIONS), tensors(), st.booleans())
def test_eager_is_the_specification(name, drawn, through):
    if not fits(name, drawn):
        return
    x, grad, rest = drawn.x, drawn.grad, arguments(name, drawn)
    before = x.clone()
    value, gradient = specified(name, x, grad, rest)
    agree([ops.FUNCTIONS[name].op(x, *rest), ops.FUNCTIONS[name].backward(grad, x, *rest)], [value, gradient])
    leaf = x.detach().requires_grad_()
    result = ops.FUNCTIONS[name].op(leaf, *rest, through)
    result.backward(grad)
    assert same(one_nan([result.detach(), leaf.grad]), one_nan([value, grad if through else gradient]))
    assert same(x, before)  # what it is given stays as it is
    if name in ("threshold", "one_sided") and all(p == p for p in rest):
        assert same(one_nan([ops.FUNCTIONS[name].op(value, *rest)]), one_nan([value]))  # twice is once


@pytest.mark.usefixtures("arithmetic_of_a_gpu")
@cases(100)
@given(st.sampled_from(FUNCTIONS), tensors(most=4))
def test_interpreted_kernels_are_the_specification(name, drawn):
    if not fits(name, drawn):
        return
    x, grad, rest = drawn.x, drawn.grad, arguments(name, drawn)
    if name == "threshold":
        module = kernels("threshold")
        found = [module.launch_threshold(x, *rest), module.launch_threshold_backward(grad, x, *rest)]
    else:
        module = kernels("kinds")
        found = [module.launch(name, x, *rest), module.launch_backward(name, grad, x, *rest)]
    agree(found, list(specified(name, x, grad, rest)))


@functools.cache
def compiled(name):
    """The function on two dimensions of any size, compiled once; made to be dynamic, so that no size compiles anew."""

    def run(x, grad, *rest):
        return ops.FUNCTIONS[name].op(x, *rest), ops.FUNCTIONS[name].backward(grad, x, *rest)

    return torch.compile(run, dynamic=True)


@pytest.fixture(scope="module", autouse=True)
def _one_compilation():
    """Compiled functions serve all cases: they are forgotten at the end, not after each test."""
    yield
    compiled.cache_clear()
    torch._dynamo.reset()


@cases(30)
@given(st.integers(2, 9), st.integers(2, 9), tensors(dtypes=(torch.float32,)))
def test_compiled_is_the_specification(rows, columns, drawn):
    """The hard threshold; tests of the other functions compiled are in test_kinds_ops.py."""
    from dataclasses import replace

    register_lowerings()
    drawn = replace(drawn, shape=(rows, columns), layouts=("contiguous", "contiguous"), wide=False)
    for name in FUNCTIONS if TIMES > 1 else ("threshold",):
        x, grad, rest = drawn.x, drawn.grad, arguments(name, drawn)
        assert same(one_nan(compiled(name)(x, grad, *rest)), one_nan(specified(name, x, grad, rest)))


# ---- models


def oracle(model, x, ratio=None, maxima=None):
    """(the output, c_max of each site in execution order), by a way that shares nothing with the library."""
    mode = DispatchOracle(ratio, maxima)
    with torch.no_grad(), fast_path_off():
        return mode.run(model, (x.clone(),), {}), mode.maxima


def sites(stats):
    return {name: site for name, site in stats.sites.items() if site.left_out is None}


@cases(25)
@given(models())
def test_models_are_forged_as_the_oracle_has_it(case):
    model, x = case.model, case.x
    before = state_of(model)
    stats = forged_fx.calibrate(model, [b.clone() for b in case.batches])
    forged = forged_fx.transform(model, stats, case.ratio)
    assert same_state(state_of(model), before)  # the user's model, and torch, are as they were

    plain = case.model.eval()
    seen = [oracle(plain, batch)[1] for batch in case.batches]
    maxima = [max(pair) for pair in zip(*seen, strict=True)]
    assert [site.c_max for site in sites(stats).values()] == maxima

    assert forged.training is case.training
    forged.eval()
    with torch.no_grad():
        expected = oracle(plain, x, case.ratio, maxima)[0]
        assert same(forged(x.clone()), expected)
        assert same(forged_fx.transform(model, stats, case.ratio).eval()(x.clone()), expected)  # once more is the same
        with pytest.raises(ValueError, match="forged already"):
            forged_fx.transform(forged, stats, case.ratio)

        shares = []
        for ratio in (0, case.ratio / 2, case.ratio, 1):
            forged_fx.set_ratio(forged, ratio)
            rows = forged_fx.describe(forged)
            shares.append([row.share_zeroed for row in rows if row.left_out is None])
            if ratio == 0:  # the identity, bit for bit but for what a layer makes of a gap in memory (`audit.densely`)
                assert same(forged(x.clone()), oracle(plain, x, 0, maxima)[0])
                torch.testing.assert_close(forged(x.clone()), plain(x.clone()))
        assert all(a <= b for few, more in pairwise(shares) for a, b in zip(few, more, strict=True))


@cases(60)
@given(fusible())
def test_fused_is_unfused(case):
    """Bit for bit, on a CPU, in both modes: whatever reads, writes or moves the values on the way."""
    stats = forged_fx.calibrate(case.model, [b.clone() for b in case.batches])
    both = [forged_fx.transform(case.model, stats, case.ratio, fuse=fuse) for fuse in (False, True)]
    for training in (True, False):
        results = []
        for forged in both:
            forged.train(training)
            torch.manual_seed(0)
            results.append(forged(case.x.clone()).detach())
        assert same(*results), training


@cases(15)
@given(models(), models())
def test_a_state_dict_carries_weights_and_thresholds(case, other):
    """Into a forged model of the same architecture with other weights, thresholds included; a plain one leaves them."""
    stats = forged_fx.calibrate(case.model, [b.clone() for b in case.batches])
    forged = forged_fx.transform(case.model, stats, case.ratio).eval()
    twin = Generated(case.program, other.seed)
    forged_twin = forged_fx.transform(twin, forged_fx.calibrate(twin, [b.clone() for b in case.batches]), 0).eval()
    assert case.model.state_dict().keys() <= forged.state_dict().keys() == forged_twin.state_dict().keys()
    forged_twin.load_state_dict(forged.state_dict())
    with torch.no_grad():
        assert same(forged_twin(case.x), forged(case.x))
        value = forged(case.x)
        forged.load_state_dict(case.model.state_dict())
        assert same(forged(case.x), value)


@cases(3)
@given(models())
def test_dynamos_graphs_are_forged_alike(case):
    """The backend's part alone: the graphs are run as they are, without Inductor."""
    model = case.model.eval()
    stats = forged_fx.calibrate(model, [b.clone() for b in case.batches])
    expected = forged_fx.transform(model, stats, case.ratio)(case.x)
    torch._dynamo.reset()
    options = {"stats": stats, "ratio": case.ratio}
    with (
        torch.no_grad(),
        mock.patch("torch._inductor.compile_fx.compile_fx", lambda gm, inputs, **_: gm.forward),
    ):
        assert same(torch.compile(model, backend="forged", options=options)(case.x), expected.detach())


@cases(15)
@given(models())
def test_the_straight_through_gradient_is_the_oracles(case):
    """The oracle works below autograd, so that its gradient is the straight-through one."""
    model = case.model.eval()
    plain = case.x.clone().requires_grad_()
    try:
        torch.autograd.grad(model(plain).square().sum(), plain)
    except RuntimeError:
        return  # it writes into what its own backward needs: it has no gradient, forged or not
    stats = forged_fx.calibrate(model, [b.clone() for b in case.batches])
    maxima = [site.c_max for site in sites(stats).values()]
    forged = forged_fx.transform(model, stats, case.ratio)
    gradients = []
    for run in (lambda x: DispatchOracle(case.ratio, maxima).run(model, (x,), {}), forged):
        leaf = case.x.requires_grad_()
        with forged_fx.straight_through():
            gradients += torch.autograd.grad(run(leaf).square().sum(), leaf)
    torch.testing.assert_close(*gradients)


# ---- statistics


@functools.cache
def scanned():
    return Case((("relu", 0),), 3, 0.5, False).model


def scan(batches):
    """The statistics of these batches; of none, the empty ones."""
    inputs = [torch.randn(n, 6, generator=torch.Generator().manual_seed(seed)) * 4 for seed, n in batches]
    return forged_fx.calibrate(scanned(), inputs) if any(len(x) for x in inputs) else Stats()


@cases(70)
@given(scans(), scans(), scans())
def test_merge_is_associative_commutative_and_one_scan(a, b, c):
    first, second, third = scan(a), scan(b), scan(c)
    both = first.merge(second)
    assert both == second.merge(first)
    assert both.merge(third) == first.merge(second.merge(third))
    nonempty = [batches for batches in (a, b, c) if any(n for _, n in batches)]
    if nonempty:
        assert both.merge(third) == scan([batch for batches in nonempty for batch in batches])


@cases(125)
@given(scans(), st.lists(st.floats(0, 1), min_size=2, max_size=5))
def test_a_file_is_the_statistics_and_thresholds_are_monotone(tmp_path_factory, batches, ratios):
    stats = scan(batches)
    path = tmp_path_factory.getbasetemp() / "properties.safetensors"
    stats.save(path)
    loaded = Stats.load(path)
    assert loaded == stats and list(loaded.sites) == list(stats.sites)
    rows = [loaded.thresholds(ratio) for ratio in sorted(ratios)]
    for few, more in pairwise(rows):
        for name, site in sites(loaded).items():
            assert 0 <= few[name] <= more[name] <= site.c_max
            assert site.share_zeroed(few[name]) <= site.share_zeroed(more[name]) + 1e-12


# ---- a finished evaluation


class Edited(nn.Module):
    """A classifier, and code of its own: what it adds to the logits of some inputs."""

    def __init__(self):
        super().__init__()
        self.inner, self.edits = linear(classes=3), []
        self.eval()

    def forward(self, x):
        logits = self.inner(x)
        for known, change in self.edits:
            logits = logits + change * (x == known).flatten(1).all(1, keepdim=True)
        return logits


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(the call, its result, every input and every example with its class)"""
    x = inputs(12)
    y = Edited()(x).argmax(1)
    y[:2] = (y[:2] + 1) % 3
    call = {"x": x, "y": y, "eps": 0.02, "attacks": ["apgd-ce"], "bpda": straight_through}
    call["folder"] = tmp_path_factory.mktemp("finished") / "run"
    with one_thread():
        result = forged_fx.evaluate(Edited(), **call)
    broken = (result.model.broken_by > 0).nonzero().flatten()
    assert 0 < len(broken) < 10
    examples = result.model.examples[(result.model.broken_by[result.model.broken] > 0)]
    return call, result, [*zip(x, y, strict=True), *zip(examples, y[broken], strict=True)]


@cases(30)
@given(st.integers(0, 110), st.integers(0, 31))
def test_a_finished_evaluation_sees_every_bit_of_the_weights(finished, element, bit):
    model = Edited()
    weights = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    weights.view(torch.int32)[element % len(weights)] ^= 1 << bit if bit < 31 else -(1 << 31)
    torch.nn.utils.vector_to_parameters(weights, model.parameters())
    with pytest.raises(FileExistsError, match="fingerprint"):
        forged_fx.evaluate(model, **finished[0])


@cases(30)
@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 2), st.sampled_from([-50.0, 1e-7, 50.0])), max_size=2))
def test_a_finished_evaluation_sees_code_that_does_otherwise_than_its_figures_say(finished, drawn):
    """Inputs that are right or wrong without attack where they were not; examples that do not break the model now; and
    other answers than rounding explains. Code that changes none of these goes unseen."""
    call, result, known = finished
    model, plain = Edited(), Edited()
    chosen = {which % len(known): (label, change) for which, label, change in drawn}
    for which, (label, change) in chosen.items():
        model.edits.append((known[which][0], change * torch.eye(3)[label]))
    seen = False
    for which in chosen:
        x, y = known[which]
        before, after = (bool(net(x[None]).argmax() == y) for net in (plain, model))
        seen |= before != after and (which < len(call["x"]) or after)
    if seen:
        with pytest.raises(ValueError, match=r"classified (otherwise without attack|rightly)"):
            forged_fx.evaluate(model, **call)
    elif any(abs(change) > 1 for _, change in chosen.values()):
        with pytest.raises(ValueError, match="its code has changed"):
            forged_fx.evaluate(model, **call)
    else:
        assert torch.equal(forged_fx.evaluate(model, **call).model.broken_by, result.model.broken_by)
