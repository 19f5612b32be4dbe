"""The pass: in the graph that `transform` makes, move a threshold up to the producer that it can be fused with.

    norm ─ roll ─ view ─ threshold ─ linear      becomes      norm ─ threshold ─ roll ─ view ─ linear

Values and gradients stay what they are, as in `forged_fx/hoist.py`, which does this for compilers, in their graph. Here
the graph is as the model was written: functions and methods, of which some may write in place, and readers that ask for
a shape alone. By itself a threshold costs the same in either place, so it stays where it is unless it can be fused.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor

from forged_fx import ops

FORGED = {f.op: f for f in ops.FUNCTIONS.values()}


def _always(node: fx.Node) -> bool:
    return True


def _pads_with_zeros(node: fx.Node) -> bool:
    given = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
    return given.get("mode", "constant") == "constant" and given.get("value") in (None, 0)


# Calls that only move elements, or fill in zeros -> on which condition. A method is listed as `torch.Tensor` holds it.
MOVES: dict[Any, Callable[[fx.Node], bool]] = {
    **{getattr(torch, name): _always for name in ("flatten", "flip", "permute", "reshape", "roll", "transpose")},
    **{getattr(Tensor, name): _always for name in ("flatten", "flip", "permute", "reshape", "roll", "transpose")},
    **{getattr(Tensor, name): _always for name in ("contiguous", "squeeze", "unflatten", "unsqueeze", "view")},
    torch.squeeze: _always,
    torch.unsqueeze: _always,
    F.pad: _pads_with_zeros,
}
SHAPES = {"shape", "ndim", "size", "dim"}  # attributes and methods that read no value


def lift(graph: fx.Graph, joins: Callable[[fx.Node], bool]) -> None:
    """Move thresholds up, where nothing else reads the values on the way, to a node that they can be fused with."""
    for threshold in [node for node in graph.nodes if node.op == "call_function" and node.target in FORGED]:
        below, node = threshold, threshold.args[0]
        while _moves(node) and readers(node) == {below}:
            below, node = node, node.args[0]
        if below is threshold or not FORGED[threshold.target].moves or readers(node) != {below} or not joins(node):
            continue
        threshold.replace_all_uses_with(threshold.args[0])
        for moved in (*threshold.args[1:], threshold):
            below.prepend(moved)
        threshold.replace_input_with(threshold.args[0], node)
        below.replace_input_with(node, threshold)


def readers(node: fx.Node) -> set[fx.Node]:
    """Who reads the node's values, and not only its shape."""
    return {user for user in node.users if not reads_shape(user)}


def reads_shape(user: fx.Node) -> bool:
    if user.op == "call_method":
        return user.target in SHAPES
    return user.target is getattr and user.args[1] in SHAPES


def _moves(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return False
    function = getattr(Tensor, node.target, None) if node.op == "call_method" else node.target
    # The data alone is a value: what else there is are sizes.
    moves = function in MOVES and bool(node.args) and isinstance(node.args[0], fx.Node)
    return moves and MOVES[function](node)
