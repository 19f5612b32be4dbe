"""hoist: where thresholds end up, and that no bit of the result changes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from written import code_of

import forged_fx
from forged_fx.hoist import MOVES, RENAMINGS, hoist
from forged_fx.in_place import THRESHOLD
from forged_fx.ops import BY_OPERATOR, FUNCTIONS

threshold = torch.ops.forged_fx.threshold
X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
X[0, 0, 0, :4] = torch.tensor([0.5, -0.5, float("nan"), -0.0])
T, OTHER = torch.tensor(0.5), torch.tensor(0.25)


def hoisted(f, *inputs):
    """The graph of f before and behind the pass: as functions, and how the latter's thresholds are fed and read."""
    gm = make_fx(f, tracing_mode="fake")(*inputs)
    before = make_fx(f)(*inputs)
    gm.graph.eliminate_dead_code()  # as it comes from behind autograd: no one asks where a pool's values were
    hoist(gm.graph)
    gm.graph.lint()
    gm.recompile()
    found = gm.graph.find_nodes(op="call_function", target=THRESHOLD)
    return (
        before,
        gm,
        [(str(_source(node.args[0]).target), [str(user.target) for user in node.users]) for node in found],
    )


def _source(node):
    """What made the value, whatever its dimensions are called now."""
    while node.target in RENAMINGS:
        node = node.args[0]
    return node


def same(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) and a.shape == b.shape


