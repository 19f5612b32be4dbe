"""The pass: in the graph that `transform` makes, thresholds that read the same tensor become one call.

    x ─ threshold(·, t1) ─ conv             becomes             x ─ each(·, [t1, t2]) ─ [0] ─ conv
    └── threshold(·, t2) ─ shortcut                                                   └ [1] ─ shortcut

The call sees all thresholds when it runs, and need not compute twice what is equal then: see `forged_fx/in_place.py`.
`forged_fx/share.py` does this for compilers, in their graph, on what is equal when the code is compiled.
"""

import operator
from collections.abc import Callable

import torch.fx as fx
from torch import nn

from forged_fx.effects import aliases, writes


def share(thresholds: list[fx.Node], each: Callable, root: nn.Module) -> None:
    """Let thresholds, calls of (x, t), that read one value be one call of `each`, (x, [t, ...]), where the first is.

    The value has to be the same at all of them, and none of their readers may write, as the results may be one tensor.
    """
    by_value: dict[fx.Node, list[fx.Node]] = {}
    for node in thresholds:
        by_value.setdefault(node.args[0], []).append(node)
    for x, several in by_value.items():
        readers = [user for node in several for user in node.users]
        if len(several) > 1 and not any(writes(reader, root) for reader in readers) and _stays(x, several, root):
            _join(x, several, each)


def _stays(x: fx.Node, several: list[fx.Node], root: nn.Module) -> bool:
    """Whether nothing writes into x's memory between the first of several nodes and the last one."""
    same_memory = aliases(x, root)
    node, last = several[0], several[-1]
    while node is not last:
        if writes(node, root) and not same_memory.isdisjoint(node.all_input_nodes):
            return False
        node = node.next
    return True


def _join(x: fx.Node, several: list[fx.Node], each: Callable) -> None:
    first = several[0]
    parameters = [node.args[1] for node in several]
    for parameter in parameters:
        first.prepend(parameter)
    with first.graph.inserting_before(first):
        joined = first.graph.call_function(each, (x, parameters))
        results = [first.graph.call_function(operator.getitem, (joined, i)) for i in range(len(several))]
    for node, result in zip(several, results, strict=True):
        node.replace_all_uses_with(result)
        first.graph.erase_node(node)
