"""torch.ops.forged_fx.*: a producer and the threshold behind it, as one operator.

    elementwise_threshold(x, t, residual, add_first, mean, var, weight, bias, eps, channel, activation, function, limit)
                                             x -> affine -> add -> activation -> threshold
    norm_threshold(x, t, shape, residual, weight, bias, eps, rms, function, limit, channels_first)
                                             x -> add -> LayerNorm or RMSNorm -> threshold

`kernels/reference.py` says what the arguments mean. `function` is the forged function that stands in the threshold's
place: any of `ops.FUNCTIONS` whose parameters are scalars. Each has an overload `keep`, which takes `keep="value"` or
"sum" too and also returns that tensor: a residual stream, which is not thresholded. `straight_through` is as in
forged_fx/ops.py. What an operator computes is its *chain*: the same steps by PyTorch's own operators, one by one, and
`torch.ops.forged_fx.threshold`, or what stands in its place, behind them.

    CUDA                 one Triton kernel for a dense x in float16, bfloat16 or float32; else the chain
    CPU and elsewhere    the chain: fused and unfused are equal bit for bit
    gradients, vmap      the chain, in either mode of the gradient, whatever the device: a backward that recomputes it
                         would cost the pass over memory that fusing saves
    Inductor             the chain, which it fuses by itself

Numerics of the kernels: every step in float32, rounded to x's dtype where the chain rounds. So the two differ by what
float32 arithmetic differs by within a step (the order of a sum, an erf or exp): for float16 and bfloat16 rarely in the
last bit, for float32 in the last few. Only a value that close to the threshold can be on the other side of it;
tests/test_fused_kernels.py counts them.
"""

import functools
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from forged_fx import ops, torch_internals

OVERLOADS = {
    "default": "*, bool straight_through=False) -> Tensor",
    "keep": "*, str keep, bool straight_through=False) -> (Tensor, Tensor)",
}
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

Result: TypeAlias = Tensor | tuple[Tensor, Tensor]


# ---- the chains

# For each activation of kernels/reference.py, PyTorch's own function.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda v: v,
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
}


def elementwise_threshold(
    x: Tensor,
    t: Tensor,
    residual: Tensor | None = None,
    add_first: bool = False,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    channel: int = 1,
    activation: str = "none",
    function: str = "threshold",
    limit: Tensor | None = None,
    *,
    keep: str | None = None,
    straight_through: bool = False,
) -> Result:
    v = x + residual if add_first else x
    total = v
    if mean is not None:
        v = F.batch_norm(v.movedim(channel, 1), mean, var, weight, bias, eps=eps).movedim(1, channel)
    else:
        shape = [-1 if d == channel % x.dim() else 1 for d in range(x.dim())]
        v = v if weight is None else v * weight.reshape(shape)
        v = v if bias is None else v + bias.reshape(shape)
    if residual is not None and not add_first:
        v = v + residual
    v = ACTIVATIONS[activation](v)
    y = ops.FUNCTIONS[function].op(v, *_parameters(t, limit), straight_through)
    return _with_kept(y, {"value": v, "sum": total}.get(keep))


def norm_threshold(
    x: Tensor,
    t: Tensor,
    shape: list[int],
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-5,
    rms: bool = False,
    function: str = "threshold",
    limit: Tensor | None = None,
    channels_first: bool = False,
    *,
    keep: str | None = None,
    straight_through: bool = False,
) -> Result:
    total = x if residual is None else x + residual
    v = total.movedim(1, -1) if channels_first else total
    v = F.rms_norm(v, shape, weight, eps) if rms else F.layer_norm(v, shape, weight, bias, eps)
    v = v.movedim(-1, 1) if channels_first else v
    y = ops.FUNCTIONS[function].op(v, *_parameters(t, limit), straight_through)
    return _with_kept(y, {"value": v, "sum": total}.get(keep))


def _parameters(t: Tensor, limit: Tensor | None) -> tuple[Tensor, ...]:
    return (t,) if limit is None else (t, limit)


def _with_kept(y: Tensor, kept: Tensor | None) -> Result:
    return y if kept is None else (y, kept)


# ---- what a caller may pass


