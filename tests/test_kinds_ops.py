"""The other forged functions as operators: each row of the table is its formula, on every path that PyTorch takes."""

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from interpreted import arithmetic_of_a_gpu, kernels  # noqa: F401 (the fixture is used by being there)
from kinks import DTYPES, LAYOUTS, THRESHOLDS, same, values
from torch import Tensor

from forged_fx import ops
from forged_fx.bpda import straight_through
from forged_fx.kernels import reference
from forged_fx.ops import FUNCTIONS

SCALAR = [name for name, f in FUNCTIONS.items() if not f.channels and name != "threshold"]
KINDS = [*SCALAR, "mean"]
NEW = pytest.mark.parametrize("name", KINDS)
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# Element by element, in numpy, on values as wide as the comparison: (value, gradient).
def one_sided(x, t):
    return (0, 0) if t > 0 and x < t else (x, 1)


def shifted(x, t):
    return one_sided(x, t) if not t > 0 else (0, 0) if x < t else (x - t, 1)


def soft(x, t):
    return (x, 1) if not t > 0 else (0, 0) if abs(x) < t else (x - np.copysign(t, x), 1)


def clamp(x, limit):
    return (np.copysign(limit, x) if limit > 0 else -limit if x < 0 else limit, 0) if abs(x) > limit else (x, 1)


def band(x, t, limit):
    return (0, 0) if abs(x) < t else clamp(x, limit)


def mean(x, mean, width):
    return (mean, 0) if width > 0 and abs(x - mean) <= width else (x, 1)


FORMULAS = {f.__name__: f for f in (one_sided, shifted, soft, clamp, band, mean)}


def arguments(name: str, t: float, x: Tensor) -> list[tuple]:
    """Parameters worth a try at t: in band and mean, t is each of the two in turn; one channel of mean's is wide."""
    if name == "band":
        return [(torch.tensor(t), torch.tensor(2.0)), (torch.tensor(0.05), torch.tensor(t))]
    if name == "mean":
        if not x.dim():
            return []
        n = x.shape[-1]
        at, width = torch.full((n,), 0.0), torch.full((n,), t)
        at[::2], width[::3] = 0.3, 0.0
        return [(at, width, -1), (width, torch.full((n,), 0.25), x.dim() - 1)]
    return [(torch.tensor(t),)]


@np.errstate(all="ignore")
def expected(name: str, x: Tensor, *args) -> tuple[Tensor, Tensor]:
    wide = np.float64 if x.dtype == torch.float64 else np.float32
    parameters = [p.numpy().astype(wide) for p in args if isinstance(p, Tensor)]
    parameters = [np.broadcast_to(p, x.shape).ravel() for p in parameters]
    values = x.to(getattr(torch, wide.__name__)).numpy().ravel()
    pairs = np.array([FORMULAS[name](*each) for each in zip(values, *parameters, strict=True)], wide)
    return tuple(torch.from_numpy(column.copy()).reshape(x.shape).to(x.dtype) for column in pairs.T)


def op(name: str) -> Callable:
    return getattr(torch.ops.forged_fx, name)


# ---- values


@NEW
@ALL_DTYPES
def test_every_path_is_the_formula(name: str, dtype: torch.dtype) -> None:
    """Reference, CPU and, interpreted, Triton."""
    launch, launch_backward = kernels("kinds").launch, kernels("kinds").launch_backward
    forward, backward = getattr(reference, name), getattr(reference, f"{name}_backward")
    for t in THRESHOLDS:
        x = values(t, dtype)
        grad = torch.linspace(1, 2, x.numel(), dtype=dtype)
        for args in arguments(name, t, x):
            value, kept = expected(name, x, *args)
            assert same(forward(x, *args), value), args
            assert same(op(name)(x, *args), value), args
            assert same(backward(grad, x, *args), grad * kept), args
            assert same(op(f"{name}_backward")(grad, x, *args), grad * kept), args
            if t in (-1.0, 0.1, 1e6, math.inf):  # (it is slow, and loses bfloat16's denormals)
                assert same(launch(name, x, *args), value), args
                assert same(launch_backward(name, grad, x, *args), grad * kept), args


