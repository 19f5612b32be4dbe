"""The whole path on a GPU: calibrate, transform, fuse, compile in every mode, attack. Skipped where there is none.

Without one, a rehearsal of what needs no kernels, which tells whether the tests themselves are right:
    FORGED_FX_TEST_DEVICE=cpu python -m pytest tests/test_device.py
"""

import copy
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import nets
import oracle
import pytest
import torch
import torch.nn.functional as F
from kinks import DTYPES, LAYOUTS, same, values
from launches import MERGED
from test_backend import graphs
from test_kinds_ops import KINDS, SCALAR, arguments
from torch import nn

import forged_fx
from forged_fx import digits, fused_ops
from forged_fx.kernels import reference
from forged_fx.thresholds import thresholds_of

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu

DEVICE = os.environ.get("FORGED_FX_TEST_DEVICE", "cuda")
RATIO = 2**-4
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
KERNELS = pytest.mark.skipif(DEVICE != "cuda", reason="kernels run on a GPU alone")


class Transformer(nn.Module):
    """Two blocks as in a ViT: LayerNorms, GELU, fused attention, residual streams. Tokens roll, as in a Swin."""

    def __init__(self, width=64, heads=4):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2, self.heads = nn.LayerNorm(width), nn.LayerNorm(width), heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        n, length, width = x.shape
        qkv = self.qkv(self.norm1(x).roll(1, 1)).view(n, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


NETS = {"resnet": lambda: nets.PreActResNet(32, (1, 1, 1)), "transformer": Transformer}


@pytest.fixture(autouse=True)
def _exactly():
    """Equal calls give equal results: the same kernels, without TF32."""
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    torch._dynamo.utils.counters.clear()
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False, allow_tf32=False):
        yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(params=NETS)
def model(request):
    torch.manual_seed(0)
    return NETS[request.param]().eval().to(DEVICE)


@pytest.fixture
def x():
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def forge(model, x, **more):
    return forged_fx.transform(model, forged_fx.calibrate(model, [x]), RATIO, **more)


def close(found, expected, tolerance=2e-3):
    """In norm: a value at a threshold may fall on either side where sums are taken in another order."""
    return ((found - expected).norm() / expected.norm()).item() < tolerance


# ---- operators


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["threshold", *KINDS])
def test_every_kind_is_its_specification(name, dtype):
    """NaN, infinities and denormals among the values, in every layout, value and gradient."""
    forward, backward = getattr(torch.ops.forged_fx, name), getattr(torch.ops.forged_fx, f"{name}_backward")
    for t in (-1.0, 0.1, 0.5):
        for layout in LAYOUTS.values():
            x = layout(values(t, dtype))
            for args in [(torch.tensor(t),)] if name == "threshold" else arguments(name, t, x):
                given = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in (x, *args)]
                grad = torch.linspace(1, 2, x.numel(), dtype=dtype, device=DEVICE).reshape(x.shape)
                assert same(forward(*given), getattr(reference, name)(*given)), args
                assert same(backward(grad, *given), getattr(reference, f"{name}_backward")(grad, *given)), args


# ---- eager


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_unfused_is_the_oracle_bit_for_bit(model, x, dtype, channels_last):
    model, x = model.to(dtype), x.to(dtype)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    stats = forged_fx.calibrate(model, [x])
    assert {name: site.c_max for name, site in stats.sites.items()} == oracle.maxima(model, [x])
    forged = forged_fx.transform(model, stats, RATIO, fuse=False)
    with torch.no_grad(), oracle.forged(model, stats.thresholds(RATIO)):
        expected = model(x)
    with torch.no_grad():
        assert torch.equal(forged(x), expected) and not torch.equal(expected, model(x))
        forged.set_ratio(0)
        assert torch.equal(forged(x), model(x))


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fused_by_default_and_in_fewer_launches(model, x, dtype):
    model, x = model.to(dtype), x.to(dtype)
    fused, unfused = forge(model, x), forge(model, x, fuse=False)
    with torch.no_grad():
        assert close(fused(x), unfused(x), 2e-3 if dtype == torch.float32 else 2e-2)
        assert launches(fused, x) < launches(unfused, x)


def launches(call, x):
    call(x)
    return len(gpu.kernels(functools.partial(call, x)))


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_case_that_is_known_gives_what_its_first_call_gave(model, x, dtype):
    """On a device, `fused_ops.unrecorded` launches at once what it has seen."""
    model, x = model.to(dtype), x.to(dtype)
    forged = forge(model, x)
    fused_ops._known.clear()
    with torch.no_grad():
        first, known = forged(x), len(fused_ops._known)
        assert known and torch.equal(forged(x), first) and len(fused_ops._known) == known
        fewer = forged(x[:3])
        assert len(fused_ops._known) == 2 * known and torch.equal(forged(x[:3]), fewer)
        assert close(fewer.float(), forge(model, x, fuse=False)(x[:3]).float(), 5e-2)
        assert torch.equal(forged(x), first)


