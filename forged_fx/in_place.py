"""How a forged graph runs where nothing is recorded: its thresholds are plain calls, in place where they can be.

In eager mode a threshold costs a trip through PyTorch's dispatcher, a pass over memory, and new memory for its result.
Without gradients the trip is saved, and the new memory wherever nobody else can tell: the graph has no later reader of
the input, and when it comes to it, the tensor has no other owner. A hook that kept it, a view that is still alive, the
branch of a residual: each is an owner, and is counted when the threshold runs, so that nothing is assumed of modules.
Sums go the same way.

A ReLU and the threshold behind it are one pass over memory in place of two, since PyTorch has a function that is both:
`torch.threshold`, 0 where x <= the limit, else x.

Of several thresholds that read one tensor, those that are equal to the first are not computed again: on a CPU their
values are read anyway. Whether anyone has written to the tensor since, or to the result, is asked of PyTorch then.

A graph also names each module by its path from the root, which costs Python more than the model's own nested calls.
Here the paths are gone through together, once a run.

Recorded, watched or compiled runs (gradients, function and dispatch modes, torch.func, tracers, compilers) get the
graph as it is written.
"""

import copy
import functools
import operator
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor, nn

from forged_fx import cpu, ops, torch_internals
from forged_fx.effects import writes
from forged_fx.graph_calls import to_be_kept
from forged_fx.models import is_as_its_class
from forged_fx.producers import FUNCTIONS
from forged_fx.rewrite import function_of, is_call
from forged_fx.thresholds import lost, parameters_of
from forged_fx.torch_internals import has_any_global_hook

THRESHOLD = torch.ops.forged_fx.threshold.default
RELUS = {f for f, row in FUNCTIONS.values() if row.role == "activation" and row.arguments() == {"activation": "relu"}}
ROOT = "root"


