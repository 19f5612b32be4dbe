"""The pass: in the graph that `transform` makes, thresholds that read the same tensor know of the first of them.

    x ─ threshold(·, t1) ─ conv             becomes             x ─ threshold(·, t1) ─ y ─ conv
    └── threshold(·, t2) ─ shortcut                             └── again(·, t2, note of y) ─ shortcut

When it runs, `again` gives y once more if it would compute the same: see `forged_fx/in_place.py`. `forged_fx/share.py`
does this for compilers, in their graph, on what is equal when the code is compiled.
"""

from collections.abc import Callable

import torch.fx as fx


def share(thresholds: list[fx.Node], note: Callable, again: Callable) -> None:
    """Let each threshold, a call of (x, t), whose x an earlier one reads be a call of `again`, (x, t, what was noted).

    note: called with the first one's x, t and result.
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