@pytest.mark.parametrize("kind", sorted({*SCALAR, "hard"} - {"threshold"}))
def test_every_kind_fused(model, x, kind):
    ratio = (RATIO, 0.5) if kind == "band" else 0.5 if kind == "clamp" else RATIO
    stats = forged_fx.calibrate(model, [x])
    fused, unfused = (forged_fx.transform(model, stats, ratio, kind=kind, fuse=fuse) for fuse in (True, False))
    with torch.no_grad():
        assert close(fused(x), unfused(x)) and not close(unfused(x), model(x), 1e-4)


@pytest.mark.parametrize("straight_through", [False, True])
def test_gradients_are_those_of_plain_torch(model, x, straight_through):
    forged = forge(model, x)
    thresholds = forged_fx.calibrate(model, [x]).thresholds(RATIO)
    leaf = x.clone().requires_grad_()
    with forged_fx.straight_through() if straight_through else torch.enable_grad():
        (found,) = torch.autograd.grad(forged(leaf).square().sum(), leaf)
    with oracle.forged(model, thresholds, straight_through):
        (expected,) = torch.autograd.grad(model(leaf).square().sum(), leaf)
    assert close(found, expected, 1e-5) and found.any()


def test_autocast(model, x):
    forged = forge(model, x)
    thresholds = forged_fx.calibrate(model, [x]).thresholds(RATIO)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        found = forged(x)
        with oracle.forged(model, thresholds):
            assert close(found, model(x), 2e-2)


# ---- compiled


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_eager(model, x, mode):
    forged = forge(model, x, fuse=False)
    fast = torch.compile(forged, backend="forged", mode=mode)
    with torch.no_grad():
        for _ in range(3):  # CUDA graphs are recorded in the second call and replayed in the third
            assert close(fast(x).clone(), forged(x))


def test_thresholds_move_in_a_cuda_graph_and_batches_shrink(model, x):
    forged = forge(model, x, fuse=False)
    fast = torch.compile(forged, backend="forged", mode="reduce-overhead", dynamic=False)
    with torch.no_grad():
        for ratio in (RATIO, 2**-2, 0):
            forged.set_ratio(ratio)
            for _ in range(3):
                assert close(fast(x).clone(), forged(x)), ratio
        assert graphs() == 1
        plain = torch.compile(forged, backend="forged", dynamic=True)
        for n in (8, 5, 3):
            assert close(plain(x[:n].clone()), forged(x[:n])), n
    assert graphs() == 2


class Heads(nn.Module):
    """A linear layer on what attention returns: four heads, with q, k and v side by side in the input."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(256, 256)

    def forward(self, x):
        q, k, v = x.view(*x.shape[:2], 3, 4, 64).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


# Inductor's own products, and a prologue wherever it is possible: nothing hangs on what is faster. (With options,
# torch.compile takes no mode.)
OWN_PRODUCTS = {
    "max_autotune": True,
    "max_autotune_gemm_backends": "TRITON",
    "benchmark_epilogue_fusion": False,
    **MERGED,
}


@KERNELS
@pytest.mark.parametrize("net", [nn.Linear(256, 256), Heads()], ids=["of the input", "of attention"])
def test_a_product_applies_its_threshold_as_it_loads(net):
    """Every token looks at itself alone and the weights are the unit matrix, so the results are the values, zeroed or
    not. None is near the threshold, 0.5."""
    if not torch._inductor.utils.is_big_gpu():
        pytest.skip("Inductor generates no products for a GPU as small as this")
    net = copy.deepcopy(net).requires_grad_(False)
    layer = getattr(net, "out", net)
    layer.weight.copy_(torch.eye(256)), layer.bias.zero_()
    generator = torch.Generator().manual_seed(0)
    v = torch.tensor([-2, -1, -0.25, 0.25, 1, 2])[torch.randint(6, (8, 64, 256), generator=generator)]
    itself = 32 * torch.eye(64).repeat(8, 1, 4)  # (its product with itself, / 8, is 128 on the diagonal, 0 elsewhere)
    x = v if net is layer else torch.cat([itself, itself, v], 2)
    net, x = net.eval().to(DEVICE, torch.float16), x.to(DEVICE, torch.float16)
    forged = forged_fx.transform(net, forged_fx.calibrate(net, [x]), 0.25, fuse=False)
    assert [t.item() for t in thresholds_of(forged).values()] == [0.5]
    expected = torch.where(v.abs() < 0.5, 0, v).to(DEVICE, torch.float16)
    fast = torch.compile(forged, backend="forged", options=OWN_PRODUCTS)
    with torch.no_grad():
        found, (code,) = torch._inductor.utils.run_and_get_code(fast, x)
        assert set(re.findall(r"triton_([a-z]+)_fused", code)) == {"tem"}, "no kernel but the product's"
        for result in (forged(x), found):
            torch.testing.assert_close(result, expected)
            assert torch.equal(result == 0, expected == 0)


@pytest.mark.parametrize("straight_through", [False, True])
def test_training_through_it_gives_eagers_gradients(model, x, straight_through):
    forged = forge(model, x, fuse=False)
    fast = torch.compile(forged, backend="forged")
    found = []
    for module in (fast, forged):
        forged.zero_grad()
        with forged_fx.straight_through() if straight_through else torch.enable_grad():
            module(x).square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in forged.parameters()]))
    assert close(*found, 1e-2)


@KERNELS
def test_it_costs_the_launches_that_cost_names(model, x):
    """Of the CUDA runtime, beside what the rules of `forged_fx.cost` say."""
    from forged_fx.cost import LAUNCH

    model, x = model.half().to(memory_format=torch.channels_last), x.half().to(memory_format=torch.channels_last)
    forged = forge(model, x, fuse=False)
    with torch.no_grad():
        costs = forged_fx.cost(forged, (x,))
        counts = [
            launches(torch.compile(module, backend=backend), x)
            for module, backend in ((model, "inductor"), (forged, "forged"))
        ]
    assert counts[1] - counts[0] == sum(cost.kind == LAUNCH for cost in costs.values()), (counts, costs)


RUN = """
import sys, torch
x, expected = (v.to(sys.argv[3]) for v in torch.load(sys.argv[2], weights_only=True))
model = torch._inductor.aoti_load_package(sys.argv[1])
assert "forged_fx" not in sys.modules
with torch.no_grad():
    print(((model(x) - expected).norm() / expected.norm()).item())
