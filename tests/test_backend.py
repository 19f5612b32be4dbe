"""torch.compile(backend="forged"): forged models and plain ones, one result."""

import contextlib
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.utils.checkpoint import checkpoint
from written import code_of, graphs_run_as_traced

import forged_fx
from forged_fx import torch_internals
from forged_fx.share import thresholds_in


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


@pytest.fixture
def as_traced():
    with graphs_run_as_traced():
        yield


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
    code = code_of(compiled(model, stats), x)
    assert "torch.ops.forged_fx" not in code and "extern_kernels.addmm" in code


def test_loops_shorter_than_a_vector_stay_vectors():
    """A layout's change over 3 and 8 channels: Inductor's rule for what is worth vectors counts operations."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3)).eval()
    x = torch.rand(4, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]))

    def one_by_one(module, **how):
        code = code_of(torch.compile(module, **how), x)
        assert "transpose_mxn" in code or not torch.cpu._is_avx2_supported()
        return code.count("_tail++")

    assert one_by_one(forged, backend="forged") <= one_by_one(model)


@pytest.mark.parametrize(
    ("pixels", "dtype", "calls"), [(48, torch.float32, 1), (16, torch.float32, 0), (48, torch.bfloat16, 0)]
)
def test_between_two_convolutions_on_a_cpu_a_large_threshold_is_eager_modes(pixels, dtype, calls):
    """There is nothing to join, and a loop of its own would be one more file of C++ to compile."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval().to(dtype)
    x = torch.rand(10, 3, pixels, pixels, generator=torch.Generator().manual_seed(0)).to(dtype)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-2)
    with torch.no_grad():
        result, (code,) = run_and_get_code(torch.compile(forged, backend="forged"), x)
        assert torch.allclose(result, forged(x), atol=1e-5 if dtype == torch.float32 else 1e-2)
    assert code.count("= torch.ops.forged_fx.threshold.default(") == calls
    if calls:
        plain = code_of(torch.compile(model), x)
        assert code.count("= async_compile.cpp_pybinding(") == plain.count("= async_compile.cpp_pybinding(")


class Heads(nn.Module):
    """Attention, whose heads become one row again for the product that reads them; copied: by way of a copy."""

    def __init__(self, copied):
        super().__init__()
        self.qkv, self.proj, self.copied = nn.Linear(32, 96), nn.Linear(32, 32), copied

    def forward(self, x):
        n, rows, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, rows, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(2, 3).reshape(n, rows, 32) if self.copied else y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("copied", [False, True])
def test_between_libraries_a_threshold_is_eager_modes_past_views(copied):
    """Where the view is a copy, the threshold is a part of it."""
    model = Heads(copied).eval()
    x = torch.randn(32, 256, 32, generator=torch.Generator().manual_seed(0))
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-2)
    with torch.no_grad():
        result, (code,) = run_and_get_code(torch.compile(forged, backend="forged"), x)
        assert torch.allclose(result, forged(x), atol=1e-5)
    assert code.count("= torch.ops.forged_fx.threshold.default(") == (not copied)
    plain = code_of(torch.compile(model), x)
    files = code.count("= async_compile.cpp_pybinding("), plain.count("= async_compile.cpp_pybinding(")
    assert files == ((2, 1) if copied else (1, 0))  # (one of ours is for the model's input)