@NEW
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(name: str, layout: str) -> None:
    for dtype in (torch.float32, torch.float16) if layout == "permuted" else (torch.float32,):
        x = LAYOUTS[layout](values(0.1, dtype))
        before, grad = x.clone(), torch.full((), 3.0, dtype=dtype).expand(x.shape)
        for args in arguments(name, 0.1, x):
            result = getattr(reference, name)(x, *args)
            gradient = getattr(reference, f"{name}_backward")(grad, x, *args)
            assert result.stride() == torch.empty_like(x).stride()
            assert same(op(name)(x, *args), result) and same(kernels("kinds").launch(name, x, *args), result)
            assert same(op(f"{name}_backward")(grad, x, *args), gradient)
            assert same(kernels("kinds").launch_backward(name, grad, x, *args), gradient)
        assert same(x.clone(), before)


@pytest.mark.parametrize("channel", [0, 1, 2, 3, -1, -3])
def test_channels_lie_along_any_dimension(channel: int) -> None:
    x = torch.randn(2, 3, 4, 5)
    n = x.shape[channel]
    at, width = torch.randn(n), torch.rand(n)
    shape = [-1 if d == channel % 4 else 1 for d in range(4)]
    result = torch.where((x - at.view(shape)).abs() <= width.view(shape), at.view(shape), x)
    for y in (x, x.to(memory_format=torch.channels_last)):
        assert torch.equal(op("mean")(y, at, width, channel), result)
        assert torch.equal(kernels("kinds").launch("mean", y, at, width, channel), result)


@NEW
@ALL_DTYPES
def test_off_is_the_identity_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    x = values(0.5, dtype)
    zeros = torch.zeros(x.numel())
    off = {"clamp": (torch.tensor(math.inf),), "band": (torch.tensor(0.0), torch.tensor(math.inf))}
    args = off.get(name, (torch.tensor(0.0),)) if name != "mean" else (zeros, zeros, 0)
    assert same(op(name)(x, *args), x) and same(kernels("kinds").launch(name, x, *args), x)
    assert same(op(f"{name}_backward")(x, x, *args), x)


