"""Every kind of forging, from statistics to the forged model: by hand, as one graph, module by module, compiled."""

import copy
import functools
import io
import json
import math
import re
import textwrap

import numpy as np
import pytest
import scratch
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import nn
from written import graphs_run_as_traced

import forged_fx
from forged_fx.channels import ChannelCounts
from forged_fx.evaluate import surrogate
from forged_fx.kinds import KINDS
from forged_fx.ops import FUNCTIONS
from forged_fx.transform import ForgedModule, forging_of


def nothing(*_):
    """A hook: no graph runs it, so that the model is forged module by module."""


class Many(nn.Module):
    """A site for each kind, two that read one tensor, and a view between an activation and its reader."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3)
        self.c, self.d = nn.Linear(144, 32), nn.Linear(144, 32)
        self.e, self.f, self.g, self.h = (nn.Linear(32, 32) for _ in range(4))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.act(self.a(x))
        x = torch.tanh(self.b(x)).flatten(1)
        x = self.act(self.c(x) + self.d(x))
        x = nn.functional.gelu(self.e(x))
        return self.h(self.g(self.f(x).sin()).cos())


SITES = {
    "a": "band",
    "b": "soft",
    "c": "clamp",
    "d": "clamp",
    "e": "shifted",
    "f": "one_sided",
    "g": "mean",
    "h": "hard",
}
RATIOS = {"a": (0.05, 0.6), "[cd]": 0.5, "g": 0.4, "*": 0.1}


def formula(kind, x, stats, ratio):
    """The kind on a tensor, from the statistics' numbers, in plain torch."""
    c = stats.c_max
    if kind == "mean":
        dims = [d for d in range(x.dim()) if d != x.dim() + stats.channel]
        mean, std = stats.channel_mean_std()
        shape = [1 if d in dims else -1 for d in range(x.dim())]
        mean, width = (torch.tensor(v, dtype=torch.float32).view(shape) for v in (mean, ratio * std))
        return torch.where((x - mean).abs() <= width, mean, x)
    if kind == "band":
        low, high = (torch.tensor(r * c, dtype=torch.float32) for r in ratio)
        return torch.where(x.abs() < low, 0, x.clamp(-high, high))
    t = torch.tensor(ratio * c, dtype=torch.float32)
    return {
        "hard": torch.where(x.abs() < t, 0, x),
        "one_sided": torch.where(x < t, 0, x),
        "shifted": (x - t).relu(),
        "soft": x - x.clamp(-t, t),
        "clamp": x.clamp(-t, t),
    }[kind]


def by_hand(model, x, stats, kinds, ratios):
    """The model with each kind ahead of its layer, by hooks."""
    twin = copy.deepcopy(model)
    for name, kind in kinds.items():
        row, ratio = stats.sites[name], ratios[name]
        twin.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kind=kind, row=row, ratio=ratio: (formula(kind, args[0], row, ratio),)
        )
    return twin(x)


def resolved():
    return {site: RATIOS.get(site, RATIOS["[cd]"] if site in "cd" else RATIOS["*"]) for site in SITES}


@pytest.fixture(scope="module")
def x():
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Many().eval()


@pytest.fixture(scope="module")
def stats(model, x):
    return forged_fx.calibrate(model, x.split(5), channels=True, where="activations")


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_its_formula(model, stats, x, kind):
    ratio = {"band": (0.05, 0.5), "clamp": 0.5}.get(kind, 0.1)
    forged = forged_fx.transform(model, stats, ratio, kind=kind)
    assert isinstance(forged, ForgedModule)
    with torch.no_grad():
        expected = by_hand(model, x, stats, dict.fromkeys(SITES, kind), dict.fromkeys(SITES, ratio))
        assert torch.equal(forged(x), expected) and not torch.equal(expected, model(x))
        forged.set_ratio(None)
        assert torch.equal(forged(x), model(x))
        forged.set_ratio(ratio)
        assert torch.equal(forged(x), expected)


