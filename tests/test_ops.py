"""The operator equals the reference, and PyTorch's transforms and compilers take it for one of their own."""

import functools
import importlib.util
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinks import DTYPES, LAYOUTS, THRESHOLDS, same, values
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from forged_fx import ops
from forged_fx.bpda import straight_through, straight_through_enabled
from forged_fx.kernels import reference
from forged_fx.lowering import register_lowerings

ROOT = Path(__file__).parents[1]
threshold = torch.ops.forged_fx.threshold
threshold_backward = torch.ops.forged_fx.threshold_backward

T = torch.tensor(0.5)
X = torch.tensor([-2.0, -0.5, -0.25, -0.0, 0.0, 0.25, 0.5, 1.0])
KEPT = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0])  # their gradient
ONES = torch.ones(8)


# ---- values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_is_the_rule(dtype: torch.dtype) -> None:
    for t in (torch.tensor(t) for t in THRESHOLDS):
        x = values(t.item(), dtype)
        expected = [0.0 if abs(value) < t.item() else value for value in x.tolist()]
        assert same(reference.threshold(x, t), torch.tensor(expected, dtype=dtype)), t
        grad = x.flip(0)
        pairs = zip(grad.tolist(), x.tolist(), strict=True)
        expected = [0.0 if abs(value) < t.item() else g for g, value in pairs]
        assert same(reference.threshold_backward(grad, x, t), torch.tensor(expected, dtype=dtype)), t


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_is_the_reference(dtype: torch.dtype) -> None:
    for t in (torch.tensor(t) for t in THRESHOLDS):
        for part in (slice(None), slice(-5, None)):  # whole vector registers, and less than one
            x = values(t.item(), dtype)[part]
            grad = x.flip(0)
            assert same(threshold(x, t), reference.threshold(x, t)), t
            assert same(threshold_backward(grad, x, t), reference.threshold_backward(grad, x, t)), t


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("t", [*THRESHOLDS, 3.0517578e-05, 65520.0])
def test_every_value_of_a_16_bit_dtype(t: float, dtype: torch.dtype) -> None:
    x, t = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype), torch.tensor(t)
    assert same(threshold(x, t), reference.threshold(x, t))
    assert same(threshold_backward(x.flip(0), x, t), reference.threshold_backward(x.flip(0), x, t))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype: torch.dtype, layout: str) -> None:
    x, t = LAYOUTS[layout](values(0.1, dtype)), torch.tensor(0.1)
    before = x.clone()
    result = threshold(x, t)
    assert same(result, reference.threshold(x, t))
    assert result.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() or not x.numel()
    for grad in (torch.empty_like(x).fill_(2), torch.full((), 3.0, dtype=dtype).expand(x.shape)):
        assert same(threshold_backward(grad, x, t), reference.threshold_backward(grad, x, t))
    assert same(x.clone(), before)


@pytest.mark.parametrize("t_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threshold_of_any_dtype(dtype: torch.dtype, t_dtype: torch.dtype) -> None:
    """Compared in float32 all the same. `model.half()` makes float16 of a threshold, `.double()` float64."""
    for value in (0.1, 0.7, 1e-300, 1e300):  # 0.7 rounds down to float32, so there 0.7 is kept
        t = torch.tensor(value, dtype=torch.float64).to(t_dtype)
        x = values(value if value < 1e5 else 1.0, dtype)
        assert same(threshold(x, t), reference.threshold(x, t)), t
        assert same(threshold_backward(x.flip(0), x, t), reference.threshold_backward(x.flip(0), x, t)), t


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(width=32), max_size=70),
    st.floats(),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
)
def test_any_values(some: list[float], limit: float, dtype: torch.dtype, t_dtype: torch.dtype) -> None:
    t = torch.tensor(limit, dtype=torch.float64).to(t_dtype)
    x = torch.tensor([*some, limit, -limit], dtype=torch.float64).to(dtype)
    assert same(threshold(x, t), reference.threshold(x, t))
    assert same(threshold_backward(x.flip(0), x, t), reference.threshold_backward(x.flip(0), x, t))