@pytest.mark.parametrize(
    ("name", "args", "error", "says"),
    [
        ("soft", (torch.tensor([0.1]),), TypeError, r"soft: t must be .*shape \(1,\).*0-dim"),
        ("band", (torch.tensor(0.1), torch.tensor(1)), TypeError, "band: limit must be .*int64"),
        ("clamp", (torch.tensor(0.1, device="meta"),), ValueError, "limit is on meta and x on cpu; move limit"),
        ("mean", (torch.zeros(3), torch.zeros(4), -1), TypeError, r"width must be .*\(3,\), not .*\(4,\).*per channel"),
        ("mean", (torch.zeros(3), torch.zeros(3), 2), ValueError, "channel=2 is no dimension of x, which has 2"),
    ],
)
def test_errors_name_the_next_step(name: str, args: tuple, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        op(name)(torch.ones(2, 3), *args)


# ---- what PyTorch asks of an operator

X = torch.tensor([[-2.0, -0.7, -0.3, 0.1], [0.3, 0.8, 1.3, 3.0]])
ARGS = dict.fromkeys(SCALAR, (torch.tensor(0.5),)) | {
    "band": (torch.tensor(0.5), torch.tensor(1.5)),
    "mean": (torch.tensor([0.0, 0.5, 1.0, 0.0]), torch.full((4,), 0.4), -1),
}


@pytest.mark.parametrize("name", ["soft", "band", "mean"])  # one of each signature
def test_opcheck(name: str) -> None:
    x = X.clone().requires_grad_()
    torch.library.opcheck(op(name).default, (x, *ARGS[name], name in ("soft", "mean")))
    torch.library.opcheck(op(f"{name}_backward").default, (x, X, *ARGS[name]))


@NEW
def test_gradients(name: str) -> None:
    x = X.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: op(name)(x, *ARGS[name]).sin(), x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: op(name)(x, *ARGS[name]).sin(), x, check_fwd_over_rev=True)
    parameters = [p.clone().requires_grad_() for p in ARGS[name] if isinstance(p, Tensor)]
    y = op(name)(x, *parameters, *ARGS[name][len(parameters) :], True)
    grads = torch.autograd.grad(y.sum(), [x, *parameters], allow_unused=True)
    assert torch.equal(grads[0], torch.ones_like(x)) and grads[1:] == (None,) * len(parameters)
    with straight_through():
        within = op(name)(x, *ARGS[name])
    assert same(within, op(name)(x, *ARGS[name]))
    assert torch.equal(torch.autograd.grad(within.sum(), x)[0], torch.ones_like(x))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_gradient_is_the_slope(name: str) -> None:
    """Of every function in the table, by finite differences wherever there is no kink within their reach."""
    f, chance = FUNCTIONS[name], torch.Generator().manual_seed(0)
    x = 6 * torch.rand(400, dtype=torch.float64, generator=chance) - 3
    size = (len(x),) if f.channels else ()
    parameters = [low + 0.5 * torch.rand(size, generator=chance) for low in (0.3, 1.1)[: len(f.parameters)]]
    arguments = (*parameters, 0) if f.channels else tuple(parameters)
    h = 1e-6
    below, at, above = (f.op(v, *arguments) for v in (x - h, x, x + h))
    smooth = ((above - at) - (at - below)).abs() < 1e-3 * h
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f.op(leaf, *arguments).sum(), leaf)
    assert smooth.sum() > 390
    assert torch.allclose(gradient[smooth], ((above - below) / (2 * h))[smooth], atol=1e-6), (
        f"{name} has a slope that is neither 0 where its rule drops a value nor 1 where it keeps one, and its gradient "
        "knows no other: see the head of kernels/reference.py"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name, f in FUNCTIONS.items() if f.moves])
def test_what_moves_commutes_with_a_maximum(name: str, dtype: torch.dtype) -> None:
    """It never makes the larger of two values the smaller one."""
    f = FUNCTIONS[name]
    x = torch.cat([torch.linspace(-3, 3, 1001), torch.tensor([float("-inf"), float("inf")])]).to(dtype).sort().values
    y = f.op(x, *(torch.tensor(value) for value in (0.3, 1.1)[: len(f.parameters)]))
    assert torch.equal(y, y.cummax(0).values) and not torch.equal(y, x)


@NEW
def test_vmap(name: str) -> None:
    f, args = op(name), ARGS[name]
    expected = torch.stack([f(row, *args) for row in X])
    assert torch.equal(torch.vmap(lambda x: f(x, *args))(X), expected)
    if args[-1] == -1:
        assert torch.equal(torch.vmap(lambda x: f(x, *args[:-1], 0))(X), expected)
    grads = torch.vmap(torch.func.grad(lambda x: f(x, *args).sum()))(X)
    assert torch.equal(grads, op(f"{name}_backward")(torch.ones_like(X), X, *args))
    ensemble = torch.vmap(lambda p: f(X, p, *args[1:]))(torch.stack([args[0], 2 * args[0]]))
    assert torch.equal(ensemble[1], f(X, 2 * args[0], *args[1:]))


