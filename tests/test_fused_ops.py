"""The fused operators equal their chain, in every mode of PyTorch, and launch their kernel on a GPU."""

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from interpreted import arithmetic_of_a_gpu, kernels  # noqa: F401 (a fixture)
from kinks import same
from torch import Tensor

import forged_fx
from forged_fx import fused_ops, ops
from forged_fx.bpda import straight_through

elementwise = torch.ops.forged_fx.elementwise_threshold
norm = torch.ops.forged_fx.norm_threshold
threshold = torch.ops.forged_fx.threshold

T, LIMIT = torch.tensor(0.5), torch.tensor(1.0)
G = torch.Generator().manual_seed(0)
X, R = (torch.randn(2, 6, 5, 4, generator=G) for _ in range(2))
BN = dict(zip(("mean", "var", "weight", "bias"), torch.rand(4, 6, generator=G) + 0.5, strict=True))
W, B = torch.randn(2, 4, generator=G)


def batch_norm(x: Tensor) -> Tensor:
    return F.batch_norm(x, BN["mean"], BN["var"], BN["weight"], BN["bias"])


def layer_norm_2d(x: Tensor) -> Tensor:
    return F.layer_norm(x.permute(0, 2, 3, 1), [6], BN["weight"], BN["bias"]).permute(0, 3, 1, 2)


