"""What Inductor makes of a forged function: a pointwise node, which joins the kernel that makes its input.

On a CPU, where there is no such kernel, it may as well stay the call that eager mode makes: see `_between_libraries`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true as known

from forged_fx import behind_relu, torch_internals
from forged_fx.hoist import made_by, read_by
from forged_fx.kernels import reference
from forged_fx.ops import FUNCTIONS, Function

inductor = torch_internals.inductor

# From so many values on, a call through PyTorch's dispatcher, 10 to 20 microseconds, makes no difference beside a pass
# over them, 30 and more.
LARGE = 2**18


@functools.cache
def register_lowerings() -> None:
    """Teach Inductor to make a pointwise node of each op. Idempotent; imports Inductor.

    A backend calls it. Under plain `torch.compile` it happens by itself: `_lower_if_inductor_runs`, forged_fx/ops.py.
    """
    for f in FUNCTIONS.values():
        in_eager_mode = inductor().fallback_handler(f.op, add_to_fallback_set=False)
        rows = {f.op: functools.partial(_forward, f, in_eager_mode), f.backward: functools.partial(_backward, f)}
        for op, lowering in rows.items():
            inductor().register_lowering(op, type_promotion_kind=None)(lowering)
    behind = torch.ops.forged_fx.elementwise_threshold.default
    inductor().register_lowering(behind, type_promotion_kind=None)(_behind_relu)


def _forward(f: Function, in_eager_mode: Callable, x: Any, *arguments: Any) -> Any:
    if f.cpu and _between_libraries(x):
        return in_eager_mode(x, *arguments)
    arguments = arguments[: f.arguments]
    graph, meta = inductor().V.graph, inductor().V.graph.current_node.meta
    offered = _own_products(x) and inductor().config.prologue_fusion and meta.get("prologue")
    if offered or (meta.get("raw") and _has_several_sources(x)):
        _write(x)
    result = _pointwise(f, reference.RULES[f.name], x, arguments, _chosen)
    if not offered:
        return result
    result.realize()
    graph.invoke_quant_ops.add(result.get_operation_name())  # Inductor's list of prologues worth a try
    return result


def _backward(f: Function, grad: Any, x: Any, *arguments: Any) -> Any:
    load, inner = grad.make_loader(), inductor().ops

    def masked(index: Any, dropped: Any, *_: Any) -> Any:
        return inner.where(dropped, inner.constant(0, x.get_dtype()), load(index))

    return _pointwise(f, reference.RULES[f.name], x, arguments, masked)


def _behind_relu(x: Any, t: Any, *, activation: str, function: str) -> Any:
    """Of the operator, the one form that is left once Inductor took the others apart: see `behind_relu.join`."""
    return _pointwise(FUNCTIONS[function], behind_relu.RULES[function], x, (t,), _chosen)


def _chosen(index: Any, dropped: Any, instead: Any, kept: Any) -> Any:
    return inductor().ops.where(dropped, instead, kept)


def _pointwise(f: Function, rule: Callable, x: Any, arguments: tuple, result: Callable) -> Any:
    """result: (index, what is dropped, what takes its place, what else becomes of x) -> the value there."""
    inner, dtype, load_x = inductor().ops, x.get_dtype(), x.make_loader()
    loads = [(p.make_loader(), p.get_dtype()) for p in arguments[: len(f.parameters)]]
    o, twice = _Wide(reference.comparison_dtype(dtype)), _own_products(x)
    # For a CPU, Inductor gives up vectors in loops that are shorter than one (a layer's 8 channels, moved last) where
    # more than 12 % of the operations select (`TilingSelect`). So conversions count that change nothing: with all three
    # a lone threshold is 1 in 9; without, the loop behind a digits' network's first layer took 35 times as long.
    # Elsewhere they would be no more than work for Inductor.
    every = x.get_device().type == "cpu" and dtype == o.dtype and not _is_computed(x)

    def converted(value: Any, source: torch.dtype, target: torch.dtype) -> Any:
        return inner.to_dtype(value, target) if every or source != target else value

    def at(index: Any) -> Any:
        where = (index[arguments[-1]],) if f.channels else ()
        given = load_x(index)  # once: Inductor traces all that makes x anew at each call, many times over
        value = converted(given, dtype, o.dtype)
        if twice:
            # Twice: a kernel's loops are ordered as most of its accesses lie. So the input outvotes the output, and the
            # kernel can be an epilogue of the product that makes it. Loaded once, a threshold with the copy of
            # attention's heads is a kernel of its own (swin_tiny, float16: 12 launches more).
            given = load_x(index)
        parameters = [converted(load(where), stored, o.dtype) for load, stored in loads]
        dropped, instead, kept = rule(o, value, *parameters)
        if isinstance(instead, int):
            instead = inner.constant(instead, dtype)
        else:
            instead = converted(instead, o.dtype, dtype)
        found = result(index, dropped, instead, given if kept is value else converted(kept, o.dtype, dtype))
        return converted(found, dtype, dtype)

    return inductor().Pointwise.create(device=x.get_device(), dtype=dtype, inner_fn=at, ranges=x.get_size())


class _Wide:
    """Inductor's elementwise functions, for a rule of the reference: numbers among the arguments are constants."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __getattr__(self, name: str) -> Callable:
        return lambda *args: getattr(inductor().ops, name)(*map(self.value, args))

    def value(self, given: Any) -> Any:
        return inductor().ops.constant(given, self.dtype) if isinstance(given, int) else given