def test_straight_through_keeps_the_value() -> None:
    assert same(threshold(X, T, True), threshold(X, T))


@pytest.mark.parametrize(
    ("x", "t", "error", "says"),
    [
        (torch.arange(3), T, TypeError, "int64.*float16"),
        (torch.ones(3, dtype=torch.complex64), T, TypeError, "complex64.*float16"),
        (torch.ones(3, dtype=torch.bool), T, TypeError, "bool.*float16"),
        (torch.ones(3), torch.tensor([0.1]), TypeError, r"shape \(1,\).*0-dim"),
        (torch.ones(3), torch.tensor(1), TypeError, "int64.*torch.tensor"),
        (torch.ones(3), torch.tensor(0.1, device="meta"), ValueError, "meta.*cpu.*move t"),
    ],
)
def test_errors_name_the_next_step(x: Tensor, t: Tensor, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        threshold(x, t)
    with torch.no_grad(), pytest.raises(error, match=says):
        threshold_backward(x, x, t)


@pytest.mark.parametrize("grad", [torch.ones(4), torch.ones(3, dtype=torch.float64)])
def test_gradient_must_fit(grad: Tensor) -> None:
    with pytest.raises(ValueError, match="agree"):
        threshold_backward(grad, torch.ones(3), T)


# ---- what PyTorch asks of an operator


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "empty"])
def test_opcheck(layout: str) -> None:
    x = LAYOUTS[layout](torch.linspace(-1, 1, 900))
    for tracked in (False, True):
        leaf = x.detach().requires_grad_(tracked)
        torch.library.opcheck(threshold.default, (leaf, T))
        torch.library.opcheck(threshold.default, (leaf, T, True))
        torch.library.opcheck(threshold_backward.default, (x.clone().requires_grad_(tracked), x, T))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "empty"])  # has no layout