def test_kinds_per_site_in_every_way_to_run(model, stats, x):
    """One graph, copies of it, module by module, half precision's buffers; the same result bit for bit."""
    forged = forged_fx.transform(model, stats, RATIOS, kind=SITES)
    hooked = copy.deepcopy(model)
    hooked.register_forward_hook(nothing)
    one_by_one = forged_fx.transform(hooked, stats, RATIOS, kind=SITES)
    assert not isinstance(one_by_one, ForgedModule)
    with torch.no_grad():
        expected = by_hand(model, x, stats, SITES, resolved())
        for found in (forged, one_by_one):
            file = io.BytesIO()
            torch.save(found, file)
            file.seek(0)
            again = forged_fx.transform(model, stats, None, kind=SITES)
            again.load_state_dict(found.state_dict())
            for twin in (found, copy.deepcopy(found), torch.load(file, weights_only=False), again):
                assert torch.equal(twin(x), expected)
                assert [row.forging for row in forged_fx.describe(twin)] == list(SITES.values())
            assert found.half().get_buffer("g.forged_width").dtype == torch.float32


def test_compiled_equals_eager(model, stats, x):
    forged = forged_fx.transform(model, stats, RATIOS, kind=SITES)
    torch._dynamo.reset()
    fast = torch.compile(forged, backend="forged")
    with torch.no_grad():
        assert torch.allclose(fast(x), forged(x), atol=1e-6)
        forged_fx.set_ratio(forged, None)
        assert torch.allclose(fast(x), model(x), atol=1e-6)
        forged_fx.set_ratio(forged, RATIOS)


def test_gradients_of_what_is_forged_on_the_way():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)).eval(), torch.randn(5, 6)
    stats = forged_fx.calibrate(model, [x], channels=True)
    given = {"ratio": {"0": (0.1, 0.5), "*": 0.5}, "kind": {"0": "band", "1": "mean", "2": "soft"}}
    torch._dynamo.reset()
    fast = torch.compile(model, backend="forged", options={"stats": stats, **given})
    found = []
    for module in (fast, forged_fx.transform(model, stats, **given)):
        leaf = x.clone().requires_grad_()
        with forged_fx.straight_through():
            y = module(leaf)
        found.append(torch.autograd.grad(y.sum(), leaf)[0])
    through = (model[2].weight @ model[1].weight @ model[0].weight).sum(0).expand(5, 6)
    assert torch.allclose(*found, atol=1e-6) and torch.allclose(found[0], through, atol=1e-6)


def test_exported_and_decomposed(model, stats, x):
    forged = forged_fx.transform(model, stats, RATIOS, kind=SITES, fuse=True)  # on a CPU that changes nothing
    program = torch.export.export(forged, (x,)).run_decompositions(forged_fx.decompositions())
    assert not any("forged_fx" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
    assert torch.allclose(program.module()(x), forged(x), atol=1e-6)


def test_dynamo_goes_through_modules_forged_one_by_one(model, stats, x):
    hooked = copy.deepcopy(model)
    hooked.register_forward_hook(nothing)
    forged = forged_fx.transform(hooked, stats, RATIOS, kind=SITES)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(forged, backend="aot_eager")(x), forged(x))


