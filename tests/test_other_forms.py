"""A network in another form, or one that draws numbers: every call is seen, and nothing is forged by name alone."""

import random
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import forged_fx
from forged_fx.audit import AuditFailed
from forged_fx.sites import CALLS

X = torch.rand(3, 2, 6, 6, generator=torch.Generator().manual_seed(0))


def convolutions():
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, padding="same"), nn.ReLU(), nn.ConvTranspose2d(4, 3, 2), nn.Flatten(), nn.Linear(147, 5)
    return nn.Sequential(*layers).eval()


def exported(model, *args):
    return torch.export.export(model, args).module()


# ---- an exported program


def test_an_exported_program_is_forged_as_the_model_is():
    model = convolutions()
    program = exported(model, X)
    of_program, of_model = (forged_fx.calibrate(m, [X]) for m in (program, model))
    assert [site.kind for site in of_program.sites.values()] == ["conv2d", "conv_transpose2d", "linear"]
    pairs = zip(of_program.sites.values(), of_model.sites.values(), strict=True)
    assert all((a.c_max, a.kind, a.channel) == (b.c_max, b.kind, b.channel) for a, b in pairs)
    forged = [forged_fx.transform(m, s, 2**-2) for m, s in ((program, of_program), (model, of_model))]
    assert torch.equal(*(f(X) for f in forged)) and not torch.equal(forged[0](X), model(X))


@pytest.mark.parametrize("strict", [True, False])
def test_the_statistics_of_another_form_are_refused(strict):
    model = convolutions()
    stats = forged_fx.calibrate(model, [X])
    with pytest.raises(
        RuntimeError, match=r"none of the 3 sites.*ran '#0', '#1', '#2'.*calibrate the model that is to be"
    ):
        forged_fx.transform(exported(model, X), stats, example=((X,), {}), strict=strict)


V = torch.tensor([0.0, 0.6, 0.7, 0.9])  # with 0.5 taken from it, two lie below half of the largest
W, B = (torch.rand(*shape, generator=torch.Generator().manual_seed(0)) for shape in ((4, 4), (2, 4, 4)))
DATA = {1: V, 2: W, 3: B}
# A product of data with weights: the data's dimensions, the weights, and the call.
PRODUCTS = {
    "linalg.matmul": (2, W, torch.linalg.matmul),
    "sparse.mm": (2, W, lambda x, w: torch.sparse.mm(w.to_sparse(), x)),
    "conv_tbc": (3, B, lambda x, w: torch.conv_tbc(x, w, torch.zeros(4))),
    "addmv_": (2, V, lambda x, w: torch.addmv_(torch.zeros(4), x, w)),
    "inner": (2, V, torch.inner),
    "Tensor.inner": (2, V, lambda x, w: x.inner(w)),
    "dot": (1, V, torch.dot),
    "vecdot": (2, V, torch.linalg.vecdot),
    "addmv": (2, V, lambda x, w: torch.addmv(torch.zeros(4), x, w)),
    "addbmm": (3, B, lambda x, w: torch.addbmm(torch.zeros(4, 4), x, w)),
    "addmm_": (2, W, lambda x, w: torch.zeros(4, 4).addmm_(x, w)),
    "baddbmm_": (3, B, lambda x, w: torch.zeros(2, 4, 4).baddbmm_(x, w)),
    "chain_matmul": (2, W, torch.chain_matmul),
    "multi_dot": (2, W, lambda x, w: torch.linalg.multi_dot([x, w])),
    "two weights": (2, W, lambda x, w: torch.linalg.multi_dot([x, w, w])),
    "einsum, two weights": (2, W, lambda x, w: torch.einsum("ab,bc,cd->ad", w, x, w)),
    "convolution": (3, B[:, :, :1], lambda x, w: torch.convolution(x, w, None, [1], [0], [1], False, [0], 2)),
    "aten.mm": (2, W, torch.ops.aten.mm),
    "aten.einsum": (2, W, lambda x, w: torch.ops.aten.einsum.default("ab,bc->ac", [x, w])),
    "aten.conv1d": (
        3,
        B[:, :2],
        lambda x, w: torch.ops.aten.conv1d.padding(x.transpose(1, 2)[:, :4], w, None, [1], "same"),
    ),
}


class Product(nn.Module):
    def __init__(self, weight, call):
        super().__init__()
        self.weight, self.call = nn.Parameter(weight.clone()), call

    def forward(self, x):
        return self.call(x * 1, self.weight)


@pytest.mark.filterwarnings("ignore:torch.chain_matmul")
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_a_site_whoever_makes_it(name):
    dims, weight, call = PRODUCTS[name]
    if name == "convolution":
        weight = B[:, :2, :3]
    if name == "aten.conv1d":
        weight = B[:, :, :3]
    model, x = Product(weight, call).eval(), DATA[dims] - 0.5
    stats = forged_fx.calibrate(model, [x])
    assert list(stats.sites) == ["#0"] and stats.sites["#0"].left_out is None
    forged = forged_fx.transform(model, stats, 2**-1)
    t = stats.sites["#0"].c_max / 2
    assert torch.equal(forged(x), model(torch.where(x.abs() < t, 0, x)))
    assert not torch.equal(forged(x), model(x))


