"""Without gradients, thresholds that read one tensor are computed once where they are equal."""

import pytest
import torch
from torch import nn

import forged_fx
from forged_fx.transform import ForgedModule


class Fork(nn.Module):
    """A value that three layers read, and what else is done to it."""

    def __init__(self, between=None, behind=None):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.left, self.middle, self.right = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.act = nn.ReLU(inplace=True)
        self.between, self.behind = between, behind

    def forward(self, x):
        x = self.stem(x)
        y = self.act(self.left(x))
        if self.between is not None:
            y = y + self.between(x)
        y = y + self.middle(x) + self.right(x)
        return y if self.behind is None else y + self.behind(x)


def forge(x, model, **given):
    torch.manual_seed(0)
    stats = forged_fx.calibrate(model.eval(), [x.clone()], where="activations")
    forged = forged_fx.transform(model, stats, 2**-2, **given)
    assert isinstance(forged, torch.fx.GraphModule)
    return forged


@pytest.fixture
def x():
    return torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def passes(forged, x, monkeypatch, mode=torch.no_grad):
    """(how many times a threshold went over memory, how many of them in place), the values being the recorded run's."""
    found = []
    hardshrink = torch.hardshrink

    def count(value, limit, out):
        found.append(value.data_ptr() == out.data_ptr())
        return hardshrink(value, limit, out=out)

    expected = forged(x.clone()).detach()
    with monkeypatch.context() as patch, mode():
        patch.setattr(torch, "hardshrink", count)
        assert torch.equal(forged(x.clone()), expected)
    return len(found), sum(found)


def test_equal_ones_are_one_as_long_as_they_are_equal(x, monkeypatch):
    forged = forge(x, Fork())
    assert passes(forged, x, monkeypatch) == (2, 0)  # the stem's, and one for three layers
    assert passes(forged, x, monkeypatch, torch.inference_mode) == (4, 1)  # who wrote is not known of such tensors
    forged_fx.set_ratio(forged, {"middle": 2**-1, "*": 2**-2})
    assert passes(forged, x, monkeypatch) == (3, 0)
    forged_fx.set_ratio(forged, {"middle": 2**-1, "right": 0, "*": 2**-2})
    assert passes(forged, x, monkeypatch) == (4, 1)
    forged_fx.set_ratio(forged, 2**-3)
    assert passes(forged, x, monkeypatch) == (2, 0)
    forged.right.forged_threshold.fill_(torch.nan)
    assert passes(forged, x, monkeypatch) == (3, 1)


@torch.fx.wrap
def write(x):
    x.mul_(0.5)
    return x


WRITES = {
    "a method": lambda x: x.mul_(0.5),
    "a function": lambda x: nn.functional.relu(x, inplace=True),
    "a view": lambda x: x.flatten(1).mul_(0.5).view_as(x),
    "a detached one": lambda x: x.detach().mul_(0.5),
    "a module": nn.ReLU(inplace=True),
    "a function of which nothing is known": write,
}


@pytest.mark.parametrize("name", WRITES)
def test_a_value_that_is_overwritten_in_between_is_another_one(x, monkeypatch, name):
    assert passes(forge(x, Fork(between=WRITES[name])), x, monkeypatch)[0] == 4


def test_a_value_that_is_overwritten_behind_is_the_same_until_then(x, monkeypatch):
    assert passes(forge(x, Fork(behind=lambda x: x.mul_(0.5))), x, monkeypatch) == (2, 0)


def test_others_may_read_it_or_write_elsewhere(x, monkeypatch):
    assert passes(forge(x, Fork(between=lambda x: x.tanh().mul_(0.5))), x, monkeypatch) == (2, 0)


@pytest.mark.parametrize("layer, computed", [("left", 4), ("middle", 3)])
def test_a_hook_that_writes_has_it_computed_anew(x, monkeypatch, layer, computed):
    forged = forge(x, Fork())
    forged.get_submodule(layer).register_forward_pre_hook(lambda _, args: (args[0].mul_(0.5),))
    assert passes(forged, x, monkeypatch)[0] == computed


def test_what_it_saves_in_a_resnet(monkeypatch):
    """The blocks that begin a stage read their input twice. (Within a block, a ReLU and its threshold are one.)"""
    model = pytest.importorskip("torchvision").models.resnet18(num_classes=2)
    assert passes(forge(x := torch.rand(1, 3, 32, 32), model), x, monkeypatch)[0] == 21 - 3 - 8


def test_what_writes_into_memory_unseen_is_found_by_the_audit(x):
    """What is written into another tensor's memory is not counted. The model is forged module by module then."""

    def unseen(x):
        x.new_empty(0).set_(x).mul_(0.5)
        return x

    torch.manual_seed(0)
    model = Fork(between=unseen).eval()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0)
    with torch.no_grad():
        assert torch.equal(forged(x), model(x))
    assert "the result differs" in forged.forging.not_whole


def test_a_graph_that_reaches_for_data_shares_nothing(x, tmp_path):
    """What is written through `.data` is not counted either, and without a batch no audit would see it."""

    def unseen(x):
        x.data.mul_(0.5)
        return x

    torch.manual_seed(0)
    model = Fork(between=unseen).eval()
    forged_fx.calibrate(model, [x]).save(tmp_path / "stats")
    forged = forged_fx.transform(model, tmp_path / "stats", 0)
    assert isinstance(forged, ForgedModule)
    with torch.no_grad():
        assert torch.equal(forged(x), model(x))


def test_a_site_that_writes_has_a_tensor_of_its_own(x, monkeypatch):
    class Reads(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.act, self.layer = act, nn.Conv2d(3, 3, 1)

        def forward(self, x):
            x = x - 0.5
            return self.layer(x) + self.act(x)

    assert passes(forge(x, Reads(nn.SELU()), where="*"), x, monkeypatch)[0] == 1
    assert passes(forge(x, Reads(nn.SELU(inplace=True)), where="*"), x, monkeypatch)[0] == 2