@graphs_run_as_traced()
def test_shared_code_of_several_kinds():
    """Blocks of one class share Dynamo's graph, unless their kinds differ."""

    class Block(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.fc = nn.Linear(channels, 8)

        def forward(self, x):
            torch._dynamo.graph_break()
            return self.fc(x).relu()

    torch.manual_seed(0)
    model, x = nn.Sequential(*map(Block, (6, 8, 8, 8))).eval(), torch.randn(4, 6)
    stats = forged_fx.calibrate(model, [x], channels=True)
    scalar = {"0.fc": "hard", "1.fc": "soft", "2.fc": "clamp", "3.fc": "hard"}
    for kind, ratio in (("soft", 0.2), (scalar, 0.2), ({**scalar, "1.fc": "mean"}, 0.2), ("mean", 0.2)):
        torch._dynamo.reset()
        fast = torch.compile(model, backend="forged", options={"stats": stats, "ratio": ratio, "kind": kind})
        with torch.no_grad():
            assert torch.allclose(fast(x), forged_fx.transform(model, stats, ratio, kind=kind)(x), atol=1e-6)


def test_equal_ends_are_shared(model, stats, x):
    """c and d read one tensor; so their clamps are one, as `cost` knows of its graph."""
    for kinds, shared in (("clamp", True), ({"c": "clamp", "d": "hard"}, False)):
        forged = forged_fx.transform(model, stats, 0.5, kind=kinds, where=["c", "d"])
        torch._dynamo.reset()
        assert (forged_fx.cost(forged, (x,))["d"].kind == "shared") == shared


def test_costs_are_those_of_a_threshold(model, stats, x):
    prices = {
        kind: forged_fx.cost(forged_fx.transform(model, stats, None, kind=kind), (x,)) for kind in ("hard", "band")
    }
    assert prices["hard"] == prices["band"]
    only = forged_fx.transform(model, stats, 0.5, kind="clamp", only="free")
    rows = {row.site: row for row in forged_fx.describe(only)}
    assert rows["a"].left_out.startswith("not free") and rows["c"].limit == stats.sites["c"].c_max / 2


def test_describe_says_kind_and_ends(model, stats):
    forged = forged_fx.transform(model, stats, RATIOS, kind=SITES)
    rows = {row.site: row for row in forged_fx.describe(forged)}
    assert {site: row.forging for site, row in rows.items()} == SITES
    assert rows["a"].limit == pytest.approx(0.6 * stats.sites["a"].c_max)
    assert 0 < rows["a"].share_limited < rows["c"].share_limited < 1
    assert rows["g"].threshold is None and rows["g"].width > 0 and rows["g"].share_zeroed is None
    assert rows["e"].share_zeroed == stats.sites["e"].share_zeroed(rows["e"].threshold)  # behind a ReLU
    assert rows["f"].share_zeroed is None  # GELU's negative values would become 0 too, and |x| does not tell
    assert "+-" in str(forged_fx.describe(forged)) and "limited  clamp, in the graph" in str(forged_fx.describe(forged))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "hart"}, "no kind 'hart'; did you mean 'hard'"),
        ({"kind": "clamp"}, "kind 'clamp' needs a ratio .*limited"),
        ({"kind": "clamp", "ratio": 0}, "ratio must be a number above 0.*None leaves"),
        ({"kind": "band", "ratio": 0.5}, r"ratio must be a pair \(low, high\)"),
        ({"kind": "band", "ratio": (0.5, 0.2)}, "low end 0.5 lies above"),
        ({"kind": "band", "ratio": (0.5, float("nan"))}, "ratio, its high end, must be"),
        ({"kind": {"a": "hard"}}, "no kind for site 'b': add a glob"),
        ({"kind": {"x": "hard", "*": "soft"}}, "kind: 'x' matches no site"),
        ({"ratio": {"a": 2, "*": 0.1}}, r"ratio for 'a' must be a number in \[0, 1\]"),
        ({"statistic": "median"}, "statistic='median': it is 'max', or 'quantile"),
        ({"statistic": "quantile(2)"}, "quantile"),
        ({"statistic": "quantile(0.9)", "ratio": float("inf")}, "ratio must be a number in"),
        ({"statistic": "quantile(0.1)", "kind": "clamp", "ratio": 2}, r"^quantile\(0.1\) of 'b' is 0.*higher quantile"),
        ({"statistic": "quantile(0.1)", "kind": "band", "ratio": (0, 2)}, "no input would be left"),
        ({"statistic": "mean_std"}, "is for kind 'mean'; the others take"),
        ({"kind": "mean", "statistic": "max", "ratio": 0.1}, "kind 'mean' takes 'mean_std'"),
        ({"where": "conv"}, "where: 'conv' matches no site"),
    ],
)
def test_errors_name_the_next_step(model, stats, options, says):
    with pytest.raises(ValueError, match=says):
        forged_fx.transform(model, stats, **options)


def test_what_calibration_did_not_measure_is_an_error(model, x):
    plain = forged_fx.calibrate(model, [x])
    with pytest.raises(ValueError, match=r"lack at 'a': .*channels=True.*calibrate \.\.\. --channels"):
        forged_fx.transform(model, plain, 0.1, kind="mean")
    with pytest.raises(ValueError, match=r"no activation.*where='activations'"):
        forged_fx.transform(model, plain, where="activations")
    with pytest.raises(ValueError, match="where='relu'"):
        forged_fx.calibrate(model, [x], where="relu")


