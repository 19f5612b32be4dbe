"""cost: which thresholds are free, and why the others are not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import forged_fx
from forged_fx.cost import FREE, LAUNCH, SHARED, WRITE


class Net(nn.Module):
    """One site of each kind: the network's input, a residual stream, a fork, attention, and what rides along."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.left, self.right = (nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 8, 8))
        self.qkv, self.proj, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 2)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        x = F.gelu(self.stem(x))
        x = F.gelu(x + self.body(x))
        x = F.gelu(self.left(x) + self.right(x)).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.head(F.gelu(self.proj(x)).mean(1))


EXPECTED = {
    "stem": (LAUNCH, "network's input"), "body": (WRITE, "add reads the raw result of mul"), "left": (FREE, "mul"),
    "right": (SHARED, "left"), "qkv": (FREE, "add"), "proj": (LAUNCH, "attention"), "head": (FREE, "mean"),
}  # fmt: skip


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    return model, forged_fx.calibrate(model, [x]), x


def test_costs_site_by_site(made):
    model, stats, x = made
    forged = forged_fx.transform(model, stats)
    costs = forged_fx.cost(forged, (x,))
    assert list(costs) == list(EXPECTED)
    for site, (kind, why) in EXPECTED.items():
        assert costs[site].kind == kind and why in costs[site].why, (site, costs[site])
    assert costs["stem"].bytes == 2 * x.numel() * 4 and costs["body"].bytes == 2 * 8 * 64 * 4
    rows = {row.site: row for row in forged_fx.describe(forged, cost=True)}
    assert {site: row.cost for site, row in rows.items()} == costs
    assert "one more write: add reads the raw result of mul (0.0041 MB)" in str(forged_fx.describe(forged, cost=True))
    assert forged_fx.describe(forged)[0].cost is None


@pytest.mark.parametrize(
    ("pool", "size", "kind"),
    [
        (nn.AdaptiveAvgPool2d(3), 24, FREE), (nn.AdaptiveAvgPool2d(3), 13, FREE), (nn.AdaptiveAvgPool2d(3), 16, LAUNCH),
        (nn.AdaptiveMaxPool2d(3), 24, FREE), (nn.AdaptiveMaxPool2d(3), 16, LAUNCH),
        (nn.AvgPool2d(7, 1), 16, LAUNCH), (nn.AvgPool2d(7), 21, FREE), (nn.AvgPool2d(3, 1), 16, FREE),
    ],
)  # fmt: skip
def test_a_pool_that_inductor_leaves_to_pytorch_takes_no_threshold(pool, size, kind):
    from torch._inductor.utils import run_and_get_code

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), pool, nn.Conv2d(8, 4, 1)).eval(), torch.randn(2, 3, size, size)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]))
    assert forged_fx.cost(forged, (x,))["2"].kind == kind
    with torch.no_grad():
        _, (code,) = run_and_get_code(torch.compile(forged, backend="forged"), x)
    assert ("pool2d.default(buf" in code) == (kind == LAUNCH)


def test_thresholds_that_part_are_not_shared(made):
    model, stats, x = made
    forged = forged_fx.transform(model, stats, {"left": 2**-3, "*": 2**-4})
    assert forged_fx.cost(forged, (x,))["right"].kind == FREE


def test_only_what_is_free(made, tmp_path):
    model, stats, x = made
    forged = forged_fx.transform(model, stats, only="free")
    reached = {row.site for row in forged_fx.describe(forged) if row.left_out is None}
    assert reached == {"left", "right", "qkv", "head"}
    assert "not free: a kernel of its own: its input comes from the network's input" in str(forged_fx.describe(forged))
    assert all(price.free for price in forged_fx.cost(forged, (x,)).values())
    with pytest.raises(ValueError, match=r"only='fre'.*'free'"):
        forged_fx.transform(model, stats, only="fre")
    stats.save(tmp_path / "s")
    with pytest.raises(ValueError, match="pass example"):
        forged_fx.transform(model, tmp_path / "s", only="free")


def test_what_is_free_beside_a_site_that_is_left_out_is_not_free():
    """The network's input, which two layers read: without the first, the second pays for the kernel."""

    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x):
            return self.last((self.a(x) + self.b(x)).relu())

    model, x = Fork().eval(), torch.randn(2, 3, 8, 8)
    stats = forged_fx.calibrate(model, [x])
    forged = forged_fx.transform(model, stats, only="free")
    described = {row.site: row.left_out for row in forged_fx.describe(forged)}
    assert described.pop("last") is None
    pays = "not free: a kernel of its own: its input comes from the network's input (0.00307 MB)"
    assert set(described.values()) == {pays}
    with pytest.warns(UserWarning, match="only='free' leaves none of 1 sites forged"):
        bare = forged_fx.transform(alone := nn.Conv2d(3, 8, 3).eval(), forged_fx.calibrate(alone, [x]), only="free")
    assert torch.equal(bare(x), alone(x))


def test_a_model_may_write_into_its_input():
    class Centred(nn.Conv2d):
        def forward(self, x):
            return super().forward(x.sub_(0.5))

    model, x = Centred(3, 4, 3).eval(), torch.ones(2, 3, 8, 8)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x.clone()]))
    forged_fx.cost(forged, (x,))
    assert torch.equal(x, torch.ones_like(x))


def test_it_leaves_no_trace_in_the_model(made):
    model, stats, x = made
    forged = forged_fx.transform(model, stats).train()
    forged_fx.cost(forged, (x,))
    assert forged.training
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        torch.compile(forged, backend="eager")(x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_modules_that_no_compiler_enters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    x = torch.randn(2, 5, 8)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]))
    costs = forged_fx.cost(forged, (x,))
    assert {cost.why for cost in costs.values()} == {"it runs uncompiled"} and not any(c.free for c in costs.values())


@pytest.mark.parametrize("window", [3, 7])  # Inductor makes a loop over the small one, and a reduction of the large one
def test_behind_max_pooling_it_is_free(window):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(window, 2), nn.Conv2d(4, 4, 1)).eval()
    x = torch.randn(2, 3, 16, 16)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]))
    assert forged_fx.cost(forged, (x,))["3"].kind == FREE


def test_of_several_forged_models_each_site_has_its_own(made):
    model, stats, x = made

    class Ensemble(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = forged_fx.transform(model, stats, 2**-4), forged_fx.transform(model, stats, 2**-5)

        def forward(self, x):
            return self.a(x) + self.b(x)

    both = Ensemble().eval()
    costs = forged_fx.cost(both, (x,))
    assert [*costs] == [f"{member}.{site}" for member in "ab" for site in EXPECTED]
    alone = forged_fx.cost(both.a, (x,))
    kinds = [{site: costs[f"{member}.{site}"].kind for site in EXPECTED} for member in "ab"]
    assert kinds == 2 * [{site: cost.kind for site, cost in alone.items()}]