def test_a_convolutions_channels_are_found_whatever_its_dimensions():
    for dims in (1, 2, 3):
        weight, x = torch.rand(2, 3, *[1] * dims), torch.rand(4, 3, *[5] * dims)
        model = Product(weight, lambda x, w, n=dims: torch.ops.aten.convolution(
            x, w, None, [1] * n, [0] * n, [1] * n, False, [0] * n, 1
        )).eval()  # fmt: skip
        assert forged_fx.calibrate(model, [x], channels=True).sites["#0"].channel == -dims - 1


def test_rows_of_operators_have_their_operands():
    for function, call in CALLS.items():
        if isinstance(function, torch._ops.OpOverload):
            names = [argument.name for argument in function._schema.arguments]
            assert all(names[position] == keyword for position, keyword in call.keys), function


def test_no_site_at_all_is_said():
    with pytest.warns(UserWarning, match="no linear, convolution or matrix product.*nothing to forge"):
        forged_fx.calibrate(nn.ReLU(), [X])
    with pytest.warns(UserWarning, match="nothing to forge.*'#0' is left out: a fused recurrent kernel"):
        forged_fx.calibrate(nn.LSTM(X.shape[-1], 2), [X[0]])


# ---- what calibration did not see


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, more=False):
        return self.c(self.a(x)) if more else self.a(x)


def test_a_layer_that_calibration_did_not_see_is_no_secret():
    model = Branch().eval()
    stats, example = forged_fx.calibrate(model, [W]), ((W,), {"more": True})
    with pytest.raises(RuntimeError, match=r"calibration did not see: 'c'.*strict=False"):
        forged_fx.transform(model, stats, 2**-2, example=example)
    forged = forged_fx.transform(model, stats, 2**-2, example=example, strict=False)
    assert "left as they are, as calibration saw no call of them: c" in str(forged_fx.describe(forged))
    unaudited = forged_fx.transform(model, stats, 2**-2)
    assert "saw no call of them: c" in str(forged_fx.describe(unaudited)), "here it is the layer"
    t = stats.sites["a"].c_max / 4
    assert torch.equal(forged(W, more=True), model.c(model.a(torch.where(W.abs() < t, 0, W))))


@torch.jit.script
def out_of_sight(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w


class Weights(nn.Module):
    """In a product, made into another weight, normalised with, looked up, added, and in a product that is not seen."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.table = nn.Linear(4, 4), nn.LayerNorm((4, 4)), nn.Embedding(4, 4)
        self.made = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.scale, self.added = nn.Parameter(torch.rand(4, 1)), nn.Parameter(torch.rand(4, 4))
        self.tied, self.unseen = self.fc.weight, nn.Parameter(torch.rand(4, 4))

    def forward(self, x):
        x = self.made(self.fc(x)) * self.scale + self.table(torch.arange(4)) + self.added
        return self.norm(out_of_sight(x, self.unseen))


class Pool(nn.Module):
    """A module is called weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Linear(4, 1)

    def forward(self, x):
        return (x * self.weight(x).softmax(0)).sum(0)


def test_a_weight_in_no_product_that_was_seen_is_named():
    model = Weights().eval()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [W - 0.5]), 2**-2)
    assert "\nin no product that calibration saw by name: added, unseen\n" in str(forged_fx.describe(forged))
    pool = nn.Sequential(Pool())
    assert "in no product" not in str(forged_fx.describe(forged_fx.transform(pool, forged_fx.calibrate(pool, [W]))))
    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 2, 1)), {nn.Linear})
    forged = forged_fx.transform(quantized, forged_fx.calibrate(quantized, [torch.rand(2, 4, 4)]), 2**-2)
    assert "\nin no product that calibration saw by name: 0\n" in str(forged_fx.describe(forged))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.b = nn.Linear(4, 4), nn.Bilinear(4, 4, 3)

    def forward(self, x):
        h = self.fc(x)
        return self.b(h, h) * (1 if torch.rand(()) < 2 else 0)  # module by module


def test_a_tensor_that_is_both_inputs_is_thresholded_as_both():
    model = Twice().eval()
    stats = forged_fx.calibrate(model, [W])
    forged = forged_fx.transform(model, stats, 2**-1)
    assert "module by module" in str(forged_fx.describe(forged))
    drop = lambda v, site: torch.where(v.abs() < stats.sites[site].c_max / 2, 0, v)  # noqa: E731
    h = drop(model.fc(drop(W, "fc")), "b")
    assert torch.equal(forged(W), model.b(h, h))


# ---- random numbers

DRAWS = {
    "torch": lambda: torch.rand(()).item(),
    "python": random.random,
    "numpy": lambda: float(np.random.rand()),
}


