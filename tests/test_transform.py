"""transform as one graph: where the thresholds go, what stays the same, what is refused."""

import collections
import copy
import functools
import io
import itertools
import pickle
import random
import sys
import threading
import types
import warnings

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import forged_fx
from forged_fx import capture
from forged_fx.audit import AuditFailed, audit, densely, same
from forged_fx.transform import ForgedModule


class Net(nn.Module):
    """Normalisation with buffers, a residual, a shared layer, a product with a parameter, dropout, an optional mask."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.1))
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.blocks = nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 1))
        self.fc = nn.Linear(6, 6)
        self.weight = nn.Parameter(torch.randn(6, 5))
        self.drop = nn.Dropout(0.5)

    def forward(self, x, mask=None):
        x = self.bn(self.conv(x - self.mean)).relu()
        x = (x + self.blocks(x)).mean((2, 3))
        if mask is not None:
            x = x * mask
        return {"logits": self.drop(self.fc(self.fc(x).relu())) @ self.weight, "features": (x,)}


SITES = ["conv", "blocks.0", "blocks.2", "fc", "fc#1", "#0"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x():
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def stats(model, x):
    return forged_fx.calibrate(model, [x])


def test_the_thresholds_are_buffers_beside_the_weights(model, stats):
    forged = forged_fx.transform(model, stats, 2**-3)
    assert isinstance(forged, ForgedModule) and isinstance(forged, torch.fx.GraphModule)
    added = {k: v for k, v in forged.state_dict().items() if k not in model.state_dict()}
    assert {name: value.item() for name, value in added.items()} == {
        "conv.forged_threshold": stats.sites["conv"].c_max / 8,
        "blocks.0.forged_threshold": stats.sites["blocks.0"].c_max / 8,
        "blocks.2.forged_threshold": stats.sites["blocks.2"].c_max / 8,
        "fc.forged_threshold": stats.sites["fc"].c_max / 8,
        "fc.forged_threshold_1": stats.sites["fc#1"].c_max / 8,
        "forged_threshold": stats.sites["#0"].c_max / 8,
    }
    assert model.state_dict().keys() <= forged.state_dict().keys()
    assert all(value.dtype == torch.float32 and value.dim() == 0 for value in added.values())


def test_the_forward_is_the_formula(model, stats, x):
    """Written out by hand, with the formula of arXiv 2406.19622, section 3."""
    ratio = 2**-3

    def f(site, x):
        return torch.where(x.abs() < ratio * stats.sites[site].c_max, 0.0, x)

    with torch.no_grad():
        h = model.bn(model.conv(f("conv", x - model.mean))).relu()
        inner = model.blocks[0](f("blocks.0", h)).relu()
        h = (h + model.blocks[2](f("blocks.2", inner))).mean((2, 3))
        h = model.fc(f("fc#1", model.fc(f("fc", h)).relu()))
        expected = f("#0", h) @ model.weight
        found = forged_fx.transform(model, stats, ratio)(x)
    assert torch.equal(found["logits"], expected)
    assert not torch.equal(expected, model(x)["logits"])


def test_ratio_zero_is_the_model_bit_for_bit(model, stats, x):
    forged = forged_fx.transform(model, stats, 0)
    with torch.no_grad():
        for t in (x, x[:1], torch.randn(7, 3, 12, 10), x.to(memory_format=torch.channels_last)):
            assert torch.equal(forged(t)["logits"], model(t)["logits"])
            assert torch.equal(forged(t)["features"][0], model(t)["features"][0])


def test_set_ratio_moves_the_thresholds_in_place(model, stats, x):
    forged = forged_fx.transform(model, stats, 0)
    buffers = dict(forged.named_buffers())
    for ratio in (2**-3, {"fc*": 0.5, "*": 0.01}):
        forged.set_ratio(ratio)
        assert torch.equal(forged(x)["logits"], forged_fx.transform(model, stats, ratio)(x)["logits"])
        assert all(buffers[name] is value for name, value in forged.named_buffers())


@pytest.mark.parametrize("whole", [True, False], ids=["one graph", "module by module"])
def test_a_layer_that_was_replaced_is_missed(whole):
    class Two(nn.Sequential):
        def forward(self, x):
            return super().forward(x if whole or x.sum() > 0 else -x)

    model, x = Two(nn.Linear(6, 6), nn.Linear(6, 3)), torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]))
    assert isinstance(forged, torch.fx.GraphModule) is whole
    setattr(forged, "1", nn.Linear(6, 2))
    asks = (
        forged_fx.describe,
        lambda forged: forged_fx.set_ratio(forged, 0.1),
        lambda forged: forged_fx.cost(forged, (x,)),
    )
    for ask in asks:
        with pytest.raises(ValueError, match=r"'1' has lost its threshold: .* Replace it in the plain model"):
            ask(forged)


def test_a_graph_whose_layer_was_replaced_says_so_when_it_runs(model, stats, x):
    forged = forged_fx.transform(model, stats)
    forged.bn.running_mean = None  # an error that is the model's own stays what it is
    del forged.bn.running_mean
    with pytest.raises(AttributeError, match="running_mean"):
        forged(x)
    for name, path in (("fc", ""), ("0", "blocks"), ("blocks", "")):
        for grad in (True, False):
            forged = forged_fx.transform(model, stats)
            forged.get_submodule(path)._modules[name] = nn.Identity()  # as torch.ao replaces them
            with torch.set_grad_enabled(grad), pytest.raises(AttributeError, match=r"lost its threshold.* forge that"):
                forged(x)


def test_a_shallow_copy_is_forged(model, stats, x):
    forged = forged_fx.transform(model, stats, 2**-3)
    twin = copy.copy(forged)
    assert twin.fc is forged.fc and torch.equal(twin(x)["logits"], forged(x)["logits"])
    twin.fc = nn.Identity()
    assert torch.equal(forged(x)["logits"], forged_fx.transform(model, stats, 2**-3)(x)["logits"])
    twin = copy.copy(forged)
    forged_fx.set_ratio(twin, 0)
    assert torch.equal(twin(x)["logits"], model(x)["logits"])
    assert twin.half().get_buffer("fc.forged_threshold").dtype == torch.float32


@pytest.mark.parametrize("graph", [True, False], ids=["one graph", "module by module"])
@pytest.mark.parametrize("where", ["file", "memory"])
def test_on_the_meta_device_thresholds_have_their_values(graph, where, model, stats, x, tmp_path):
    expected = forged_fx.transform(model, stats, 2**-3)
    if where == "file":
        stats.save(stats := tmp_path / "stats.safetensors")
    with torch.device("meta"):
        large = Net()
        with pytest.warns(UserWarning, match="without an audit: a model on the meta device has no weights"):
            forged = forged_fx.transform(large, stats, 0, graph=graph)
    assert all(parameter.is_meta for parameter in forged.parameters())
    forged_fx.set_ratio(forged, 2**-3)
    assert "not audited: it had no weights" in str(forged_fx.describe(forged))
    for _ in range(2):
        forged.to_empty(device="cpu")
        for tensor in (*forged.parameters(), forged.mean, forged.bn.running_mean):
            tensor.data.fill_(7.0)
        assert forged.load_state_dict(model.state_dict(), strict=True) == ([], [])
        assert torch.equal(forged.eval()(x)["logits"], expected(x)["logits"])
        forged.to("meta")
    with pytest.raises(ValueError, match="only='free' runs a model with weights"):
        forged_fx.transform(large, stats, only="free")


@pytest.mark.parametrize("graph", [True, False], ids=["one graph", "module by module"])
def test_layers_that_get_their_memory_one_by_one_keep_their_thresholds(graph, model, stats, x):
    expected = forged_fx.transform(model, stats, 2**-3)
    with torch.device("meta"), pytest.warns(UserWarning, match="without an audit"):
        forged = forged_fx.transform(Net(), stats, 2**-3, graph=graph)
    for twin in (copy.deepcopy(forged), pickle.loads(pickle.dumps(forged)), forged.half()):
        for module in twin.modules():  # as loaders of large checkpoints do
            module.to_empty(device="cpu", recurse=False)
        twin.float().load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(twin.eval()(x)["logits"], expected(x)["logits"])


def test_describe_takes_any_threshold(model, stats):
    forged = forged_fx.transform(model, stats)
    for value in (-1.0, float("inf"), float("nan"), 1e38):
        forged.get_buffer("fc.forged_threshold").fill_(value)
        assert len(forged_fx.describe(forged)) == len(SITES)


def test_what_is_selected_may_be_an_iterator_and_is_something(model, stats):
    def sites(**globs):
        return list(forged_fx.transform(model, stats, **globs).forging.reached)

    assert sites(include=(name for name in ["fc*"])) == sites(where=iter(["fc*"])) == ["fc", "fc#1"]
    assert sites(exclude=(name for name in ["fc*"])) == ["conv", "blocks.0", "blocks.2", "#0"]
    for globs in ({"exclude": "*"}, {"include": "fc", "exclude": ["fc"]}, {"where": ["conv"], "exclude": "conv"}):
        with pytest.raises(ValueError, match=r"no site is left to forge \('\w+': in exclude\): ask for others"):
            sites(**globs)
    for globs in ({"include": []}, {"where": []}, {"where": iter(())}):
        with pytest.raises(ValueError, match="names no site: leave it out"):
            sites(**globs)
    with pytest.raises(TypeError, match="where=None: a glob over site names, or several"):
        sites(where=None)


def test_include_and_exclude(model, stats):
    def forged_sites(**globs):
        forged = forged_fx.transform(model, stats, **globs)
        return [row.site for row in forged_fx.describe(forged) if row.left_out is None]

    assert forged_sites() == SITES
    assert forged_sites(include="fc*") == ["fc", "fc#1"]
    assert forged_sites(exclude=["blocks.*", "#0"]) == ["conv", "fc", "fc#1"]
    assert forged_sites(include="blocks.*", exclude="blocks.2") == ["blocks.0"]
    with pytest.raises(ValueError, match=r"exclude: 'block.\*' matches no site"):
        forged_sites(exclude="block.*")


def test_a_plain_checkpoint_loads(model, stats, x):
    other = Net().eval()
    forged = forged_fx.transform(model, stats, 2**-3)
    thresholds = {k: v.clone() for k, v in forged.state_dict().items() if "forged" in k}
    assert forged.load_state_dict(other.state_dict()) == ([], [])
    assert torch.equal(forged.conv.weight, other.conv.weight)
    assert all(torch.equal(forged.state_dict()[k], v) for k, v in thresholds.items())


def test_a_forged_checkpoint_loads_with_its_thresholds(model, stats, x):
    forged = forged_fx.transform(model, stats, 2**-3)
    again = forged_fx.transform(Net(), stats, 0)
    again.load_state_dict(forged.state_dict())
    assert torch.equal(again.eval()(x)["logits"], forged(x)["logits"])


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "nested"])
def test_copies_are_complete(model, stats, x, how):
    forged = forged_fx.transform(model, stats, 2**-3)
    if how == "deepcopy":
        twin = copy.deepcopy(forged)
    elif how == "pickle":
        buffer = io.BytesIO()
        torch.save(forged, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    else:
        twin = copy.deepcopy(nn.Sequential(forged, nn.Identity()))
    assert torch.equal(twin(x)["logits"], forged(x)["logits"])
    assert str(forged_fx.describe(twin)) == str(forged_fx.describe(forged))
    forged_fx.set_ratio(twin, 0)
    assert torch.equal(twin(x)["logits"], model(x)["logits"])
    assert not torch.equal(forged(x)["logits"], model(x)["logits"])


class Sometimes(nn.Module):
    """Stochastic depth by a generator of its own, or a count, in train mode."""

    def __init__(self, draw):
        super().__init__()
        self.a, self.b, self.draw, self.steps = nn.Linear(4, 4), nn.Linear(4, 4), draw, 0

    def forward(self, x):
        if self.training and self.chance() < 0.5:
            return self.b(x)
        return self.b(x + self.a(x))

    def chance(self):
        if self.draw is None:
            self.steps += 1
            return 1
        draw = getattr(self.draw, "random", None)
        return draw() if draw else torch.rand(1, generator=self.draw).item()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "make", [random.Random, np.random.default_rng, np.random.RandomState, torch.Generator().manual_seed, lambda _: None]
)
def test_what_a_module_draws_or_counts_in_training_alone_is_in_no_graph(make, seed):
    model, x = Sometimes(make(seed)).eval(), torch.randn(8, 4)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0).train()
    assert not isinstance(forged, torch.fx.GraphModule)
    results = {forged(x)[0, 0].item() for _ in range(30)}
    assert (len(results), forged.steps) == ((1, 30) if model.draw is None else (2, 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_thresholds_stay_float32(model, stats, x, dtype):
    forged = nn.Sequential(forged_fx.transform(model, stats, 2**-3)).to(dtype)
    assert forged[0].conv.weight.dtype == dtype
    assert forged[0].get_buffer("conv.forged_threshold").dtype == torch.float32
    assert forged[0].get_buffer("conv.forged_threshold").item() == stats.sites["conv"].c_max / 8
    assert forged(x.to(dtype))["logits"].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_thresholds_move_with_the_model(model, stats, dtype):
    forged = forged_fx.transform(model, stats, 2**-3).to("meta", dtype)
    assert {value.device.type for value in forged.state_dict().values()} == {"meta"}
    assert all(value.dtype == torch.float32 for key, value in forged.state_dict().items() if "forged" in key)


def test_channels_last(model, stats, x):
    """Set before or after the transform: the same layout at every site's call, and the same bits."""
    last = torch.channels_last
    x = x.to(memory_format=last)
    layouts, ratio = [], {"fc*": 0, "#0": 0, "*": 2**-3}
    thresholds = {name: t for name, t in stats.thresholds(ratio).items() if t}
    before = forged_fx.transform(copy.deepcopy(model).to(memory_format=last), stats, ratio)
    after = forged_fx.transform(model, stats, ratio).to(memory_format=last)
    with torch.no_grad(), oracle.forged(copy.deepcopy(model).to(memory_format=last), thresholds) as expected:
        for module in (before, after, expected):
            handle = module.blocks.get_submodule("2").register_forward_pre_hook(
                lambda _, args: layouts.append(args[0].is_contiguous(memory_format=last))
            )
            assert torch.equal(module(x)["logits"], expected(x)["logits"])
            handle.remove()
    assert all(layouts) and len(layouts) == 4