def test_where_a_view_has_to_be_copied_the_threshold_is_a_part_of_the_copy():
    """A convolution's result lies channels last for Inductor, and its graph does not say so."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(16 * 30 * 30, 5)).eval()
    x = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-2)
    code, plain = code_of(torch.compile(forged, backend="forged"), x), code_of(torch.compile(model), x)
    assert "= torch.ops.forged_fx.threshold.default(" not in code
    assert code.count("= async_compile.cpp_pybinding(") == plain.count("= async_compile.cpp_pybinding(") == 2


def test_statistics_may_be_a_path(model, stats, x, tmp_path, as_traced):
    stats.save(tmp_path / "s")
    with torch.no_grad():
        assert torch.equal(compiled(model, str(tmp_path / "s"))(x), compiled(model, stats)(x))


def test_a_path_is_read_again(model, stats, x, tmp_path, as_traced):
    others = forged_fx.calibrate(model, [4 * x])
    for these in (stats, others):
        these.save(tmp_path / "s")
        torch._dynamo.reset()
        with torch.no_grad():
            expected = forged_fx.transform(model, these, 2**-3)(x)
            assert torch.allclose(compiled(model, str(tmp_path / "s"))(x), expected, atol=1e-6)


def test_include_and_exclude(model, stats, x, as_traced):
    for globs in (
        {"include": "fc*"},
        {"exclude": ["conv", "#1"]},
        {"include": "*"},
        {"where": ["fc", "#1"]},
        {"statistic": "quantile(0.5)"},
    ):
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


def test_straight_through_reaches_compiled_code(model, stats, x, as_traced):
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
        ("freezing", "options='freezing': a dict, such as {'stats': stats}"),
        ({"stats": None}, "option 'stats' is NoneType: pass what forged_fx.calibrate returned"),
        ({"stats": "stats.safetensors", "strict": "no"}, "option 'strict' is 'no': True, or False"),
        ({"stats": "stats.safetensors", "strict": 1}, "option 'strict' is 1: True, or False"),
        ({"freezing": "yes"}, "option 'freezing' is 'yes': True, or False"),
        ({"triton.cudagraphs": 0}, "option 'triton.cudagraphs' is 0: True, or False"),
        ({1: 2}, "no option 1; ours are stats, "),
        ({"stats": "stats.safetensors", "only": "free"}, "no option 'only'; forged_fx.transform takes it"),
    ],
)
def test_options_are_checked(model, x, options, message):
    with pytest.raises(Exception, match=message):
        torch.compile(model, backend="forged", options=options)(x)


@pytest.fixture
def configured(monkeypatch):
    """What Inductor is told, compilation by compilation."""
    inductor, seen = torch_internals.inductor(), []
    compile_fx = inductor.compile_fx

    def spy(*args, config_patches, **how):
        seen.append(config_patches)
        return compile_fx(*args, config_patches=config_patches, **how)

    monkeypatch.setattr(inductor, "compile_fx", spy)
    return seen


def test_inductors_own_options_pass_through(model, stats, x, configured):
    with torch.no_grad():
        expected = forged_fx.transform(model, stats, 2**-3)(x)
        fast = compiled(model, stats, freezing=True, **{"epilogue-fusion": False})  # which may be spelled so, too
        assert torch.allclose(fast(x), expected, atol=1e-6)
    assert [(patches["freezing"], patches["epilogue_fusion"]) for patches in configured] == [(True, False)]


def test_the_disk_cache_does_not_serve_frozen_thresholds_of_another_ratio(model, stats, x):
    """Frozen, they are numbers in the code, which Inductor's key does not cover."""
    with torch.no_grad():
        for ratio in (2**-3, 2**-1):
            torch._dynamo.reset()
            expected = forged_fx.transform(model, stats, ratio)(x)
            assert torch.allclose(compiled(model, stats, ratio, freezing=True)(x), expected, atol=1e-6), ratio


def test_what_is_frozen_by_inductors_own_setting_is_in_the_cache_key_too(model, stats, x, monkeypatch):
    keys = []

    def note(gm, inputs, config_patches, **_):
        keys.append(config_patches["post_grad_custom_pre_pass"].uuid())
        return gm.forward

    inductor = torch_internals.inductor()
    monkeypatch.setattr(inductor, "compile_fx", note)
    for freezing in (False, True):
        with inductor.config.patch(freezing=freezing):
            for ratio in (2**-3, 2**-1):
                torch._dynamo.reset()
                compiled(model, stats, ratio)(x)
    assert keys[0] == keys[1] and len(set(keys)) == 3


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="this version's Inductor takes one pass")
def test_the_callers_own_pass_sees_what_ours_has_made(x):
    model, seen = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Flatten(), nn.Linear(256, 2)).eval(), []
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]))
    never_cached = os.urandom(8)
    own = torch_internals.graph_pass(lambda graph: seen.extend(thresholds_in(graph)), never_cached)
    code_of(torch.compile(forged, backend="forged", options={"post_grad_custom_pre_pass": own}), x)
    assert len(seen) == 2 and all("prologue" in node.meta for node in seen)


def test_statistics_of_another_model_are_refused(stats):
    with pytest.raises(Exception, match="belong to another model"):
        compiled(nn.Sequential(nn.Linear(3, 3)), stats)(torch.randn(2, 3))


def test_a_model_that_is_forged_already_is_refused(model, stats, x):
    with pytest.raises(Exception, match="this model is forged already: compile it without options"):
        compiled(forged_fx.transform(model, stats), stats)(x)


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


