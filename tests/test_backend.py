"""torch.compile(backend="forged"): forged models and plain ones, one result."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import forged_fx


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.randn(5, 8))
        self.register_buffer("filter", torch.ones(8, 1, 2, 2) / 4)

    def forward(self, x):
        x = F.conv2d(self.bn(self.conv(x)).relu(), self.filter, groups=8)
        return F.linear(self.fc(self.fc(x.mean((2, 3))).relu()), self.weight)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x():
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def stats(model, x):
    return forged_fx.calibrate(model, [x])


def compiled(model, stats, ratio=2**-3, **more):
    return torch.compile(model, backend="forged", options={"stats": stats, "ratio": ratio, **more})


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def _no_counts():
    torch._dynamo.utils.counters.clear()


def test_a_plain_model_gets_the_same_thresholds(model, stats, x):
    with torch.no_grad():
        expected = forged_fx.transform(model, stats, 2**-3)(x)
        assert not torch.allclose(model(x), expected, atol=1e-3)
        assert torch.allclose(compiled(model, stats)(x), expected, atol=1e-6)


def test_a_forged_model_compiles(model, stats, x):
    forged = forged_fx.transform(model, stats, 2**-3)
    with torch.no_grad():
        assert torch.allclose(torch.compile(forged, backend="forged")(x), forged(x), atol=1e-6)


def test_the_threshold_is_not_an_opaque_call(model, stats, x):
    from torch._inductor.utils import run_and_get_code

    with torch.no_grad():
        _, (code,) = run_and_get_code(compiled(model, stats), x)
    assert "torch.ops.forged_fx" not in code and "extern_kernels.addmm" in code


def test_statistics_may_be_a_path(model, stats, x, tmp_path):
    stats.save(tmp_path / "s")
    with torch.no_grad():
        assert torch.equal(compiled(model, str(tmp_path / "s"))(x), compiled(model, stats)(x))


def test_include_and_exclude(model, stats, x):
    for globs in ({"include": "fc*"}, {"exclude": ["conv", "#1"]}, {"include": "*"}):
        torch._dynamo.reset()
        with torch.no_grad():
            expected = forged_fx.transform(model, stats, 2**-3, **globs)(x)
            assert torch.allclose(compiled(model, stats, **globs)(x), expected, atol=1e-6)


def test_training_through_it_gives_eagers_gradients(model, stats, x):
    forged = forged_fx.transform(model, stats, 2**-3)
    forged(x).square().sum().backward()
    compiled(model, stats)(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, forged.get_parameter(name).grad, atol=1e-4, rtol=1e-4), name


def test_straight_through_reaches_compiled_code(model, stats, x):
    forged = forged_fx.transform(model, stats, 2**-2)
    for fast in (torch.compile(forged, backend="forged"), compiled(model, stats, 2**-2)):
        found = {}
        for key, context in (
            ("true", torch.enable_grad),
            ("bpda", forged_fx.straight_through),
            ("again", torch.enable_grad),
        ):
            expected_from = []
            for module in (forged, fast):
                leaf = x.clone().requires_grad_()
                with context():
                    expected_from.append(torch.autograd.grad(module(leaf).sum(), leaf)[0])
            assert torch.allclose(*expected_from, atol=1e-5), key
            found[key] = expected_from[0]
        assert not torch.allclose(found["true"], found["bpda"]) and torch.equal(found["true"], found["again"])


def test_batch_sizes_and_moved_thresholds_do_not_recompile(model, stats, x):
    forged = forged_fx.transform(model, stats, 2**-3)
    fast = torch.compile(forged, backend="forged", dynamic=True)
    with torch.no_grad():
        for n in (6, 3, 5):
            assert torch.allclose(fast(x[:n].clone()), forged(x[:n]), atol=1e-6)
        n_graphs = graphs()
        forged.set_ratio(2**-1)
        assert torch.allclose(fast(x), forged(x), atol=1e-6)
        assert not torch.allclose(fast(x), model(x), atol=1e-3)
    assert graphs() == n_graphs == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stat": 1}, "no option 'stat'; did you mean 'stats'"),
        ({"ratio": 0.1}, "ratio need 'stats' too"),
        ({"max_autotun": True}, "did you mean 'max_autotune"),
    ],
)
def test_options_are_checked(model, x, options, message):
    with pytest.raises(Exception, match=message):
        torch.compile(model, backend="forged", options=options)(x)


def test_inductors_own_options_and_modes_pass_through(model, stats, x):
    with torch.no_grad():
        expected = forged_fx.transform(model, stats, 2**-3)(x)
        assert torch.allclose(compiled(model, stats, freezing=True)(x), expected, atol=1e-6)
        torch._dynamo.reset()
        forged = forged_fx.transform(model, stats, 2**-3)
        fast = torch.compile(forged, backend="forged", mode="max-autotune-no-cudagraphs")
        assert torch.allclose(fast(x), expected, atol=1e-6)


def test_statistics_of_another_model_are_refused(stats):
    with pytest.raises(Exception, match="belong to another model"):
        compiled(nn.Sequential(nn.Linear(3, 3)), stats)(torch.randn(2, 3))


class Breaks(nn.Module):
    """Graph breaks in the root and in a submodule; functional calls and a layer on both sides of one."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList(BreakInside() for _ in range(2))
        self.head = nn.Linear(4, 3)
        self.first, self.second = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))

    def forward(self, x):
        x = F.linear(x, self.first)
        x = self.inner[0](x)
        torch._dynamo.graph_break()
        return self.head(self.inner[1](F.linear(x, self.second)))


class BreakInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.a(x)
        if x.sum() > -1e9:
            x = self.b(x)
        return x


def test_graph_breaks_are_no_hindrance():
    torch.manual_seed(0)
    model, x = Breaks().eval(), torch.randn(5, 4)
    stats = forged_fx.calibrate(model, [x])
    with torch.no_grad():
        expected = forged_fx.transform(model, stats, 2**-3)(x)
        assert torch.allclose(compiled(model, stats)(x), expected, atol=1e-6)
    assert graphs() > 3


def test_attention_is_opened():
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x):
            return self.layer(self.attention(x, x, x, need_weights=False)[0])

    model, x = Net().eval(), torch.randn(2, 5, 8)
    stats = forged_fx.calibrate(model, [x])
    forged, leaf = forged_fx.transform(model, stats, 2**-3), x.clone().requires_grad_()
    expected = forged(leaf)
    assert torch.allclose(compiled(model, stats)(leaf), expected, atol=1e-5)
    assert not torch.allclose(model(leaf), expected, atol=1e-3)


@pytest.mark.parametrize("where", ["disabled", "break"])
def test_sites_that_cannot_be_reached_raise(where):
    """A layer in code that is never compiled; two calls of one layer with a graph break between them."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.a(x)
            if where == "disabled":
                return torch.compiler.disable(self.b)(x)
            torch._dynamo.graph_break()
            return self.b(self.a(x))

    torch._dynamo.reset()
    model, x = Net().eval(), torch.randn(5, 4)
    stats = forged_fx.calibrate(model, [x])
    message = "'b'" if where == "disabled" else "'a'"
    with pytest.raises(Exception, match=message + r".*exclude"):
        compiled(model, stats)(x)
    torch._dynamo.reset()
    excluded = "b" if where == "disabled" else "a*"
    with torch.no_grad():
        expected = forged_fx.transform(model, stats, 2**-3, exclude=excluded)(x)
        assert torch.allclose(compiled(model, stats, exclude=excluded)(x), expected, atol=1e-6)
        torch._dynamo.reset()
        compiled(model, stats, strict=False)(x)


def test_a_wrapper_around_the_calibrated_model(model, stats, x):
    """The statistics find their model inside the one that is compiled."""
    with torch.no_grad():
        expected = forged_fx.transform(model, stats, 2**-3)(x * 2)

        class Doubled(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, x):
                return self.model(x * 2)

        assert torch.allclose(compiled(Doubled(), stats)(x), expected, atol=1e-6)


CHILD = """
import sys, torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
x = torch.randn(2, 3, 8, 8)
fast = torch.compile(model, backend="forged", options={"stats": sys.argv[1], "ratio": 0.25})
with torch.no_grad():
    print((fast(x) - model(x)).abs().max().item() > 0)
print(torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"])
"""


def test_it_is_found_without_an_import_and_hits_the_cache_in_a_second_process(tmp_path):
    import os

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    forged_fx.calibrate(model, [torch.randn(2, 3, 8, 8)]).save(tmp_path / "s")
    outputs = []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", CHILD, str(tmp_path / "s")],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        outputs.append(run.stdout.split())
    assert outputs == [["True", "0"], ["True", "1"]]
