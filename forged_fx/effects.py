"""What a node of the graph that `transform` makes may do besides giving a result: write, draw random numbers, alias.

The graph is as the model was written, so any of its functions, methods and modules may. What is not known to do without
counts as doing it.
"""

import operator

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from forged_fx.ops import THRESHOLD_OPS
from forged_fx.producers import row_of
from forged_fx.sites import CALLS


def modules_of(node: fx.Node, root: nn.Module) -> list[nn.Module]:
    return [*root.get_submodule(node.target).modules()] if node.op == "call_module" else []


def draws(node: fx.Node, root: nn.Module) -> bool:
    """Whether the node may draw random numbers, in train mode at least."""
    if node.op == "call_module":
        return any(hasattr(m, "p") or hasattr(m, "drop_prob") or type(m) is nn.RReLU for m in modules_of(node, root))
    return any(word in _function_name(node) for word in ("drop", "rand", "bernoulli", "multinomial", "normal", "rrelu"))


_OPERATORS = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split()
_WRITING = {"setitem", "__setitem__", *(f"i{name}" for name in _OPERATORS), *(f"__i{name}__" for name in _OPERATORS)}


def writes(node: fx.Node, root: nn.Module) -> bool:
    """Whether the node may write into its input."""
    if node.op == "call_module":
        return any(getattr(m, "inplace", False) or not _is_known(m) for m in modules_of(node, root))
    if node.op not in ("call_function", "call_method"):
        return False
    if (schema := getattr(node.target, "_schema", None)) is not None:  # an operator says it itself
        return schema.is_mutable
    name = _function_name(node)
    in_place = (name.endswith("_") and not name.endswith("__")) or name in _WRITING
    flag = any(arg is True for arg in (*node.args[1:], node.kwargs.get("inplace")))  # (1 == True)
    return in_place or flag or "out" in node.kwargs


def _function_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _is_known(module: nn.Module) -> bool:
    """Whether modules of this class write nowhere unless they say `inplace`; a user's own may."""
    return type(module).__module__.startswith(("torch.nn.", "torchvision.", "timm.")) or row_of(module) is not None


_FRESH_MODULES = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.Linear,
    nn.LayerNorm,
)
_FRESH_FUNCTIONS = {*CALLS, *THRESHOLD_OPS, operator.add, operator.mul, torch.cat, F.max_pool2d, F.avg_pool2d}


def is_fresh(node: fx.Node, root: nn.Module) -> bool:
    """Whether the node's result is a tensor of its own, which shares no memory with its inputs."""
    if node.op == "call_module":
        return isinstance(root.get_submodule(node.target), _FRESH_MODULES)
    return node.op == "call_function" and node.target in _FRESH_FUNCTIONS


def aliases(node: fx.Node, root: nn.Module) -> set[fx.Node]:
    """The nodes whose results may share memory with the node's: it is one of them."""
    found, left = {node}, [node]
    while left:
        last = left.pop()
        near = {user for user in last.users if not is_fresh(user, root)}
        near |= set() if is_fresh(last, root) else {*last.all_input_nodes}
        left += near - found
        found |= near
    return found
