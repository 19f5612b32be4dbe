"""The whole path on real models: calibrate, transform, compile; the oracle shares no code with the library."""

import copy

import oracle
import pytest
import torch
from nets import PreActResNet

import forged_fx
from forged_fx.transform import ForgedModule

REAL = ["mnist_cnn_a_adv", "cifar_resnet2b_adv", "cifar_cnn_a_adv4", "cifar_resnet20_std"]
RANDOM = ["torchvision:resnet18", "timm:vit_tiny_patch16_224", "preact:resnet18"]
RATIO = 2**-5


def _random(name):
    torch.manual_seed(0)
    library, _, kind = name.partition(":")
    if library == "preact":
        return PreActResNet(width=16, blocks=(1, 1, 1)).eval(), torch.randn(8, 3, 32, 32)
    if library == "torchvision":
        return getattr(pytest.importorskip("torchvision").models, kind)().eval(), torch.randn(4, 3, 64, 64)
    return pytest.importorskip("timm").create_model(kind, depth=2).eval(), torch.randn(2, 3, 224, 224)


@pytest.fixture(scope="module", params=[*REAL, *RANDOM])
def case(request):
    """(model, calibration batches, test images, statistics)"""
    if ":" in request.param:
        model, x = _random(request.param)
        batches = [x, torch.randn_like(x)]
    else:
        assets = request.getfixturevalue("assets")
        model = assets.load(request.param)
        train, test = (
            ("mnist_train", "mnist_test") if "mnist" in request.param else ("cifar10jpeg_train", "cifar10raw_300")
        )
        batches = list(assets.images(train, 1000)[0].split(250))
        x = assets.images(test, 64)[0]
    return model, batches, x, forged_fx.calibrate(model, batches)


def test_calibration_equals_hooks(case):
    model, batches, _, stats = case
    assert {name: site.c_max for name, site in stats.sites.items()} == oracle.maxima(model, batches)


def test_it_is_one_graph_that_was_audited(case):
    model, _, _, stats = case
    forged = forged_fx.transform(model, stats)
    assert isinstance(forged, ForgedModule) and forged.forging.audited


def test_ratio_zero_is_the_model_bit_for_bit(case):
    model, _, x, stats = case
    with torch.no_grad():
        assert torch.equal(forged_fx.transform(model, stats, 0)(x), model(x))


def test_the_forward_equals_hooks_bit_for_bit(case):
    model, batches, x, stats = case
    thresholds = {name: c * RATIO for name, c in oracle.maxima(model, batches).items()}
    forged = forged_fx.transform(model, stats, RATIO)
    with torch.no_grad(), oracle.forged(copy.deepcopy(model), thresholds) as expected:
        assert torch.equal(forged(x), expected(x))
        assert not torch.equal(forged(x), model(x))


def test_the_gradient_equals_hooks(case):
    model, batches, x, stats = case
    thresholds = {name: c * RATIO for name, c in oracle.maxima(model, batches).items()}
    forged = forged_fx.transform(model, stats, RATIO)

    def gradient(module):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(module(leaf).square().sum(), leaf)[0]

    with oracle.forged(copy.deepcopy(model), thresholds) as expected:
        assert torch.allclose(gradient(forged), gradient(expected), rtol=1e-4, atol=1e-7)


def test_compiled_equals_eager_both_ways(case):
    """Compiled code rounds differently in the last bits, so that an element within rounding of its threshold may fall
    on its other side and move that image's logits; all but a few images agree to rounding."""
    model, _, x, stats = case
    forged = forged_fx.transform(model, stats, RATIO)
    options = {"stats": stats, "ratio": RATIO}
    with torch.no_grad():
        expected = forged(x)
        from_forged = torch.compile(forged, backend="forged")(x)
        from_plain = torch.compile(model, backend="forged", options=options)(x)
        plain = model(x)
    tolerance = 1e-5 * expected.abs().max()
    agree = [((found - expected).abs().amax(1) < tolerance).sum() for found in (from_forged, from_plain, plain)]
    assert agree[0] >= 0.95 * len(x) and agree[1] >= 0.95 * len(x)
    assert agree[2] < 0.5 * len(x)


def test_a_plain_checkpoint_loads(case):
    model, _, x, stats = case
    forged = forged_fx.transform(model, stats, RATIO)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
        assert forged.load_state_dict(other.state_dict()) == ([], [])
        assert torch.equal(forged(x), forged_fx.transform(other, stats, RATIO, example=((x,), {}))(x))


def test_shares_zeroed_are_as_calibration_predicts(case):
    """On the calibration data itself, to a percentage point (a larger site is counted from a sample)."""
    model, batches, _, stats = case
    for ratio in (2**-6, 2**-4):
        thresholds = stats.thresholds(ratio)
        for name, share in oracle.shares_below(model, batches, thresholds).items():
            assert stats.sites[name].share_zeroed(thresholds[name]) == pytest.approx(share, abs=0.01), name