def test_a_quantile_is_a_smaller_statistic(model, stats, x):
    site = stats.sites["a"]
    for q in (0.1, 0.5, 0.9, 0.999):
        exact = torch.quantile(x.abs().flatten(), q).item()
        assert site.statistic(f"quantile({q})") == pytest.approx(exact, rel=0.13)
        assert site.share_zeroed(site.statistic(f"quantile({q})")) == pytest.approx(q, abs=1e-6)
    assert site.statistic("quantile(1)") == site.c_max and site.statistic("quantile(0)") < x.abs().min() * 1.01
    assert stats.sites["e"].statistic("quantile(0.1)") == 0  # most are a ReLU's zeros
    forged = forged_fx.transform(model, stats, 1.5, kind="clamp", statistic="quantile(0.9)")
    assert forged.a.forged_limit.item() == pytest.approx(1.5 * site.statistic("quantile(0.9)"))
    forged.set_ratio(0.5)
    assert forged.a.forged_limit.item() == pytest.approx(0.5 * site.statistic("quantile(0.9)"))
    beyond = forged_fx.transform(model, stats, 1.5, statistic="quantile(0.9)")  # values lie there, other than of c_max
    assert beyond.a.forged_threshold.item() == pytest.approx(1.5 * site.statistic("quantile(0.9)"))


def test_the_ends_of_a_band_may_meet():
    assert KINDS["band"].check((0.5, 0.5), "max", "ratio") == (0.5, 0.5)


# ---- what attacks see


