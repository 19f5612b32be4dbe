"""torch.ops.forged_fx.*: the forged function as an operator that every part of PyTorch understands.

    threshold(Tensor x, Tensor t, bool straight_through=False) -> Tensor     0 where |x| < t, else x
    threshold_backward(Tensor grad, Tensor x, Tensor t) -> Tensor            0 where |x| < t, else grad

`kernels/reference.py` specifies both, values and strides. `straight_through` selects the gradient and never
changes the value: False is the true gradient, True the identity (BPDA: Athalye, Carlini, Wagner 2018, arXiv
1802.00420). t gets no gradient.

x is float16, bfloat16, float32 or float64, of any shape; t is a floating-point scalar on x's device. They
are compared in float32 (float64 where x is float64). Anything else is a TypeError or a ValueError that says
what to do.

    CUDA         the Triton kernels of kernels/threshold.py
    CPU          plain torch: one pass over memory, two for the gradient
    elsewhere    the reference
    Inductor     a pointwise node, which fuses into whatever produces x
"""

import functools
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from forged_fx.kernels import reference

SCHEMAS = {
    "threshold": "(Tensor x, Tensor t, bool straight_through=False) -> Tensor",
    "threshold_backward": "(Tensor grad, Tensor x, Tensor t) -> Tensor",
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

try:
    _library = torch.library.Library("forged_fx", "DEF")
except RuntimeError as error:
    raise ImportError(
        f"{__file__} was imported a second time, now as {__name__!r}, and operators are defined only once: "
        "import it as forged_fx.ops everywhere, and keep its folder itself off sys.path"
    ) from error
# flexible_layout: any layout will do. Without it Inductor, once it has met an op before its lowering was registered,
# would hold its inputs to the strides that they had in eager mode.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pointwise, *TAGS))

_threshold = torch.ops.forged_fx.threshold.default
_threshold_backward = torch.ops.forged_fx.threshold_backward.default

# Every operator that applies a threshold, its second argument, and takes `straight_through`; as overload and as packet.
# The value: how many arguments may come ahead of `straight_through` (None: it is a keyword). Other files add theirs.
THRESHOLD_OPS: dict[Callable, int | None] = {_threshold: 2, torch.ops.forged_fx.threshold: 2}


# ---- what a caller may pass


def _check(x: Tensor, t: Tensor) -> None:
    if x.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"threshold: x is {x.dtype}; cast it to one of {known}")
    if not t.is_floating_point() or t.dim():
        raise TypeError(
            f"threshold: t must be a floating-point scalar, not {t.dtype} of shape {tuple(t.shape)}; "
            "pass a 0-dim tensor such as torch.tensor(0.1)"
        )
    if t.device != x.device:
        raise ValueError(
            f"threshold: t is on {t.device} and x on {x.device}; move t to x's device "
            "(as a buffer of the model it moves along with model.to(...))"
        )


def _check_backward(grad: Tensor, x: Tensor, t: Tensor) -> None:
    _check(x, t)
    if (grad.shape, grad.dtype, grad.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"threshold_backward: grad is {grad.dtype} {tuple(grad.shape)} on {grad.device}, and x is "
            f"{x.dtype} {tuple(x.shape)} on {x.device}; they must agree"
        )


# ---- one implementation per device


def _threshold_cpu(x: Tensor, t: Tensor, straight_through: bool = False) -> Tensor:
    _check(x, t)
    return torch.hardshrink(x, _largest_below(t.item(), x.dtype), out=torch.empty_like(x))


def _threshold_backward_cpu(grad: Tensor, x: Tensor, t: Tensor) -> Tensor:
    _check_backward(grad, x, t)
    # hardshrink_backward would be one pass, but it zeroes the gradient where x is NaN.
    magnitude = torch.abs(x, out=torch.empty_like(x))
    limit = _largest_below(t.item(), x.dtype)
    return torch.ops.aten.threshold_backward.grad_input(grad, magnitude, limit, grad_input=magnitude)


