"""cost: which thresholds are free, and why the others are not."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from written import code_of

import forged_fx
from forged_fx.cost import FREE, LAUNCH, SHARED, WRITE, price
from forged_fx.hoist import hoist
from forged_fx.lowering import register_lowerings
from forged_fx.share import thresholds_in

threshold = torch.ops.forged_fx.threshold


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
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), pool, nn.Conv2d(8, 4, 1)).eval(), torch.randn(2, 3, size, size)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]))
    assert forged_fx.cost(forged, (x,))["2"].kind == kind
    code = code_of(torch.compile(forged, backend="forged"), x)
    assert ("pool2d.default(buf" in code) == (kind == LAUNCH)


def priced(f, *inputs):
    """The price of the one threshold in the graph of f."""
    register_lowerings()
    gm = make_fx(f, tracing_mode="fake")(*inputs)
    hoist(gm.graph)
    (node,) = thresholds_in(gm.graph)
    return price(node)


def cast(x):
    return torch.ops.prims.convert_element_type(x, torch.float16)  # as Inductor's graphs have it


def product(x):
    return x.reshape(-1, 6) @ x.new_empty(6, 6)


SIZE = 2 * 4 * 6 * 6 * 4  # bytes of the input
# How a threshold's input is made, what reads the input besides, what reads the threshold -> its price
PRICES = {
    "half precision": (lambda x: cast(x.relu()), product, product, WRITE, SIZE // 2),
    "a slice": (lambda x: x.relu()[:, :2], None, product, LAUNCH, SIZE),
    "a view of a slice": (lambda x: x.relu()[:, :2].flatten(1), None, product, LAUNCH, SIZE),
    "a selection": (lambda x: x.relu()[:, 1], None, product, LAUNCH, SIZE // 2),
    "a library's result": (product, None, product, LAUNCH, 2 * SIZE),
    "one of several": (lambda x: x.topk(6)[0], None, product, LAUNCH, 2 * SIZE),
    "one of several, as small": (lambda x: x.median(3, keepdim=True)[0], None, product, LAUNCH, SIZE // 3),
    "a copy behind it": (lambda x: x, None, lambda y: y.flip(1), FREE, 0),
    "a copy behind it, and more": (lambda x: x, None, lambda y: (y.flip(1), product(y)), LAUNCH, 2 * SIZE),
    "a kernel behind it": (product, None, torch.relu, FREE, 0),
    "a kernel behind it, and its view": (product, None, lambda y: (y.relu(), y.view(8, 36).sin()), FREE, 0),
    "a kernel behind it, and the caller": (product, None, lambda y: (y.relu(), y.view(8, 36)), LAUNCH, 2 * SIZE),
    "a kernel between others": (torch.relu, product, torch.sin, FREE, 0),
    "another kernel": (torch.relu, torch.cos, product, FREE, 0),
    "the caller": (torch.relu, lambda x: x, product, WRITE, SIZE),
    "a product": (torch.relu, product, product, WRITE, SIZE),
    "a product and more": (torch.relu, lambda x: (product(y := x.view(48, 6)), y.sin()), product, WRITE, SIZE),
    "views of a kernel's": (torch.relu, lambda x: x.view(48, 6).sin(), product, FREE, 0),
}  # fmt: skip


@pytest.mark.parametrize(("make", "beside", "behind", "kind", "size"), PRICES.values(), ids=PRICES)
def test_the_rule_on_graphs_of_aten_calls(make, beside, behind, kind, size):
    def f(x, t):
        x = make(x)
        return behind(threshold(x, t)), beside and beside(x)

    found = priced(f, torch.rand(2, 4, 6, 6), torch.tensor(0.5))
    assert (found.kind, found.bytes) == (kind, size) and not found.prologue


class Stem(nn.Module):
    """What `rest` makes of a value that a kernel of Inductor's computes, by 3x3 convolutions a and b."""

    def __init__(self, rest):
        super().__init__()
        self.stem, self.norm, self.rest = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), rest
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.one, self.other = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 1)
        self.join, self.gain = nn.Conv2d(16, 8, 1), nn.Parameter(torch.rand(8, 1, 1))

    def forward(self, x):
        return self.rest(self, self.norm(self.stem(x)).relu())