@pytest.mark.parametrize("name", surrogate.SLOPES)
def test_smooth_surrogates(name):
    """As the temperature falls, the slope becomes the true gradient away from the kinks; off, it is 1."""
    f = FUNCTIONS[name]
    x = torch.tensor([-3.0, -2.0, -1.4, -0.3, -0.1, 0.1, 0.2, 0.9, 1.4, 2.0, 5.0])
    on = {"clamp": (1.7,), "band": (0.5, 1.7), "mean": (0.5, 0.7)}.get(name, (0.5,))
    off = {"clamp": (torch.inf,), "band": (0.0, torch.inf), "mean": (0.5, 0.0)}.get(name, (0.0,))
    channel = (0,) if f.channels else ()

    def gradient(values, temperature):
        leaf = x.clone().requires_grad_()
        parameters = [torch.full((len(x),), v) if f.channels else torch.tensor(v) for v in values]
        with surrogate.smooth(temperature) if temperature else torch.enable_grad():
            y = f.op(leaf, *parameters, *channel)
        assert torch.equal(y, f.op(x, *parameters, *channel))
        return torch.autograd.grad(y.sum(), leaf)[0]

    assert torch.allclose(gradient(on, 0.01), gradient(on, 0), atol=1e-3)
    assert not torch.allclose(gradient(on, 1.0), gradient(on, 0), atol=1e-2)
    assert (gradient(on, 0.3)[gradient(on, 0) == 0] != 0).any()
    assert torch.equal(gradient(off, 0.3), torch.ones_like(x))
    # a temperature is a share of the threshold: in other units the slope is the same
    slope, parameters = surrogate.SLOPES[name], [torch.tensor(v) for v in on]
    assert torch.equal(slope(8 * x, *(8 * p for p in parameters), 0.3), slope(x, *parameters, 0.3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", surrogate.SLOPES)
def test_smooth_surrogates_of_small_thresholds_in_half_precision(name, dtype):
    """Parameters are float32, and may be smaller than anything in float16: the slope is that of float32, rounded."""
    f = FUNCTIONS[name]
    values = {"clamp": (1e-9,), "band": (1e-9, 2e-9), "mean": (0.0, 1e-9)}.get(name, (1e-9,))
    channel = (0,) if f.channels else ()
    x = torch.tensor([-8.0, -1e-3, 0.0, 6e-8, 1e-3, 8.0], dtype=dtype)

    def gradient(leaf):
        leaf = leaf.clone().requires_grad_()
        parameters = [torch.full((len(x),), v) if f.channels else torch.tensor(v) for v in values]
        with surrogate.smooth(0.1):
            y = f.op(leaf, *parameters, *channel)
        return torch.autograd.grad(y.sum(), leaf)[0]

    assert torch.equal(gradient(x), gradient(x.float()).to(dtype)) and gradient(x).isfinite().all()


# ---- one that is added

ADDED = """
import torch, triton
triton.knobs.runtime.interpret = True
import forged_fx
from forged_fx.evaluate.surrogate import smooth
from forged_fx.kernels import kinds, reference
from forged_fx.search_moves import LADDERS

x, t = torch.linspace(-2, 2, 401), torch.tensor(0.3)
y = torch.where(x.abs() < t, 0, x + t * x.sign())
for found in (reference.apart(x, t), torch.ops.forged_fx.apart(x, t), kinds.launch("apart", x, t)):
    assert torch.equal(found, y)
assert torch.equal(forged_fx.decompositions()[torch.ops.forged_fx.apart.default](x, t), y)
kept = (x.abs() >= t).float()
for found in (torch.ops.forged_fx.apart_backward(x, x, t), kinds.launch_backward("apart", x, x, t)):
    assert torch.equal(found, x * kept)
model = torch.nn.Sequential(torch.nn.Linear(4, 3))
forged = forged_fx.transform(model, forged_fx.calibrate(model, [x[:400].view(100, 4)]), 0.15, kind="apart")
assert torch.allclose(forged(x[:4]), model(y[:4])) and "apart" in LADDERS
leaf = x[:4].clone().requires_grad_()
with smooth(0.3):
    forged(leaf).sum().backward()
print(forged_fx.describe(forged)[0].forging, leaf.grad.isfinite().all().item())
"""


def test_a_kind_that_is_added_as_the_docs_say_works_everywhere(tmp_path):
    page = (scratch.ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"<!-- not run: (\S.*?) -->\n   ```python\n(.*?)   ```", page, flags=re.DOTALL))
    code = {where: textwrap.dedent(block) for where, block in blocks.items()}
    branches = {where: textwrap.indent(lines, "    ") for where, lines in code.items()}
    rule, function, kind, slope, ladder = re.findall(r"`([^`\n]*\"apart\"[^`\n]*,)`", page)
    added = {
        "kernels/reference.py": [
            ("RULES: dict[", code["kernels/reference.py"] + "\n\n"),
            ('    "mean": _mean,\n', f"    {rule}\n"),
        ],
        "kernels/kinds.py": [
            ('    else:\n        tl.static_assert(RULE == "mean"', branches["drops in kernels/kinds.py"]),
            ('    else:\n        tl.static_assert(RULE == "one_sided"', branches["other in kernels/kinds.py"]),
        ],
        "ops.py": [('        Function("mean", (', f"        {function}\n")],
        "kinds.py": [('        Kind("mean", "mean"', f"        {kind}\n")],
        "evaluate/surrogate.py": [('    "mean": lambda x, mean', f"    {slope}\n")],
        "search_moves.py": [('    "mean": (WIDTH,),\n', f"    {ladder}\n")],
    }
    done = scratch.run(tmp_path, ADDED, added)
    assert done.stdout == "apart True\n", done.stderr


# ---- MeanSparse, and activations as sites


class WideBlock(nn.Module):
    """Zagoruyko and Komodakis 2016 (arXiv 1605.07146): bn-relu-conv, twice, on four times the width."""

    def __init__(self, i, o, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(i), nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(o), nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.relu1, self.relu2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.shortcut = nn.Conv2d(i, o, 1, stride, bias=False)

    def forward(self, x):
        x = self.relu1(self.bn1(x))
        return self.shortcut(x) + self.conv2(self.relu2(self.bn2(self.conv1(x))))


class WideResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(WideBlock(8, 16, 1), WideBlock(16, 32, 2))
        self.bn, self.fc = nn.BatchNorm2d(32), nn.Linear(32, 10)

    def forward(self, x):
        x = self.blocks(self.conv(x))
        return self.fc(torch.relu(self.bn(x)).mean((2, 3)))


class MeanSparse(nn.Module):
    """arXiv 2406.05927, section 3, by hand: an activation's input, sparsified around its channels' means."""

    def __init__(self, activation, inputs, a):
        super().__init__()
        self.activation = activation
        self.mean = inputs.mean((0, 2, 3), keepdim=True, dtype=torch.float64).float()
        self.std = inputs.double().std((0, 2, 3), keepdim=True, correction=0)
        self.width = (a * self.std).float()

    def forward(self, x):
        return self.activation(torch.where((x - self.mean).abs() <= self.width, self.mean, x))


def test_mean_sparse_in_one_line():
    torch.manual_seed(0)
    model, x = WideResNet(), torch.randn(12, 3, 12, 12)
    with torch.no_grad():
        model.train()(x)  # statistics of its own
    model.eval()
    forged = forged_fx.transform(
        model, forged_fx.calibrate(model, x.split(5), where="activations", channels=True), 0.25,
        kind="mean", where="activations",
    )  # fmt: skip
    assert list(forging_of(forged).reached) == [
        *(f"blocks.{b}.relu{i}@0" for b in (0, 1) for i in (1, 2)), "@0",
    ]  # fmt: skip

    by_hand, inputs = copy.deepcopy(model), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].clone()}))
    model.bn.register_forward_hook(lambda _, args, result: inputs.update({"": result.clone()}))
    with torch.no_grad():
        model(x)
        for name, seen in inputs.items():
            if name:
                owner, _, leaf = name.rpartition(".")
                setattr(by_hand.get_submodule(owner), leaf, MeanSparse(nn.ReLU(), seen, 0.25))
        by_hand.bn = nn.Sequential(by_hand.bn, MeanSparse(nn.Identity(), inputs[""], 0.25))
        result = forged(x)
        assert torch.allclose(result, by_hand(x), atol=1e-6) and not torch.allclose(result, model(x), atol=1e-3)
        relu = forged.get_submodule("blocks.1.relu1")
        assert (relu.forged_width_activation > 0).all() and relu.forged_mean_activation.shape == (16,)