def test_graph_breaks_are_no_hindrance(as_traced):
    torch.manual_seed(0)
    model, x = Breaks().eval(), torch.randn(5, 4)
    stats = forged_fx.calibrate(model, [x])
    with torch.no_grad():
        expected = forged_fx.transform(model, stats, 2**-3)(x)
        assert torch.allclose(compiled(model, stats)(x), expected, atol=1e-6)
    assert graphs() > 3


def test_attention_is_opened(as_traced):
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


class Disabled(nn.Module):
    """A layer in code that is never compiled."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    @torch.compiler.disable
    def plain(self, x):
        return self.b(x)

    def forward(self, x):
        return self.plain(self.a(x))


class OneBranch(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else self.b(x)


def test_a_branch_that_calibration_did_not_take_is_named_as_a_cause(as_traced):
    model, x = OneBranch().eval(), torch.rand(5, 4)
    fast = compiled(model, forged_fx.calibrate(model, [x]))
    fast(x)
    with pytest.raises(ValueError, match=r"'a' did not run in any graph.*a branch that none in calibration took"):
        fast(-x)


class MadeOfParameters(nn.Module):
    """Its weights are made on the way, so that no call shows a parameter as it is."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(8, 8)) for _ in range(3))

    def forward(self, x, short=False):
        if not short:
            x = F.linear(x, self.a * 2)
        x = F.linear(x.tanh(), self.b * 2)
        return F.linear(x, self.c * 2)


def test_a_call_that_is_left_out_does_not_shift_those_that_follow(as_traced):
    torch.manual_seed(0)
    model, x = MadeOfParameters().eval(), torch.randn(5, 8)
    stats = forged_fx.calibrate(model, [x])
    fast = compiled(model, stats, ratio=2**-1)
    fast(x)

    def cut(value, site):
        return value.masked_fill(value.abs() < stats.sites[site].c_max / 2, 0)

    h = F.linear(cut(x.tanh(), "#1"), model.b * 2)
    torch.testing.assert_close(fast(x, short=True), F.linear(cut(h, "#2"), model.c * 2))


@torch._dynamo.config.patch(recompile_limit=2)
def test_any_number_of_forged_models_is_compiled():
    """Dynamo compiles a code a limited number of times: each forged model has its own."""
    torch._dynamo.reset()
    for _ in range(4):
        model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.rand(5, 4)
        forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]))
        with torch.no_grad():
            torch.compile(forged, backend="eager", fullgraph=True)(x)  # raises at the limit


def test_sites_that_cannot_be_reached_raise(as_traced):
    model, x = Disabled().eval(), torch.randn(5, 4)
    stats = forged_fx.calibrate(model, [x])
    fast = compiled(model, stats)
    for _ in range(2):  # not only where it is compiled
        with pytest.raises(ValueError, match=r"'b' did not run in any graph.*exclude"):
            fast(x)
    try:
        raise KeyError
    except KeyError:  # the caller's, which it handles
        with pytest.raises(ValueError, match="'b' did not run in any graph"):
            fast(x)
    with torch.no_grad():
        expected = forged_fx.transform(model, stats, 2**-3, exclude="b")(x)
        assert torch.allclose(compiled(model, stats, exclude="b")(x), expected, atol=1e-6)
        assert torch.allclose(compiled(model, stats, strict=False)(x), expected, atol=1e-6)


def test_a_pass_that_runs_no_graph_raises(model, stats, x, as_traced):
    """As when Dynamo has compiled too often, and runs the model plain from then on."""
    fast = compiled(model, stats)
    fast(x)
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(ValueError, match="'conv', 'fc', 'fc#1', '#1' did not run"),
    ):
        fast(x)
    fast(x)
    with torch.compiler.set_stance("force_eager"):
        compiled(model, stats, strict=False)(x)


def test_the_models_own_error_is_the_one_that_is_raised(as_traced):
    class Fails(Disabled):
        @torch.compiler.disable
        def plain(self, x):
            raise KeyError("mine")

    x = torch.randn(5, 4)
    stats = forged_fx.calibrate(Disabled().eval(), [x])
    with pytest.raises(KeyError, match="mine"):
        compiled(Fails().eval(), stats)(x)


