"""What a node of the graph that `transform` makes may do besides giving a result: write, draw random numbers, alias.

The graph is as the model was written, so any of its functions, methods and modules may. What is of no library that is
known counts as doing it.
"""

import inspect
import operator
import types
from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from forged_fx.graph_calls import AUGMENTED
from forged_fx.models import is_as_its_class
from forged_fx.ops import THRESHOLD_OPS
from forged_fx.producers import row_of
from forged_fx.rewrite import fact_of, is_call
from forged_fx.sites import CALLS, Many
from forged_fx.torch_internals import schemas_of

_LIBRARIES = ("torch.nn.modules.", "torchvision.", "timm.")  # (what torch.nn.utils makes of a module is another's code)
_PACKAGES = ("torch", "torchvision", "timm", "forged_fx", "operator", "math", "builtins")
_BUILTIN = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)


def modules_of(node: fx.Node, root: nn.Module) -> list[nn.Module]:
    return [*root.get_submodule(node.target).modules()] if node.op == "call_module" else []


# ---- random numbers

_RANDOM_MODULES = (nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)
_SHARES = ("p", "prob", "drop_prob", "dropout")  # attributes of modules that draw
_RANDOM_WORDS = ("drop", "rand", "bernoulli", "multinomial", "rrelu", "fractional", "attention")


def draws(node: fx.Node, root: nn.Module) -> bool:
    """Whether the node may draw random numbers, in train mode at least."""
    if node.op == "call_module":
        return any(_module_draws(module) for module in modules_of(node, root))
    if not is_call(node):
        return False
    name = _name(node.target)
    return not _is_known_call(node) or name.strip("_") == "normal" or any(word in name for word in _RANDOM_WORDS)


def _module_draws(module: nn.Module) -> bool:
    return not _is_known(module) or isinstance(module, _RANDOM_MODULES) or any(hasattr(module, a) for a in _SHARES)


# ---- writes

_OPERATORS = "add sub mul div truediv floordiv mod pow matmul and or xor lshift rshift".split()
_WRITING = {"setitem", "__setitem__", *(f"i{name}" for name in _OPERATORS), *(f"__i{name}__" for name in _OPERATORS)}


def writes(node: fx.Node, root: nn.Module) -> bool:
    """Whether the node may write into its input."""
    if node.op == "call_module":
        return any(getattr(m, "inplace", False) or not _is_known(m) for m in modules_of(node, root))
    if not is_call(node) or node.meta.get(UNSEEN):
        return False
    if schemas := schemas_of(node.target):  # an operator says it itself
        return any(schema.is_mutable for schema in schemas)
    return named_in_place(node.target) or not _is_known_call(node) or _asks_in_place(node) or "out" in node.kwargs


def named_in_place(function: Any) -> bool:
    """Whether a function, or a method that is given by name, writes into its first argument, as its name says."""
    name = _name(function)
    return (name.endswith("_") and not name.endswith("__")) or name in _WRITING


def _asks_in_place(node: fx.Node) -> bool:
    """Whether the function is called with `inplace`, or may be."""
    try:
        return bool(inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments.get("inplace"))
    except (TypeError, ValueError):  # a method, or a function that does not say what its arguments are
        return may_ask_in_place(node.args, node.kwargs)


def may_ask_in_place(args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether these may be the arguments of a call with `inplace`."""
    return bool(kwargs.get("inplace")) or any(arg is True for arg in args[1:])  # (1 == True)


# Of a tensor, a part or all of it in other clothes, whatever its layout; by the name of the function or method.
_VIEWS = set(
    "getattr view view_as transpose permute t squeeze unsqueeze expand expand_as narrow select chunk split unbind "
    "unfold diagonal detach swapaxes swapdims movedim moveaxis tensor_split unflatten flatten reshape".split()
)


def written_attribute(graph: fx.Graph) -> str | None:
    """The name of a tensor of the model's that a call of the graph surely writes into; None if none does."""
    for node in graph.nodes:
        x = next(iter(node.args), None)
        if not is_call(node) or not named_in_place(node.target):
            continue
        while isinstance(x, fx.Node) and is_call(x) and (_is_view(x) or named_in_place(x.target)):
            x = next(iter(x.args), None)
        if isinstance(x, fx.Node) and x.op == "get_attr":
            return x.target
    return None


def _is_view(node: fx.Node) -> bool:
    if fact_of(node) is not None:
        return False
    if node.target is operator.getitem:  # (by a tensor or a list, it is a copy)
        places = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return all(isinstance(place, int | slice | type(None) | type(...)) for place in places)
    return _name(node.target) in _VIEWS


# ---- memory

# (an einsum of one operand, or a product of one, is a view of it)
_FRESH_FUNCTIONS = {
    *(f for f, call in CALLS.items() if not isinstance(call, Many)), operator.add, operator.mul, torch.clone,
    torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like,
}  # fmt: skip
_FRESH_MODULES = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.Linear, nn.LayerNorm)


def is_fresh(node: fx.Node, root: nn.Module) -> bool:
    """Whether the node's result, if it is a tensor, shares no memory with its inputs."""
    if node.op == "call_module":
        module = root.get_submodule(node.target)
        return isinstance(module, _FRESH_MODULES) and _is_known(module)
    if fact_of(node) is not None or (node.op == "call_method" and node.target == "clone"):
        return True
    fresh = node.target in _FRESH_FUNCTIONS or node.target in THRESHOLD_OPS or bool(node.meta.get(UNSEEN))
    return node.op == "call_function" and fresh and not writes(node, root)


def aliases(x: fx.Node, write: fx.Node, root: nn.Module) -> set[fx.Node]:
    """The node, and all whose results may share memory with its own when `write` writes into that."""
    found: set[fx.Node] = set()
    new = [x]
    while new:
        if (node := new.pop()) not in found:
            found.add(node)
            readers = [user for user in node.users if user is not write and user.op != "output"]
            new += [user for user in readers if not is_fresh(user, root)]
            new += [] if is_fresh(node, root) else node.all_input_nodes
    return found


UNSEEN = "unseen"  # marks an augmented assignment that writes where nobody looks any more: it is as good as none


def settle(graph: fx.Graph, root: nn.Module) -> None:
    """Mark the augmented assignments of the graph that are `UNSEEN`: the memory is neither the caller's nor the
    model's, and nothing reads it behind them, through a view or what is viewed."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for write in assignments(graph):
        shared = aliases(write.args[0], write, root)
        own = all(node.op not in ("placeholder", "get_attr") for node in shared)
        write.meta[UNSEEN] = own and all(order[user] <= order[write] for node in shared for user in node.users)


def assignments(graph: fx.Graph) -> list[fx.Node]:
    """The augmented ones (`x += y`), in order."""
    return [node for node in graph.nodes if node.target in AUGMENTED.values() and isinstance(node.args[0], fx.Node)]


# ---- what is known


def _name(function: Any) -> str:
    return function if isinstance(function, str) else getattr(function, "__name__", "")


def _is_known_call(node: fx.Node) -> bool:
    """A method is taken for a tensor's. Of a function of a library, its name and arguments tell what it does."""
    home = getattr(node.target, "__module__", None) or ""
    return isinstance(node.target, (str, *_BUILTIN)) or home.partition(".")[0].lstrip("_") in _PACKAGES


def _is_known(module: nn.Module) -> bool:
    """Whether the module is one of a library, as it was written there: what its class and attributes say holds."""
    of_a_library = type(module).__module__.startswith(_LIBRARIES) or row_of(module) is not None
    return of_a_library and is_as_its_class(module)
