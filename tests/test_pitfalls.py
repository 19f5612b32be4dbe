"""A table of small models with one pitfall each, and what must come of it.

The oracle of `benchmarks/dispatch_oracle.py` works below the Python API and shares no code with the library: it says
which kernels are sites, what their maxima are, and what the forged forward is.
"""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves
from written import graphs_run_as_traced

import forged_fx
from forged_fx.modes import fast_path_off
from forged_fx.sites import CONSTANT_INPUT, FIXED_FILTER, RECURRENT, SCRIPTED

_spec = importlib.util.spec_from_file_location(
    "dispatch_oracle", Path(__file__).parents[1] / "benchmarks" / "dispatch_oracle.py"
)
dispatch_oracle = importlib.util.module_from_spec(_spec)
sys.modules["dispatch_oracle"] = dispatch_oracle
_spec.loader.exec_module(dispatch_oracle)

WHOLE, BY_MODULE = "whole", "by module"


def vector(n=6):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(1))


def image():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)


class DataDependentBranch(Pair):
    def forward(self, x):
        return self.a(x) if x.sum() > 1e9 else self.b(x)


class EarlyExit(Pair):
    def forward(self, x):
        x = self.a(x)
        if x.abs().max() > 1e-9:
            return x
        return self.b(x)


class LoopOverTheBatch(Pair):
    def forward(self, x):
        return torch.stack([self.b(self.a(row)) for row in x])


class SharedLayer(Pair):
    def forward(self, x):
        return self.b(self.a(self.a(x).relu()))


class TwoNames(Pair):
    def __init__(self):
        super().__init__()
        self.c = self.a

    def forward(self, x):
        return self.c(self.b(x))


class TiedWeights(Pair):
    def __init__(self):
        super().__init__()
        self.b.weight = self.a.weight

    def forward(self, x):
        return F.linear(self.b(self.a(x)), self.a.weight.t())


class Parametrized(Pair):
    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.a)
        nn.utils.parametrizations.spectral_norm(self.b)

    def forward(self, x):
        return self.b(self.a(x))


class OldWeightNorm(Pair):
    def __init__(self):
        super().__init__()
        nn.utils.weight_norm(self.a)

    def forward(self, x):
        return self.b(self.a(x))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)


class CrossAttention(Attention):
    def forward(self, x):
        return self.attention(x, x * 2, x + 1, need_weights=False)[0]


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, groups=4, padding=1)
        self.circular = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.transposed = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.volume = nn.Conv3d(1, 2, 3)

    def forward(self, x):
        return self.volume(self.transposed(self.circular(self.grouped(x))).unsqueeze(1))


class Recurrent(Pair):
    def __init__(self):
        super().__init__()
        self.lstm, self.cell = nn.LSTM(4, 4, batch_first=True), nn.GRUCell(4, 4)

    def forward(self, x):
        return self.cell(self.lstm(self.a(x).unsqueeze(1))[0][:, 0])


class Scripted(Pair):
    def __init__(self):
        super().__init__()
        self.b = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))

    def forward(self, x):
        return self.b(self.a(x))


class HiddenInAList(Pair):
    def __init__(self):
        super().__init__()
        self.hidden = [nn.Linear(4, 4)]

    def forward(self, x):
        return self.b(self.hidden[0](self.a(x)))


class Autocast(Pair):
    def forward(self, x):
        x = self.a(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.b(x)
        return x.float()


class NoGrad(Pair):
    def forward(self, x):
        with torch.no_grad():
            scale = self.a(x).mean()
        return self.b(x) * scale


class InPlaceResidual(Pair):
    def forward(self, x):
        x = self.a(x)
        x += self.b(x.relu_())
        return x.mul_(2)


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple


torch.utils._pytree.register_dataclass(Output)


class NestedInputsAndOutputs(Pair):
    def forward(self, batch, *, scale=None):
        h = self.a(batch["x"][0])
        return Output(self.b(h) * scale, ({"h": h},))


class MixtureOfExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 2), nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        choice = self.gate(x).argmax(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            if (chosen := choice == i).any():
                out[chosen] = expert(x[chosen])
        return out


class Checkpointed(Pair):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.b, self.a(x), use_reentrant=False)