class OnBothSides(nn.Module):
    """One layer on both sides of graph breaks, as often as the data says, and in a frame that it shares."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.a(x).relu()
        torch._dynamo.graph_break()
        x = self.b(self.a(self.a(x)).relu())
        if x.abs().max() > 0.4:
            x = self.a(x)
        if x.abs().max() >= 0:
            x = self.a(x)
        return self.b(x)


@pytest.fixture
def on_both_sides():
    """The model, its statistics, and an input that takes one branch; eight times as large, it takes the other."""
    torch.manual_seed(0)
    model, x = OnBothSides().eval(), torch.randn(5, 4)
    with torch.no_grad():
        for layer in (model.a, model.b):
            layer.bias.zero_()
    return model, forged_fx.calibrate(model, [x, 8 * x]), x


def test_a_layer_on_both_sides_of_a_graph_break_is_told_apart_by_counting(on_both_sides, as_traced):
    model, stats, x = on_both_sides
    calls = [name for name in stats.sites if name.startswith("a")]
    assert len(calls) == 5 and len({stats.sites[name].c_max for name in calls}) == 5
    assert stats.sites["a#4"].calls == 1
    forged, fast = forged_fx.transform(model, stats, 2**-3), compiled(model, stats)
    with torch.no_grad():
        for scale in (1, 8, 1):
            expected = forged(scale * x)
            assert torch.allclose(fast(scale * x), expected, atol=1e-6)
            assert not torch.allclose(model(scale * x), expected, atol=1e-3)


def test_a_call_that_calibration_never_saw_is_an_error(as_traced):
    torch.manual_seed(0)
    model, x = OnBothSides().eval(), torch.randn(5, 4)
    fast = compiled(model, forged_fx.calibrate(model, [x * 1e-3]))
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"'a' makes its call number 4 .*exclude='a\*'"):
        fast(100 * x)


class Blocks(nn.Module):
    """More instances of one class with a graph break inside than Dynamo would compile one by one."""

    def __init__(self, n=12):
        super().__init__()
        self.blocks = nn.ModuleList(BreakInside() for _ in range(n))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def test_instances_of_one_class_share_code_and_not_thresholds(as_traced):
    torch.manual_seed(0)
    model, x = Blocks().eval(), torch.randn(5, 4)
    stats = forged_fx.calibrate(model, [x])
    forged = forged_fx.transform(model, stats, 2**-3)
    fast, leaf = compiled(model, stats), x.clone().requires_grad_()
    found = fast(leaf)
    assert torch.allclose(found, forged(leaf), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, model(x), rtol=1e-2)
    assert graphs() < 8
    gradients = [torch.autograd.grad(out.sum(), leaf)[0] for out in (fast(leaf), forged(leaf))]
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-4)


class CheckpointedBlocks(nn.Module):
    """Nested checkpoints, attention that is opened inside, and a product of the root's own."""

    def __init__(self, checkpointed=True):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)) for _ in range(3))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.checkpointed = checkpointed

    def run(self, function, x):
        if not self.checkpointed:
            return function(x)
        return torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)

    def inner(self, x):
        x = self.run(self.blocks[1], x) @ (self.weight * 2)
        return x + self.attention(x, x, x, need_weights=False)[0]

    def forward(self, x):
        return self.blocks[2](self.run(self.inner, self.run(self.blocks[0], x)))


