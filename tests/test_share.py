"""share: one result for sites that read one tensor, for as long as their thresholds are equal."""

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

import forged_fx


class Fork(nn.Module):
    """Two layers on one tensor, which the code in between may change in place."""

    def __init__(self, changes=False):
        super().__init__()
        self.first, self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.changes = changes

    def forward(self, x):
        x = self.first(x).relu()
        y = self.a(x)
        if self.changes:
            x.mul_(0.5)
        return y - self.b(x)


@pytest.fixture
def x():
    return torch.randn(64, 8, generator=torch.Generator().manual_seed(1))


def made(x, changes=False):
    torch.manual_seed(0)
    model = Fork(changes).eval()
    return model, forged_fx.calibrate(model, [x])


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def selections(module, x):
    """How many thresholds the generated code applies."""
    with torch.no_grad():
        _, (code,) = run_and_get_code(module, x)
    return code.count("::blendv(")


def test_one_result_for_two_sites(x):
    model, stats = made(x)
    forged = forged_fx.transform(model, stats, 2**-3)
    model.register_forward_hook(lambda *_: None)
    one_by_one = forged_fx.transform(model, stats, 2**-3)
    assert "module by module" in str(forged_fx.describe(one_by_one))
    for ratio, count in ((2**-3, 2), ({"a": 2**-2, "*": 2**-3}, 3)):
        torch._dynamo.reset()
        forged.set_ratio(ratio)
        assert selections(torch.compile(forged, backend="forged"), x) == count
        torch._dynamo.reset()
        assert selections(torch.compile(model, backend="forged", options={"stats": stats, "ratio": ratio}), x) == count
        torch._dynamo.reset()
        forged_fx.set_ratio(one_by_one, ratio)
        assert selections(torch.compile(one_by_one, backend="forged"), x) == count


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        x = x.tanh()
        return sum(head(x) for head in self.heads)


@pytest.mark.parametrize("other", range(3))
def test_two_of_three_are_one_to_the_bit(x, other):
    torch.manual_seed(0)
    model = Three().eval()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-3)
    fast = torch.compile(forged, backend="forged")
    assert selections(fast, x) == 1
    forged.heads[other].forged_threshold.mul_(1 + 2**-22)
    assert selections(fast, x) == 2
    with torch.no_grad():
        assert torch.allclose(fast(x), forged(x), atol=1e-6)


def test_one_for_each_channel_is_never_shared(x):
    """They are no numbers, whose equality a guard could ask for."""
    model, _ = made(x)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x], channels=True), 0.5, kind="mean")
    with torch.no_grad():
        assert torch.allclose(torch.compile(forged, backend="forged")(x), forged(x), atol=1e-6)


@pytest.mark.parametrize("changes", [False, True])
def test_thresholds_that_part_and_meet_again(x, changes):
    model, stats = made(x, changes)
    forged = forged_fx.transform(model, stats, 2**-3)
    fast = torch.compile(forged, backend="forged")
    results = []
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for ratio in (2**-3, 2**-4, {"a": 2**-1, "*": 2**-3}, {"a": 2**-3, "*": 2**-1}, 2**-2, 0):
            forged.set_ratio(ratio)
            results.append(forged(x))
            assert torch.allclose(fast(x), results[-1], atol=1e-6), ratio
        assert graphs() == (1 if changes else 2)  # moved together, they are not compiled for anew
        forged.set_ratio(2**-3)
        forged.a.forged_threshold.fill_(0.5)  # by hand, one of them
        assert torch.allclose(fast(x), forged(x), atol=1e-6)
        forged.load_state_dict({**forged.state_dict(), "b.forged_threshold": torch.tensor(1.0)})
        assert torch.allclose(fast(x), forged(x), atol=1e-6)
        assert not torch.allclose(results[2], results[3], atol=1e-3)


def test_training(x):
    model, stats = made(x)
    forged = forged_fx.transform(model, stats, 2**-2)
    expected = torch.autograd.grad(forged(x).square().sum(), list(forged.parameters()))
    found = torch.autograd.grad(torch.compile(forged, backend="forged")(x).square().sum(), list(forged.parameters()))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, found, strict=True))