def split(m, h):
    one, other = h.chunk(2, 1)
    return m.one(one) + m.other(other)


def split_once(m, h):
    one, other = h.chunk(2, 1)
    return m.one(one) + other.mean(1, keepdim=True)


def cosine(m, h):
    return m.a(h) + m.b(c := h.cos()) + c


# What becomes of the value -> site: the kind of its price. What else reads it runs in one kernel with what follows, and
# that comes later; or reads around a place, or in another order; or its own result is in memory anyway.
READERS = {
    "scaled, beside a residual": (lambda m, h: m.a(h) + h * m.gain, {"a": WRITE}),
    "a gate": (lambda m, h: m.a(h) * h.sigmoid(), {"a": WRITE}),
    "behind a library's call": (lambda m, h: m.a(h) + m.b(h.mean((2, 3), keepdim=True)) * h, {"a": WRITE, "b": FREE}),
    "pooled by the mean": (lambda m, h: m.a(h) + m.b(F.avg_pool2d(h, 3, 1, 1)), {"a": WRITE, "b": FREE}),
    "pooled by max": (lambda m, h: m.a(h).mean() + m.b(F.max_pool2d(h, 2)), {"a": WRITE, "b": FREE}),
    "one that is written": (cosine, {"a": FREE, "b": WRITE}),
    "a mean": (lambda m, h: m.a(h) + h.mean(), {"a": WRITE}),
    "a mean by itself": (lambda m, h: (m.a(h), h.mean((2, 3))), {"a": WRITE}),
    "a mean of it, scaled": (lambda m, h: (m.a(h), (h * m.gain).mean((2, 3))), {"a": WRITE}),
    "the largest": (lambda m, h: (m.a(h), h.amax((2, 3))), {"a": WRITE}),
    "pooled to one": (lambda m, h: m.a(h) + m.b(F.adaptive_avg_pool2d(h, 1)), {"a": WRITE, "b": FREE}),
    "a norm of planes": (lambda m, h: (m.a(h), F.instance_norm(h)), {"a": WRITE}),
    "a mean of rows": (lambda m, h: (m.a(h), h.mean(3)), {"a": FREE}),
    "the largest of rows, scaled": (lambda m, h: (m.a(h), (h * m.gain).amax(-1)), {"a": FREE}),
    "a norm of rows": (lambda m, h: (m.a(h), F.layer_norm(h, h.shape[3:])), {"a": FREE}),
    "a softmax of rows": (lambda m, h: (m.a(h), h.softmax(3)), {"a": FREE}),
    "rows that lie across": (lambda m, h: (m.a(h), h.transpose(1, 3).mean(3)), {"a": WRITE}),
    "rows of a part": (lambda m, h: (m.a(h), h[:, :4].mean(3)), {"a": WRITE}),
    "rows by their share": (lambda m, h: (m.a(h), h * h.mean(3).softmax(2)[..., None]), {"a": WRITE}),
    "copied in another order": (lambda m, h: (m.a(h), h.transpose(1, 2).contiguous()), {"a": WRITE}),
    "copied so, scaled": (lambda m, h: (m.a(h), (h * m.gain).transpose(1, 2).contiguous()), {"a": WRITE}),
    "turned": (lambda m, h: (m.a(h), h.flip(1)), {"a": WRITE}),
    "padded": (lambda m, h: (m.a(h), F.pad(h, (1, 1))), {"a": WRITE}),
    "joined with what it makes": (lambda m, h: m.join(torch.cat([m.a(h).relu(), h], 1)), {"a": WRITE, "join": LAUNCH}),
    "joined alone": (lambda m, h: m.join(torch.cat([m.a(h).relu(), m.b(h).relu()], 1)), {"a": FREE, "join": FREE}),
    "both halves": (split, {"one": LAUNCH, "other": LAUNCH}),
    "half of it": (split_once, {"one": FREE}),
    "a part, scaled": (lambda m, h: m.a(h) + (h * m.gain)[:, :4].mean(), {"a": WRITE}),
    "a part, scaled, later": (lambda m, h: m.a(h)[:, :4] + (h * m.gain)[:, :4], {"a": WRITE}),
    "both parts, scaled": (lambda m, h: m.one(m.a(h)[:, :4] + torch.mul(*(h * m.gain).chunk(2, 1))), {"a": WRITE}),
    "a gated linear unit": (lambda m, h: m.a(h)[:, :4] + F.glu(h, 1), {"a": WRITE}),
    "a selection": (lambda m, h: m.a(h) + m.b(h[:, :, :2, :2]).mean(), {"a": WRITE, "b": LAUNCH}),
}