class NumpyInTheMiddle(Pair):
    def forward(self, x):
        return self.b(torch.from_numpy(self.a(x).detach().numpy() * 2))


class ConstantInput(Pair):
    def __init__(self):
        super().__init__()
        self.register_buffer("grid", torch.randn(6, 4))

    def forward(self, x):
        return self.b(x) + self.a(self.grid)


class FixedFilter(Pair):
    def __init__(self):
        super().__init__()
        self.register_buffer("blur", torch.ones(4, 1) / 4)

    def forward(self, x):
        return self.a(x) * (x @ self.blur)


class Products(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        x = torch.addmm(self.v, x @ self.w, self.w.t())
        x = torch.einsum("bi,ij->bj", x, self.w * 2) + self.w.matmul(x.t()).t()
        return torch.bmm(x.unsqueeze(1), self.w.expand(x.shape[0], 4, 4)).squeeze(1).mv(self.v)


class WeightsFromData(Pair):
    def forward(self, x):
        return F.linear(x, self.a(x)) @ x


class OptionalArgument(Pair):
    def forward(self, x, mask=None):
        x = self.a(x)
        return self.b(x) if mask is None else x


class TwoCallsInALayer(nn.Linear):
    def forward(self, x):
        return super().forward(x) + F.linear(x, self.weight)


# model -> (captured, sites, left out)
TABLE = {
    DataDependentBranch: (BY_MODULE, ["b"], {}),
    EarlyExit: (BY_MODULE, ["a"], {}),
    LoopOverTheBatch: (BY_MODULE, [f"{m}{k}" for k in ("", "#1", "#2", "#3", "#4", "#5") for m in "ab"], {}),
    SharedLayer: (WHOLE, ["a", "a#1", "b"], {}),
    TwoNames: (WHOLE, ["b", "a"], {}),
    TiedWeights: (WHOLE, ["a", "b", "#0"], {}),
    Parametrized: (WHOLE, ["a", "b"], {}),
    OldWeightNorm: (WHOLE, ["a", "b"], {}),
    Attention: (BY_MODULE, ["attention", "attention#3"], {}),
    CrossAttention: (BY_MODULE, [f"attention{k}" for k in ("", "#1", "#2", "#3")], {}),
    Convolutions: (WHOLE, ["grouped", "circular", "transposed", "volume"], {}),
    Recurrent: (WHOLE, ["a"], {"lstm": RECURRENT, "cell": RECURRENT}),
    Scripted: (WHOLE, ["a"], {"b": SCRIPTED}),
    HiddenInAList: (BY_MODULE, ["a", "#0", "b"], {}),
    Autocast: (BY_MODULE, ["a", "b"], {}),
    NoGrad: (BY_MODULE, ["a", "b"], {}),
    InPlaceResidual: (WHOLE, ["a", "b"], {}),
    NestedInputsAndOutputs: (WHOLE, ["a", "b"], {}),
    MixtureOfExperts: (BY_MODULE, ["gate", "experts.0", "experts.1"], {}),
    Checkpointed: (BY_MODULE, ["a", "b"], {}),
    NumpyInTheMiddle: (BY_MODULE, ["a", "b"], {}),
    ConstantInput: (WHOLE, ["b"], {"a": CONSTANT_INPUT}),
    FixedFilter: (WHOLE, ["a"], {"#0": FIXED_FILTER}),
    Products: (WHOLE, [f"#{k}" for k in range(6)], {}),
    WeightsFromData: (WHOLE, ["a"], {}),
    OptionalArgument: (WHOLE, ["a", "b"], {}),
    TwoCallsInALayer: (WHOLE, ["#0", "#1"], {}),
}

# Where the oracle looks below what the library can reach (it sees the products inside a recurrent or scripted kernel),
# or after autocast has rounded the input.
SEES_ELSEWHERE = {Recurrent, Scripted, Autocast}

INPUTS = {
    Convolutions: ((image(),), {}),
    Attention: ((vector().reshape(2, 3, 4),), {}),
    CrossAttention: ((vector().reshape(2, 3, 4),), {}),
    NestedInputsAndOutputs: ((), {"batch": {"x": [vector()]}, "scale": torch.tensor(2.0)}),
}


@pytest.fixture(params=TABLE, ids=lambda kind: kind.__name__)
def case(request):
    kind = request.param
    torch.manual_seed(0)
    model = kind(4, 4) if kind is TwoCallsInALayer else kind()
    args, kwargs = INPUTS.get(kind, ((vector(),), {}))
    batch = kwargs or args
    return model.eval(), args, kwargs, forged_fx.calibrate(model, [batch]), *TABLE[kind]


def same(a, b):
    pairs = list(zip(tree_leaves(a), tree_leaves(b), strict=True))
    return bool(pairs) and all(torch.equal(x, y) for x, y in pairs)


def oracle(model, args, kwargs, ratio=None, maxima=None):
    run = dispatch_oracle.DispatchOracle(ratio, maxima)
    with torch.no_grad(), fast_path_off():
        return run.run(model, args, kwargs), run.maxima


def test_the_outcome(case):
    model, args, kwargs, stats, captured, sites, left_out = case
    forged = forged_fx.transform(model, stats, 2**-2)
    rows = forged_fx.describe(forged)
    assert [row.site for row in rows if row.left_out is None] == sites
    assert {row.site: row.left_out for row in rows if row.left_out is not None} == left_out
    assert (WHOLE if isinstance(forged, torch.fx.GraphModule) else BY_MODULE) == captured

    if type(model) in SEES_ELSEWHERE:
        return
    _, maxima = oracle(model, args, kwargs)
    assert [site.c_max for site in stats.sites.values() if site.left_out is None] == maxima
    expected, _ = oracle(model, args, kwargs, 2**-2, maxima)
    with torch.no_grad(), fast_path_off():
        assert same(forged(*args, **kwargs), expected)
        plain = model(*args, **kwargs)
        assert not same(expected, plain)
        forged_fx.set_ratio(forged, 0)
        assert same(forged(*args, **kwargs), plain)


# Where Dynamo makes no graph of code with a site in it.
NOT_COMPILED = {
    Recurrent: "'a' did not run in any graph",  # Dynamo gives up a forward that calls an LSTM
    Scripted: "'a' did not run in any graph",
    MixtureOfExperts: "'gate', 'experts.0', 'experts.1' did not run in any graph",  # a data-dependent branch in a loop
}


def test_compiled_from_the_plain_model(case):
    """The same thresholds through the backend, graph breaks included; or an error that names what it cannot reach."""
    model, args, kwargs, stats, _, _, _ = case
    forged = forged_fx.transform(model, stats, 2**-2)
    fast = torch.compile(model, backend="forged", options={"stats": stats, "ratio": 2**-2})
    with torch.no_grad(), fast_path_off(), graphs_run_as_traced():
        if type(model) in NOT_COMPILED:
            for _ in range(2):
                with pytest.raises(ValueError, match=NOT_COMPILED[type(model)] + ".*exclude"):
                    fast(*args, **kwargs)
            return
        found, expected = tree_leaves(fast(*args, **kwargs)), tree_leaves(forged(*args, **kwargs))
    tolerance = 1e-2 if isinstance(model, Autocast) else 1e-5
    assert all(torch.allclose(a, b, atol=tolerance) for a, b in zip(found, expected, strict=True))


@torch._dynamo.config.patch(allow_rnn=True)
def test_recurrent_layers_compile_where_dynamo_is_let_in():
    torch.manual_seed(0)
    model, x = Recurrent().eval(), vector()
    stats = forged_fx.calibrate(model, [x])
    fast = torch.compile(model, backend="forged", options={"stats": stats, "ratio": 2**-2})
    with torch.no_grad():
        expected = forged_fx.transform(model, stats, 2**-2)(x)
        assert torch.allclose(fast(x), expected, atol=1e-6) and not torch.allclose(model(x), expected, atol=1e-3)


def test_a_fixed_filter_can_be_asked_for():
    model, x = FixedFilter().eval(), vector()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-1, include="*")
    t = x.abs().max() / 2
    cut = torch.where(x.abs() < t, 0, x)
    assert torch.equal(forged(x), model.a(cut) * (cut @ model.blur))
