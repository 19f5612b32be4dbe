"""What a forward hears that asks, while it is traced, whether a value is a tensor.

To Python a proxy is none, and `if isinstance(x, torch.Tensor)` would take the wrong branch into the graph. (A proxy
that says itself what it stands for, by its `__class__`, says so to PyTorch's C++ code as well, which reads its memory.)
So `isinstance` itself answers for what a proxy stands for: to the thread that traces, and to all code but PyTorch's
and this library's own.
"""

import builtins
import contextlib
import operator
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from forged_fx.proxies import Attribute, Buffer, Value
from forged_fx.rewrite import fact_of


class _NoTensor:
    """Of a type that is not known, but no tensor."""


# What is no tensor. Facts and their items are of a type that is known; other results are not looked into.
_FACTS = {"shape": torch.Size, "dtype": torch.dtype, "device": torch.device, "ndim": int, "dim": int, "numel": int}
_PROXIES = {Value, Attribute, Buffer}
_TUPLES = (nn.RNNBase, nn.LSTMCell, nn.MultiheadAttention)
_UNKNOWN = set(
    "aminmax chunk cummax cummin dsplit element_size frexp get_device hsplit item kthvalue max median meshgrid min "
    "mode nelement size sort split split_with_sizes std_mean stride tensor_split tolist topk type unbind unique "
    "unique_consecutive unsafe_chunk unsafe_split var_mean vsplit".split()
)


@contextlib.contextmanager
def values_are_tensors(example: Mapping[str, Any] | None, refuse: Callable[[], None]) -> Iterator[dict[str, str]]:
    """Within it, a proxy is of the type of what it stands for. Yields the arguments that were asked for theirs, and
    what they said: "Tensor", or the name of another type.

    example: the arguments of a call by name, which tell what those of the root's forward are; None: not known. refuse:
    called where the type is not known.
    """
    plain, tracing = builtins.isinstance, threading.get_ident()
    asked: dict[str, str] = {}

    def answer(value: Any, kinds: Any) -> bool:
        found = plain(value, kinds)
        if found or type(value) not in _PROXIES or threading.get_ident() != tracing:
            return found
        if is_of_torch(sys._getframe(1)):
            return found
        kind = _kind(value, example or {}, asked)
        if kind is None or (kind is _NoTensor and not all(issubclass(k, torch.Tensor) for k in _each(kinds))):
            refuse()
            return found
        return issubclass(kind, kinds)

    try:
        builtins.isinstance = answer
        yield asked
    finally:
        builtins.isinstance = plain


def is_of_torch(frame: types.FrameType) -> bool:
    """Whether code of PyTorch's runs there, or of this library. (`torch.is_tensor` itself asks in "torch".)"""
    return frame.f_globals.get("__name__", "").startswith(("torch.", "forged_fx."))


def _each(kinds: Any) -> Iterator[type]:
    """The types that `isinstance` was given: one, a tuple of some, or a union."""
    several = kinds if isinstance(kinds, tuple) else getattr(kinds, "__args__", None)
    for kind in several or ():
        yield from _each(kind)
    if several is None:
        yield kinds


def _kind(value: fx.Proxy, example: Mapping[str, Any], asked: dict[str, str]) -> type | None:
    """The type of what a proxy stands for; None where that is not known."""
    if issubclass(type(value), fx.proxy.Attribute):  # (asked for its node, it would enter the graph)
        return _FACTS.get(value.attr)
    node, root = value.node, value.tracer.root
    if node.op == "placeholder":
        if node.target not in example:
            return None
        kind = type(example[node.target])
        asked[node.target] = "Tensor" if issubclass(kind, torch.Tensor) else kind.__name__
        return kind
    if node.op == "get_attr":
        owner, _, name = node.target.rpartition(".")
        held = root.get_submodule(owner)  # (asked for its attribute, it gives a proxy)
        return torch.nn.Parameter if name in held._parameters else torch.Tensor
    if node.op == "call_module":
        module = root.get_submodule(node.target)
        if not type(module).__module__.startswith("torch.nn."):
            return None
        return tuple if isinstance(module, _TUPLES) else torch.Tensor
    if (fact := fact_of(node)) is not None:
        return _FACTS.get(fact)
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and fact_of(node.args[0]) == "shape":
        return int if isinstance(node.args[1], int) else torch.Size
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return None if name in _UNKNOWN else _made_of(node, example)


def _made_of(node: fx.Node, example: Mapping[str, Any]) -> type | None:
    """The same of what was computed: a tensor, where one is among what it was computed from; not, where facts are."""
    seen, ahead, found = set[fx.Node](), [*node.all_input_nodes], _NoTensor
    while ahead:
        if (node := ahead.pop()) in seen or fact_of(node) is not None:
            continue
        if node.op in ("get_attr", "call_module") or isinstance(example.get(str(node.target)), torch.Tensor):
            return torch.Tensor
        found = None if node.op == "placeholder" else found
        seen.add(node)
        ahead += node.all_input_nodes
    return found