@pytest.mark.parametrize(("rest", "kinds"), READERS.values(), ids=READERS)
def test_who_else_reads_what_a_threshold_reads(rest, kinds):
    torch.manual_seed(0)
    model, x = Stem(rest).eval(), torch.rand(2, 3, 8, 8)
    costs = forged_fx.cost(forged_fx.transform(model, forged_fx.calibrate(model, [x])), (x,))
    assert {site: (costs[site].alone or costs[site]).kind for site in kinds} == kinds


PRODUCTS = {
    "a product": (lambda x, w, b: x.view(48, 6) @ b, True),
    "two products": (lambda x, w, b: (x.view(48, 6) @ b, x.view(-1, 6) @ b), False),
    "a product and another kernel": (lambda x, w, b: (x.view(48, 6) @ b, x.view(48, 6).sin()), False),
    "a 1x1 convolution": (lambda x, w, b: F.conv2d(x, w), True),
    "its weight": (lambda x, w, b: F.conv2d(w.mT, x.view(72, 4, 1, 1)), False),
    "3x3": (lambda x, w, b: F.conv2d(x, w.expand(8, 4, 3, 3)), False),
    "a stride": (lambda x, w, b: F.conv2d(x, w, stride=2), False),
    "padding": (lambda x, w, b: F.conv2d(x, w, padding=1), False),
    "groups": (lambda x, w, b: F.conv2d(x, w[:, :2], groups=2), False),
    "transposed": (lambda x, w, b: F.conv_transpose2d(x, w[:4]), False),
    "one dimension": (lambda x, w, b: F.conv1d(x.view(2, 4, 36), w[:, :, 0]), False),
}


def test_a_convolution_reads_by_a_library_whatever_adds_its_bias():
    given = [torch.empty(size, device="meta") for size in ((2, 4, 6, 6), (), (8, 4, 3, 3), (8,))]
    assert priced(lambda x, t, w, b: F.conv2d(threshold(x, t), w, b), *given).kind == LAUNCH
    kept = priced(lambda x, t, w, b: (F.conv2d(threshold(y := x.relu(), t), w, b), F.conv2d(y, w, b)), *given)
    assert kept.kind == WRITE


@pytest.mark.parametrize(("reads", "may"), PRODUCTS.values(), ids=PRODUCTS)
def test_what_may_apply_it_as_it_loads_on_a_gpu(reads, may):
    """(Any device that is no CPU.)"""
    given = [torch.empty(size, device="meta") for size in ((2, 4, 6, 6), (), (8, 4, 1, 1), (6, 6))]
    found = priced(lambda x, t, w, b: reads(threshold(x, t), w, b), *given)
    assert found.kind == LAUNCH and found.prologue == may


def test_thresholds_that_part_are_not_shared(made):
    model, stats, x = made
    ratios = {"left": 2**-3, "*": 2**-4}
    found = forged_fx.cost(forged_fx.transform(model, stats, ratios), (x,))
    (shape,) = {stats.sites[name].shape for name in ("left", "right")}
    assert (found["left"].kind, found["left"].bytes, found["left"].free) == (FREE, 0, False)
    assert (found["right"].kind, found["right"].bytes) == (WRITE, 4 * math.prod(shape))
    # Each alone is written beside the raw value, which the other site reads.
    bare = forged_fx.transform(model, stats, ratios, only="free")
    assert {row.site for row in forged_fx.describe(bare) if row.left_out is None} == {"qkv", "head"}


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


def test_a_threshold_is_priced_where_it_ends_up():
    """Ahead of the view, behind the slice; and nowhere, where no one reads what its layer makes."""

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.spare, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(72, 2)

        def forward(self, x):
            x = self.conv(x).relu()
            self.spare(x)
            return self.head(x[:, :2].flatten(1))

    model, x = Parts().eval(), torch.randn(2, 3, 6, 6)
    costs = forged_fx.cost(forged_fx.transform(model, forged_fx.calibrate(model, [x]), graph=False), (x,))
    assert costs["head"].kind == LAUNCH and costs["head"].why == "its input is a part of what relu makes"
    assert costs["spare"].free and costs["spare"].why == "no one reads it"


