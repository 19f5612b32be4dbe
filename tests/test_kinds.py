"""Every kind of forging, from statistics to the forged model: by hand, as one graph, module by module, compiled."""

import copy
import io

import pytest
import torch
from torch import nn

import forged_fx
from forged_fx.kinds import KINDS
from forged_fx.transform import ForgedModule


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
    """Forged before compiling, and on the way."""
    forged = forged_fx.transform(model, stats, RATIOS, kind=SITES)
    options = {"stats": stats, "ratio": RATIOS, "kind": SITES}
    torch._dynamo.reset()
    fast = torch.compile(forged, backend="forged")
    with torch.no_grad():
        assert torch.allclose(fast(x), forged(x), atol=1e-6)
        assert torch.allclose(torch.compile(model, backend="forged", options=options)(x), forged(x), atol=1e-6)
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
    for context in (torch.enable_grad, forged_fx.straight_through):
        found = []
        for module in (fast, forged_fx.transform(model, stats, **given)):
            leaf = x.clone().requires_grad_()
            with context():
                y = module(leaf)
            found.append(torch.autograd.grad(y.sum(), leaf)[0])
        assert torch.allclose(*found, atol=1e-6) and (found[0] == 0).any() == (context is torch.enable_grad)


def test_dynamo_goes_through_modules_forged_one_by_one(model, stats, x):
    hooked = copy.deepcopy(model)
    hooked.register_forward_hook(nothing)
    forged = forged_fx.transform(hooked, stats, RATIOS, kind=SITES)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(forged, backend="aot_eager")(x), forged(x))


def test_shared_code_of_several_kinds():
    """Blocks of one class share Dynamo's graph, unless their kinds differ."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            torch._dynamo.graph_break()
            return self.fc(x).relu()

    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Block(), Block()).eval(), torch.randn(4, 8)
    stats = forged_fx.calibrate(model, [x], channels=True)
    for kind, ratio in (("soft", 0.2), ({"0.fc": "mean", "1.fc": "clamp", "2.fc": "hard"}, 0.2), ("mean", 0.2)):
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
        ({"kind": "mean", "statistic": "max", "ratio": 0.1}, "kind 'mean' takes 'mean_std'"),
        ({"where": "conv"}, "where: 'conv' matches no site"),
    ],
)
def test_errors_name_the_next_step(model, stats, options, says):
    with pytest.raises(ValueError, match=says):
        forged_fx.transform(model, stats, **options)


def test_what_calibration_did_not_measure_is_an_error(model, x):
    plain = forged_fx.calibrate(model, [x])
    with pytest.raises(ValueError, match=r"lack at 'a': .*channels=True"):
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
