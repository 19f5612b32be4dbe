"""Functions that a graph calls besides PyTorch's. Traced again, as unpickling traces it, the calls stay what they are.

Among them are Python's augmented assignments. What torch.fx records of `x += y` is `x + y`, as its values have no
`__iadd__`. That is another thing where somebody else has the tensor (the caller, a buffer, a view of it), or where y is
of a wider dtype. (And its code for `operator.iadd` gives a name another value where x is a number.) So a graph calls
these, and stays the model.
"""

import functools
import operator
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from forged_fx import torch_internals


def _stays_a_call(function: Callable) -> Callable:
    @functools.wraps(function)
    def call(x: Any, *others: Any) -> Any:
        if isinstance(x, fx.Proxy):
            return x.tracer.create_proxy("call_function", call, (x, *others), {})
        return function(x, *others)

    call.__module__ = __name__  # from where a graph's code imports it
    return call


AUGMENTED = {
    name: _stays_a_call(getattr(operator, name))  # (of `@=` tensors have none, and Python takes `x = x @ y`)
    for name in "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift".split()
}
globals().update(AUGMENTED)


@_stays_a_call
def to_be_kept(x: Any) -> Any:
    """The tensor, which will be written to; a copy, where a backward will look at it. (Anything else as it is.)"""
    kept = isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled()
    return x.clone() if kept else x


@_stays_a_call
def of_type(value: Any, kind: str, name: str) -> Any:
    """An argument whose type the forward asked for. Raises TypeError where it is another one than in calibration."""
    if (type_now := "Tensor" if isinstance(value, Tensor) else type(value).__name__) != kind:
        raise TypeError(
            f"{name!r} is {type_now}: calibration gave {kind}, and this graph is of calls that do "
            "(transform(..., graph=False) gives one that takes both)"
        )
    return value


def ordered(items: list[tuple[Any, Any]]) -> Any:
    """The OrderedDict that a forward makes of them."""
    for value in torch_internals.tree_leaves(items):
        if isinstance(value, fx.Proxy):
            return value.tracer.create_proxy("call_function", ordered, (items,), {})
    return OrderedDict(items)