def test_the_model_is_untouched(stats, x):
    torch.manual_seed(0)
    model = Net().train()
    model.fc.eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    rng = torch.get_rng_state()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-3)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert before.keys() == model.state_dict().keys()
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(rng, torch.get_rng_state())
    assert forged.training and forged.bn.training and not forged.fc.training
    with torch.no_grad():
        forged.conv.weight.zero_()
    assert torch.equal(before["conv.weight"], model.conv.weight)


@pytest.mark.parametrize("graph", [True, False])
def test_a_feature_extractor_stays_in_its_mode(graph):
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    extractor, x = (
        feature_extraction.create_feature_extractor(net.eval(), {"1": "a", "3": "b"}),
        torch.randn(2, 3, 8, 8),
    )
    forged = forged_fx.transform(extractor, forged_fx.calibrate(extractor, [x]), 0, graph=graph)
    before = copy.deepcopy(forged.state_dict())
    assert not any(module.training for module in forged.modules())
    found, expected = forged(x), extractor(x)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert all(torch.equal(before[key], value) for key, value in forged.state_dict().items())


def test_train_and_eval_mode_still_switch(model, stats, x):
    forged = forged_fx.transform(model, stats, 0)
    forged.train()
    torch.manual_seed(3)
    found = forged(x)["logits"]
    torch.manual_seed(3)
    assert torch.equal(found, model.train()(x)["logits"])