def _own_products(x: Any) -> bool:
    """Whether Inductor may generate the matrix products that read this value."""
    config = inductor().config
    return (config.max_autotune or config.max_autotune_gemm) and x.get_device().type != "cpu"


def _is_computed(x: Any) -> bool:
    """Whether much is computed to make the value, in the kernel that the threshold will be a part of: with what is no
    constant among six, a threshold's selection is 1 operation in 9 at most."""
    made = getattr(x.data, "data", None)
    return isinstance(made, inductor().Pointwise) and made.inner_fn_opcount().num_ops >= 6


def _write(x: Any) -> None:
    """Have the input written, laid out as in eager mode: as its reader would without the threshold. So others that read
    it need not compute it anew, and a product shall compute the threshold, and not all that comes ahead."""
    x.realize()
    if inductor().is_storage_and_layout(x) and isinstance(x.get_layout(), inductor().FlexibleLayout):
        graph = inductor().V.graph
        strides = graph.current_node.args[0].meta["val"].stride()
        order = inductor().get_stride_order(strides, graph.sizevars.shape_env)
        inductor().as_storage_and_layout(x, want_contiguous=False, stride_order=order)


def _has_several_sources(x: Any) -> bool:
    """Whether computing it anew reads as much as writing it and reading that: it has yet to be written, and is made of
    several tensors of its size. Inductor would leave it at that up to four, for more kinds of kernels."""
    if inductor().is_storage_and_layout(x):
        return False
    return sum(read.get_numel() == x.get_numel() for read in x.get_reads()) > 1


def _between_libraries(x: Any) -> bool:
    """Whether a library makes the value, and libraries read what is left of it, on a CPU: then there is nothing to
    join. A loop of its own would be no faster than eager mode's, and a file of C++ for each size of tensor, most of a
    second to compile. (In half precision it would be faster, by a tenth and more. A program that is compiled ahead of
    time may run without Python, and so without eager mode's.)"""
    graph = inductor().V.graph
    node = graph.current_node
    if node.meta["val"].device.type != "cpu" or graph.cpp_wrapper or graph.aot_mode:
        return False
    if not inductor().is_storage_and_layout(x):  # a view for which it has to be copied, and so a loop
        return False
    around = (made_by(node.args[0]), *read_by(node))
    if not all(n.op == "call_function" and torch_internals.is_library_call(n) for n in around):
        return False
    return x.get_dtype().itemsize > 2 and known(node.meta["val"].numel() >= LARGE)