# A call of an operator, and the chain that it stands for, written out: x -> (result,) or (result, what is kept).
CALLS: dict[str, tuple[Callable, Callable]] = {
    "batch norm": (
        lambda x: (elementwise(x, T, **BN, activation="relu"),),
        lambda x: (threshold(F.relu(batch_norm(x)), T),),
    ),
    "batch norm + residual": (
        lambda x: elementwise.keep(x, T, R, **BN, activation="gelu_tanh", keep="value"),
        lambda x: (threshold(y := F.gelu(batch_norm(x) + R, approximate="tanh"), T), y),
    ),
    "residual + batch norm": (
        lambda x: elementwise.keep(x, T, R, True, **BN, activation="relu6", keep="sum"),
        lambda x: (threshold(F.relu6(batch_norm(y := x + R)), T), y),
    ),
    "scale, bias": (
        lambda x: (elementwise(x, T, weight=W, bias=B, channel=-1, activation="hardswish"),),
        lambda x: (threshold(F.hardswish(x * W + B), T),),
    ),
    "batch norm over the last dimension": (
        lambda x: (elementwise(x.movedim(1, 3), T, **BN, channel=3, activation="silu"),),
        lambda x: (threshold(F.silu(batch_norm(x)).movedim(1, 3), T),),
    ),
    "layer norm": (
        lambda x: norm.keep(x, T, [4], weight=W, bias=B, keep="value"),
        lambda x: (threshold(y := F.layer_norm(x, [4], W, B), T), y),
    ),
    "residual, a band": (
        lambda x: elementwise.keep(x, T, R, function="band", limit=LIMIT, keep="value"),
        lambda x: (torch.ops.forged_fx.band(y := x + R, T, LIMIT), y),
    ),
    "layer norm, soft": (
        lambda x: (norm(x, T, [4], weight=W, bias=B, function="soft"),),
        lambda x: (torch.ops.forged_fx.soft(F.layer_norm(x, [4], W, B), T),),
    ),
    "layer norm over channels": (
        lambda x: norm.keep(x, T, [6], R, BN["weight"], BN["bias"], channels_first=True, keep="sum"),
        lambda x: (threshold(layer_norm_2d(y := x + R), T), y),
    ),
    "residual + rms norm": (
        lambda x: norm.keep(x, T, [5, 4], R, eps=None, rms=True, keep="sum"),
        lambda x: (threshold(F.rms_norm(y := x + R, [5, 4]), T), y),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_it_is_the_chain(name: str) -> None:
    """Values and strides; the true and the straight-through gradient, and that of a transform; under vmap."""
    call, chain = CALLS[name]
    for x in (X, X.contiguous(memory_format=torch.channels_last), X[:1].expand(2, -1, -1, -1)):
        assert all(map(same, call(x), chain(x)))
        for mode in (torch.enable_grad, straight_through):
            with mode():
                found, expected = (gradient(f, x) for f in (call, chain))
            assert torch.equal(found, expected) and found.any()
    loss = torch.func.grad(lambda x: call(x[None].expand(2, -1, -1, -1))[0].sum())
    expected = torch.func.grad(lambda x: chain(x[None].expand(2, -1, -1, -1))[0].sum())
    assert torch.allclose(torch.vmap(loss)(X), torch.vmap(expected)(X))
    tangents = (torch.func.jvp(lambda x, f=f: f(x)[0], (X,), (R,))[1] for f in (call, chain))
    assert torch.equal(*tangents)


def gradient(f: Callable, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad([y.sin().sum() for y in f(leaf)], leaf)[0]


@pytest.mark.parametrize("tracked", [False, True])
def test_opcheck(tracked: bool) -> None:
    x = X.clone().requires_grad_(tracked)
    check = torch.library.opcheck
    check(elementwise.default, (x, T, R), {**BN, "activation": "relu"})
    check(elementwise.keep, (x, T, R, True), {**BN, "keep": "sum", "straight_through": True})
    check(norm.default, (x, T, [4]), {"weight": W, "bias": B})
    check(norm.keep, (x, T, [5, 4], R), {"rms": True, "keep": "value"})
    check(elementwise.default, (x, T, R), {"function": "band", "limit": LIMIT})


def test_inductor_fuses_the_chain() -> None:
    """Plain torch.compile, with gradients, without, and in inference mode, where autograd's key is not consulted."""
    from torch._inductor.utils import run_and_get_code

    def f(x: Tensor) -> Tensor:
        return elementwise(x * 2, T, **BN, activation="relu") + norm(x, T, [4], weight=W)

    for x, mode in ((X, torch.no_grad()), (X.clone().requires_grad_(), torch.enable_grad())):
        with mode:
            found, code = run_and_get_code(torch.compile(f, fullgraph=True), x)
            assert torch.allclose(found, f(x))
            assert not any("forged_fx" in line for line in code[0].splitlines() if not line.startswith("#"))
    with torch.inference_mode():
        found, code = run_and_get_code(torch.compile(f, fullgraph=True), X)
    assert torch.allclose(found, f(X)) and "forged_fx.elementwise" not in code[0]


def test_exported_programs_have_standard_operators() -> None:
    class Net(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return elementwise(x, T, R, activation="relu")

    program = torch.export.export(Net(), (X,)).run_decompositions(ops.decompositions())
    assert not any("forged_fx" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(X), Net()(X))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: elementwise(X, T, activation="tanh"), ValueError, "no activation 'tanh'.*relu6"),
        (lambda: elementwise(X, T, mean=BN["mean"]), ValueError, "mean and var.*both, or neither"),
        (lambda: elementwise(X, T, weight=BN["mean"], channel=4), ValueError, "channel=4 is no dimension.*4"),
        (lambda: elementwise(X, T, bias=W), ValueError, r"bias has shape \(4,\).*6 channels along dimension 1"),
        (lambda: elementwise(X, T, bias=BN["bias"].half()), TypeError, "bias is torch.float16.*cast"),
        (lambda: elementwise(X, T, R[0]), ValueError, r"residual is.*\(6, 5, 4\).*must agree"),
        (lambda: elementwise(X, T, add_first=True), ValueError, "without a residual"),
        (lambda: elementwise.keep(X, T, R, keep="sum"), ValueError, "added first.*keep='value'"),
        (lambda: elementwise.keep(X, T, R, keep="both"), ValueError, "keep='both'; it is 'value'.*'sum'"),
        (lambda: elementwise.keep(X, T, keep="value"), ValueError, "is x itself"),
        (lambda: norm(X, T, [5]), ValueError, r"shape=\[5\].*last dimensions"),
        (lambda: norm(X, T, [5], channels_first=True), ValueError, r"shape=\[5\].*dimension 1 of.*\(2, 6, 5, 4\)"),
        (lambda: norm(X, T, [4], bias=B, rms=True), ValueError, "has no bias"),
        (lambda: norm(X, T, [4], weight=W[:1]), ValueError, r"weight has shape \(1,\).*that of a row, \(4,\)"),
        (lambda: norm(X, T, [4], bias=B[None]), ValueError, r"bias has shape \(1, 4\)"),
        (lambda: norm(X, T, [4], eps=None), ValueError, "LayerNorm needs a number"),
        (lambda: norm(X, torch.ones(2), [4]), TypeError, "0-dim"),
        (lambda: norm(X, T, [4], function="mean"), ValueError, "no function 'mean'.*soft"),
        (lambda: norm(X, T, [4], function="band"), ValueError, "band has the parameters t, limit; pass"),
        (lambda: elementwise(X, T, limit=T), ValueError, "threshold has the parameters t; leave limit out"),
        (lambda: elementwise(X.int(), T), TypeError, "int32.*float16"),
    ],
)
def test_errors_name_the_next_step(call: Callable, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()


# ---- on CUDA, short of the device


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The CUDA implementations with interpreted kernels; the names of those that were launched."""
    launched = []

    def interpreted(name: str) -> object:
        module = kernels({"elementwise_threshold": "fused", "norm_threshold": "norm"}[name])
        launched.append(name)
        return module

    monkeypatch.setattr(fused_ops, "_kernels", interpreted)
    return launched


def test_cuda_launches_the_kernel(on_cuda: list[str]) -> None:
    cuda = functools.partial(fused_ops._cuda, "elementwise_threshold")
    for x in (X, X.contiguous(memory_format=torch.channels_last)):
        residual = torch.empty_like(x).copy_(R)
        found = cuda(x, T, residual, **BN, activation="relu", keep="value", straight_through=True)
        expected = elementwise.keep(x, T, residual, **BN, activation="relu", keep="value")
        for one, other in zip(found, expected, strict=True):
            assert one.stride() == other.stride() and torch.allclose(one, other, atol=1e-5)
    assert on_cuda == ["elementwise_threshold"] * 2
    found = fused_ops._cuda("norm_threshold", X, T, [4], R, W, function="band", limit=LIMIT, keep="sum")
    expected = norm.keep(X, T, [4], R, W, function="band", limit=LIMIT, keep="sum")
    assert all(map(functools.partial(torch.allclose, atol=1e-5), found, expected))
    last = X.contiguous(memory_format=torch.channels_last)
    found = fused_ops._cuda("norm_threshold", last, T, [6], channels_first=True)
    expected = norm(last, T, [6], channels_first=True)
    assert found.stride() == expected.stride() and torch.allclose(found, expected, atol=1e-5)
    assert on_cuda.count("norm_threshold") == 4  # (it is asked for the longest row, too)


LAST = X.contiguous(memory_format=torch.channels_last)
# What a fused graph calls where nothing is recorded: the operator, x, and the rest.
UNRECORDED: dict[str, tuple[Callable, Tensor, dict]] = {
    "batch norm": (elementwise.default, LAST, {**BN, "eps": 1e-5, "activation": "relu"}),
    "residual + batch norm": (elementwise.keep, X, {"residual": R, "add_first": True, **BN, "keep": "sum"}),
    "scale": (elementwise.default, X, {"weight": W, "bias": None, "channel": 3, "activation": "gelu"}),
    "residual": (elementwise.keep, X, {"residual": R, "keep": "value"}),
    "layer norm": (norm.default, X, {"shape": (4,), "weight": W, "bias": B, "eps": 1e-5}),
    "residual + rms norm": (norm.keep, X, {"residual": R, "shape": (5, 4), "eps": None, "rms": True, "keep": "sum"}),
    "over channels": (norm.keep, LAST, {"shape": (6,), "weight": BN["mean"], "channels_first": True, "keep": "value"}),
}


@pytest.fixture
def asked(on_cuda: list[str], monkeypatch: pytest.MonkeyPatch) -> list[Callable]:
    """As on a GPU. The operators whose arguments were looked at."""
    here, found = ops.direct, []

    def noted(op: Callable, run: Callable) -> Callable:
        return lambda *args, **kwargs: found.append(op) or run(*args, **kwargs)

    fused = {op: noted(op, ops.CUDA[op]) for packet in (elementwise, norm) for op in (packet.default, packet.keep)}
    for op, run in fused.items():
        monkeypatch.setitem(ops.CUDA, op, run)

    def direct(op: Callable, *tensors: Tensor) -> Callable | None:
        if op not in fused:
            return here(op, *tensors)
        return fused[op] if all(ops.is_on_cpu(tensor) and ops.is_ordinary(tensor) for tensor in tensors) else None

    monkeypatch.setattr(ops, "direct", direct)
    monkeypatch.setattr(fused_ops, "_known", {})
    return found


@pytest.mark.parametrize("name", UNRECORDED)
@pytest.mark.parametrize("function", ["threshold", "band"])
def test_a_case_that_is_known_goes_to_the_kernel(name: str, function: str, asked: list[Callable]) -> None:
    op, x, arguments = UNRECORDED[name]
    parameters = (T, LIMIT) if function == "band" else (T,)

    def call(x: Tensor) -> tuple[Tensor, ...]:
        found = fused_ops.unrecorded(op, x, parameters, {**arguments, "function": function})
        return found if isinstance(found, tuple) else (found,)

    for given in (x, x + 1, x / 3):
        known = call(given)
        assert asked == [op]
        fused_ops._known.clear()
        assert all(
            one.stride() == other.stride() and torch.equal(one, other)
            for one, other in zip(known, call(given), strict=True)
        )
        asked.pop()
    assert not any(same(one, other) for one, other in zip(call(x), known, strict=True))


CHANGES: dict[str, dict] = {
    "size": {"x": X[:1]},
    "layout": {"x": LAST},
    "dtype": {"x": X.half()},
    "another dtype of a parameter": {"weight": BN["weight"].half()},
    "no weight": {"weight": None},
    "eps": {"eps": 0.5},
    "activation": {"activation": "relu6"},
    "function": {"function": "soft"},
    "another dtype of the threshold": {"parameters": (T.double(),)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_decides_is_looked_at_again(change: str, asked: list[Callable]) -> None:
    given = {"x": X, "parameters": (T,), **BN, "eps": 1e-5, "activation": "relu", "function": "threshold"}

    def call(x: Tensor, parameters: tuple, **arguments) -> Tensor:
        return fused_ops.unrecorded(elementwise.default, x, parameters, arguments)

    call(**given), call(**given)
    assert len(asked) == 1
    found, known = (call(**given | CHANGES[change]) for _ in range(2))
    assert len(asked) == 2 and same(found, known)
    arguments = given | CHANGES[change]
    x, _ = arguments.pop("x"), arguments.pop("parameters")
    if "dtype of a parameter" in change:  # which PyTorch's own operator wants to be x's on a CPU
        arguments["weight"] = arguments["weight"].float()
    expected = elementwise(x, T, **arguments)
    torch.testing.assert_close(found, expected, atol=1e-2 if change == "dtype" else 1e-5, rtol=1e-3)


def test_what_no_kernel_takes_as_it_is_is_never_known(asked: list[Callable]) -> None:
    """No elements, parameters with gaps, another residual's layout; a wrong one is an error each time."""
    gaps = torch.stack([W, W], 1)[:, 0]
    for x, arguments in (
        (X[:0], {"activation": "relu"}),
        (X, {"weight": gaps, "channel": 3}),
        (X, {"residual": torch.empty_like(R, memory_format=torch.channels_last).copy_(R)}),
    ):
        for _ in range(2):
            found = fused_ops.unrecorded(elementwise.default, x, (T,), {**arguments, "function": "threshold"})
            torch.testing.assert_close(found, elementwise(x, T, **arguments))
    assert len(asked) == 6 and not fused_ops._known
    for _ in range(2):
        with pytest.raises(ValueError, match="6 channels"):
            fused_ops.unrecorded(elementwise.default, X, (T,), {"weight": W, "channel": 1, "function": "threshold"})
    negated = torch._neg_view(R)  # R's memory; the sign is a bit beside it
    for _ in range(2):
        found = fused_ops.unrecorded(elementwise.default, X, (T,), {"residual": negated, "function": "threshold"})
        assert same(found, threshold(X - R, T))
        scale = {"weight": BN["weight"], "channel": 1, "function": "threshold"}
        fused_ops.unrecorded(elementwise.default, X, (T,), scale)  # is known, and is another case
        scale["weight"] = torch._neg_view(BN["weight"])
        found = fused_ops.unrecorded(elementwise.default, X, (T,), scale)
        torch.testing.assert_close(found, threshold(X * -BN["weight"][:, None, None], T))


def test_arguments_are_told_apart_by_their_names(asked: list[Callable]) -> None:
    for name, expected in (("weight", X * W), ("bias", X + W)):
        found = fused_ops.unrecorded(elementwise.default, X, (T,), {name: W, "channel": 3, "function": "threshold"})
        assert same(found, threshold(expected, T))
    assert len(asked) == 2


def test_a_case_may_be_forgotten_while_another_thread_looks(asked: list[Callable], monkeypatch) -> None:
    class Forgetful(dict):
        def __contains__(self, key: object) -> bool:
            return True

    monkeypatch.setattr(fused_ops, "_known", Forgetful())
    found = fused_ops.unrecorded(elementwise.default, X, (T,), {"activation": "relu", "function": "threshold"})
    assert same(found, threshold(F.relu(X), T))


def test_known_cases_do_not_fill_the_memory(asked: list[Callable], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_ops, "MOST", 4)
    for size in range(1, 12):
        fused_ops.unrecorded(elementwise.default, torch.ones(size), (T,), {"activation": "relu", "function": "soft"})
    assert len(asked) == 11 and 0 < len(fused_ops._known) <= 4


def test_a_fused_graph_takes_that_way_where_nothing_is_recorded(asked: list[Callable]) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.conv = torch.nn.BatchNorm2d(6), torch.nn.Conv2d(6, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.relu(self.bn(x)))

    model = Net().eval()
    stats = forged_fx.calibrate(model, [X])
    fused, plain = (forged_fx.transform(model, stats, 2**-3, fuse=fuse) for fuse in (True, False))
    assert fused.forging.fused == 1 and fused_ops._known, "the audit has run it"
    asked.clear(), fused_ops._known.clear()
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(fused(X), plain(X))
    assert asked == [elementwise.default]
    fused(X), plain(X)
    assert asked == [elementwise.default], "recorded, it is the operator"
    fused.bn.register_forward_hook(lambda module, args, y: y + 1)
    with torch.no_grad():
        assert not torch.allclose(fused(X), plain(X))


def test_cuda_runs_the_chain_for_what_the_kernel_lays_out_otherwise(on_cuda: list[str]) -> None:
    cuda = functools.partial(fused_ops._cuda, "elementwise_threshold")
    for x in (X.double(), X.transpose(0, 3), X[:1].expand(2, -1, -1, -1)):
        assert same(cuda(x, T, activation="relu"), elementwise(x, T, activation="relu"))
    last = torch.empty_like(R, memory_format=torch.channels_last).copy_(R)
    assert same(cuda(X, T, last), elementwise(X, T, last))
    moved = X.movedim(1, 3).contiguous()
    assert same(cuda(moved, T, **BN, channel=3), elementwise(moved, T, **BN, channel=3))
    assert not on_cuda
    moved = X.transpose(0, 1)
    assert same(fused_ops._cuda("norm_threshold", moved, T, [4]), norm(moved, T, [4]))
    assert on_cuda == ["norm_threshold"]  # (it is asked for the longest row)
    with pytest.raises(ValueError, match="no activation"):
        cuda(X, T, activation="tanh")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", fused_ops.KERNEL_DTYPES, ids=str)
def test_device_is_the_chain(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("T", "LIMIT", "R", "W", "B"):
        value = globals()[key].cuda()
        monkeypatch.setitem(globals(), key, value if value.dim() == 0 else value.to(dtype))
    like = dtype if "over channels" in name else torch.float32  # F.layer_norm takes no others on a GPU
    monkeypatch.setitem(globals(), "BN", {key: value.cuda().to(like) for key, value in BN.items()})
    call, chain = CALLS[name]
    x = X.cuda().to(dtype)
    near = max(2 * torch.finfo(dtype).eps, 1.3e-6)
    for found, expected in zip(call(x), chain(x), strict=True):
        kept = (found != 0) & (expected != 0)
        assert found.stride() == expected.stride() and (kept != (expected != 0)).sum() <= 1
        torch.testing.assert_close(found[kept], expected[kept], rtol=near, atol=1e-5)
    assert torch.equal(gradient(call, x), gradient(chain, x))