@pytest.mark.parametrize("whole", [True, False])
def test_straight_through_reaches_what_is_checkpointed(whole, as_traced):
    """Dynamo heeds no function mode there."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 3)).eval()
    x = torch.randn(4, 6)
    forged = forged_fx.transform(block, forged_fx.calibrate(block, [x]), 0.5)

    class Checkpoints(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = forged

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=False)

    called = Checkpoints() if whole else lambda v: checkpoint(forged, v, use_reentrant=False)
    run = torch.compile(called, backend="forged")
    for context in (forged_fx.straight_through, contextlib.nullcontext, forged_fx.straight_through):
        found = []
        for one in (forged, run):
            leaf = x.clone().requires_grad_()
            with context():
                y = one(leaf)
            found += torch.autograd.grad(y.sum(), leaf)
        assert torch.allclose(*found, atol=1e-6) and bool((found[1] == 0).any()) is (context is contextlib.nullcontext)


def test_what_is_checkpointed_is_forged_and_recomputed(as_traced):
    torch.manual_seed(0)
    model, x = CheckpointedBlocks().train(), torch.randn(5, 3, 4)
    plain = CheckpointedBlocks(checkpointed=False).train()
    plain.load_state_dict(model.state_dict())
    stats = forged_fx.calibrate(model, [x])
    forged, fast = forged_fx.transform(plain, stats, 2**-2), compiled(model, stats, 2**-2)
    for context in (torch.enable_grad, forged_fx.straight_through):
        gradients = []
        for module in (forged, fast):
            leaf = x.clone().requires_grad_()
            with context():
                out = module(leaf)
            gradients.append(torch.autograd.grad(out.square().sum(), leaf)[0])
        assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5)
    assert torch.allclose(fast(x), forged(x), atol=1e-6) and not torch.allclose(forged(x), model(x), atol=1e-3)


def test_one_model_compiled_twice_at_two_ratios(model, stats, x, as_traced):
    fast = {ratio: compiled(model, stats, ratio) for ratio in (2**-3, 2**-1)}
    for _ in range(2):
        for ratio, module in fast.items():
            with torch.no_grad():
                assert torch.allclose(module(x), forged_fx.transform(model, stats, ratio)(x), atol=1e-6)


def test_a_branch_that_is_compiled_later_belongs_to_the_options_that_it_began_with(on_both_sides, as_traced):
    model, stats, x = on_both_sides
    with torch.no_grad():
        fast = {ratio: compiled(model, stats, ratio) for ratio in (2**-3, 2**-1)}
        for scale in (1, 8):
            for ratio, module in fast.items():
                expected = forged_fx.transform(model, stats, ratio)(scale * x)
                assert torch.allclose(module(scale * x), expected, atol=1e-6)


def test_compiled_in_place(model, stats, x, as_traced):
    with torch.no_grad():
        expected = forged_fx.transform(model, stats, 2**-3)(x)
        model.compile(backend="forged", options={"stats": stats, "ratio": 2**-3})
        assert torch.allclose(model(x), expected, atol=1e-6)


@pytest.mark.parametrize("made", [lambda: nn.Linear(6, 6), lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU())])
def test_layers_and_containers_of_pytorchs_own_compiled_in_place(made, as_traced):
    torch.manual_seed(0)
    model, x, plain, seen = made(), torch.randn(8, 6), made(), []
    plain.compile(backend=lambda gm, inputs: seen.append(gm) or gm.forward)
    plain(x)
    if not seen:
        pytest.skip("this version's Dynamo passes them by")
    stats = forged_fx.calibrate(model, [x])
    with torch.no_grad():
        expected = forged_fx.transform(model, stats, 2**-2)(x)
        assert not torch.allclose(model(x), expected, atol=1e-3)
        model.compile(backend="forged", options={"stats": stats, "ratio": 2**-2})
        assert torch.allclose(model(x), expected, atol=1e-6)


def test_within_another_compiled_function_thresholds_are_dropped_with_a_warning(model, stats, x, as_traced):
    """Dynamo looks through a compiled model, and knows the outermost backend alone."""
    inner, forged = compiled(model, stats), forged_fx.transform(model, stats, 2**-3)
    with torch.no_grad():
        with pytest.warns(UserWarning, match=r"looks through it, and drops them: forge it with forged_fx.transform"):
            torch.compile(lambda x: inner(x) * 2, backend="forged")(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert torch.allclose(torch.compile(lambda x: forged(x) * 2, backend="forged")(x), forged(x) * 2, atol=1e-6)
            torch.compile(lambda x: x * 2, backend="forged")(x)
            torch.compile(lambda x: x * model.bn.weight[0], backend="forged")(x)  # no layer's


def test_a_graph_of_a_block_without_sites_is_of_a_forged_model_all_the_same(as_traced):
    class Doubles(nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return x * 2

    model, x = nn.Sequential(nn.Linear(4, 4), Doubles()).eval(), torch.randn(5, 4)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-3, graph=False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.allclose(torch.compile(forged, backend="forged")(x), forged(x), atol=1e-6)


class Halves(nn.Module):
    """Blocks of one class, which share code in two graphs, run in another order than they are registered in."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Half() for _ in range(4))

    def forward(self, x):
        for block in reversed(self.blocks):
            x = block(x) * 3
        return x


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        x = self.layer(x)
        torch._dynamo.graph_break()
        return x * 1.0