@functools.lru_cache(maxsize=4096)
def _largest_below(t: float, dtype: torch.dtype) -> float:
    """The largest value of `dtype` below t; -1 where no magnitude is (t <= 0, or NaN).

    torch's one-pass functions compare by `<=`, in x's dtype, and `|x| < t` is `|x| <= _largest_below(t)`.
    """
    limit = torch.tensor(t, dtype=reference.comparison_dtype(dtype), device="cpu")
    if not limit > 0:
        return -1.0
    below = limit.to(dtype)  # to nearest: it may be above the limit as well as on it
    if below.to(limit.dtype) >= limit:
        below = torch.nextafter(below, torch.zeros_like(below))
    return below.item()


def _threshold_cuda(x: Tensor, t: Tensor, straight_through: bool = False) -> Tensor:
    _check(x, t)
    return _kernels().launch_threshold(x, t)


def _threshold_backward_cuda(grad: Tensor, x: Tensor, t: Tensor) -> Tensor:
    _check_backward(grad, x, t)
    return _kernels().launch_threshold_backward(grad, x, t)


@functools.cache
def _kernels() -> ModuleType:
    # Late: Triton takes long to import, and not every machine has it.
    return importlib.import_module("forged_fx.kernels.threshold")


def _threshold_elsewhere(x: Tensor, t: Tensor, straight_through: bool = False) -> Tensor:
    _check(x, t)
    return reference.threshold(x, t)


def _threshold_backward_elsewhere(grad: Tensor, x: Tensor, t: Tensor) -> Tensor:
    _check_backward(grad, x, t)
    return reference.threshold_backward(grad, x, t)


def _threshold_fake(x: Tensor, t: Tensor, straight_through: bool = False) -> Tensor:
    _check(x, t)
    _lower_if_inductor_runs()
    return torch.empty_like(x)


def _threshold_backward_fake(grad: Tensor, x: Tensor, t: Tensor) -> Tensor:
    _check_backward(grad, x, t)
    _lower_if_inductor_runs()
    return torch.empty_like(x)


# ---- gradients


class _Masked(torch.autograd.function._SingleLevelFunction):
    """What both ops do to a gradient or tangent: zero it where |x| < t, or leave it alone (straight-through).

    By hand: what torch.library.register_autograd makes refuses torch.func.grad, and answers forward mode with
    zeros.
    """

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _mask(ctx, grad), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, *_: Any) -> Tensor | None:
        return None if tangent is None else _mask(ctx, tangent)

    @staticmethod
    def _compiled_autograd_key(ctx: Any) -> tuple:
        return ctx._autograd_function_id, ctx.straight_through


class _Threshold(_Masked):
    @staticmethod
    def forward(x: Tensor, t: Tensor, straight_through: bool) -> Tensor:
        return _run_recorded(_threshold, x, t, straight_through)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, t, straight_through = inputs
        _keep(ctx, x, t, straight_through)