FORGED = {f.name: f for f in ops.FUNCTIONS.values() if not f.channels}  # what may stand in the threshold's place


def _check_function(name: str, a: dict[str, Any]) -> None:
    function = FORGED.get(a["function"])
    if function is None:
        raise ValueError(f"{name}: no function {a['function']!r} to forge by; there are {', '.join(FORGED)}")
    if len(function.parameters) != len(_parameters(a["t"], a["limit"])):
        hint = "pass the second as limit=" if a["limit"] is None else "leave limit out"
        raise ValueError(f"{name}: {function.name} has the parameters {', '.join(function.parameters)}; {hint}")
    ops.check_function(function, a["x"], *_parameters(a["t"], a["limit"]))


def _check_elementwise(a: dict[str, Any]) -> None:
    name, x, channel = "elementwise_threshold", a["x"], a["channel"]
    if a["activation"] not in ACTIVATIONS:
        raise ValueError(f"{name}: no activation {a['activation']!r}; there are {', '.join(ACTIVATIONS)}")
    if (a["mean"] is None) != (a["var"] is None):
        raise ValueError(f"{name}: mean and var make a BatchNorm together; pass both, or neither")
    given = {key: a[key] for key in ("mean", "var", "weight", "bias") if a[key] is not None}
    if given and not -x.dim() <= channel < x.dim():
        raise ValueError(f"{name}: channel={channel} is no dimension of x, which has {x.dim()}")
    for key, value in given.items():
        if value.shape != (x.shape[channel],):
            raise ValueError(
                f"{name}: {key} has shape {tuple(value.shape)}; it needs an element for each of the "
                f"{x.shape[channel]} channels along dimension {channel} of x, which is {tuple(x.shape)}"
            )
        if a["mean"] is None and value.dtype != x.dtype:
            raise TypeError(f"{name}: {key} is {value.dtype} and x is {x.dtype}; cast one of them")
    if a["add_first"] and a["residual"] is None:
        raise ValueError(f"{name}: add_first=True without a residual; pass the tensor to add")
    _check_kept(name, a, sum_is=a["add_first"])
    if a["keep"] == "value" and not given and a["residual"] is None and a["activation"] == "none":
        raise ValueError(f"{name}: nothing comes ahead of the threshold, so what keep='value' asks for is x itself")


def _check_norm(a: dict[str, Any]) -> None:
    name, x, shape = "norm_threshold", a["x"], list(a["shape"])
    over = list(x.shape[1:2] if a["channels_first"] else x.shape[-len(shape) :])
    if not shape or over != shape:
        which = "dimension 1" if a["channels_first"] else "the last dimensions"
        raise ValueError(f"{name}: shape={shape} is not that of {which} of x, which is {tuple(x.shape)}")
    for key in ("weight", "bias"):
        if a[key] is not None and list(a[key].shape) != shape:
            raise ValueError(f"{name}: {key} has shape {tuple(a[key].shape)}; it needs that of a row, {tuple(shape)}")
    if a["rms"] and a["bias"] is not None:
        raise ValueError(f"{name}: an RMSNorm has no bias; leave it out, or take the LayerNorm with rms=False")
    if a["eps"] is None and not a["rms"]:
        raise ValueError(f"{name}: eps=None is for an RMSNorm; a LayerNorm needs a number, such as 1e-5")
    _check_kept(name, a, sum_is=a["residual"] is not None)


def _check_kept(name: str, a: dict[str, Any], sum_is: bool) -> None:
    x, residual, keep = a["x"], a["residual"], a["keep"]
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"{name}: residual is {residual.dtype} {tuple(residual.shape)} on {residual.device}, and x is {x.dtype} "
            f"{tuple(x.shape)} on {x.device}; they must agree"
        )
    if keep not in (None, "value", "sum"):
        raise ValueError(f"{name}: keep={keep!r}; it is 'value', what the threshold is given, or 'sum'")
    if keep == "sum" and not sum_is:
        raise ValueError(f"{name}: keep='sum' is for a residual that is added first; take keep='value'")


# ---- what a kernel takes


