"""What a forward hears that asks, while it is traced, whether a value is a tensor.

To Python a proxy is none, and `if isinstance(x, torch.Tensor)` would take the wrong branch into the graph. (A proxy
that says itself what it stands for, by its `__class__`, says so to PyTorch's C++ code as well, which reads its memory.)
So the question is answered where it is asked: in the files whose forwards are traced, and in `torch.is_tensor`.
"""

import builtins
import contextlib
import types
from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from forged_fx.rewrite import fact_of
from forged_fx.straight import enclosed

_ASKS = "isinstance"
_TUPLES = (nn.RNNBase, nn.LSTMCell, nn.MultiheadAttention)  # what these return is none


@contextlib.contextmanager
def values_are_tensors(classes: Iterable[type], others: Set[str] | None, refuse: Callable[[], None]) -> Iterator[None]:
    """Within it, what a proxy stands for is a tensor to the code in the files of these classes' forwards.

    others: arguments of the root's forward that are none; None: not known. refuse: called where it cannot be known.
    """

    def answer(value: Any, kinds: Any) -> bool:
        if not isinstance(value, fx.Proxy) or isinstance(value, fx.proxy.Attribute):
            return builtins.isinstance(value, kinds)
        is_tensor = _is_tensor(value, others)
        if is_tensor is None:
            refuse()
        return issubclass(torch.Tensor, kinds) if is_tensor else builtins.isinstance(value, kinds)

    own = [scope for scope in _files(classes) if _ASKS not in scope]
    plain = torch.is_tensor
    try:
        torch.is_tensor = lambda value: answer(value, torch.Tensor)
        for scope in own:
            scope[_ASKS] = answer
        yield
    finally:
        torch.is_tensor = plain
        for scope in own:
            scope.pop(_ASKS, None)


def _files(classes: Iterable[type]) -> list[dict[str, Any]]:
    """The globals of the classes' forwards, and of what is beneath their decorators."""
    ahead: list[Any] = [vars(cls).get("forward") for cls in classes]
    found: dict[int, dict[str, Any]] = {}
    seen: set[int] = set()
    while ahead:
        function = ahead.pop()
        if not isinstance(function, types.FunctionType) or id(function) in seen:
            continue
        seen.add(id(function))
        if not function.__globals__.get("__name__", "").startswith("torch."):
            found[id(function.__globals__)] = function.__globals__
        ahead += (getattr(function, "__wrapped__", None), *enclosed(function))
    return [*found.values()]


def _is_tensor(value: fx.Proxy, others: Set[str] | None) -> bool | None:
    """Whether a value is a tensor: an input is, or what is made of some, but not a fact of one's. None: who knows."""
    seen, ahead = set(), [value.node]
    while ahead:
        if (node := ahead.pop()) in seen or fact_of(node) is not None:
            continue
        if node.op == "call_module":
            module = value.tracer.root.get_submodule(node.target)
            is_theirs = type(module).__module__.startswith("torch.nn.")
            if node is value.node and (not is_theirs or isinstance(module, _TUPLES)):
                return False if is_theirs else None
            return True
        if node.op in ("placeholder", "get_attr"):
            if node.op == "get_attr" or (others is not None and node.target not in others):
                return True
            return False if others is not None and node is value.node else None
        seen.add(node)
        ahead += node.all_input_nodes
    return False