def test_fake_strides_are_the_real_ones(layout: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = LAYOUTS[layout](values(0.5, torch.float32))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake, t = mode.from_tensor(x), mode.from_tensor(T)
        results = threshold(fake, t), threshold_backward(fake, fake, t)
    real = threshold(x, T), threshold_backward(x, x, T)
    assert [layout_of(f) for f in results] == [layout_of(r) for r in real]


def layout_of(x: Tensor) -> list:
    """What there is to know of it; the stride of a dimension of one element means nothing."""
    return [x.dtype, *((size, stride) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1)]


def test_devices_without_an_implementation_take_the_reference() -> None:
    kernel = ops.IMPLEMENTATIONS["threshold"]["CompositeExplicitAutograd"]
    assert same(kernel(X, T), reference.threshold(X, T))
    kernel = ops.IMPLEMENTATIONS["threshold_backward"]["CompositeExplicitAutograd"]
    assert same(kernel(X, X, T), reference.threshold_backward(X, X, T))
    assert threshold(X.to("meta"), T.to("meta")).device.type == "meta"


# ---- gradients


def gradient(f: Callable[[Tensor], Tensor], x: Tensor = X) -> Tensor:
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(f(leaf).sum(), leaf)
    return grad


def test_true_gradient() -> None:
    assert same(gradient(lambda x: threshold(x, T)), KEPT)
    x = X.clone().fill_(torch.nan)
    assert same(gradient(lambda x: threshold(x, T), x), ONES)


def test_straight_through_gradient() -> None:
    assert torch.equal(gradient(lambda x: threshold(x, T, True)), ONES)


def test_no_gradient_to_the_threshold() -> None:
    t = T.clone().requires_grad_()
    x = X.clone().requires_grad_()
    for through in (False, True):
        assert torch.autograd.grad(threshold(x, t, through).sum(), (x, t), allow_unused=True)[1] is None


@pytest.mark.parametrize("through", [False, True])
def test_gradcheck_away_from_the_kink(through: bool) -> None:
    x = torch.tensor([-2.0, -0.7, 0.8, 3.0] if through else [-2.0, -0.3, 0.1, 0.8], dtype=torch.float64)
    x.requires_grad_()

    def f(x: Tensor) -> Tensor:
        return threshold(x, T, through).sin()

    assert torch.autograd.gradcheck(f, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, x, check_fwd_over_rev=True)
    grad = torch.ones_like(x).requires_grad_()
    fixed = functools.partial(threshold_backward, x=x.detach(), t=T)
    assert torch.autograd.gradcheck(fixed, grad, check_forward_ad=True)


def test_double_backward() -> None:
    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad((threshold(x, T) ** 3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(second, 6 * X * KEPT)


def test_forward_mode() -> None:
    tangent = torch.arange(1.0, 9.0)
    for through, expected in ((False, tangent * KEPT), (True, tangent)):
        f = functools.partial(threshold, t=T, straight_through=through)
        assert same(torch.func.jvp(f, (X,), (tangent,))[1], expected)
        with forward_ad.dual_level(), torch.no_grad():
            assert same(forward_ad.unpack_dual(f(forward_ad.make_dual(X, tangent))).tangent, expected)


@pytest.mark.parametrize("outer", [torch.func.jacrev, torch.func.jacfwd])
@pytest.mark.parametrize("inner", [torch.func.jacrev, torch.func.jacfwd])
def test_transforms_nest(outer: Callable, inner: Callable) -> None:
    hessian = outer(inner(lambda x: (threshold(x, T) ** 3).sum()))(X)
    assert torch.equal(hessian, torch.diag(6 * X * KEPT))


def test_compiled_autograd() -> None:
    """The backward that it compiles and caches is not the same for both gradients."""
    compiled = torch.compile(backend="aot_eager")
    for through in (False, True, False, True):
        x = X.clone().requires_grad_()
        loss = threshold(x, T, through).sum()
        with torch._dynamo.compiled_autograd._enable(compiled):
            loss.backward()
        assert torch.equal(x.grad, ONES if through else KEPT)


# ---- torch.func.vmap


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_vmap_over_x(dim: int) -> None:
    x = torch.randn(3, 4, 5)
    over = functools.partial(torch.vmap, in_dims=dim, out_dims=dim)
    assert torch.equal(over(lambda x: threshold(x, T))(x), threshold(x, T))
    inner = 0 if dim else 1
    assert torch.equal(over(torch.vmap(lambda x: threshold(x, T), inner, inner))(x), threshold(x, T))


def test_vmap_over_t_is_an_ensemble() -> None:
    x, t = torch.randn(3, 4, 5), torch.rand(3)
    members = torch.stack([threshold(a, b) for a, b in zip(x, t, strict=True)])
    assert torch.equal(torch.vmap(threshold)(x, t), members)
    assert torch.equal(torch.vmap(threshold, in_dims=(1, 0), out_dims=1)(x.movedim(0, 1), t), members.movedim(0, 1))
    assert torch.equal(torch.vmap(lambda t: threshold(x, t))(t)[1], threshold(x, t[1]))
    grads = torch.vmap(torch.func.grad(lambda x, t: threshold(x, t).sum()))(x, t)
    assert torch.equal(grads, (members != 0).float())


def test_vmap_over_gradients() -> None:
    x = torch.randn(3, 4)
    grads = torch.vmap(torch.func.grad(lambda x: threshold(x, T).sum()))(x)
    assert torch.equal(grads, (x.abs() >= 0.5).float())
    through = torch.vmap(torch.func.grad(lambda x: threshold(x, T, True).sum()))(x)
    assert torch.equal(through, torch.ones(3, 4))
    assert torch.equal(torch.func.jacrev(lambda x: threshold(x, T))(X), torch.diag(KEPT))


# ---- Inductor


@pytest.fixture
def fresh_inductor() -> Iterator[None]:
    """As in a process that has compiled nothing yet."""
    from torch._inductor.lowering import fallbacks, lowerings

    for op in (threshold.default, threshold_backward.default):
        lowerings.pop(op, None)
    register_lowerings.cache_clear()
    torch._dynamo.reset()
    # Whether there is a lowering is not part of the caches' keys.
    no_graphs = torch._inductor.config.patch(fx_graph_cache=False)
    with no_graphs, torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()
    fallbacks.difference_update((threshold.default, threshold_backward.default))  # what a test without lowerings leaves
    register_lowerings()


def calls(code: list[str]) -> list[str]:
    """The lines of generated code that call one of our operators."""
    lines = [line.strip() for part in code for line in part.splitlines()]
    return [line for line in lines if "forged_fx" in line and not line.startswith("#")]


LIMIT = torch.tensor(0.1)


def chain(*xs: Tensor) -> list[Tensor]:
    return [threshold(x.neg(), LIMIT).neg() for x in xs]


def run(f: Callable, dtypes: tuple = (torch.float32, torch.float64, torch.bfloat16)) -> list[Tensor]:
    """Values and gradients of `f` at the kinks, in each of the dtypes."""
    leaves = [values(0.1, dtype).requires_grad_() for dtype in dtypes]
    outputs = f(*leaves)
    grads = torch.autograd.grad(outputs, leaves, [leaf.detach().flip(0) for leaf in leaves])
    return [y.detach() for y in outputs] + list(grads)


def test_inductor_fuses_it(fresh_inductor: None) -> None:
    """Plain `torch.compile`: nobody has called `register_lowerings`."""
    from torch._inductor.utils import run_and_get_code

    results, code = run_and_get_code(run, torch.compile(chain, fullgraph=True))
    assert len(code) == 2 and not calls(code)  # forward and backward
    assert all(map(same, results, run(chain)))


def test_inductor_is_right_without_the_lowering(fresh_inductor: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.utils import run_and_get_code

    monkeypatch.setattr(ops, "_lower_if_inductor_runs", lambda: None)
    results, code = run_and_get_code(run, torch.compile(chain, fullgraph=True), (torch.float32,))
    assert calls(code)
    assert all(map(same, results, run(chain, (torch.float32,))))


# ---- straight_through()


def inside(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        with straight_through():
            return f(x)

    return call


@pytest.mark.parametrize(
    "call",
    [
        lambda x: threshold(x, T),
        lambda x: threshold.default(x, T),
        lambda x: threshold(x, t=T),
        lambda x: threshold(x=x, t=T, straight_through=False),
        lambda x: threshold(x, T, False),
    ],
)
def test_context_in_eager(call: Callable[[Tensor], Tensor]) -> None:
    for f, expected in ((call, KEPT), (inside(call), ONES), (inside(inside(call)), ONES), (call, KEPT)):
        assert torch.equal(gradient(f), expected)
    assert same(inside(call)(X), call(X))


def test_what_counts_is_where_the_forward_runs() -> None:
    x = X.clone().requires_grad_()
    outside = threshold(x, T)
    with straight_through():
        within = threshold(x, T)
        assert same(torch.autograd.grad(outside.sum(), x)[0], KEPT)
    assert torch.equal(torch.autograd.grad(within.sum(), x)[0], ONES)


def test_context_ends_with_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), straight_through():
        raise ZeroDivisionError
    assert not straight_through_enabled()


def test_context_belongs_to_its_thread() -> None:
    seen = []

    def look() -> None:
        seen.extend([straight_through_enabled(), gradient(lambda x: threshold(x, T))])

    with straight_through():
        worker = threading.Thread(target=look)
        worker.start()
        worker.join()
        assert straight_through_enabled()
    assert not seen[0] and same(seen[1], KEPT)


def test_context_in_transforms() -> None:
    grads = torch.vmap(torch.func.grad(inside(lambda x: threshold(x, T).sum())))(X.reshape(2, 4))
    assert torch.equal(grads, torch.ones(2, 4))


def test_activation_checkpointing() -> None:
    """The forward that runs again, within the backward, must keep the same tensors as the first one."""

    def block(x: Tensor) -> Tensor:
        return threshold(x.sin(), T).exp()

    def recomputed(x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=False)

    for f, g in ((block, recomputed), (inside(block), inside(recomputed))):
        assert torch.equal(gradient(f), gradient(g))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("depths", [(0, 1, 0, 2, 1, 0), (1, 0, 2, 1)], ids=["outside first", "inside first"])
def test_context_reaches_compiled_code(backend: str, depths: tuple[int, ...]) -> None:
    torch._dynamo.reset()
    fast = torch.compile(lambda x: torch.sin(threshold(x, T)), backend=backend, fullgraph=True)
    nested = (fast, inside(fast), inside(inside(fast)))
    for depth in depths:
        expected = torch.cos(threshold(X, T)) * (ONES if depth else KEPT)
        torch.testing.assert_close(gradient(nested[depth]), expected)


@pytest.mark.parametrize("graph_break", [False, True])
def test_context_within_compiled_code(graph_break: bool) -> None:
    def f(x: Tensor) -> Tensor:
        with straight_through():
            y = threshold(x, T)
            if graph_break:
                torch._dynamo.graph_break()
            y = threshold(y.sin(), T)
        return y + threshold(x, T)

    torch._dynamo.reset()
    expected = torch.cos(threshold(X, T)) + KEPT
    torch.testing.assert_close(gradient(f), expected)
    fast = torch.compile(f, backend="aot_eager", fullgraph=not graph_break)
    torch.testing.assert_close(gradient(fast), expected)


def test_a_backend_can_ask() -> None:
    """Dynamo takes function modes off the stack while a backend compiles: the answer is right even so."""
    importlib.import_module("forged_fx.backend")  # its watch over compiled modules is looked into, too
    seen = []

    def backend(gm: torch.fx.GraphModule, inputs: list) -> Callable:
        seen.append(straight_through_enabled())
        return gm

    torch._dynamo.reset()
    fast = torch.compile(lambda x: x + 1, backend=backend)
    for f in (fast, inside(fast), fast, inside(fast)):
        f(X)
    assert seen == [False, True]


# ---- importing


def test_import_is_light() -> None:
    heavy = ("triton", "torch._dynamo", "torch._inductor", "sympy")
    code = f"import sys, forged_fx.ops; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def load_again(path: Path) -> None:
    spec = importlib.util.spec_from_file_location(f"another_{path.stem}", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


class Own(Tensor):
    pass


ORDINARY = {
    "plain": (X, True),
    "a parameter": (torch.nn.Parameter(X), True),
    "of inference mode": (torch.inference_mode()(X.clone)(), True),
    "a class of its own": (X.as_subclass(Own), False),
    "sparse": (X.to_sparse(), False),
    "negated unseen": (torch._neg_view(X), False),
    "on meta": (X.to("meta"), False),
}


@pytest.mark.parametrize(("x", "ordinary"), ORDINARY.values(), ids=ORDINARY)
def test_the_short_way_is_for_ordinary_tensors(x: Tensor, ordinary: bool) -> None:
    assert (ops.direct(threshold.default, x, T) is not None) == ordinary
    assert ops.direct(threshold.default, X, T.to("meta")) is None
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert ops.direct(threshold.default, x, T) is None


def test_second_import_under_another_name_is_refused() -> None:
    with pytest.raises(ImportError, match=r"another_ops.*import it as forged_fx\.ops"):
        load_again(ROOT / "forged_fx" / "ops.py")
    assert same(gradient(lambda x: threshold(x, T)), KEPT)


def test_the_reference_can_be_imported_under_two_names() -> None:
    load_again(ROOT / "kernels" / "reference.py")


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_is_the_cpu() -> None:
    x, t = X.cuda(), T.cuda()
    assert same(threshold(x, t).cpu(), threshold(X, T))
    assert same(gradient(lambda x: threshold(x, t), x).cpu(), KEPT)
    assert same(gradient(inside(lambda x: threshold(x, t)), x).cpu(), ONES)
    with pytest.raises(ValueError, match="t is on cpu and x on cuda"):
        threshold(x, T)
    fast = torch.compile(lambda x: threshold(x, t) * 2)
    assert same(gradient(fast, x).cpu(), 2 * KEPT)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = threshold(x, t)
    graph.replay()
    assert same(y.cpu(), threshold(X, T))