def test_parameters_may_be_exchanged(x, as_traced):
    """The weight tells which block a graph runs as. Its id may be another's by then, and it may be another block's."""
    torch.manual_seed(0)
    model, x = Halves().eval(), torch.randn(8, 6)
    stats = forged_fx.calibrate(model, [x])
    fast = compiled(model, stats, 2**-2)
    with torch.no_grad():
        fast(x)
        first, last = model.blocks[0].layer, model.blocks[-1].layer
        first.weight, last.weight = last.weight, first.weight
        assert torch.allclose(fast(x), forged_fx.transform(model, stats, 2**-2)(x), atol=1e-4)
        for _ in range(4):
            given = {name: torch.randn_like(value) / 2 for name, value in model.state_dict().items()}
            model.load_state_dict(given, assign=True)
            del given
            assert torch.allclose(fast(x), forged_fx.transform(model, stats, 2**-2)(x), atol=1e-4)


def test_a_weight_that_is_computed_tells_no_module(as_traced):
    class Doubled(Half):
        def forward(self, x):
            x = F.linear(x, self.layer.weight * 2)
            torch._dynamo.graph_break()
            return x * 1.0

    torch.manual_seed(0)
    model, x = Halves().eval(), torch.randn(8, 6)
    model.blocks = nn.ModuleList(Doubled() for _ in range(4))
    stats = forged_fx.calibrate(model, [x])
    fast = compiled(model, stats, 2**-2)
    with torch.no_grad():
        expected = forged_fx.transform(model, stats, 2**-2)(x)
        for _ in range(2):
            assert torch.allclose(fast(x), expected, rtol=1e-4, atol=1e-4)


def test_a_weight_of_two_modules_tells_neither(as_traced):
    torch.manual_seed(0)
    model, x = Halves().eval(), torch.randn(8, 6)
    model.blocks[0].layer.weight = model.blocks[-1].layer.weight
    stats = forged_fx.calibrate(model, [x])
    fast = compiled(model, stats, 2**-2)
    with torch.no_grad():
        expected = forged_fx.transform(model, stats, 2**-2)(x)
        for _ in range(2):
            assert torch.allclose(fast(x), expected, atol=1e-4)


def test_a_weight_stays_one_when_it_is_expanded_to_the_batch_or_multiplied_by_what_was_not_seen(as_traced):
    class Weighs(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.scales = nn.Parameter(torch.randn(4, 4)), [torch.tensor(2.0)]

        def forward(self, x):
            return x @ (self.weight * self.scales[0]).expand(x.shape[0], -1, -1)

    torch.manual_seed(0)
    model, x = Weighs().eval(), torch.randn(6, 3, 4)
    stats = forged_fx.calibrate(model, [x])
    fast = torch.compile(model, backend="forged", dynamic=True, options={"stats": stats, "ratio": 2**-2})
    with torch.no_grad():
        for n in (6, 3):
            assert torch.allclose(fast(x[:n]), forged_fx.transform(model, stats, 2**-2)(x[:n]), atol=1e-5)


def test_a_norm_of_all_blocks_does_not_part_their_graphs(as_traced):
    class Normed(Half):
        def forward(self, x):
            return super().forward(self.norm(x))

    torch.manual_seed(0)
    model, x, norm = Halves().eval(), torch.randn(8, 6), nn.LayerNorm(6)
    model.blocks = nn.ModuleList(Normed() for _ in range(4))
    for block in model.blocks:
        block.norm = norm
    fast = compiled(model, forged_fx.calibrate(model, [x]), 2**-2)
    with torch.no_grad():
        assert torch.allclose(fast(x), forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-2)(x), atol=1e-4)
    assert graphs() == 3  # two of the blocks, and one between them


def test_thresholds_are_where_their_layers_are(monkeypatch):
    """On the device that the model was moved to, and, where its layers lie on several, on that of each."""
    monkeypatch.setattr(torch_internals.inductor(), "compile_fx", lambda gm, inputs, **_: gm.forward)

    class OnTwo(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.b(self.a(x).relu().to(self.b.weight.device))

    torch.manual_seed(0)
    model, x = OnTwo().eval(), torch.randn(8, 6)
    stats = forged_fx.calibrate(model, [x])
    with torch.no_grad():
        fast = compiled(model, stats, 0)
        assert fast(x).device.type == "cpu"
        model.b.to("meta")
        assert fast(x).device.type == "meta"
        model.a.to("meta")
        assert fast(x.to("meta")).device.type == "meta"


@pytest.mark.parametrize("backend", ["eager", "forged"])
def test_tangents_pass_a_compiled_threshold(backend):
    """Dynamo's graph begins forward-mode differentiation where Python does not see it."""

    class Residual(nn.Linear):
        def forward(self, x):
            return x + super().forward(x)

    torch.manual_seed(0)
    model, x = Residual(6, 6).eval(), torch.randn(8, 6)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-2)

    def tangent(module):
        return lambda x: torch.func.jvp(module, (x,), (torch.ones_like(x),))[1]

    expected = tangent(forged)(x)
    assert not torch.allclose(expected, tangent(model)(x), atol=1e-3)
    assert torch.allclose(torch.compile(tangent(forged), backend=backend)(x), expected, atol=1e-5)
    assert torch.equal(tangent(forged)(x), expected)