class _ThresholdBackward(_Masked):
    @staticmethod
    def forward(grad: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return _run_recorded(_threshold_backward, grad, x, t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, x, t = inputs
        _keep(ctx, x, t, straight_through=False)


def _keep(ctx: Any, x: Tensor, t: Tensor, straight_through: bool) -> None:
    # Kept even where they are not needed: activation checkpointing runs the forward again, outside of
    # straight_through(), and takes the i-th tensor that is kept then for the i-th that was kept at first.
    ctx.save_for_backward(x, t)
    ctx.save_for_forward(x, t)
    ctx.straight_through = straight_through


def _mask(ctx: Any, value: Tensor) -> Tensor:
    return value if ctx.straight_through else _threshold_backward(value, *ctx.saved_tensors)


def _record(function: type[_Masked], op: Callable, *args: Any) -> Tensor:
    tracked = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
    if tracked or forward_ad._current_level >= 0:
        with enable_single_level_autograd_function():
            return function.apply(*args)
    if op in _CPU and torch._C._dispatch_keys(args[0]) == _PLAIN and not _modes_listen():
        return _CPU[op](*args)  # what the dispatcher would come to, without another round of it: a third of the call
    return _run(op, *args)


def _modes_listen() -> bool:
    """Whether a dispatch mode or a torch.func transform is to see what runs below autograd."""
    return bool(torch._C._len_torch_dispatch_stack()) or torch._C._functorch.maybe_current_level() is not None


_PLAIN = torch._C._dispatch_keys(torch.empty(0))  # of an ordinary CPU tensor
_CPU = {_threshold: _threshold_cpu, _threshold_backward: _threshold_backward_cpu}


def _run(op: Callable, *args: Any) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _run_recorded(op: Callable, *args: Any) -> Tensor:
    # autograd.Function switches both modes off; a torch.func transform further out has yet to record this.
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return _run(op, *args)


def _threshold_autograd(x: Tensor, t: Tensor, straight_through: bool = False) -> Tensor:
    return _record(_Threshold, _threshold, x, t, straight_through)


def _threshold_backward_autograd(grad: Tensor, x: Tensor, t: Tensor) -> Tensor:
    return _record(_ThresholdBackward, _threshold_backward, grad, x, t)


# ---- torch.func.vmap


def _batch_rule(op: Callable, t_at: int) -> Callable:
    """Elementwise, so a batch of x is one bigger x; a batch of t, as in an ensemble, takes a call each."""

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple[Tensor, int]:
        def member(i: int) -> Tensor:
            pairs = zip(args, in_dims, strict=True)
            return op(*(arg if dim is None else arg.select(dim, i) for arg, dim in pairs))

        def whole(arg: Tensor, dim: int | None) -> Tensor:
            return arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)

        if in_dims[t_at] is None:
            return op(*map(whole, args[:t_at], in_dims), *args[t_at:]), 0
        return torch.stack([member(i) for i in range(info.batch_size)]), 0

    return rule


# ---- Inductor


@functools.cache
def register_lowerings() -> None:
    """Teach Inductor to make a pointwise node of each op. Idempotent; imports Inductor.

    A backend calls it. Under plain `torch.compile` it happens by itself: see `_lower_if_inductor_runs`.
    """
    from torch._inductor import config
    from torch._inductor.ir import Pointwise, TensorBox
    from torch._inductor.lowering import register_lowering
    from torch._inductor.virtualized import V
    from torch._inductor.virtualized import ops as inner

    def where_kept(value: TensorBox, x: TensorBox, t: TensorBox) -> TensorBox:
        load_value, load_x, load_t = value.make_loader(), x.make_loader(), t.make_loader()
        wide = reference.comparison_dtype(x.get_dtype())

        def at(index: Any) -> Any:
            magnitude = inner.abs(inner.to_dtype(load_x(index), wide))
            dropped = inner.lt(magnitude, inner.to_dtype(load_t(()), wide))
            return inner.where(dropped, inner.constant(0, x.get_dtype()), load_value(index))

        return Pointwise.create(device=x.get_device(), dtype=x.get_dtype(), inner_fn=at, ranges=x.get_size())

    def threshold(x: TensorBox, t: TensorBox, straight_through: bool = False) -> TensorBox:
        tunes = config.max_autotune or config.max_autotune_gemm
        if not (tunes and config.prologue_fusion and V.graph.current_node.meta.get("prologue")):
            return where_kept(x, x, t)
        x.realize()  # the product shall compute the threshold, not everything ahead of it as well
        result = where_kept(x, x, t)
        result.realize()
        V.graph.invoke_quant_ops.add(result.get_operation_name())  # Inductor's list of prologues worth a try
        return result

    register_lowering(_threshold, type_promotion_kind=None)(threshold)
    register_lowering(_threshold_backward, type_promotion_kind=None)(where_kept)


def _lower_if_inductor_runs() -> None:
    """The fake implementations call this: a compiler consults them before it lowers anything. So plain
    `backend="inductor"` finds the lowerings, and a program that never compiles never imports Inductor."""
    if "torch._inductor.lowering" in sys.modules:
        register_lowerings()


# ---- the gradient that an attack may ask for


class straight_through(TorchFunctionMode):
    """A context manager: within it, every threshold's gradient is the identity. Values stay as they are.

        with forged_fx.straight_through():
            loss = criterion(forged(x), y)
        loss.backward()

    BPDA (Athalye, Carlini, Wagner 2018, arXiv 1802.00420) for any attack, whether or not it knows of this.

    What counts is where the forward runs: a backward has the gradient that its forward was run with. It
    holds for the thread that enters it, and for none that it starts. It nests. Compiled models are compiled
    once for each gradient, when it is first asked for.

    Activation checkpointing with `use_reentrant=True` runs the forward anew in the backward, where no mode
    reaches it: take `use_reentrant=False`.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # A function mode that overrides nothing else, because Dynamo traces such a one, may break its graph
        # within it, and guards what it compiled on the types of those that are active.
        kwargs = kwargs or {}
        if func in THRESHOLD_OPS:
            args, kwargs = args[: THRESHOLD_OPS[func]], {**kwargs, "straight_through": True}
        return func(*args, **kwargs)


def straight_through_enabled() -> bool:
    """Whether this thread is within `straight_through()`; a backend may ask it too, while it compiles."""
    modes = torch.overrides._get_current_function_mode_stack()
    if "torch._dynamo" in sys.modules:
        # Dynamo takes the modes off the stack while it compiles.
        from torch._dynamo.variables.torch_function import torch_function_mode_stack_state_mgr as taken_off

        modes = [*modes, *taken_off.stack]
    return any(isinstance(mode, straight_through) for mode in modes)


# ---- exporters that know standard operators only


def _kept(value: Tensor, x: Tensor, t: Tensor) -> Tensor:
    wide = reference.comparison_dtype(x.dtype)
    return torch.where(x.to(wide).abs() < t.to(wide), 0, value)


# Operator -> the same in more basic ones. Other files add theirs.
DECOMPOSITIONS: dict[Callable, Callable] = {}
_STANDARD = {_threshold: lambda x, t, straight_through=False: _kept(x, x, t), _threshold_backward: _kept}


def decompositions() -> dict[Any, Callable]:
    """This library's operators in standard ones, for `torch.export.ExportedProgram.run_decompositions`.

    program = torch.export.export(forged, (x,)).run_decompositions(forged_fx.decompositions())
    torch.onnx.export(program).save("forged.onnx")
    """
    return {**DECOMPOSITIONS, **_STANDARD}


# ---- registration

IMPLEMENTATIONS = {
    "threshold": {
        "CPU": _threshold_cpu,
        "CUDA": _threshold_cuda,
        "CompositeExplicitAutograd": _threshold_elsewhere,
        "Autograd": _threshold_autograd,
    },
    "threshold_backward": {
        "CPU": _threshold_backward_cpu,
        "CUDA": _threshold_backward_cuda,
        "CompositeExplicitAutograd": _threshold_backward_elsewhere,
        "Autograd": _threshold_backward_autograd,
    },
}
for _name, _by_key in IMPLEMENTATIONS.items():
    for _key, _implementation in _by_key.items():
        _library.impl(_name, _implementation, _key)

_register_fake = functools.partial(torch.library.register_fake, lib=_library)
_register_fake("forged_fx::threshold", _threshold_fake)
_register_fake("forged_fx::threshold_backward", _threshold_backward_fake)

_register_vmap = functools.partial(torch.library.register_vmap, lib=_library)
_register_vmap("forged_fx::threshold", _batch_rule(_threshold, t_at=1))
_register_vmap("forged_fx::threshold_backward", _batch_rule(_threshold_backward, t_at=2))