def _elementwise_fits(a: dict[str, Any]) -> bool:
    """Whether the kernel's results have the chain's layout: the kernel works in storage order."""
    x, formats = a["x"], {4: torch.channels_last, 5: torch.channels_last_3d}
    dense = x.is_contiguous() or (x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()]))
    standard = a["mean"] is None or a["channel"] % x.dim() == 1
    return dense and standard and _same_kind(x, a["residual"])


def _norm_fits(a: dict[str, Any]) -> bool:
    fits = math.prod(a["shape"]) <= _kernels("norm_threshold").LONGEST
    rows = a["x"].movedim(1, -1) if a["channels_first"] else a["x"]
    return fits and rows.is_contiguous() and _same_kind(a["x"], a["residual"])


def _same_kind(x: Tensor, residual: Tensor | None) -> bool:
    return x.dtype in KERNEL_DTYPES and (residual is None or residual.stride() == x.stride())


def _kernels(name: str) -> Any:
    return ops.kernels(OPERATORS[name].file)


# ---- the operators


@dataclass(frozen=True)
class Operator:
    """schema: its arguments, as PyTorch writes them. chain: what it computes. check: raises where arguments, by name,
    are not right. fits: whether the kernel takes them. file: of kernels/, which holds `NAME_kernel`, `launch_NAME`,
    `plan` and `OTHERS`."""

    schema: str
    chain: Callable[..., Result]
    check: Callable[[dict[str, Any]], None]
    fits: Callable[[dict[str, Any]], bool]
    file: str


OPERATORS = {
    "elementwise_threshold": Operator(
        "Tensor x, Tensor t, Tensor? residual=None, bool add_first=False, Tensor? mean=None, Tensor? var=None, "
        "Tensor? weight=None, Tensor? bias=None, float eps=1e-05, int channel=1, str activation='none', "
        "str function='threshold', Tensor? limit=None",
        elementwise_threshold,
        _check_elementwise,
        _elementwise_fits,
        "fused",
    ),
    "norm_threshold": Operator(
        "Tensor x, Tensor t, int[] shape, Tensor? residual=None, Tensor? weight=None, Tensor? bias=None, "
        "float? eps=1e-05, bool rms=False, str function='threshold', Tensor? limit=None, bool channels_first=False",
        norm_threshold,
        _check_norm,
        _norm_fits,
        "norm",
    ),
}
_DEFAULTS = {
    name: {key: p.default for key, p in inspect.signature(operator.chain).parameters.items()}
    for name, operator in OPERATORS.items()
}


# ---- one implementation per device


