"""The pass: in the graph that `transform` makes, move a threshold up to the producer that it can be fused with.

    norm ─ roll ─ view ─ threshold ─ linear      becomes      norm ─ threshold ─ roll ─ view ─ linear

Values stay what they are, as in `forged_fx/hoist.py`, which does this for compilers, in their graph; gradients too, but
that a producer may get them in another memory layout, and add them up in another order. Here the graph is as the model
was written: functions and methods, of which some may write in place, and readers that ask for a shape alone. By itself
a threshold costs the same in either place, so it stays where it is unless it can be fused.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor

from forged_fx.hoist import is_zero
from forged_fx.rewrite import fact_of, function_of, is_call


def _always(node: fx.Node) -> bool:
    return True


def _pads_with_zeros(node: fx.Node) -> bool:
    given = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
    return given.get("mode", "constant") == "constant" and is_zero(given.get("value", 0))


# Calls that only move elements, or fill in zeros -> on which condition. A method is listed as `torch.Tensor` holds it.
MOVES: dict[Any, Callable[[fx.Node], bool]] = {
    **{getattr(torch, name): _always for name in ("flatten", "flip", "permute", "reshape", "roll", "transpose")},
    **{getattr(Tensor, name): _always for name in ("flatten", "flip", "permute", "reshape", "roll", "transpose")},
    **{getattr(Tensor, name): _always for name in ("contiguous", "squeeze", "unflatten", "unsqueeze", "view")},
    torch.squeeze: _always,
    torch.unsqueeze: _always,
    F.pad: _pads_with_zeros,
}


def top(threshold: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The node that the threshold may move up to, and who reads it there: a move, or the threshold itself.

    Nothing else may read what is moved on the way, or write there: it is often the same memory.
    """
    below, node = threshold, threshold.args[0]
    while _moves(node) and readers(node) == {below}:
        below, node = node, node.args[0]
    return node, below


def lift(threshold: fx.Node, node: fx.Node, below: fx.Node) -> None:
    """Move the threshold between the node and `below`, which reads it."""
    threshold.replace_all_uses_with(threshold.args[0])
    for moved in (*threshold.args[1:], threshold):
        below.prepend(moved)
    threshold.replace_input_with(threshold.args[0], node)
    below.replace_input_with(node, threshold)


def readers(node: fx.Node) -> set[fx.Node]:
    """Who reads the node's values, and not only its shape and the like."""
    return {user for user in node.users if fact_of(user) is None}


def _moves(node: Any) -> bool:
    if not isinstance(node, fx.Node) or not is_call(node):
        return False
    function = function_of(node)
    if function not in MOVES or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    # The data alone is a value: what else there is are sizes. (Or a dtype: `view` reads the bits as another one.)
    rest = (*node.args[1:], *node.kwargs.values())
    return MOVES[function](node) and not any(_is_dtype(arg) for arg in rest)


def _is_dtype(arg: Any) -> bool:
    return isinstance(arg, torch.dtype) or (isinstance(arg, fx.Node) and fact_of(arg) == "dtype")
