"""The fused operators equal their chain, in every mode of PyTorch, and launch their kernel on a GPU."""

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from interpreted import arithmetic_of_a_gpu, kernels  # noqa: F401 (a fixture)
from kinks import same
from torch import Tensor

from forged_fx import fuse, fused_ops, ops
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


def test_without_gradients_the_kernel_is_reached_past_the_dispatcher(
    on_cuda: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, fused = ops.direct, {elementwise.default, elementwise.keep}  # as for ordinary tensors on a GPU
    monkeypatch.setattr(ops, "direct", lambda op, *tensors: ops.CUDA[op] if op in fused else here(op, *tensors))
    relu = ("torch.nn.modules.activation.ReLU", torch.nn.ReLU(), 0, (), {})
    call = functools.partial(fuse.producer_threshold, X, (T,), [relu])
    for context, launched in ((torch.enable_grad, 0), (torch.no_grad, 1)):
        with context():
            assert same(call(None, "threshold"), threshold(F.relu(X), T))
            assert len(on_cuda) == launched
    with torch.no_grad():
        y, kept = call(0, "threshold")
    assert same(y, threshold(F.relu(X), T)) and same(kept, F.relu(X)) and len(on_cuda) == 2


def test_cuda_runs_the_chain_for_what_the_kernel_lays_out_otherwise(on_cuda: list[str]) -> None:
    cuda = functools.partial(fused_ops._cuda, "elementwise_threshold")
    for x in (X.double(), X.transpose(0, 3), X[:1].expand(2, -1, -1, -1)):
        assert same(cuda(x, T, activation="relu"), elementwise(x, T, activation="relu"))
    last = torch.empty_like(R, memory_format=torch.channels_last).copy_(R)
    assert same(cuda(X, T, last), elementwise(X, T, last))
    assert not on_cuda
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