def _arguments(name: str, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, checked. (The dispatcher leaves out those that have their default.)"""
    arguments = {**_DEFAULTS[name], **dict(zip(_DEFAULTS[name], args, strict=False)), **kwargs}
    _check_function(name, arguments)
    OPERATORS[name].check(arguments)
    return arguments


def _elsewhere(name: str, *args: Any, **kwargs: Any) -> Result:
    arguments = _arguments(name, args, kwargs)
    _decompose_if_inductor_runs()
    return OPERATORS[name].chain(**arguments)


def _cuda(name: str, *args: Any, **kwargs: Any) -> Result:
    arguments = _arguments(name, args, kwargs)
    if not OPERATORS[name].fits(arguments):
        return OPERATORS[name].chain(**arguments)
    del arguments["straight_through"]
    return _with_kept(*getattr(_kernels(name), f"launch_{name}")(**arguments))


# ---- where nothing is recorded or watched

MOST = 4096  # cases that are kept: inputs of ever new sizes must not fill the memory
_known: dict[tuple, tuple[Any, Any]] = {}  # case -> a file of kernels/, and its kernel


def unrecorded(op: Any, x: Tensor, parameters: tuple[Tensor, ...], arguments: dict[str, Any]) -> Result:
    """`op(x, *parameters, **arguments)`. That nothing has to be recorded, or is watched, is for the caller to know.

    On a GPU, checking the arguments and finding out whether there is a kernel for them takes longer than most kernels
    run. Both depend on what the tensors look like, not on what is in them: of a case that is known, the kernel is all.
    """
    t, limit = parameters if len(parameters) == 2 else (*parameters, None)
    residual = arguments.get("residual")
    run = ops.direct(op, x, t) if residual is None else ops.direct(op, x, t, residual)
    if run is None or run is not ops.CUDA.get(op):
        return (run or op)(x, t, limit=limit, **arguments)
    case = (op, *arguments, *[
        (type(v), v.dtype, v.shape, v.stride(), v.get_device(), v.is_neg()) if isinstance(v, Tensor) else v
        for v in (x, *parameters, *arguments.values())
    ])  # fmt: skip
    known = _known.get(case)
    if known is None:
        others = [v for v in (*parameters, *arguments.values()) if isinstance(v, Tensor)]
        ordinary = ops.direct(op, x, *others) is not None
        result = (run if ordinary else op)(x, t, limit=limit, **arguments)
        if ordinary:
            _learn(case, op, {**arguments, "x": x, "t": t, "limit": limit})
        return result
    file, kernel = known
    y = torch.empty_like(x)
    kept = torch.empty_like(x) if "keep" in arguments else None
    tensors = (x, t, limit, y, kept, *map(arguments.get, file.OTHERS))
    file.launch(kernel, tensors, case, lambda: file.plan(y, **{**_DEFAULTS[_NAMES[op]], **arguments}))
    return _with_kept(y, kept)


def _learn(case: tuple, op: Any, arguments: dict[str, Any]) -> None:
    """Keep the case, if the kernel takes every tensor as it is. (Whether the arguments are right was checked.)"""
    name = _NAMES[op]
    whole = {**_DEFAULTS[name], **arguments}
    file = _kernels(name)
    parameters = [whole[other] for other in file.OTHERS if other != "residual" and whole[other] is not None]
    if whole["x"].numel() and OPERATORS[name].fits(whole) and all(p.is_contiguous() for p in parameters):
        if len(_known) >= MOST:
            _known.clear()
        _known[case] = file, getattr(file, f"{name}_kernel")


# ---- gradients, and Inductor


def _autograd(name: str, op: Callable, *args: Any, **kwargs: Any) -> Result:
    tensors = [value for value in args if isinstance(value, Tensor)]
    tracked = torch.is_grad_enabled() and torch_internals.any_requires_grad(*tensors)
    if tracked or torch_internals.in_forward_mode():
        return _elsewhere(name, *args, **kwargs)
    with torch_internals.AutoDispatchBelowAutograd():
        return op(*args, **kwargs)


def _decompose_if_inductor_runs() -> None:
    """The fake implementations come here, and a compiler consults them before it decomposes anything."""
    if "torch._inductor.decomposition" in sys.modules:
        _register_decompositions()


@functools.cache
def _register_decompositions() -> None:
    decomposition = torch_internals.inductor().decomposition
    decomposition.decompositions.update(ops.DECOMPOSITIONS)
    decomposition.fast_random_decomps.cache_clear()  # a copy of the table


# ---- registration

_NAMES: dict[Callable, str] = {}
_library = torch.library.Library("forged_fx", "FRAGMENT")
for _name, _operator in OPERATORS.items():
    for _overload, _rest in OVERLOADS.items():
        _full = _name if _overload == "default" else f"{_name}.{_overload}"
        _library.define(f"{_full}({_operator.schema}, {_rest}", tags=ops.TAGS)
        _op = getattr(getattr(torch.ops.forged_fx, _name), _overload)
        _chain = functools.partial(_elsewhere, _name)
        _library.impl(_full, _chain, "CompositeExplicitAutograd")
        ops.CUDA[_op], _NAMES[_op] = functools.partial(_cuda, _name), _name
        _library.impl(_full, ops.CUDA[_op], "CUDA")
        _library.impl(_full, functools.partial(_autograd, _name, _op), "Autograd")
        _library.impl(_full, _chain, "FuncTorchBatchedDecomposition")
        torch.library.register_fake(f"forged_fx::{_full}", _chain, lib=_library)
        ops.THRESHOLD_OPS[_op] = None
        ops.DECOMPOSITIONS[_op] = _chain
    ops.THRESHOLD_OPS[getattr(torch.ops.forged_fx, _name)] = None