def test_compiled_is_eager() -> None:
    """All functions in one graph, values and gradients, at their kinks; nothing is left to call."""
    from torch._inductor.utils import run_and_get_code

    rounds = {torch.float32: KINDS, torch.bfloat16: ("shifted", "clamp", "mean")}
    xs = [(name, values(0.1, dtype)) for dtype, names in rounds.items() for name in names]
    calls = [(name, x, arguments(name, 0.1, x)[-1]) for name, x in xs]

    def chain(*xs: Tensor) -> list[Tensor]:
        return [op(name)(x.neg(), *args).neg() for x, (name, _, args) in zip(xs, calls, strict=True)]

    def run(f: Callable) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for _, x, _ in calls]
        outputs = f(*leaves)
        weights = [torch.linspace(1, 2, y.numel(), dtype=y.dtype) for y in outputs]
        return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, weights)]

    torch._dynamo.reset()
    found, code = run_and_get_code(run, torch.compile(chain, fullgraph=True))
    lines = [line.strip() for part in code for line in part.splitlines()]
    assert not [line for line in lines if "forged_fx." in line and not line.startswith("#")]
    assert all(map(same, found, run(chain)))


def test_compiled_by_channels_with_the_straight_gradient() -> None:
    """The channel's dimension is no longer the last argument."""
    x, args = torch.randn(2, 3, 4), (torch.randn(4), torch.rand(4), -1)
    fast = torch.compile(lambda x: op("mean")(x.neg(), *args, True), backend="forged", fullgraph=True)
    assert torch.equal(fast(x), op("mean")(x.neg(), *args))


@NEW
def test_decomposed(name: str) -> None:
    table = ops.decompositions()
    for args in [a for t in (0.0, 0.1) for a in arguments(name, t, values(t, torch.bfloat16))]:
        for dtype in (torch.float32, torch.bfloat16):
            x = values(0.1, dtype)
            assert same(table[op(name).default](x, *args), op(name)(x, *args))
            assert same(table[op(f"{name}_backward").default](x, x, *args), op(f"{name}_backward")(x, x, *args))


def test_compiled_autograd_tells_them_apart() -> None:
    compiled = torch.compile(backend="aot_eager")
    for name in ("soft", "clamp", "mean"):
        for through in (False, True):
            x = X.clone().requires_grad_()
            with torch._dynamo.compiled_autograd._enable(compiled):
                functools.partial(op(name), straight_through=through)(x, *ARGS[name]).sum().backward()
            kept = op(f"{name}_backward")(torch.ones_like(X), X, *ARGS[name])
            assert torch.equal(x.grad, torch.ones_like(X) if through else kept)


@pytest.mark.parametrize("name", sorted(ops.FUNCTIONS.keys() - {"mean"}))
def test_a_parameter_that_is_zero_in_the_dtype_of_the_comparison(name):
    x, f = torch.tensor([-torch.inf, -2.0, -0.0, 0.5, torch.inf]), ops.FUNCTIONS[name]
    tiny = [torch.tensor(1e-60, dtype=torch.float64)] * len(f.parameters)
    assert torch.equal(f.op(x, *tiny), getattr(reference, name)(x, *tiny))
    assert torch.equal(f.backward(x, x, *tiny), getattr(reference, f"{name}_backward")(x, x, *tiny))


@ALL_DTYPES
@pytest.mark.parametrize("name", [name for name, f in FUNCTIONS.items() if f.told])
def test_a_backward_that_is_told_by_the_result(name, dtype):
    """comes to what it comes to from x, at every kink."""
    for t in map(torch.tensor, THRESHOLDS):
        x = values(float(t), dtype)
        grad = torch.arange(1, x.numel() + 1).to(dtype)
        y = getattr(reference, name)(x, t)
        backward = getattr(reference, f"{name}_backward")
        assert same(backward(grad, y, t), backward(grad, x, t))
        leaf = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(FUNCTIONS[name].op(leaf, t), leaf, grad)
        assert same(found, backward(grad, x, t))


def test_a_threshold_ahead_of_a_layer_that_learns_keeps_nothing_more():
    """Its backward looks at its result, which the layer's looks at, too."""
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x

    x, w, t = torch.randn(8, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True), torch.tensor(0.1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y = FUNCTIONS["threshold"].op(x.sin(), t)
        y @ w
    assert kept.keys() == {v.data_ptr() for v in (x, y, w, t)}