def test_it_is_of_eval_mode_whatever_mode_the_model_is_in():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)).eval(), torch.randn(2, 3, 8, 8)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]))
    costs, buffers = forged_fx.cost(forged, (x,)), copy.deepcopy(forged.state_dict())
    assert costs["2"].free and forged_fx.cost(forged.train(), (x,)) == costs
    assert all(torch.equal(buffers[name], value) for name, value in forged.state_dict().items())


def test_bytes_are_a_number_where_the_compiler_takes_the_batch_for_any():
    """As it does with code that it has met with another batch before."""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x)

    model, x = Outer().eval(), torch.rand(6, 4)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), graph=False)
    for n in (6, 3):
        size = forged_fx.cost(forged, (x[:n],))["layer"].bytes
        assert type(size) is int and size == 2 * 4 * 4 * n


def test_it_leaves_no_trace_in_the_model(made):
    model, stats, x = made
    forged = forged_fx.transform(model, stats).train()
    forged_fx.cost(forged, (x,))
    assert forged.training
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        torch.compile(forged, backend="eager")(x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("graph", [True, False])
def test_bytes_are_of_the_input_that_is_given(graph):
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.rand(64, 4)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), graph=graph)
    for n in (2, 4, 8, 64):
        assert forged_fx.cost(forged, (x[:n],))["0"].bytes == 2 * 4 * 4 * n


def test_what_was_compiled_for_a_price_runs_elsewhere_too():
    """Dynamo may be told to run whatever is compiled for a code."""
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.rand(2, 4)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), graph=False)
    with torch.no_grad():
        compiled, expected = torch.compile(forged, backend="eager"), forged(x)
        assert torch.equal(compiled(x), expected)
        forged_fx.cost(forged, (x,))
        with torch.compiler.set_stance("eager_on_recompile"):
            assert torch.allclose(compiled(x), expected)


def test_asking_often_takes_nothing_from_what_the_user_may_compile():
    """A model that is forged module by module runs its class's own code, which Dynamo compiles a few times only."""

    class Plain(nn.Sequential):
        def forward(self, x):
            return super().forward(x).relu()

    made, x = [], torch.rand(2, 4)

    def backend(gm, inputs):
        made.append(gm)
        return gm.forward

    torch._dynamo.reset()
    for _ in range(torch._dynamo.config.recompile_limit + 1):
        model = Plain(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
        forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), graph=False)
        costs = forged_fx.cost(forged, (x,))
        assert [cost.kind for cost in costs.values()] == [LAUNCH, FREE]
    with torch.no_grad():
        torch.compile(forged, backend=backend)(x)
    assert made


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


def test_a_model_that_runs_twice_has_the_dearest_of_its_runs():
    class Twice(nn.Module):
        def __init__(self, model, breaks, first, second):
            super().__init__()
            self.model, self.breaks, self.first, self.second = model, breaks, first, second

        def forward(self, x):
            y = self.model(self.first(x))
            if self.breaks:
                torch._dynamo.graph_break()
            return y + self.model(self.second(x))

    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.rand(4, 8)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]))
    for breaks in (False, True):
        for first, second in ((nn.Identity(), nn.ReLU()), (nn.ReLU(), nn.Identity())):
            costs = forged_fx.cost(Twice(forged, breaks, first, second).eval(), (x,))
            assert {site: cost.kind for site, cost in costs.items()} == {"0": LAUNCH, "2": FREE}


