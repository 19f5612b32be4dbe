"""The pass: sites that read the same tensor with the same threshold read one result.

    x ─ threshold(·, t1) ─ conv             becomes             x ─ threshold(·, t1) ─ conv
    └── threshold(·, t2) ─ shortcut                                               └─── shortcut

Such sites have the same c_max, hence under one ratio the same threshold; but each has its own, and a ratio per site may
set them apart. So the passes act on what is equal when the code is compiled, and the code is guarded: once two
thresholds that it took for one differ, the model is compiled anew, without that.

This pass runs on Dynamo's graph and only gives equal thresholds one name, which is right whatever happens to x between
the two reads. The two results become one behind autograd, where nothing is written in place: see `hoist`.
"""

import torch
import torch.fx as fx
from torch import Tensor

from forged_fx import torch_internals


def share(graph: fx.Graph) -> None:
    """Let thresholds of one value that are equal now be one, for as long as they are equal."""
    known: dict[fx.Node, list[fx.Node]] = {}  # a value -> the different thresholds that it is read with
    for node in thresholds_in(graph):
        x, t, *straight_through = node.args
        same = next((other for other in known.setdefault(x, []) if _equal(other, t)), None)
        if same is None:
            known[x].append(t)
        elif same is not t:
            torch_internals.guard_equal(same, t)
            node.args = (x, same, *straight_through)


def thresholds_in(graph: fx.Graph) -> list[fx.Node]:
    """The thresholds in one of Dynamo's graphs: those that a graph calls, and those that Python code does."""
    op = torch.ops.forged_fx.threshold
    return [node for node in graph.nodes if node.target in (op, op.default)]


def _equal(a: fx.Node, b: fx.Node) -> bool:
    if a is b:
        return True
    values = [torch_internals.lifted_value(node) for node in (a, b)]
    return all(type(v) is Tensor and not v.is_inference() for v in values) and torch.equal(*values)