def offer(forged: fx.GraphModule) -> None:
    """Let the class of a graph module that was just compiled choose, call by call, how to run."""
    as_written, unrecorded = type(forged).forward, _unrecorded(forged)

    def forward(self: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return as_written(self, *args, **kwargs)
        try:
            if torch.is_grad_enabled() or torch_internals.watched():
                return as_written(self, *args, **kwargs)
            return unrecorded(self, *args, **kwargs)
        except AttributeError as error:
            if gone := lost(parameters_of(self), self.threshold_buffers):
                raise AttributeError(f"{gone} ({error})") from error
            raise

    forward.__code__ = forward.__code__.replace()  # its own: Dynamo counts how often it has compiled a code
    type(forged).forward = functools.wraps(as_written)(forward)


def _unrecorded(forged: fx.GraphModule) -> Callable:
    """The graph's code, with its thresholds as plain calls."""
    graph = copy.deepcopy(forged.graph)
    for node in graph.find_nodes(op="call_function", target=to_be_kept):
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    # (with more arguments, a threshold's gradient was chosen)
    calls = [n for n in graph.nodes if n.target in IN_PLACE and len(n.args) == 2 and not n.kwargs]
    # A layer that writes into its input gets a tensor of its own. Writes through `.data` are not counted.
    if not any(n.target is getattr and n.args[1] == "data" for n in graph.nodes):
        _share([n for n in calls if n.target is THRESHOLD and not any(writes(m, forged) for m in n.users)])
    for node in calls:
        if node.target is THRESHOLD:
            _join_relu(node, forged)
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        node.target = UNRECORDED.get(node.target, node.target)
    for node in calls:
        plain, overwriting = IN_PLACE[node.target]
        x, node.target = node.args[0], plain
        if not isinstance(x, fx.Node) or x.op in ("placeholder", "get_attr"):
            continue
        if max(x.users, key=order.__getitem__) is node:
            with graph.inserting_before(node):
                references = graph.call_function(sys.getrefcount, (x,))
            node.target, node.args = overwriting, (*node.args, references)
    return _with_modules(graph, {name for name, _ in forged.named_modules()})


def _join_relu(threshold: fx.Node, root: nn.Module) -> None:
    """Let a threshold compute the ReLU ahead of it, too, if nothing but the threshold reads that.

    They have to stand next to each other: what runs in between could read what a ReLU in place has written.
    """
    relu = threshold.args[0]
    between = threshold.prev
    while between.op == "get_attr":
        between = between.prev
    if between is not relu or len(relu.users) > 1 or not (relu.args and isinstance(relu.args[0], fx.Node)):
        return
    if relu.op == "call_module" and type(root.get_submodule(relu.target)) is nn.ReLU:
        with relu.graph.inserting_before(relu):
            how = relu.graph.get_attr(relu.target)
    elif is_call(relu) and function_of(relu) in RELUS:
        how = writes(relu, root)
    else:
        return
    threshold.target, threshold.args = rectify, (relu.args[0], threshold.args[1], how)
    relu.graph.erase_node(relu)


def _share(thresholds: list[fx.Node]) -> None:
    """Let thresholds that read the same tensor know of the first of them.

        x ─ threshold(·, t1) ─ conv             becomes             x ─ threshold(·, t1) ─ y ─ conv
        └── threshold(·, t2) ─ shortcut                             └── again(·, t2, note of y) ─ shortcut

    `forged_fx/share.py` does this for compilers, in their graph, on what is equal when the code is compiled.
    """
    by_value: dict[fx.Node, list[fx.Node]] = {}
    for node in thresholds:
        by_value.setdefault(node.args[0], []).append(node)
    for first, *others in by_value.values():
        if others:
            with first.graph.inserting_after(first):
                noted = first.graph.call_function(note, (*first.args, first))
        for node in others:
            node.target, node.args = again, (*node.args, noted)


def _with_modules(graph: fx.Graph, modules_of_it: set[str]) -> Callable:
    """The graph's code, which it changes to find its modules under names of their own."""
    steps: dict[tuple[str, str], str] = {}  # (a module's name, an attribute of it) -> the name of what is there

    def name(path: str) -> str:
        parent, _, leaf = path.rpartition(".")
        return steps.setdefault((name(parent), leaf), f"m{len(steps)}") if path else ROOT

    for node in graph.nodes:
        if node.op == "call_module" or (node.op == "get_attr" and node.target in modules_of_it):
            node.target = name(node.target)
        elif node.op == "get_attr":  # a tensor, which is asked for when it is needed
            owner, _, leaf = node.target.rpartition(".")
            node.target = f"{name(owner)}.{leaf}"
    run = torch_internals.forward_of(graph)

    def forward(self: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        modules: dict[str, Any] = {ROOT: self}
        for (parent, leaf), found in steps.items():
            try:
                modules[found] = modules[parent]._modules[leaf]  # what nn.Module.__getattr__ comes to last
            except (AttributeError, KeyError):
                modules[found] = getattr(modules[parent], leaf)
        return run(SimpleNamespace(**modules), *args, **kwargs)

    return forward


def apply(x: Tensor, t: Tensor) -> Tensor:
    """`threshold(x, t)` in new memory."""
    if not _plain(x, t):
        return (ops.direct(THRESHOLD, x, t) or THRESHOLD)(x, t)
    return cpu.threshold(x, t)


def overwrite(x: Tensor, t: Tensor, references: int) -> Tensor:
    """`threshold(x, t)` in the memory of x, if the caller's variable is all that owns it.

    references: to x, as the caller counts them. (Here there would be one more or not, as Dynamo has calls run.)
    """
    if references != _ONE_VARIABLE or not _plain(x, t) or not _alone(x):
        return apply(x, t)
    return cpu.threshold(x, t, out=x)


def rectify(x: Tensor, t: Tensor, relu: nn.Module | bool, references: int = 0) -> Tensor:
    """`threshold(relu(x), t)`. relu: its module, or whether the function that stood here works in place."""
    if isinstance(relu, bool):
        in_place, run = relu, torch.relu_ if relu else torch.relu
    else:
        in_place, run = getattr(relu, "inplace", True), relu
    if (run is not relu or _is_relu(relu)) and _plain(x, t) and (limit := cpu.largest_below(t.item(), x.dtype)) >= 0:
        if references == _ONE_VARIABLE and _alone(x):
            return torch.threshold_(x, limit, 0)
        if not in_place:
            return torch.threshold(x, limit, 0)
    before = sys.getrefcount(x)
    y = run(x)
    references = references + sys.getrefcount(y) - before - 1 if y is x else sys.getrefcount(y)
    return overwrite(y, t, references)


def _is_relu(module: Any) -> bool:
    """Whether a call of the module is PyTorch's ReLU, whose two functions others put their own in the place of, too."""
    usual = type(module) is nn.ReLU and is_as_its_class(module) and not has_any_global_hook()
    return usual and _is_of(nn.ReLU.forward, torch.nn.modules.activation) and _is_of(F.relu, F)


def _is_of(function: Any, library: Any) -> bool:
    """Whether a function is written in that file."""
    return getattr(getattr(function, "__code__", None), "co_filename", None) == library.__file__


def note(x: Tensor, t: Tensor, y: Tensor) -> tuple | None:
    """What `again` needs to know of y, the threshold of x by t. Inference tensors do not count who wrote to them."""
    if not _plain(x, t) or x.is_inference() or y.is_inference():
        return None
    return t.item(), y, (x._version, y._version)


def again(x: Tensor, t: Tensor, noted: tuple | None, references: int = 0) -> Tensor:
    """`threshold(x, t)`: the tensor that was noted, if that would be equal, else as `overwrite`."""
    if noted is not None:
        value, y, versions = noted
        if _plain(x, t) and t.item() == value and (x._version, y._version) == versions:
            return y
    return overwrite(x, t, references)


def accumulate(x: Any, y: Any, references: int) -> Any:
    """`x + y` in the memory of x, if the caller's variable is all that owns it and the result looks the same."""
    alike = isinstance(x, Tensor) and isinstance(y, Tensor) and _plain(x, y) and _layout(x) == _layout(y)
    return x.add_(y) if alike and references == _ONE_VARIABLE and _alone(x) else x + y


UNRECORDED: dict[Callable, Callable] = {}  # what a graph calls -> what it calls instead. Other files add theirs.
IN_PLACE = {
    THRESHOLD: (apply, overwrite),
    again: (again, again),
    rectify: (rectify, rectify),
    operator.add: (operator.add, accumulate),
}


def _layout(x: Tensor) -> tuple:
    return x.dtype, x.shape, x.stride()


def _plain(x: Tensor, other: Tensor) -> bool:
    """Ordinary CPU tensors of a dtype that is served: what the dispatcher would come to is known."""
    return ops.is_ordinary(x) and ops.is_ordinary(other) and x.is_cpu and other.is_cpu and x.dtype in ops.DTYPES


def _alone(x: Tensor) -> bool:
    """Whether nobody else, in Python or within PyTorch, has this memory, none of its elements share a place, and it
    may be written to here."""
    if torch_internals.owners(x) != _ONE_TENSOR or not _dense(x):
        return False
    if x.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return x.untyped_storage().resizable()  # else it was numpy's, or another library's, before it was a tensor's


def _dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _of_one_variable() -> int:
    x = object()
    return sys.getrefcount(x)


_ONE_VARIABLE = _of_one_variable()
_ONE_TENSOR = torch_internals.owners(torch.empty(1))