class Through(nn.Module):
    """An activation, behind whatever comes ahead of it."""

    def __init__(self, layer, ahead):
        super().__init__()
        self.layer, self.ahead = layer, ahead

    def forward(self, x):
        return nn.functional.gelu(self.ahead(self.layer(x)))


IMAGES, SIGNALS = torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6)
PLACES = {  # the shape says nothing, as all sizes are 6
    "a norm between two permutes": (
        nn.Conv2d(3, 6, 1), lambda x: nn.functional.layer_norm(x.permute(0, 2, 3, 1), [6]).permute(0, 3, 1, 2), -3,
        IMAGES,
    ),
    "a permute": (nn.Conv2d(3, 6, 1), lambda x: x.permute(0, 2, 3, 1), -1, IMAGES),
    "movedim": (nn.Conv2d(3, 6, 1), lambda x: torch.movedim(x, source=1, destination=2), -2, IMAGES),
    "transposed by name": (nn.Conv1d(3, 6, 1), lambda x: x.transpose(dim0=1, dim1=2), -1, SIGNALS),
    "mT": (nn.Conv1d(3, 6, 1), lambda x: x.mT, -1, SIGNALS),
    "a pool": (nn.Conv1d(3, 6, 1), lambda x: nn.functional.max_pool1d(x, 2), -2, SIGNALS),
    "an average": (nn.Conv1d(3, 6, 1), lambda x: x.mean(2, keepdim=True), -2, SIGNALS),
    "a slice": (nn.Conv1d(3, 6, 1), lambda x: x[:, :, ::2], -2, SIGNALS),
}  # fmt: skip


@pytest.mark.parametrize(("layer", "ahead", "place", "x"), PLACES.values(), ids=PLACES)
def test_where_the_channels_of_an_activation_lie(layer, ahead, place, x):
    model = Through(layer, ahead).eval()
    site = forged_fx.calibrate(model, [x], where="activations", channels=True).sites["@0"]
    seen = ahead(layer(x)).detach().double().movedim(place, 0).flatten(1)
    assert site.channel == place and np.allclose(site.channel_mean_std()[0], seen.mean(1), atol=1e-6)


PRODUCTS = {
    "on the left": lambda x, w: x @ w, "on the right": lambda x, w: w @ x, "in mm": lambda x, w: torch.mm(w, x[0]),
    "named": lambda x, w: torch.bmm(input=w.expand(2, -1, -1), mat2=x), "a vector": lambda x, w: w @ x[0, 0],
    "behind a bias": lambda x, w: torch.addmm(w, w, x[0]),
}  # fmt: skip


