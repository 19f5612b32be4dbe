"""Thresholds ahead of activations that work in place: whoever reads the input later finds the result there.

    h = layer(x); h.relu_(); return other(h)

A threshold's result is new memory. An activation that is given it leaves its own there, and `h` would be as it was.
So the threshold is written to `h` first, and the activation is given `h`; unless nothing else can read it. Where
gradients are recorded, what the threshold's backward looks at is a copy: of what it read, or of its result.
"""

from collections.abc import Callable
from typing import Any

import torch.fx as fx
from torch import nn

from forged_fx.effects import aliases, assignments, is_fresh, may_ask_in_place, named_in_place, writes
from forged_fx.graph_calls import to_be_kept
from forged_fx.ops import BY_OPERATOR
from forged_fx.sites import is_activation
from forged_fx.stats import Stats


def in_graph(graph: fx.Graph, root: nn.Module, stats: Stats) -> None:
    """Of the graph that `transform` made of `root`. stats: they say which activations work in place (older files do
    not: there, what may is taken to)."""
    for threshold in list(graph.nodes):
        if threshold.target not in BY_OPERATOR or not is_activation(threshold.meta["site"]):
            continue
        x, (reader,) = threshold.args[0], threshold.users
        dies = len(x.users) == 1 and is_fresh(x, root) and reader.users
        known, told = stats.sites[threshold.meta["site"]].in_place, BY_OPERATOR[threshold.target].told
        if not (writes(reader, root) if known is None else known):
            continue
        if dies and told:
            with graph.inserting_before(reader):
                reader.replace_input_with(threshold, graph.call_function(to_be_kept, (threshold,)))
        if not dies:  # (a surrogate's backward looks at the input, whatever the kind)
            with graph.inserting_before(threshold):
                threshold.replace_input_with(x, graph.call_function(to_be_kept, (x,)))
            with graph.inserting_before(reader):
                reader.replace_input_with(threshold, graph.call_method("copy_", (x, threshold)))


def keep_what_is_read(graph: fx.Graph, root: nn.Module) -> None:
    """Where an augmented assignment (`x += y`) writes to what a threshold has read, the threshold reads a copy: its
    backward looks at it, or a surrogate's does. (To the layer behind it nothing happens: it has the result.)"""
    order = {node: i for i, node in enumerate(graph.nodes)}
    thresholds = [node for node in order if node.target in BY_OPERATOR]
    for write in assignments(graph):
        shared = aliases(write.args[0], write, root)
        for threshold in thresholds:
            x = threshold.args[0]
            if x in shared and x.target is not to_be_kept and order[threshold] < order[write]:
                with graph.inserting_before(threshold):
                    threshold.replace_input_with(x, graph.call_function(to_be_kept, (x,)))


def works_in_place(function: Callable, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether this call of an activation function does."""
    return named_in_place(function) or may_ask_in_place(args, kwargs)