def test_gradients_true_and_straight_through(model, stats):
    forged = forged_fx.transform(model, stats, 2**-2, include="conv")
    t = forged.get_buffer("conv.forged_threshold").item()
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    gradients = []
    for context in (torch.enable_grad(), forged_fx.straight_through()):
        with context:
            gradients.append(torch.autograd.grad(forged(x)["logits"].sum(), x)[0])
    cut = (x - model.mean).abs() < t
    assert cut.any() and (gradients[0][cut] == 0).all() and (gradients[1][cut] != 0).any()
    assert torch.equal(gradients[0][~cut], gradients[1][~cut])


def test_forward_keeps_its_signature(model, stats, x):
    forged = forged_fx.transform(model, stats, 0)
    assert torch.equal(forged(x=x, mask=None)["logits"], model(x)["logits"])
    with pytest.raises(AssertionError, match="mask has been specialized to have value None"):
        forged(x, mask=torch.ones(6))
    masked = forged_fx.calibrate(model, [{"x": x, "mask": torch.ones(6)}])
    assert forged_fx.transform(model, masked, 0)(x, mask=torch.zeros(6))["features"][0].abs().max() == 0


class _Between(nn.Module):
    """Calibrated with its last argument, and not the one before it."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x, scale=1.0, mask=None):
        y = self.fc(x) * scale
        return y if mask is None else y * mask


def test_an_argument_may_be_left_out_ahead_of_one_that_is_given():
    model, x, mask = _Between().eval(), torch.randn(5, 6), torch.tensor([0.0, 1, 2, 3, 4, 5])
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [{"x": x, "mask": mask}]), 0)
    assert isinstance(forged, torch.fx.GraphModule)
    assert torch.equal(forged(x, mask=mask), model(x, mask=mask))
    with pytest.raises(AssertionError, match="calibration gave 'mask'"):
        forged(x)
    with pytest.raises(AssertionError, match="specialized"):
        forged(x, 2.0, mask)


def test_a_call_without_an_argument_that_calibration_gave_is_refused(model, x):
    mask = torch.ones(6)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [{"x": x, "mask": mask}]), 0)
    with pytest.raises(AssertionError, match=r"calibration gave 'mask'.*example=\(\(x,\), \{\}\)"):
        forged(x)
    with pytest.raises(AssertionError, match="value None but got another value: calibrate with a batch that gives it"):
        forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0)(x, mask)
    with_mask, only_some = {"x": x, "mask": mask}, "only some of calibration's batches gave 'mask'"
    for batches, example, why in (
        ([with_mask], ((x,), {}), "audit: the graph does not take the input"),
        ([x, with_mask], None, only_some),
        ([with_mask, x], None, only_some),
    ):
        both = forged_fx.transform(model, forged_fx.calibrate(model, batches), 0, example=example)
        assert f"module by module ({why}" in str(forged_fx.describe(both))
        assert torch.equal(both(x)["logits"], model(x)["logits"])
        assert torch.equal(both(x, 2 * mask)["logits"], model(x, 2 * mask)["logits"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_thresholds_are_float32_whatever_the_default_is(model, stats, x, dtype):
    expected = forged_fx.transform(model, stats, 0.3)
    torch.set_default_dtype(dtype)
    try:
        forged = forged_fx.transform(model, stats, 0.3)
        forged_fx.set_ratio(forged, 0.3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, forged.buffers(), expected.buffers()))


def test_a_forged_models_statistics_are_its_own(model, x):
    """Whatever becomes of the caller's."""
    stats = forged_fx.calibrate(model, [x])
    forged = forged_fx.transform(model, stats, 0.5)
    before = str(forged_fx.describe(forged))
    site = next(iter(stats.sites))
    stats.sites[site].c_max *= 2
    forged_fx.set_ratio(forged, 0.5)
    assert str(forged_fx.describe(forged)) == before


