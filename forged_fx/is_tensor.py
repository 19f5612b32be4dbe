"""What a forward hears that asks, while it is traced, whether a value is a tensor.

To Python a proxy is none, and `if isinstance(x, torch.Tensor)` would take the wrong branch into the graph. (A proxy
that says itself what it stands for, by its `__class__`, says so to PyTorch's C++ code as well, which reads its memory.)
So the question is answered where it is asked: in the files whose forwards are traced, and in `torch.is_tensor`.
"""

import builtins
import contextlib
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.fx as fx

from forged_fx.rewrite import fact_of

_ASKS = "isinstance"


@contextlib.contextmanager
def values_are_tensors(classes: Iterable[type]) -> Iterator[None]:
    """Within it, what a proxy stands for is a tensor to the code in the files of these classes' forwards."""
    forwards = [vars(cls).get("forward") for cls in classes]
    files = [f.__globals__ for f in forwards if isinstance(f, types.FunctionType)]
    own = [scope for scope in files if not scope["__name__"].startswith("torch.") and _ASKS not in scope]
    plain = torch.is_tensor
    try:
        torch.is_tensor = lambda value: _isinstance(value, torch.Tensor)
        for scope in own:
            scope[_ASKS] = _isinstance
        yield
    finally:
        torch.is_tensor = plain
        for scope in own:
            scope.pop(_ASKS, None)


def _isinstance(value: Any, kinds: Any) -> bool:
    if isinstance(value, fx.Proxy) and not isinstance(value, fx.proxy.Attribute) and _is_tensor(value.node):
        return issubclass(torch.Tensor, kinds)
    return builtins.isinstance(value, kinds)


def _is_tensor(node: fx.Node) -> bool:
    """Whether what a call gives is a tensor, in all likelihood: an input, or made from some, and no fact of one's."""
    seen, ahead = set(), [node]
    while ahead:
        if (node := ahead.pop()) in seen or fact_of(node) is not None:
            continue
        if node.op in ("placeholder", "get_attr", "call_module"):
            return True
        seen.add(node)
        ahead += node.all_input_nodes
    return False
