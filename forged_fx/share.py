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

from forged_fx import ops, torch_internals


def share(graph: fx.Graph) -> None:
    """Let thresholds of one value that are equal now be one, for as long as they are equal."""
    known: dict[tuple, list[fx.Node]] = {}  # a value, an operator, which parameter -> the different ones that there are
    for node in thresholds_in(graph):
        x, *arguments = node.args
        for i, t in enumerate(arguments):
            if not isinstance(t, fx.Node):
                continue
            others = known.setdefault((x, getattr(node.target, "overloadpacket", node.target), i), [])
            same = next((other for other in others if _equal(other, t)), None)
            if same is None:
                others.append(t)
            elif same is not t:
                torch_internals.guard_equal(same, t)
                arguments[i] = same
        node.args = (x, *arguments)


def thresholds_in(graph: fx.Graph) -> list[fx.Node]:
    """The forged functions that a graph calls, in its order: as an overload, or, as Python code does, as a packet."""
    return [node for node in graph.nodes if node.op == "call_function" and node.target in ops.BY_OPERATOR]


def _equal(a: fx.Node, b: fx.Node) -> bool:
    if a is b:
        return True
    values = [torch_internals.lifted_value(node) for node in (a, b)]
    plain = all(type(v) is Tensor and not v.is_inference() and not v.dim() for v in values)
    return plain and torch.equal(*values)