def test_set_ratio_sets_all_models_within_or_none():
    torch.manual_seed(0)
    x = torch.randn(6, 4)
    members = [
        nn.Sequential(collections.OrderedDict({name: nn.Linear(4, 4), "head": nn.Linear(4, 2)})) for name in "ab"
    ]
    both = nn.ModuleList(forged_fx.transform(m, forged_fx.calibrate(m, [x]), 0.5) for m in members)
    values = [t.clone() for t in both.buffers()]
    with pytest.raises(ValueError, match="no ratio for site 'b'"):
        forged_fx.set_ratio(both, {"a": 0.25, "head": 0.25})
    with pytest.raises(ValueError, match="'c' matches no site; the sites are 'a', 'head', 'b'"):
        forged_fx.set_ratio(both, {"c": 0.25, "*": 0.25})
    assert all(map(torch.equal, values, both.buffers()))
    forged_fx.set_ratio(both, {"a": 0.25, "b": 1, "*": 0.5})
    factors = [0.5, 1, 2, 1]
    assert all(torch.equal(v * k, t) for v, k, t in zip(values, factors, both.buffers(), strict=True))


class Labelled(nn.Linear):
    """With an argument that it does not use, as Hugging Face's have labels, and one that it passes on."""

    def forward(self, x, labels=None, mask=None):
        return F.scaled_dot_product_attention(x, x, super().forward(x), attn_mask=mask)


def test_an_argument_that_decides_nothing_may_be_left_out():
    torch.manual_seed(0)
    model, x = Labelled(4, 4).eval(), torch.randn(2, 3, 4)
    mask = torch.rand(3, 3)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [{"x": x, "labels": x, "mask": mask}]), 0)
    assert isinstance(forged, ForgedModule)
    for given in ({}, {"mask": mask}, {"labels": x}):
        assert torch.equal(forged(x, **given), model(x, **given))


class Kernels(nn.Sequential):
    """train() as Hugging Face's models have it: their own, and it does what every model's does."""

    def train(self, mode=True):
        return super().train(mode)