@pytest.mark.parametrize("product", PRODUCTS)
def test_the_channels_of_a_product_are_what_it_adds_up(product):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))

        def forward(self, x):
            return PRODUCTS[product](x, self.weight)

    site = forged_fx.calibrate(Net(), [torch.randn(2, 6, 6)], channels=True).sites["#0"]
    assert site.channel == (-1 if product in ("on the left", "a vector") else -2) and site.channels == 6


def test_channels_whose_number_varies_are_not_measured():
    ragged = Through(nn.Linear(6, 4), lambda x: x.flatten(1)).eval()
    stats = forged_fx.calibrate(ragged, [torch.randn(2, n, 6) for n in (3, 5, 3)], where="activations", channels=True)
    assert stats.sites["layer"].channels == 6 and stats.sites["@0"].channels is None
    forged_fx.transform(ragged, stats, 0.25, kind="mean")
    with pytest.raises(ValueError, match=r"lack at '@0'.* there are varies, leave the site out"):
        forged_fx.transform(ragged, stats, 0.25, kind="mean", where="activations")


class Own(nn.Module):
    """Activations in a module's own code, beside products; one module that runs twice; channels in the last place."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.act = nn.Conv2d(3, 6, 3), nn.Linear(6, 5), nn.GELU()
        self.weight = nn.Parameter(torch.randn(5, 5))

    def forward(self, x):
        x = nn.functional.silu(self.conv(x)).permute(0, 2, 3, 1)
        x = self.act(self.fc(x))
        return self.act(nn.functional.linear(x, self.weight)).tanh().mean((1, 2))


@pytest.mark.parametrize("hooked", [False, True])
def test_activations_are_sites(hooked):
    torch.manual_seed(0)
    model, x = Own().eval(), torch.randn(4, 3, 7, 7)
    if hooked:
        model.register_forward_hook(nothing)
    stats = forged_fx.calibrate(model, [x], where="activations", channels=True)
    found = {name: (site.kind, site.channels, site.channel) for name, site in stats.sites.items() if "@" in name}
    assert found == {
        "@0": ("silu", 6, -3), "act@0": ("gelu", 5, -1), "act@1": ("gelu", 5, -1), "@1": ("tanh", 5, -1),
    }  # fmt: skip
    plain = forged_fx.calibrate(model, [x])
    assert [name for name in stats.sites if "@" not in name] == list(plain.sites)
    forged = forged_fx.transform(model, stats, 0.3, kind="soft", where="activations")
    assert isinstance(forged, ForgedModule) != hooked
    soft = {name: lambda v, c=site.c_max: v - v.clamp(-0.3 * c, 0.3 * c) for name, site in stats.sites.items()}
    with torch.no_grad():
        h = nn.functional.silu(soft["@0"](model.conv(x))).permute(0, 2, 3, 1)
        h = model.act(soft["act@0"](model.fc(h)))
        h = soft["@1"](model.act(soft["act@1"](nn.functional.linear(h, model.weight)))).tanh().mean((1, 2))
        assert torch.allclose(forged(x), h, atol=1e-6)
        both = forged_fx.transform(model, stats, 0.01, where=["fc", "@1"])
        assert [row.site for row in forged_fx.describe(both) if row.left_out is None] == ["fc", "@1"]
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"ahead of activations.*transform"):
            torch.compile(model, backend="forged", options={"stats": stats, "where": "activations"})(x)


@pytest.mark.parametrize(
    "act",
    [nn.ReLU6(), nn.ReLU6(inplace=True), nn.Hardtanh(), nn.Softsign(), nn.LogSigmoid(), nn.RReLU(), nn.Threshold(0, 0)],
    ids=lambda act: str(act),
)
def test_a_module_is_an_activation_whatever_function_it_calls(act):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 2)).eval(), torch.randn(5, 4)
    stats = forged_fx.calibrate(model, [x], where="activations")
    assert [*stats.sites] == ["0", "1@0", "2"]
    h = model[0](x)
    expected = model[2](act(torch.where(h.abs() < 0.5 * h.abs().max(), 0, h)))
    assert torch.equal(forged_fx.transform(model, stats, 0.5, where="activations")(x), expected)


def test_a_model_without_activations_says_so():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()), torch.randn(5, 4)
    stats = forged_fx.calibrate(model, [x], where="activations")
    with pytest.raises(ValueError, match="unless that is how they were taken; then the model calls none of celu, elu"):
        forged_fx.transform(model, stats, where="activations")


# ---- the statistics of channels


def test_channels_are_exact_under_merge(model, tmp_path):
    parts = [10.0**k * torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(-3, 4)]
    whole = forged_fx.calibrate(model, parts, channels=True)
    one_by_one = [forged_fx.calibrate(model, [part], channels=True) for part in parts]
    backwards = one_by_one[-1]
    for stats in one_by_one[-2::-1]:
        backwards = backwards.merge(stats)
    assert backwards == whole and backwards != one_by_one[0]
    for site in SITES:
        for a, b in zip(whole.sites[site].channel_mean_std(), backwards.sites[site].channel_mean_std(), strict=True):
            assert (a == b).all()
    everything = torch.cat(parts).double()
    mean, std = whole.sites["a"].channel_mean_std()
    assert torch.allclose(torch.from_numpy(mean), everything.mean((0, 2, 3)), rtol=1e-12)
    assert torch.allclose(torch.from_numpy(std), everything.std((0, 2, 3), correction=0), rtol=1e-12)
    whole.save(tmp_path / "s")
    assert forged_fx.Stats.load(tmp_path / "s") == whole
    assert forged_fx.calibrate(model, parts).merge(whole).sites["a"].channels is None


def test_older_files_are_read_and_impossible_ones_refused(model, stats, tmp_path):
    def rewritten(change):
        stats.save(tmp_path / "s")
        with safe_open(tmp_path / "s", "np") as file:
            header = json.loads(file.metadata()["forged_fx.stats"])
            arrays = {key: file.get_tensor(key) for key in file.keys()}
        change(arrays, header)
        save_file(arrays, tmp_path / "s", {"forged_fx.stats": json.dumps(header)})
        return forged_fx.Stats.load(tmp_path / "s")

    def as_before(arrays, header):
        for key in [key for key in arrays if key == "lowest" or key.startswith("channels.")]:
            del arrays[key]
        del header["channel_counts"]
        for site in header["sites"].values():
            del site["channel"]

    old = rewritten(as_before)
    assert old.sites["e"].c_max == stats.sites["e"].c_max and old.sites["e"].channels is None
    rows = forged_fx.describe(forged_fx.transform(model, old, 0.1, kind="one_sided"))
    assert {row.share_zeroed for row in rows} == {None}  # whether an input was negative is not known
    assert old.thresholds(0.1) == stats.thresholds(0.1) and not any("@" in site for site in stats.thresholds(0.1))
    for change, says in (
        (lambda a, h: a["lowest"].fill(np.nan), "minimum"),
        (lambda a, h: a["channels.0"].fill(np.inf), "not finite"),
        (lambda a, h: a.update({"channels.0": np.zeros((2, 3, 3))}), "channels.0 is an array of shape"),
        (lambda a, h: h["channel_counts"].update({"0": -1}), "counts -1"),
        (lambda a, h: h["sites"]["a"].update(channel=3), "dimension 3"),
    ):
        with pytest.raises(ValueError, match=says):
            rewritten(change)


def test_sums_lose_nothing():
    """What float64 would round away comes back once the large terms cancel."""
    terms = [1e20, 1.0, 2.0**-60, -1e20, 3.0, -(2.0**-60), 1e-30]
    counts = [ChannelCounts.one(1, np.array([[term], [0.0]])) for term in terms]
    for order in (terms, terms[::-1]):
        total = functools.reduce(ChannelCounts.merge, [counts[terms.index(term)] for term in order])
        assert math.fsum(total.sums[:, 0]) == math.fsum(terms) == 4.0 + 1e-30


def test_a_smooth_surrogate_by_channel_has_each_channels_parameters():
    x, mean, width = torch.randn(2, 3, 4, 5), torch.tensor([0.0, 0.5, -0.5]), torch.tensor([0.3, 0.6, 0.9])
    leaf = x.clone().requires_grad_()
    with surrogate.smooth(0.3):
        FUNCTIONS["mean"].op(leaf, mean, width, -3).sum().backward()
    for c in range(3):
        torch.testing.assert_close(leaf.grad[:, c], surrogate.slope(x[:, c] - mean[c], width[c], 0.3))