def test_a_wrapper_around_the_calibrated_model(model, stats, x, as_traced):
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

        class Twice(Doubled):
            def forward(self, x):
                return self.model(x * 2) + self.model(x)

        expected += forged_fx.transform(model, stats, 2**-3)(x)
        assert torch.allclose(compiled(Twice(), stats)(x), expected, atol=1e-6)


def test_a_wrapper_that_runs_a_model_of_several_graphs_twice(as_traced):
    class Twice(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x * 2) + self.model(x)

    torch.manual_seed(0)
    for model in (Halves().eval(), OnBothSides().eval()):
        x = torch.randn(8, next(model.parameters()).shape[0])
        stats = forged_fx.calibrate(model, [x * 2, x])
        forged, fast = forged_fx.transform(model, stats, 2**-2), compiled(Twice(model), stats, 2**-2)
        with torch.no_grad():
            for _ in range(2):
                assert torch.allclose(fast(x), Twice(forged)(x), atol=1e-4)


# Its processes are forks of one that has imported PyTorch, and of the library nothing.
CHILD = """
import os, sys, torch, torch._inductor.compile_fx
from torch import nn
_, stats, *libraries = sys.argv
assert "forged_fx" not in sys.modules
for library in libraries:
    process = os.fork()
    if not process:
        break
    assert os.waitpid(process, 0)[1] == 0
else:
    sys.exit()
sys.path.insert(0, library)
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
x = torch.randn(2, 3, 8, 8)
fast = torch.compile(model, backend="forged", options={"stats": stats, "ratio": 0.25})
with torch.no_grad():
    print(fast(x).sum().item(), model(x).sum().item(), end=" ")
counters = torch._dynamo.utils.counters
print(counters["inductor"]["fxgraph_cache_hit"], counters["aot_autograd"]["autograd_cache_hit"], flush=True)
os._exit(0)
"""


# Two files that decide what is compiled, and a change to each: dropped values become 7.
CHANGES = {
    "forged_fx/lowering.py": ("inner.constant(instead, ", "inner.constant(7, "),
    "forged_fx/kernels/reference.py": ("return o.lt(o.abs(x), t), 0, x", "return o.lt(o.abs(x), t), 7, x"),
}


def test_it_is_found_without_an_import_and_caches_serve_a_second_process_but_no_other_version(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    forged_fx.calibrate(model, [torch.randn(2, 3, 8, 8)]).save(tmp_path / "s")
    own, unknown = Path(forged_fx.__file__).parent, os.urandom(8).hex()

    def with_change(file, old, new):
        """The library in a folder of its own, laid out as it is here: in a checkout `kernels` is a link."""
        folder = tmp_path / Path(file).stem
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(own, folder / "forged_fx", ignore=skip, symlinks=True)
        if (own / "kernels").is_symlink():
            shutil.copytree(own / "kernels", folder / "kernels", ignore=skip)
        source = (folder / file).read_text()
        assert old in source
        (folder / file).write_text(source.replace(old, new))
        return folder

    libraries = [own.parent, own.parent, *(with_change(file, *change) for file, change in CHANGES.items())]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, tmp_path / "s", *libraries],
        env={**os.environ, "TORCH_COMPILE_CACHE_KEY_TAG": unknown},
        cwd=tmp_path,  # Python looks there first
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ran = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    assert all(forged != plain for forged, plain, *_ in ran)
    (first, _, *missed), (second, _, *hits), *others = ran
    assert first == second and missed == [0, 0] and all(hits)
    for file, (other, _, *hits) in zip(CHANGES, others, strict=True):
        assert other != first and hits == [0, 0], file


# ---- the modes, the caches, and what must not happen at run time


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_every_mode(model, stats, x, mode, configured):
    forged = forged_fx.transform(model, stats, 2**-3)
    with torch.no_grad():
        assert torch.allclose(torch.compile(forged, backend="forged", mode=mode)(x), forged(x), atol=1e-6)
    (patches,) = configured
    assert torch_internals.inductor().list_mode_options(mode).items() <= patches.items()


