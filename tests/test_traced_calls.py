"""A module's own calls in Dynamo's graphs: told by their weights, or left to eager mode."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import Unsupported

import forged_fx
from forged_fx import torch_internals
from forged_fx.traced_calls import TracedCalls

pytestmark = [
    pytest.mark.skipif(torch_internals.VERSION < (2, 14), reason="there they run uncompiled"),
    pytest.mark.usefixtures("single_thread"),
]


class Own(nn.Module):
    """Two layers whose weights it takes itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.twice, self.flag = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), True

    def forward(self, x):
        return F.linear(self.between(F.linear(x, self.a.weight, self.a.bias)), self.b.weight)

    def between(self, x):
        return x


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Branches(nn.Linear):
    def forward(self, x):
        return F.linear(x if x.shape[0] > 1 and self.training else 2 * x, weight=self.weight, bias=self.bias)


class WithAPart(Own):
    """A layer within, and one that has no threshold."""

    def between(self, x):
        return self.twice(x)


class Multiplies(nn.Linear):
    def forward(self, x):
        return 1 + x @ self.weight if x.dim() else x


class Convolves(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5, 3) / 4)

    def forward(self, x):
        return F.conv1d(x, self.weight, padding=1) if x.dim() == 3 else x


class GivenTwice(Own):
    def between(self, x):
        return F.linear(x, self.twice.weight) + F.linear(x + 1, self.twice.weight)


class Computes(Own):
    def between(self, x):
        return F.linear(x, self.twice.weight[[*range(8)]] * 2)


class Transposes(nn.Linear):
    def forward(self, x):
        return 1 + x @ self.weight.t() if x.dim() == 3 and self.bias is not None else x


class BreaksOff(Own):
    def between(self, x):
        torch._dynamo.graph_break()
        return x


class GoesElsewhere(Own):
    """Later: a call that has a threshold is not made."""

    def between(self, x):
        return F.linear(x, self.twice.weight) if self.flag else x


class Again(nn.Module):
    def __init__(self):
        super().__init__()
        self.own, self.flag = Own(), True

    def forward(self, x):
        return self.own(x) if self.flag else self.own(self.own(x))


def forged_of(model, x, **options):
    model = nn.Sequential(model, nn.Linear(8, 3)).eval()
    return forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-2, graph=False, **options), model


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(4, 5, 8)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("make", [Own, Attends, lambda: Branches(8, 8), lambda: Multiplies(8, 8), WithAPart, Convolves])
def test_told_by_their_weights_they_are_in_the_graph(x, make, gradients):
    forged, model = forged_of(make(), x)
    with torch.set_grad_enabled(gradients):
        assert not torch.allclose(forged(x), model(x), atol=1e-3)
        fast = torch.compile(forged, backend="aot_eager", fullgraph=True)
        for ratio in (2**-2, 2**-3):
            forged_fx.set_ratio(forged, ratio)
            assert torch.allclose(fast(x), forged(x), atol=1e-6)
    if gradients:
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        for run, leaf in zip((fast, forged), leaves, strict=True):
            run(leaf).square().sum().backward()
        assert torch.allclose(leaves[0].grad, leaves[1].grad, atol=1e-5)
    assert torch.allclose(torch.export.export(forged, (x,), strict=True).module()(x), forged(x), atol=1e-6)


def torchvisions(name):
    models = pytest.importorskip("torchvision").models
    make = {
        "Swin": lambda: models.SwinTransformer([4, 4], 16, [2, 2], [2, 2], [4, 4]),
        "ViT": lambda: models.VisionTransformer(32, 16, 1, 2, 16, 32),
    }
    model = make[name]()
    with torch.no_grad():
        for parameter in model.parameters():  # (the ViT's head is 0)
            parameter.add_(torch.randn_like(parameter) / 16)
    return model.eval()


@pytest.mark.parametrize("name", ["Swin", "ViT"])
def test_so_are_torchvisions_transformers(name):
    torch.manual_seed(0)
    model, x = torchvisions(name), torch.rand(2, 3, 32, 32)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-3)
    assert forged.forging.not_whole
    with torch.no_grad():
        assert not torch.allclose(forged(x), model(x), atol=1e-3)
        assert torch.allclose(torch.compile(forged, backend="aot_eager", fullgraph=True)(x), forged(x), atol=1e-5)


def test_a_part_without_a_threshold_is_no_call_of_its_own(x):
    forged, _ = forged_of(WithAPart(), x, exclude="0.twice")
    with torch.no_grad():
        assert torch.allclose(torch.compile(forged, backend="aot_eager", fullgraph=True)(x), forged(x), atol=1e-6)


@pytest.mark.parametrize("make", [GivenTwice, Computes, lambda: Transposes(8, 8), BreaksOff])
def test_what_weights_do_not_tell_runs_uncompiled(x, make):
    forged, model = forged_of(make(), x)
    with torch.no_grad():
        assert torch.allclose(torch.compile(forged, backend="aot_eager")(x), forged(x), atol=1e-6)
        assert not torch.allclose(forged(x), model(x), atol=1e-3)
        torch._dynamo.reset()
        with pytest.raises(Unsupported):
            torch.compile(forged, backend="aot_eager", fullgraph=True)(x)


class RepeatsOne(Own):
    """Later: one call is made twice, and another is not."""

    def between(self, x):
        return F.linear(x, self.twice.weight if self.flag else self.a.weight)


class MeetsTheRest(Own):
    """Later: a part of a weight is met by a call that has a threshold, and all of it by one that has none."""

    def between(self, x):
        y = F.linear(x, self.twice.weight[:4]).repeat(1, 1, 2)
        return y if self.flag else F.linear(y + 1, self.twice.weight)


@pytest.mark.parametrize("make", [GoesElsewhere, RepeatsOne, MeetsTheRest, Again])
def test_what_is_refused_in_eager_mode_is_refused(x, make):
    forged, _ = forged_of(make(), x)
    forged[0].flag = False
    for run in (forged, torch.compile(forged, backend="aot_eager")):
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"in another place|saw 2 at most|met the parameter"):
            run(x)


class CallsOrRuns(Own):
    """A layer within, by its weight on one path, and itself on the other."""

    def between(self, x):
        return F.linear(x, self.twice.weight, self.twice.bias) if x.shape[0] == 4 else self.twice(x)


@pytest.mark.parametrize("exclude", [None, "0.twice"])
def test_what_a_module_within_calls_is_its_own(x, exclude):
    model = nn.Sequential(CallsOrRuns(), nn.Linear(8, 3)).eval()
    stats = forged_fx.calibrate(model, [x, x[:3]])
    forged = forged_fx.transform(model, stats, {"0#1": 0.5, "*": 0.01}, graph=False, exclude=exclude)
    with torch.no_grad():
        for batch in (x, x[:3]):
            torch._dynamo.reset()
            assert torch.allclose(torch.compile(forged, backend="aot_eager")(batch), forged(batch), atol=1e-6)


def test_what_was_not_met_is_never_passed_over(x):
    """Where Dynamo should go on after a break, too."""
    forged, _ = forged_of(Own(), x)
    with pytest.raises(RuntimeError, match="ForgedOwn that have a threshold are not told"):
        TracedCalls(forged[0], forged[0].forged_by_weight).check()