def partition(x, size=3):
    n, h, w, c = x.shape
    x = x.view(n, h // size, size, w // size, size, c)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, size * size, c)


def reverse(x, size=3):
    """Of the windows that `partition` makes of X."""
    x = x.view(2, 2, 2, size, size, -1).permute(0, 1, 3, 2, 4, 5)
    return x.contiguous().view(2, 2 * size, 2 * size, -1)


ONE = {
    "view": lambda x: x.view(2, -1),
    "flatten": lambda x: x.contiguous(memory_format=torch.channels_last).flatten(1),
    "reshape": lambda x: x.transpose(1, 2).reshape(2, -1),
    "expand": lambda x: x.expand(3, 2, 4, 6, 6),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "contiguous": lambda x: x.contiguous(memory_format=torch.channels_last),
    "attention's heads": lambda x: x.permute(0, 2, 3, 1).reshape(2, 36, 4),
    "flip": lambda x: x.flip(2),
    "roll": lambda x: torch.roll(x, (-1, 2), (2, 3)),
    "permutation": lambda x: x[:, torch.tensor([2, 0, 3, 1])],
    "zero padding": lambda x: F.pad(x, (1, 1, 2, 0)),
    "window partition": lambda x: partition(x.permute(0, 2, 3, 1)),
    "window reverse": lambda x: reverse(x.reshape(8, 9, 4)),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
}


@pytest.mark.parametrize("move", ONE.values(), ids=ONE)
def test_a_threshold_moves_up_to_its_producer(move):
    before, after, places = hoisted(lambda x, t: threshold(move(x.relu()), t).sin(), X, T)
    assert same(before(X, T), after(X, T))
    assert [producer for producer, _ in places] == ["aten.relu.default"], after.code


@pytest.mark.parametrize("other", [torch.bool, torch.int64, torch.float16, torch.float64])
@pytest.mark.parametrize("join", [torch.cat, torch.stack])
def test_a_threshold_stays_behind_a_conversion(join, other):
    """Ahead of it, it would be another dtype's, or of one that has no threshold."""
    convert = torch.ops.prims.convert_element_type  # as Inductor's graphs have it, whose kernels write what it returns
    before, after, places = hoisted(lambda x, t: threshold(join([x.relu(), convert(x.abs() * 3, other)]), t), X[1:], T)
    assert same(before(X[1:], T), after(X[1:], T))
    assert [producer for producer, _ in places] == [f"aten.{join.__name__}.default"]


STAYS = {
    "chosen elements": lambda x: x[:, torch.tensor([2, 0])],
    "a few elements": lambda x: x[:, 0],
    "padding with ones": lambda x: F.pad(x, (1, 1), value=1.0),
    "padding with -0": lambda x: F.pad(x, (1, 1), value=-0.0),
    "arithmetic": lambda x: x + 1,
    "rounding": lambda x: x.half(),
    "a mean": lambda x: x.mean((2, 3)),
    "a product": lambda x: (x @ x).view(2, -1),
    "max pooling": lambda x: F.max_pool2d(x, 2),
}


@pytest.mark.parametrize("move", STAYS.values(), ids=STAYS)
def test_a_threshold_stays(move):
    before, after, [(producer, _)] = hoisted(lambda x, t: threshold(move(x.relu()), t).sin(), X, T)
    assert same(before(X, T), after(X, T))
    assert producer != "aten.relu.default"


def test_a_threshold_does_not_pass_a_mere_permutation():
    _, after, _ = hoisted(lambda x, t: threshold(x.relu().permute(0, 2, 3, 1), t).sin(), X, T)
    (node,) = after.graph.find_nodes(op="call_function", target=THRESHOLD)
    assert node.args[0].target is torch.ops.aten.permute.default


def test_a_threshold_that_is_frozen_comes_along():
    gm = make_fx(lambda x, t: threshold(x.relu().view(2, -1), t).sin(), tracing_mode="fake")(X, T)
    (node,) = gm.graph.find_nodes(op="call_function", target=THRESHOLD)
    gm.register_buffer("frozen", T)
    with gm.graph.inserting_before(node):
        node.replace_input_with(node.args[1], gm.graph.get_attr("frozen"))
    hoist(gm.graph)
    gm.graph.lint()  # a value stands ahead of who reads it
    (moved,) = gm.graph.find_nodes(op="call_function", target=THRESHOLD)
    assert moved.args[0].target is torch.ops.aten.relu.default


def test_branches_that_agree_are_passed():
    def split(x, t):
        a, b = x.relu().split([1, 3], 1)
        return threshold(a, t).sin(), threshold(b, t).cos()

    def chunk(x, t):
        a, b = x.relu().chunk(2, 1)
        return threshold(a, t).sin(), threshold(b, t).cos()

    def cat(x, t):
        return threshold(torch.cat([x.relu(), x.sin()], 1), t).cos()

    def forked(x, t):
        x = x.relu()
        return threshold(x.view(2, -1), t).sin(), threshold(x.flip(1), t).cos()

    for f, producers in (
        (split, ["aten.relu.default"]),
        (chunk, ["aten.relu.default"]),
        (cat, ["aten.relu.default", "aten.sin.default"]),
        (forked, ["aten.relu.default"]),
    ):
        before, after, places = hoisted(f, X, T)
        assert all(same(a, b) for a, b in zip([*before(X, T)], [*after(X, T)], strict=True))
        assert [producer for producer, _ in places] == producers, after.code


def test_branches_that_differ_are_not():
    def raw(x, t, u):
        x = x.relu()
        return threshold(x.view(2, -1), t).sin(), x.cos()

    def another(x, t, u):
        x = x.relu()
        return threshold(x.view(2, -1), t).sin(), threshold(x.view(2, -1), u).cos()

    def gradient(x, t, u):
        x = x.relu()
        return threshold(x.view(2, -1), t).sin(), threshold(x.view(2, -1), t, True).cos()

    def split(x, t, u):
        a, b = x.relu().split([1, 3], 1)
        return threshold(a, t).sin(), b.cos()

    def cat(x, t, u):
        x = x.relu()
        return threshold(torch.cat([x, x.sin()], 1), t).cos(), x

    for f in (raw, another, gradient, split, cat):
        before, after, places = hoisted(f, X, T, OTHER)
        assert all(same(a, b) for a, b in zip(before(X, T, OTHER), after(X, T, OTHER), strict=True))
        assert "aten.relu.default" not in [producer for producer, _ in places], after.code


POOLS = {
    "3": lambda x: F.max_pool2d(x, 3, 1, 1),
    "over the edge": lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    "wide": lambda x: F.max_pool2d(x, 5, 1, 2),
    "of volumes": lambda x: F.max_pool3d(x, 2),
    "adaptive": lambda x: F.adaptive_max_pool2d(x, 4),
}


@pytest.mark.parametrize("name", [name for name, f in FUNCTIONS.items() if f.moves])
@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_a_max_pool_reads_what_a_layer_reads_thresholded(pool, name):
    f = FUNCTIONS[name]
    parameters = (OTHER, torch.tensor(1.0))[: len(f.parameters)]
    x = X.clone()
    x[1, :, :2, :3] = torch.tensor([float("inf"), float("-inf"), 0.25])

    def beside(x, *parameters):
        x = x.neg()
        return f.op(x, *parameters).sin(), f.op(pool(x), *parameters).cos()

    before, after, _ = hoisted(beside, x, *parameters)
    assert all(same(a, b) for a, b in zip(before(x, *parameters), after(x, *parameters), strict=True))
    (node,) = [node for node in after.graph.nodes if node.target in BY_OPERATOR]
    assert node.args[0].target is torch.ops.aten.neg.default, after.code


def test_a_value_joined_with_its_max_pools_is_thresholded_once():
    def joined(x, t):
        x = x.neg()
        y = F.max_pool2d(x, 3, 1, 1)
        return threshold(torch.cat([x, y, F.max_pool2d(y, 3, 1, 1)], 1), t).sin()

    before, after, places = hoisted(joined, X, T)
    assert same(before(X, T), after(X, T))
    assert [producer for producer, _ in places] == ["aten.neg.default"], after.code


def test_a_max_pool_is_not_passed_where_that_is_not_exact_or_gains_nothing():
    pool = torch.ops.aten.max_pool2d_with_indices

    def raw(x, t, u):
        x = x.relu()
        return threshold(x, t).sin(), threshold(F.max_pool2d(x, 2), t).cos(), x.tan()

    def another(x, t, u):
        x = x.relu()
        return threshold(x, t).sin(), threshold(F.max_pool2d(x, 2), u).cos()

    def which_ones(x, t, u):  # as a backward asks: of values that are all dropped, the first is the largest
        x = x.relu()
        y, indices = pool(x, [2, 2])
        return threshold(x, t).sin(), threshold(y, t).cos(), indices

    def which_ones_alone(x, t, u):
        x = x.relu()
        return threshold(x, t).sin(), pool(x, [2, 2])[1]

    def dilated(x, t, u):  # a window without a value gives -inf, which some kinds would drop
        x = x.relu()
        return threshold(x, t).sin(), threshold(pool(x, [2, 2], [1, 1], [1, 1], [2, 2])[0], t).cos()

    def of_a_part(x, t, u):
        a, b = x.relu().chunk(2, 1)
        return threshold(F.max_pool2d(a, 2), t).sin(), b.cos()

    def averaged(x, t, u):
        x = x.relu()
        return threshold(x, t).sin(), threshold(F.avg_pool2d(x, 2), t).cos()

    for f in (raw, another, which_ones, which_ones_alone, dilated, of_a_part, averaged):
        before, after, _ = hoisted(f, X, T, OTHER)
        assert all(same(a, b) for a, b in zip(before(X, T, OTHER), after(X, T, OTHER), strict=True))
        behind = [user.target for node in after.graph.nodes if node.target is THRESHOLD for user in node.users]
        assert not any("pool" in str(target) for target in behind), f.__name__


def test_a_result_is_computed_once():
    def f(x, t):
        x = x.relu()
        return threshold(x, t).sin(), threshold(x, t).cos(), x

    before, after, places = hoisted(f, X, T)
    assert all(same(a, b) for a, b in zip(before(X, T), after(X, T), strict=True))
    assert places == [("aten.relu.default", ["aten.sin.default", "aten.cos.default"])]


def test_other_thresholds_of_one_value_are_other_results():
    def f(x, t, u):
        x = x.relu()
        return threshold(x, t).sin(), threshold(x, u).cos()

    before, after, places = hoisted(f, X, T, OTHER)
    assert all(same(a, b) for a, b in zip(before(X, T, OTHER), after(X, T, OTHER), strict=True)) and len(places) == 2


def test_an_index_is_no_data():
    index = torch.tensor([[3, 1, 2, 0]])

    def f(x, i, t):
        return threshold(x.relu()[:, i.view(4)], t)

    before, after, [(producer, _)] = hoisted(f, X, index, T)
    assert same(before(X, index, T), after(X, index, T)) and producer == "aten.relu.default"


def test_every_move_commutes():
    """Each row of the table, on its own."""
    permutation = torch.tensor([1, 0, 3, 2])
    arguments = {
        "roll": ([2], [1]), "flip": ([1],), "expand": ([3, 2, 4, 6, 6],), "repeat": ([2, 1, 1, 1],),
        "permute": ([1, 0, 2, 3],), "transpose": (0, 1), "view": ([8, 36],), "reshape": ([8, 36],),
        "_unsafe_view": ([8, 36],), "unsqueeze": (0,), "constant_pad_nd": ([1, 1],), "pixel_shuffle": (2,),
        "index": ([None, permutation],), "index_select": (1, permutation), "split": (1,), "split_with_sizes": ([1, 1],),
        "squeeze.default": (), "squeeze.dim": (0,), "squeeze.dims": ([0],),
    }  # fmt: skip
    for op in MOVES:
        if not isinstance(op, torch._ops.OpOverload):
            continue
        name = op.name().removeprefix("aten::").partition(".")[0]
        x = X[0, 0] if name == "t" else X
        args = arguments.get(name, arguments.get(f"{name}.{op._overloadname}", ()))
        first = [x, x + 1] if name in ("cat", "stack") else x
        cut = [threshold(v, T) for v in first] if isinstance(first, list) else threshold(first, T)
        moved, expected = op(cut, *args), op(first, *args)
        for a, b in zip(*(v if isinstance(v, list | tuple) else [v] for v in (moved, expected)), strict=True):
            assert same(a, threshold(b, T)), name


def test_inductor_works_out_no_tensor_anew(monkeypatch):
    """It would those of all calls that a pass has changed, and those of all behind them, which takes long."""
    from torch._inductor.fx_utils import FakeTensorUpdater

    updated, update = [], FakeTensorUpdater.incremental_update

    def count(self):
        graph = self.gm.graph if hasattr(self, "gm") else self.graph  # (torch 2.11)
        unseen = [node for node in graph.nodes if self.hash_node(node) not in self.processed_hashes]
        updated.append(len(unseen))
        return update(self)

    monkeypatch.setattr(FakeTensorUpdater, "incremental_update", count)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Unflatten(1, (2, 4)), nn.Flatten(), nn.Linear(8, 8)).eval()
    x = torch.rand(4, 8)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-3)
    code_of(torch.compile(forged, backend="forged"), x)
    assert updated and not any(updated)