@pytest.mark.parametrize("how, compilations", [("left to itself", 2), ("dynamic", 1), ("marked", 1)])
def test_the_short_last_batch_compiles_no_more_than_plain(model, stats, x, how, compilations):
    """Left to itself, Dynamo takes the first size for fixed, and the second makes the batch dynamic, for good."""
    forged = forged_fx.transform(model, stats, 2**-3)
    for module, backend in ((model, "inductor"), (forged, "forged")):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        fast = torch.compile(module, backend=backend, dynamic=True if how == "dynamic" else None)
        batches = [x[:n].clone() for n in (6, 4, 5, 6, 3)]
        if how == "marked":
            torch._dynamo.maybe_mark_dynamic(batches[0], 0)
        with torch.no_grad():
            for batch in batches:
                fast(batch)
        assert graphs() == compilations, backend


def test_thresholds_can_be_moved_in_frozen_code(model, stats, x):
    forged = forged_fx.transform(model, stats, 2**-3)
    fast = torch.compile(forged, backend="forged", options={"freezing": True})
    with torch.no_grad():
        for ratio in (2**-3, 2**-1, 0):
            forged.set_ratio(ratio)
            assert torch.allclose(fast(x), forged(x), atol=1e-6), ratio
    assert graphs() == 1


def test_nothing_waits_for_a_threshold(model, stats, x):
    """No host read in the generated code: CUDA graphs can hold it."""
    forged = forged_fx.transform(model, stats, 2**-3)
    code = code_of(torch.compile(forged, backend="forged"), x)
    runner = code.partition("class Runner")[2].partition("def get_args")[0]
    assert "call(self, args)" in runner and ".item()" not in runner and "_local_scalar_dense" not in runner


def test_low_precision_agrees_with_eager_on_request():
    """By default a threshold that rides on its producer sees the value before it is rounded: docs/cost.md."""
    x = torch.randn(2**18, generator=torch.Generator().manual_seed(0)).bfloat16()

    def f(x, t):
        return torch.ops.forged_fx.threshold(F.gelu(x), t)

    exact, default = (
        torch.compile(f, backend="forged", options={"emulate_precision_casts": exact}) for exact in (True, False)
    )
    differ = {exact: 0, default: 0}
    for t in torch.linspace(0.01, 0.1, 16):
        expected = f(x, t) == 0
        for fast in differ:
            differ[fast] += ((fast(x, t) == 0) != expected).sum().item()
    ignored = torch.__version__ < (2, 13)  # by Inductor's C++ code, where it was asked for
    assert differ[exact] == (differ[default] if ignored else 0) and 0 < differ[default] <= x.numel() * 16 / 1000


def test_options_that_say_another_thing_than_when_they_were_compiled(model, stats, x, tmp_path, as_traced):
    """Dynamo takes the same objects, or the same path, for the same options: it is an error, and not what ran then."""
    path = tmp_path / "stats"
    other = forged_fx.calibrate(model, [x * 10])

    def run(stats, ratio):
        return torch.compile(model, backend="forged", options={"stats": stats, "ratio": ratio})(x)

    def expected(stats, ratio):
        return forged_fx.transform(model, stats, ratio, example=((x,), {}))(x)

    with torch.no_grad():
        stats.save(path)
        compiled = torch.compile(model, backend="forged", options={"stats": path, "ratio": 2**-3})
        for _ in range(2):
            assert torch.allclose(compiled(x), expected(stats, 2**-3), atol=1e-6)
            stats.save(path)  # the same once more
        path.rename(tmp_path / "elsewhere")
        assert torch.allclose(compiled(x), expected(stats, 2**-3), atol=1e-6)
        other.save(path)
        for call in (lambda: compiled(x), lambda: run(path, 2**-3)):
            with pytest.raises(ValueError, match=r"torch\._dynamo\.reset"):
                call()
        torch._dynamo.reset()
        assert torch.allclose(run(path, 2**-3), expected(other, 2**-3), atol=1e-6)
        ratio = {"*": 2**-3}
        run(stats, ratio)
        ratio["*"] = 2**-1
        with pytest.raises(ValueError, match=r"torch\._dynamo\.reset"):
            run(stats, ratio)
        torch._dynamo.reset()
        assert torch.allclose(run(stats, ratio), expected(stats, 2**-1), atol=1e-6)