def test_behind_graph_breaks_blocks_of_one_class_have_a_price_each():
    """They run one compiled code. What comes into it is not the network's input."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            torch._dynamo.graph_break()
            y = self.second(self.first(x).relu())
            torch._dynamo.graph_break()
            return y

    model, x = nn.Sequential(nn.Linear(8, 8), Block(), Block(), Block()).eval(), torch.rand(4, 8)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), graph=False)
    costs = forged_fx.cost(forged, (x,))
    whys = {site: cost.why for site, cost in costs.items()}
    inside = {"first": "its input comes from what runs ahead of a graph break", "second": "a part of relu"}
    expected = {f"{i}.{name}": why for i in (1, 2, 3) for name, why in inside.items()}
    assert whys == {"0": "its input comes from the network's input", **expected}
    assert [site for site, cost in costs.items() if cost.free] == ["1.second", "2.second", "3.second"]


def test_ahead_of_activations_a_threshold_is_a_part_of_them():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.rand(4, 8)
    stats = forged_fx.calibrate(model, [x], where="activations")
    forged = forged_fx.transform(model, stats, 2**-3, where="activations", only="free")
    costs = forged_fx.cost(forged, (x,))
    assert [cost.why for cost in costs.values()] == ["a part of relu behind it"] and all(c.free for c in costs.values())


def test_what_is_free_of_a_kind_with_a_statistic_of_its_own(made):
    model, _, x = made
    stats = forged_fx.calibrate(model, [x], channels=True)
    forged = forged_fx.transform(model, stats, 0.2, kind="mean", only="free")
    assert 0 < len(forged.forging.reached) < len(stats.sites)


def test_it_is_of_compiled_code_whether_or_not_code_is_compiled(made, monkeypatch):
    model, stats, x = made
    forged = forged_fx.transform(model, stats)
    expected = forged_fx.cost(forged, (x,))
    with torch.compiler.set_stance("force_eager"):
        assert forged_fx.cost(forged, (x,)) == expected
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(ValueError, match="TORCHDYNAMO_DISABLE=1 turns compilers off: unset it"):
        forged_fx.cost(forged, (x,))


def test_of_an_input_of_another_shape_the_model_speaks_itself(made, capfd):
    model, stats, x = made
    forged = forged_fx.transform(model, stats)
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 1 channels instead") as raised:
        forged_fx.cost(forged, (x[:, :1],))
    assert not type(raised.value).__module__.startswith("torch._dynamo") and "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("example", [torch.rand(2), (torch.rand(2),), {"x": 1}])
def test_an_example_that_is_no_call_is_said_to_be_none(made, example):
    model, stats, _ = made
    with pytest.raises(TypeError, match=r"example=\(\(x,\), \{\}\)"):
        forged_fx.describe(forged_fx.transform(model, stats), cost=True, example=example)


class Chosen(nn.Module):
    """As many rows as the data say reach the second layer, and `other`."""

    def __init__(self, other):
        super().__init__()
        self.other = other
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        h = self.first(x).relu()
        rows = h[torch.nonzero(h.sum(1) > 0.5).squeeze(1)]
        return self.third(self.second(rows)), self.other(rows)


@pytest.mark.parametrize(
    ("other", "kind", "size"),
    [(lambda rows: rows.mean(1), FREE, 0), (lambda rows: rows.t().contiguous(), WRITE, None)],
)
def test_what_is_as_long_as_the_data_say_has_a_price_without_bytes(other, kind, size):
    torch.manual_seed(0)
    model, x = Chosen(other).eval(), torch.randn(32, 8)
    stats = forged_fx.calibrate(model, [x])
    forged = forged_fx.transform(model, stats, 0.2)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.no_grad():
        expected = forged(x)
        assert 0 < len(expected[0]) < 32
        for module, options in ((forged, {}), (model, {"stats": stats, "ratio": 0.2})):
            compiled = torch.compile(module, backend="forged", fullgraph=True, options=options)
            assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(compiled(x), expected, strict=True))
        costs = forged_fx.cost(forged, (x,))
    assert {site: (cost.kind, cost.bytes) for site, cost in costs.items()} == {
        "first": (LAUNCH, 2 * 4 * 32 * 8), "second": (kind, size), "third": (LAUNCH, None)
    }  # fmt: skip
    assert str(costs["third"]).endswith("(MB: as the data say)")


def test_a_slice_with_gaps_is_read_by_a_layer():
    """A threshold that moves changes strides there: what was a view is a copy then."""

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(8), nn.Linear(8, 4)

        def forward(self, x):
            first, _ = self.norm(x).cos().chunk(2, 1)
            return self.layer(first)

    model, x = Half().eval(), torch.randn(2, 4, 5, 8)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0.25)
    assert forged_fx.cost(forged, (x,))["layer"].kind == FREE
    with torch.no_grad():
        assert torch.allclose(torch.compile(forged, backend="forged")(x), forged(x), atol=1e-6)
