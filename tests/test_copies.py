"""Copies of a forged model, however they are made, are the forged model."""

import copy
import io
import pickle
import sys
from collections import OrderedDict

import pytest
import torch
from torch import nn

import forged_fx
from forged_fx.transform import forging_of


def halved(module, args):
    return (args[0] / 2,)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
    "AveragedModel": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
}


@pytest.fixture
def made():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.rand(20000, 4)
    return model, x, forged_fx.calibrate(model, [x])


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("again", COPIES.values(), ids=COPIES)
def test_hooks_and_attributes_come_along(made, again, graph):
    model, x, stats = made
    forged = forged_fx.transform(model, stats, 2**-2, graph=graph)
    without = forged(x)
    forged.register_forward_pre_hook(halved)
    forged.classes = ["a", "b"]
    twin = again(forged)
    assert twin.classes == ["a", "b"] and twin.training is False and type(twin).__name__ == type(forged).__name__
    assert torch.equal(twin(x), forged(x)) and not torch.equal(twin(x), without)
    assert again(twin).classes == ["a", "b"]
    twin.register_forward_hook(lambda *_: None)
    assert again is copy.copy or not forged._forward_hooks
    forged_fx.set_ratio(twin, 0)
    assert torch.equal(twin(2 * x), model(x))


@pytest.mark.parametrize("graph", [True, False])
def test_the_batch_that_calibration_kept_is_in_no_file(made, graph):
    model, x, stats = made
    forged = forged_fx.transform(model, stats, 2**-2, graph=graph)
    assert forging_of(saved_and_loaded(forged)).stats.example is None
    (args, _) = forging_of(copy.deepcopy(forged)).stats.example
    assert args[0] is x or torch.equal(args[0], x)
    assert len(pickle.dumps(stats)) < x.nbytes
    assert copy.deepcopy(stats) == stats == pickle.loads(pickle.dumps(stats))
    assert copy.deepcopy(stats).example is stats.example and stats.example is not None


def x_of():
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("graph", [True, False])
def test_a_copy_of_what_was_parametrized_since(graph):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.scale = nn.Linear(4, 2), nn.Parameter(torch.ones(4))

        def forward(self, x):
            return self.fc(x * self.scale)

    model, x = Scaled().eval(), torch.randn(3, 4)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), graph=graph)
    torch.nn.utils.parametrize.register_parametrization(forged, "scale", Doubled())
    twin = copy.deepcopy(forged)
    assert torch.equal(twin(x), forged(x))
    with torch.no_grad():
        twin.parametrizations.scale.original.zero_()
    assert not torch.equal(twin(x), forged(x))


@pytest.mark.parametrize("graph", [True, False])
def test_a_module_that_will_not_be_copied_is_not_changed(graph):
    class Single(nn.Linear):
        def __deepcopy__(self, memo):
            return self

    model, x = nn.Sequential(OrderedDict(encoder=Single(4, 4), head=nn.Linear(4, 2))).eval(), x_of()
    stats, before = forged_fx.calibrate(model, [x]), model(x)
    with pytest.raises(RuntimeError, match=r"'encoder' would be a part of both.*Single returns the module itself"):
        forged_fx.transform(model, stats, 0.5, graph=graph)
    assert type(model.encoder) is Single and not [*model.buffers()] and torch.equal(model(x), before)


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_thresholds_of_a_half_checkpoint_are_float32(graph, assign):
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), x_of()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0.25, graph=graph)
    half = {name: value.half() for name, value in forged.state_dict().items()}
    forged.load_state_dict(half, assign=assign)
    assert {value.dtype for value in forged.buffers()} == {torch.float32}
    assert all(torch.equal(value, half[name].float()) for name, value in forged.named_buffers())
    assert forged.float()(x).isfinite().all()


@pytest.mark.parametrize("graph", [True, False])
def test_a_part_loads_a_plain_parts_weights(graph):
    """A backbone's checkpoint, say; thresholds that it does not name stay as they are."""
    torch.manual_seed(0)
    model, x = nn.Sequential(OrderedDict(body=nn.Sequential(nn.Linear(4, 4), nn.ReLU()), head=nn.Linear(4, 2))), x_of()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0.5, graph=graph)
    before = {name: value.clone() for name, value in forged.named_buffers()}
    for name in ("body", "body.0", "head"):
        weights = {key: value + 1 for key, value in model.get_submodule(name).state_dict().items()}
        assert forged.get_submodule(name).load_state_dict(weights) == ([], [])
        found = forged.get_submodule(name).state_dict()
        assert all(torch.equal(found[key], value) for key, value in weights.items())
    assert before and all(torch.equal(value, before[name]) for name, value in forged.named_buffers())
    twin = pickle.loads(pickle.dumps(copy.deepcopy(forged)))
    assert twin.get_submodule("head").load_state_dict(model.head.state_dict()) == ([], [])


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.shift = nn.Sequential(nn.Linear(4, 4)), nn.Parameter(torch.rand(4))

    def forward(self, x):
        return self.layer(x + self.shift)


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.filterwarnings("error")
def test_data_parallel_gives_its_replicas_their_parameters(graph, monkeypatch):
    """nn.DataParallel sets copies of parameters, which are plain tensors; here those of another device of the CPU."""
    model, x = Shifted().eval(), torch.rand(3, 4)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-1, graph=graph)
    replicate = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(replicate, "_get_device_index", lambda *_: 0)
    clones = lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices]  # noqa: E731
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", clones)
    one, other = replicate.replicate(forged, [0, 1])
    assert torch.equal(one(x), forged(x)) and torch.equal(other(x), forged(x))
    assert one.shift is not forged.shift and dict(forged.named_parameters()).keys() == {
        "layer.0.weight", "layer.0.bias", "shift"
    }  # fmt: skip
    one(x).sum().backward()
    assert forged.shift.grad.any()


def test_a_checkpoint_that_lacks_a_forged_modules_own_buffer_is_refused():
    """What it need not name are thresholds; and it is they that become float32, not a module's counter."""

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))
            self.register_buffer("times", torch.tensor(3))

        def forward(self, x):
            return nn.functional.linear(x, self.weight) * self.times

    model, x = nn.Sequential(Counts()).eval(), torch.rand(5, 4)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0.1)
    with pytest.raises(RuntimeError, match=r'Missing key.*\n?.*"0.times"'):
        forged.load_state_dict({"0.weight": model[0].weight.detach()})
    forged.load_state_dict(model.state_dict(), assign=True)
    assert forged.get_buffer("0.times").dtype == torch.int64