def test_a_train_that_does_what_train_does_is_no_hindrance():
    model, x = Kernels(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval(), torch.ones(2, 4)
    assert isinstance(forged_fx.transform(model, forged_fx.calibrate(model, [x])), ForgedModule)


class Waits(nn.Linear):
    """Its forward tells that it runs, and waits for something else."""

    def __init__(self, running, other):
        super().__init__(4, 4)
        self.events = running, other

    def forward(self, x):
        running, other = self.events
        running.set()
        other.wait(0.3)
        return super().forward(x)

    def __deepcopy__(self, memo):
        return self


def test_captures_in_two_threads_leave_nothing_behind():
    """The second begins while the first is on, and ends after it."""
    plain = torch.set_autocast_enabled, torch.inference_mode.__enter__
    begun, both, first_is_done = (threading.Event() for _ in range(3))
    one, other = Waits(begun, both), Waits(both, first_is_done)
    done = []

    def first():
        done.append(capture.capture(one, {""}, {"x"}, set()))
        first_is_done.set()

    def second():
        begun.wait()
        done.append(capture.capture(other, {""}, {"x"}, set()))

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 2 and (torch.set_autocast_enabled, torch.inference_mode.__enter__) == plain


def test_statistics_of_an_earlier_version_that_saw_fewer_calls_forge_no_other_call(x):
    class Calls(nn.Module):
        def forward(self, x):
            return torch.relu(F.hardtanh(x))

    model = Calls()
    stats = forged_fx.calibrate(model, [x], where="activations")
    old = forged_fx.Stats({"@0": stats.sites["@1"]}, stats.modules, stats.batches, given=stats.given)
    forged = forged_fx.transform(model, old, 2**-3, where="activations")
    assert "module by module (what calibration saw as relu at '@0' is hardtanh in a graph)" in str(
        forged_fx.describe(forged)
    )
    with pytest.raises(RuntimeError, match="'the model' calls hardtanh in the place of relu"):
        forged(x)


def test_statistics_of_another_model_are_refused(stats):
    with pytest.raises(ValueError, match="belong to another model"):
        forged_fx.transform(nn.Linear(3, 3), stats)


def test_forging_twice_is_refused(model, stats):
    with pytest.raises(ValueError, match="forged already"):
        forged_fx.transform(forged_fx.transform(model, stats), stats)


def test_the_model_comes_first(model, stats):
    with pytest.raises(TypeError, match="the model first, then its statistics; the model is Stats"):
        forged_fx.transform(stats, model)


def test_forged_in_inference_mode_it_can_be_used_outside(model, stats, x):
    with torch.inference_mode():
        forged = forged_fx.transform(model, stats, 2**-3)
        expected = forged(x)["logits"]
    forged_fx.set_ratio(forged, 2**-4)
    forged_fx.set_ratio(forged, 2**-3)
    leaf = x.clone().requires_grad_()
    found = forged(leaf)["logits"]
    found.sum().backward()
    assert torch.equal(found, expected) and leaf.grad is not None


class Counts(nn.Module):
    """Counts its runs, in eval mode too, and gives what depends on it."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x):
        return self.fc(x) * self.runs.add_(1)


def test_a_model_that_counts_its_runs():
    model, x = Counts().eval(), torch.rand(2, 4)
    stats = forged_fx.calibrate(model, [x, x])
    for audited in (True, False):
        stats.example = stats.example if audited else None
        forged = forged_fx.transform(model, stats, 0)
        assert forged.forging.not_whole == "its forward writes into 'runs', which a graph would not do"
        assert model.runs == forged.runs == 0
        with torch.no_grad():
            for runs in (1, 2):
                assert torch.equal(forged(x), model(x)) and forged.runs == model.runs == runs
        model.runs.zero_()


def test_statistics_may_be_a_path(model, stats, x, tmp_path):
    stats.save(tmp_path / "s")
    assert torch.equal(
        forged_fx.transform(model, tmp_path / "s")(x)["logits"], forged_fx.transform(model, stats)(x)["logits"]
    )


def test_describe(model, stats):
    forged = forged_fx.transform(model, stats, 2**-3, exclude="fc")
    text = str(forged_fx.describe(forged))
    rows = {row.site: row for row in forged_fx.describe(forged)}
    assert list(rows) == SITES
    assert rows["fc"].left_out == "in exclude" and rows["fc"].threshold is None
    assert rows["conv"].threshold == stats.sites["conv"].c_max / 8
    assert rows["conv"].share_zeroed == stats.sites["conv"].share_zeroed(stats.sites["conv"].c_max / 8) > 0
    assert "4x3x8x8" in text and "left out: in exclude" in text and text.endswith("5 of 6 sites forged, as one graph")
    forged.set_ratio(0)
    assert {row.threshold for row in forged_fx.describe(forged)} == {0.0, None}
    with pytest.raises(ValueError, match="is not forged"):
        forged_fx.describe(model)


def test_what_could_not_be_audited_says_so(model, stats, x, tmp_path):
    stats.save(tmp_path / "s")
    with pytest.warns(UserWarning, match=r"without an audit.*example=\(\(x,\), \{\}\)"):
        assert "not audited" in str(forged_fx.describe(forged_fx.transform(model, tmp_path / "s")))
    assert "not audited" not in str(forged_fx.describe(forged_fx.transform(model, tmp_path / "s", example=((x,), {}))))


def test_the_oracle_agrees_with_the_formula():
    """The oracle that the tests on real models rest on, against a case by hand."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    nn.init.ones_(model[0].weight)
    x = torch.tensor([[1.0, -0.25], [0.5, 0.24]])
    assert oracle.maxima(model, [x]) == {"0": 1.0}
    with torch.no_grad(), oracle.forged(model, {"0": 0.25}):
        assert model(x).flatten().tolist() == [0.75, 0.5]
    assert model(x).flatten().tolist() == pytest.approx([0.75, 0.74])


def test_a_site_that_cannot_be_reached_is_an_error_or_left_out(model, stats, monkeypatch):
    """No model is known for which this happens: the audit is made to find it."""
    monkeypatch.setattr(sys.modules["forged_fx.transform"], "audit", lambda *_: (["fc#1", "#0"], {*SITES}))
    with pytest.raises(RuntimeError, match=r"'fc#1', '#0' cannot be reached.*exclude=\['fc#1', '#0'\].*strict=False"):
        forged_fx.transform(model, stats)
    rows = {row.site: row.left_out for row in forged_fx.describe(forged_fx.transform(model, stats, strict=False))}
    unseen = "the audit did not see its threshold run"
    assert rows == dict.fromkeys(SITES, None) | {"fc#1": unseen, "#0": unseen}


class Spare(nn.Module):
    """Parameters and buffers that the forward does not use, and a module with a second name."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3))
        self.again, self.weight = self.used, nn.Parameter(torch.ones(2))
        self.inner = nn.Module()
        self.inner.fc = nn.Linear(3, 3)
        self.inner.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        return self.inner.fc(self.again(x))


def test_what_the_graph_does_not_use_stays_in_the_checkpoint():
    model, x = Spare(), torch.randn(2, 3)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0)
    assert isinstance(forged, ForgedModule)
    for twin in (forged, copy.deepcopy(forged)):
        assert twin.load_state_dict(Spare().state_dict()) == ([], [])
        assert model.state_dict().keys() <= twin.state_dict().keys()
        assert twin.again is twin.used


class Halves(nn.Module):
    """A product whose input is a slice of a wider tensor: it has gaps in memory, and a threshold closes them."""

    def __init__(self):
        super().__init__()
        self.packed, self.weight = nn.Parameter(torch.randn(12, 6)), nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        a, b = nn.functional.linear(x, self.packed).chunk(2, 1)
        return a + b @ self.weight.t()


def test_an_input_with_gaps_in_memory_is_forged():
    """Without its gaps the product rounds otherwise in the last bit: that is no other model."""
    torch.manual_seed(0)
    net, x = Halves(), torch.randn(5, 6)
    forged = forged_fx.transform(net, forged_fx.calibrate(net, [x]), 0)
    torch.testing.assert_close(forged(x), net(x))
    assert densely(x) is densely(x.t()) is None
    closed = densely(x[:, ::2])
    assert closed.is_contiguous() and torch.equal(closed, x[:, ::2])
    gaps = torch.randn(2, 3, 4, 8).to(memory_format=torch.channels_last)[..., ::2]
    assert densely(gaps).stride() == torch.ops.forged_fx.threshold(gaps, torch.tensor(0.0)).stride() != gaps.stride()
    assert densely(x.to_sparse()) is None
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.weight[0, 0] += 1e-3
    with pytest.raises(AuditFailed):  # another model is found out all the same
        audit(other, forged, list(forged_fx.calibrate(net, [x]).sites), (x,), {})


def test_outputs_that_are_sparse_are_compared_by_their_values():
    x = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    assert same(x.to_sparse(), x.to_sparse()) and not same(x.to_sparse(), (2 * x).to_sparse())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    "wrapped",
    [
        lambda y: torch.quantize_per_tensor(y, 0.1, 0, torch.quint8),
        lambda y: torch.nested.nested_tensor([y[:1], y[1:]], layout=torch.strided),
        lambda y: torch.nested.nested_tensor([y[:1], y[1:]], layout=torch.jagged),
    ],
    ids=["quantized", "nested, strided", "nested, jagged"],
)
def test_outputs_that_are_no_plain_tensors_are_compared(wrapped):
    """A quantized one's bytes, looked at, end the process; a nested one's shape is an error, or another each time."""

    class Wraps(nn.Linear):
        def forward(self, x):
            return wrapped(super().forward(x))

    x = torch.randn(3, 4)
    net = nn.Sequential(nn.Linear(4, 4), Wraps(4, 4)).eval()
    forged = forged_fx.transform(net, forged_fx.calibrate(net, [x]), 2**-6)
    assert same(wrapped(x), wrapped(x.clone())) and not same(wrapped(x), wrapped(-x)) and not same(wrapped(x), x)
    assert same(forged_fx.transform(net, forged_fx.calibrate(net, [x]), 0)(x), net(x)) and forged.forging.audited


def test_what_a_forward_makes_of_literals_on_the_meta_device_is_no_obstacle():
    class Scaled(nn.Linear):
        where = "cpu"

        def forward(self, x):
            return super().forward(x) * torch.ones(4, device=self.where)

    net = nn.Sequential(Scaled(4, 4)).eval()
    stats = forged_fx.calibrate(net, [torch.randn(3, 4)])
    net.to("meta")[0].where = "meta"
    stats.sites["0"].layer = False  # so that the graph holds what the layer does
    with pytest.warns(UserWarning, match="a model on the meta device"):
        assert isinstance(forged_fx.transform(net, stats, 2**-6), ForgedModule)


def test_empty_outputs_with_gaps_are_the_same():
    assert same(torch.zeros(0, 2)[:, ::2], torch.zeros(0, 1))


def test_the_same_is_to_the_bit_in_number_type_and_shape():
    a = torch.tensor([0.0, torch.nan])
    assert same({"y": (a, None)}, {"y": (a.clone(), None)})
    for other in (-a, a[:1], a[None], a.double(), a.view(torch.int32), None, (a, a)):
        assert not same((a,), (other,)), other


@pytest.mark.parametrize("skipped", [True, False])
def test_a_threshold_that_attentions_fast_path_decides_on_is_missed(skipped):
    class Beside(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.attention = nn.MultiheadAttention(4, 1)

    model, x = Beside().eval(), torch.randn(2, 4)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0, graph=False)
    (site,), whole = forged_fx.calibrate(model, [x]).sites, forged.forward
    assert audit(model, forged, [site], (x,), {}) == ([], {site})
    forged.forward = lambda x: (model if torch.backends.mha.get_fastpath_enabled() is skipped else whole)(x)
    assert audit(model, forged, [site], (x,), {}) == ([site], {site})


def test_the_audit_hands_on_what_a_model_forged_module_by_module_raises(model, stats, x):
    forged = forged_fx.transform(model, stats, 0, graph=False)
    forged.register_forward_hook(lambda *_: {}["mine"])
    with pytest.raises(KeyError, match="mine"):
        audit(model, forged, SITES, (x,), {})


def test_the_audit_runs_on_copies_of_its_example():
    class Centred(nn.Linear):
        def forward(self, x):
            return super().forward(x.sub_(0.5))

    model, x = Centred(3, 3).eval(), torch.ones(2, 3)
    stats = forged_fx.calibrate(model, [x.clone()])
    assert forged_fx.transform(model, stats, example=((x,), {})).forging.audited
    assert torch.equal(x, torch.ones_like(x))


@pytest.mark.parametrize(
    "remember, whole",
    [(lambda model, y: y * model.runs, False), (lambda model, y: y, True)],
    ids=["used again", "only kept"],
)
def test_what_a_model_remembers_of_its_last_run_is_in_no_graph(remember, whole):
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.runs = nn.Linear(4, 4), torch.zeros(4) if whole else 0

        def forward(self, x):
            y = self.layer(x)
            self.runs = y if whole else self.runs + 1
            return remember(self, y)

    model, x = Remembers().eval(), torch.randn(5, 4)
    stats = forged_fx.calibrate(model, [x])
    forged = forged_fx.transform(model, stats, 0)
    assert isinstance(forged, torch.fx.GraphModule) is whole
    assert whole or forged.forging.not_whole == "its forward does another thing when it runs again"
    for _ in range(3):
        assert torch.equal(forged(x), model(x))
    assert model.runs is not None and (whole or model.runs > 3)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.runs, self.total = nn.Linear(4, 4), nn.BatchNorm1d(4), 0, torch.zeros(4)

    def forward(self, x):
        return self.norm(self.a(x))


class Autocast(Base):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.a(x)


class AttentionsKernel(Base):
    def forward(self, x):
        x = self.a(x).view(1, 1, -1, 4)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(x, x, x)


class SeedsItself(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.fc(x + 0.1 * torch.randn_like(x))


class SetsTheState(SeedsItself):
    def forward(self, x):
        before = torch.get_rng_state()
        torch.random.manual_seed(0)
        noise = torch.randn_like(x)
        torch.set_rng_state(before)
        return self.fc(x + noise)


class CountsInAList(SeedsItself):
    def __init__(self):
        super().__init__()
        self.log = {"runs": [0]}

    def forward(self, x):
        self.log["runs"][0] += 1
        return self.fc(x)


class CountsInAnObject(CountsInAList):
    def __init__(self):
        super().__init__()
        self.meter = types.SimpleNamespace(runs=0)

    def forward(self, x):
        self.meter.runs += 1
        return self.fc(x)


COUNTERS = {
    "nested objects": (lambda: types.SimpleNamespace(inner=types.SimpleNamespace(n=0)), "held.inner.n += 1"),
    "slots": (lambda: Slots(), "held.n += 1"),
    "numpy": (lambda: np.zeros(3), "held[0] += 1"),
    "a long array": (lambda: np.zeros(5000), "held[2500] += 1"),
    "a set": (set, "held.add(len(held))"),
    "a count": (itertools.count, "next(held)"),
    "keys": (dict, "held[len(held)] = None"),
    "a deque": (lambda: collections.deque([0]), "held.append(held.pop() + 1)"),
}


class Slots:
    __slots__ = ("n",)

    def __init__(self):
        self.n = 0


@pytest.mark.parametrize(("make", "count"), COUNTERS.values(), ids=COUNTERS)
def test_what_a_forward_counts_in_is_no_graph(make, count):
    class Counts(SeedsItself):
        def __init__(self):
            super().__init__()
            self.held = make()

        def forward(self, x):
            exec(count, {"held": self.held})
            return self.fc(x)

    model, x = Counts().eval(), torch.randn(5, 4)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0)
    assert forged.forging.not_whole == "its forward changes 'held', which a graph would not do"


class Inference(Base):
    def forward(self, x):
        x = self.a(x)
        with torch.inference_mode():
            scale = x.mean()
        return x * scale.clone()


class Trains(Base):
    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self


class Calls(Base):
    def __call__(self, x):
        return super().__call__(2 * x)


class AsksForGradients(Base):
    def forward(self, x):
        return 2 * self.a(x) if torch.is_grad_enabled() else self.a(x)


class CountsRuns(Base):
    def forward(self, x):
        self.runs += 1
        return self.a(x) if self.runs < 4 else 2 * self.a(x)


class CountsInATensor(Base):
    def forward(self, x):
        self.total.add_(1)
        return self.a(x) * self.total


def decorated(forward):
    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    return wrapper


class Decorated(Base):
    @decorated
    def forward(self, x, scale=1, **more):
        return self.a(x) * scale


def with_a_forward_of_its_own():
    model = Base()
    model.forward = types.MethodType(lambda self, x: 2 * self.a(x), model)
    return model


class TrainsWithGradients(Base):
    def forward(self, x):
        return self.a(x * 2) if self.training and torch.is_grad_enabled() else self.a(x)


class RecordsUnderAutocast(Base):
    def forward(self, x):
        return self.a(x * 2) if torch.is_grad_enabled() and torch.is_autocast_enabled("cpu") else self.a(x)


class DetachesWhatIsFrozen(Base):
    def forward(self, x):
        y = self.a(x)
        return y if any(p.requires_grad for p in self.parameters()) else y.detach()


LOST = {
    TrainsWithGradients: "its forward does one thing in train mode and another in eval mode",
    RecordsUnderAutocast: "its forward does one thing ",
    DetachesWhatIsFrozen: "its forward reads 'a.weight' by another way than its attribute, once for a graph",
    Autocast: "its forward sets autocast, which a graph would drop",
    AttentionsKernel: "its forward sets the kernels of attention, which a graph would drop",
    Inference: "its forward sets inference mode, which a graph would drop",
    Trains: "'the model' has a train() of its own, which a graph would not have",
    Calls: "its class has a __call__ of its own, which a graph would not run",
    AsksForGradients: "its forward does one thing with gradients and another without",
    CountsRuns: "its forward does another thing when it runs again",
    CountsInATensor: "its forward changes 'total', which a graph would not do",
    CountsInAList: "its forward changes 'log', which a graph would not do",
    CountsInAnObject: "its forward changes 'meter', which a graph would not do",
    SeedsItself: "its forward sets the state of a random generator, which a graph would drop",
    SetsTheState: "its forward sets the state of a random generator, which a graph would drop",
    Decorated: "torch.fx cannot trace a forward that takes any arguments (*args, **kwargs), its own or a decorator's",
    with_a_forward_of_its_own: "its forward was set on this one model, and a graph is of its class's",
}


@pytest.mark.parametrize("make", LOST, ids=lambda make: make.__name__)
def test_what_a_graph_would_lose_is_in_none_though_nothing_is_audited(make):
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(5, 4)
    stats = forged_fx.calibrate(model, [x])
    stats.example = None  # as from a file
    forged = forged_fx.transform(model, stats, 0)
    assert forged.forging.not_whole.startswith(LOST[make])
    for grad, training, autocast in itertools.product((True, False), repeat=3):
        for module in (forged, model):
            module.train(training)
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert torch.equal(forged(x), model(x))
    assert [m.training for m in forged.train().modules()] == [m.training for m in model.train().modules()]


def test_a_model_that_was_cast_since_calibration_needs_an_example():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3)).eval(), torch.randn(2, 3, 8, 8)
    stats = forged_fx.calibrate(model, [x])
    half = copy.deepcopy(model).bfloat16()
    with pytest.raises(RuntimeError) as caught:
        forged_fx.transform(half, stats)
    of_batch, other = caught.value.__notes__
    assert "of shape (2, 3, 8, 8), torch.float32, and the weights are torch.bfloat16" in of_batch
    assert "if the model takes others now, example=((x,), {})" in other
    forged = forged_fx.transform(half, stats, 0, example=((x.bfloat16(),), {}))
    assert torch.equal(forged(x.bfloat16()), half(x.bfloat16()))


@pytest.mark.parametrize("graph", [True, False])
def test_a_hook_ahead_of_a_layer_stays_ahead_of_its_threshold(graph):
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(5, 4)
    model[2].register_forward_pre_hook(lambda layer, args: (args[0] + 0.3,) if layer.training else None)
    forged = forged_fx.transform(model.eval(), stats := forged_fx.calibrate(model, [x]), 0.25, graph=graph).train()
    t = stats.thresholds(0.25)
    h = model[0](x.where(x.abs() >= t["0"], 0)).relu() + 0.3
    assert torch.equal(forged(x), F.linear(h.where(h.abs() >= t["2"], 0), model[2].weight, model[2].bias))


def test_the_weights_hooks_of_torch_are_no_hindrance():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), torch.nn.utils.weight_norm(nn.Linear(8, 3))).eval()
    prune.random_unstructured(model[0], "weight", 0.5)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [torch.randn(5, 4)]))
    assert isinstance(forged, ForgedModule)


@pytest.mark.parametrize("nested", [True, False])
def test_padding_that_the_fast_path_drops_is_said(nested):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    mask = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    given = {"src": torch.randn(2, 6, 8), "src_key_padding_mask": mask}
    stats = forged_fx.calibrate(model, [given])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        forged_fx.transform(model, stats)
    assert any("gives 0 at padded positions" in str(one.message) for one in said) == nested


class Adapted(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)
        self.down, self.up, self.on = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(4, 2)), False

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y + F.linear(F.linear(x, self.down), self.up) if self.on else y


@pytest.mark.parametrize("graph", [True, False])
def test_what_a_layer_of_someones_own_does_later_is_not_passed_by(graph):
    """Calibration sees one call; once another path is taken, its calls have thresholds, or are refused."""
    model, x = nn.Sequential(Adapted(), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(5, 4)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0.25, graph=graph)
    assert {"0.down", "0.up"} <= {*forged_fx.describe(forged).elsewhere}
    if isinstance(forged, ForgedModule):
        return  # where it is not switched on: a graph has no such switch
    forged(x)
    forged[0].on = True
    with pytest.raises(RuntimeError, match="calibration saw 1 at most"):
        forged(x)


def test_a_layer_of_someones_own_that_changes_its_input_on_another_shape():
    class Centres(nn.Linear):
        def forward(self, x):
            if x.dim() == 3:
                x = x - x.mean(1, keepdim=True)
            return F.linear(x, self.weight, self.bias)

    model, x = nn.Sequential(Centres(4, 4)).eval(), torch.randn(2, 3, 4)
    stats = forged_fx.calibrate(model, [x[0]])
    t, h = stats.thresholds(0.25)["0"], x - x.mean(1, keepdim=True)
    for graph in (True, False):
        forged = forged_fx.transform(model, stats, 0.25, graph=graph)
        assert torch.equal(forged(x), F.linear(h.where(h.abs() >= t, 0), model[0].weight, model[0].bias))


def test_a_hook_that_makes_calls_of_its_own_is_named():
    model = nn.Sequential(nn.Linear(4, 8), torch.nn.utils.spectral_norm(nn.Linear(8, 3))).eval()
    stats = forged_fx.calibrate(model, [torch.randn(5, 4)])
    with pytest.raises(RuntimeError, match=r"'1' has hooks .* remove_spectral_norm"):
        forged_fx.transform(model, stats)
    torch.nn.utils.remove_spectral_norm(model[1])
    stats = forged_fx.calibrate(model, [torch.randn(5, 4)])
    assert [*forged_fx.transform(model, stats).threshold_buffers] == ["0", "1"]


ACT_IN_PLACE = {
    "a function": lambda model, h: F.relu_(h),
    "a method": lambda model, h: h.relu_(),
    "an argument": lambda model, h: F.leaky_relu(h, 0.1, True),
    "a module": lambda model, h: model.relu(h),
    "on a view": lambda model, h: model.relu(h.view(-1)),
}


@pytest.mark.parametrize("whole", [True, False], ids=["one graph", "module by module"])
@pytest.mark.parametrize("act", ACT_IN_PLACE.values(), ids=ACT_IN_PLACE)
def test_what_an_activation_in_place_leaves_is_found_by_all_readers(act, whole):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.relu = nn.Linear(8, 8), nn.Linear(8, 3), nn.ReLU(inplace=True)

        def forward(self, x):
            h = self.first(x)
            if not whole and h.sum() > 1e9:
                return h
            act(self, h)
            return self.last(h)

    model, x = InPlace().eval(), torch.randn(6, 8)
    stats = forged_fx.calibrate(model, [x], where="activations")
    (site,) = (name for name in stats.sites if "@" in name)
    stats.example = None  # as of a file: no audit
    assert torch.equal(forged_fx.transform(model, stats, 0, where="activations")(x), model(x))
    forged = forged_fx.transform(model, stats, 0.5, where="activations")
    assert isinstance(forged, torch.fx.GraphModule) is whole
    h = model.first(x)
    kept = h.detach() * (h.abs() >= 0.5 * stats.sites[site].c_max)
    act(model, kept)
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            assert torch.equal(forged(x), model.last(kept))


@pytest.mark.parametrize(
    "act", [nn.SiLU(inplace=True), torch.relu_, nn.SiLU()], ids=["module", "function", "not in place"]
)
def test_an_activation_of_a_slice_is_audited_as_it_is_forged(act):
    """In place it is given the slice itself, with its gaps in memory; else a threshold's result, which has none."""

    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 4, 3), act

        def forward(self, x):
            h = self.conv(x)[:, :, 1:-1, 1:-1]
            return h + self.act(h)

    model, x = Sliced().eval(), torch.randn(2, 3, 9, 9)
    stats = forged_fx.calibrate(model, [x], where="activations")
    forged = forged_fx.transform(model, stats, 0, where="activations")
    assert forged.forging.audited and torch.allclose(forged(x), model(x), atol=1e-6)


def test_an_activation_in_place_costs_no_copy_where_nothing_reads_its_input():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)).eval(), torch.randn(6, 8)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x], where="activations"), where="activations")
    assert not forged.graph.find_nodes(op="call_method", target="copy_")