class Draws(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.a, self.draw = nn.Linear(4, 4), draw

    def forward(self, x):
        y = self.a(x)
        return 2 * y if self.draw() < 0.5 else y


@pytest.mark.parametrize("source", DRAWS)
@pytest.mark.parametrize("audited", [True, False])
def test_what_is_drawn_is_drawn_anew_in_each_run(source, audited, tmp_path):
    model = Draws(DRAWS[source]).eval()
    stats = forged_fx.calibrate(model, [W])
    stats.save(tmp_path / "stats")
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    forged = forged_fx.transform(model, stats if audited else tmp_path / "stats", 2**-2)
    assert torch.equal(before[0], torch.get_rng_state()), "the generators are left as they were"
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert ("not audited" not in str(forged_fx.describe(forged))) is audited
    assert len({tuple(forged(W).flatten().tolist()) for _ in range(40)}) == 2


def counted(model):
    model.count = model.count + 1
    return model.count


OWN = {
    "torch": lambda model: torch.rand(4, generator=model.torch),
    "numpy": lambda model: torch.from_numpy(model.numpy.random(4, dtype=np.float32)),
    "a tensor": counted,
}


class DrawsItsOwn(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.a, self.draw, self.count = nn.Linear(4, 4), draw, torch.zeros(1)
        self.torch, self.numpy = torch.Generator().manual_seed(0), np.random.default_rng(0)

    def forward(self, x):
        return self.a(x) + self.draw(self)


@pytest.mark.parametrize("source", OWN)
def test_what_comes_from_the_models_own_generator_is_drawn_anew_in_each_run(source):
    model = DrawsItsOwn(OWN[source]).eval()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [W]), 0)
    assert "its forward does another thing when it runs again" in str(forged_fx.describe(forged))
    for _ in range(3):
        assert torch.equal(forged(W), model(W))


def test_a_model_that_cannot_be_repeated_is_named_as_such():
    model = DrawsItsOwn(lambda model: random.SystemRandom().random()).eval()
    with pytest.raises(AuditFailed, match=r"another output when it runs again.*torch\.manual_seed"):
        forged_fx.transform(model, forged_fx.calibrate(model, [W]), 0)


def test_a_tensor_that_is_the_same_in_each_run_is_no_reason_against_a_graph():
    model = DrawsItsOwn(lambda model: torch.tensor([1.0, 2.0, torch.nan, torch.inf])).eval()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [W]), 0)
    assert isinstance(forged, torch.fx.GraphModule)


def test_what_data_writes_is_not_shared_past():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = x * 1
            p = self.a(y)
            y.data.mul_(2)
            return p + self.b(y)

    model = Writes().eval()
    stats = forged_fx.calibrate(model, [W])
    stats.example = None  # as from a file: without an audit
    forged = forged_fx.transform(model, stats, 0)
    with torch.no_grad():
        assert torch.equal(forged(W), model(W))


# ---- models that keep what cannot be copied


def test_what_a_run_left_in_the_model_does_not_keep_it_from_being_copied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    prune.l1_unstructured(model[0], "weight", 0.5)
    stats = forged_fx.calibrate(model, [W])
    model(W)  # with gradients: the pruned weight is no leaf
    assert not model[0].weight.is_leaf
    forged = forged_fx.transform(model, stats, 0)
    assert torch.equal(forged(W), model(W))
    assert not model[0].weight.is_leaf


def test_what_cannot_be_copied_is_named():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].guard = threading.Lock()
    stats = forged_fx.calibrate(model, [W])
    with pytest.raises(RuntimeError, match=r"'0.guard' is a lock.*__deepcopy__"):
        forged_fx.transform(model, stats)


# ---- arguments

WRONG = {
    "a tensor as the example": ({"example": W}, r"example=\(\(x,\), \{\}\)"),
    "arguments alone": ({"example": (W,)}, r"example=\(\(x,\), \{\}\)"),
    "a number as the kind": ({"kind": 3}, "kind=3: a name"),
    "no statistics": ({"stats": None}, "statistics that forged_fx.calibrate returned.*not NoneType"),
    "a dict of weights": ({"stats": {"weight": W}}, "statistics that forged_fx.calibrate returned.*not dict"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_arguments_of_another_type_are_named(wrong):
    model = nn.Linear(4, 4)
    given, says = WRONG[wrong]
    with pytest.raises(TypeError, match=says):
        forged_fx.transform(**{"model": model, "stats": forged_fx.calibrate(model, [W]), **given})


def test_batches_that_are_none():
    with pytest.raises(TypeError, match="batches is NoneType"):
        forged_fx.calibrate(nn.Linear(4, 4), None)


def test_the_functional_bilinear_too():
    model = Product(torch.rand(2, 4, 4), lambda x, w: F.bilinear(x, x, w)).eval()
    stats = forged_fx.calibrate(model, [W - 0.5])
    assert list(stats.sites) == ["#0", "#0:1"]


class Slices(nn.Module):
    """One layer reads a slice with gaps in memory, one reads all of it, and their results meet in a product."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x[:, :2]) @ self.b(x).T


def test_a_product_of_two_activations_is_none_where_the_audit_closes_gaps():
    model = Slices().eval()
    stats = forged_fx.calibrate(model, [W])
    assert list(stats.sites) == ["a", "b"]
    assert len(forged_fx.describe(forged_fx.transform(model, stats, 2**-2))) == 2
