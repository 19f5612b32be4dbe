"""How a forged graph runs where nothing is recorded: its thresholds are plain calls, in place where they can be.

In eager mode a threshold costs a trip through PyTorch's dispatcher, a pass over memory, and new memory for its result.
Without gradients the trip is saved, and the new memory wherever nobody else can tell: the graph has no later reader of
the input, and when it comes to it, the tensor has no other owner. A hook that kept it, a view that is still alive, the
branch of a residual: each is an owner, and is counted when the threshold runs, so that nothing is assumed of modules.

Recorded, watched or compiled runs (gradients, function and dispatch modes, torch.func, tracers, compilers) get the
graph as it is written.
"""

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from forged_fx import ops, torch_internals
from forged_fx.torch_internals import dispatch_keys

THRESHOLD = torch.ops.forged_fx.threshold.default


def offer(forged: fx.GraphModule) -> None:
    """Let the class of a graph module that was just compiled choose, call by call, how to run."""
    as_written, unrecorded = type(forged).forward, _unrecorded(forged.graph)

    @functools.wraps(as_written)
    def forward(self: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch_internals.watched():
            return as_written(self, *args, **kwargs)
        return unrecorded(self, *args, **kwargs)

    type(forged).forward = forward


def _unrecorded(graph: fx.Graph) -> Callable:
    """The graph's code, with its thresholds as plain calls."""
    graph = copy.deepcopy(graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.find_nodes(op="call_function", target=THRESHOLD):
        if len(node.args) > 2:
            continue  # its gradient was chosen
        x, _ = node.args
        node.target = apply
        if x.op not in ("placeholder", "get_attr") and max(x.users, key=order.__getitem__) is node:
            with graph.inserting_before(node):
                references = graph.call_function(sys.getrefcount, (x,))
            node.target, node.args = overwrite, (*node.args, references)
    return torch_internals.forward_of(graph)


def apply(x: Tensor, t: Tensor) -> Tensor:
    """`threshold(x, t)` in new memory."""
    if not _plain(x, t):
        return (ops.direct(THRESHOLD, x, t) or THRESHOLD)(x, t)
    return torch.hardshrink(x, ops._largest_below(t.item(), x.dtype), out=torch.empty_like(x))


def overwrite(x: Tensor, t: Tensor, references: int) -> Tensor:
    """`threshold(x, t)` in the memory of x, if the caller's variable is all that owns it.

    references: to x, as the caller counts them. (Here there would be one more or not, as Dynamo has calls run.)
    """
    if references != _ONE_VARIABLE or not _plain(x, t) or not _alone(x):
        return apply(x, t)
    return torch.hardshrink(x, ops._largest_below(t.item(), x.dtype), out=x)


def _plain(x: Tensor, t: Tensor) -> bool:
    """Ordinary CPU tensors of a dtype that is served: what the dispatcher would come to is known."""
    return dispatch_keys(x) in ops.PLAIN and dispatch_keys(t) in ops.PLAIN and x.dtype in ops.DTYPES


def _alone(x: Tensor) -> bool:
    """Whether no other tensor, in Python or within PyTorch, has this memory, and none of its elements share a place."""
    dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return dense and torch_internals.owners(x) == _ONE_TENSOR


def _of_one_variable() -> int:
    x = object()
    return sys.getrefcount(x)


_ONE_VARIABLE = _of_one_variable()
_ONE_TENSOR = torch_internals.owners(torch.empty(1))