"""


def test_a_package_runs_in_a_process_without_the_library(x, tmp_path):
    torch.manual_seed(0)
    forged = forge(Transformer().eval().to(DEVICE), x, fuse=False)
    own = torch._inductor.config.patch("aot_inductor.metadata", {})  # as in test_export.py
    with torch.no_grad(), own:
        torch.save((x.cpu(), forged(x).cpu()), tmp_path / "x.pt")
        program = torch.export.export(forged, (x,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "m.pt2"))
    child = [sys.executable, "-c", RUN, package, tmp_path / "x.pt", DEVICE]
    done = subprocess.run(child, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2e-3


# ---- evaluate and the other calls


@pytest.fixture(scope="module")
def trained():
    pytest.importorskip("sklearn")
    model, x_train, _, x, y = digits.train_digits(0, epochs=6)
    model = model.to(DEVICE)
    stats = forged_fx.calibrate(model, [batch.to(DEVICE) for batch in x_train.split(512)])
    return model, forged_fx.transform(model, stats, 2**-7), x[:64].to(DEVICE), y[:64].to(DEVICE)


def test_statistics_are_those_of_the_cpu(trained):
    model, _, x, _ = trained
    here = forged_fx.calibrate(model, [x]).thresholds(1)
    there = forged_fx.calibrate(copy.deepcopy(model).cpu(), [x.cpu()]).thresholds(1)
    assert list(here) == list(there)
    for site in here:
        assert abs(here[site] / there[site] - 1) < 1e-4, site


def test_evaluate_and_go_on_where_it_stopped(trained, tmp_path):
    pytest.importorskip("pyautoattack")
    model, forged, x, y = trained
    call = {"base": model, "x": x, "y": y, "eps": digits.EPS, "attacks": ["apgd-ce"], "seed": 0}
    expected = forged_fx.evaluate(forged, **call, folder=tmp_path / "whole")
    assert 0 < expected.worst_case <= expected.model.accuracy("natural") and x.device.type == DEVICE
    again = forged_fx.evaluate(forged, **call, folder=tmp_path / "whole")
    assert [side.broken_by.tolist() for side in again.sides] == [side.broken_by.tolist() for side in expected.sides]
    expected.verify(forged, x, y, model)
    broken = x[(expected.model.broken_by >= 0).to(DEVICE)]
    assert (expected.model.examples.to(DEVICE) - broken).abs().max() <= digits.EPS + 1e-6


def test_sparsity_and_lipschitz(trained):
    model, forged, x, _ = trained
    zeros = forged_fx.sparsity(forged, [x])
    on_cpu = forged_fx.sparsity(copy.deepcopy(forged).cpu(), [x.cpu()])
    assert 0 < zeros.overall.net and abs(zeros.overall.net - on_cpu.overall.net) < 1e-3
    assert str(forged_fx.lipschitz(model, forged, x[:4], eps=digits.EPS))
