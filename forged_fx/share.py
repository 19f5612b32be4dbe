"""The pass: sites that read the same tensor with the same threshold read one result.

    x ─ threshold(·, t1) ─ conv             becomes             x ─ threshold(·, t1) ─ conv
    └── threshold(·, t2) ─ shortcut                                               └─── shortcut

Such sites have the same c_max, hence under one ratio the same threshold; but each has its own, and a ratio per site may
set them apart. So the passes act on what is equal when the code is compiled, and the code is guarded: once two
thresholds that it took for one differ, the model is compiled anew, without that.

So do a site and one behind a max pool beside it, as a pool's largest value mostly is its input's: where nothing else
reads that input, their thresholds go ahead of the pool together, and no raw value is left to write.

This pass runs on Dynamo's graph and only gives equal thresholds one name, which is right whatever happens to x between
the two reads. The two results become one behind autograd, where nothing is written in place: see `hoist`.
"""

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor

from forged_fx import ops, torch_internals

MAX_POOLS = {
    *(getattr(where, f"max_pool{n}d") for where in (torch, F) for n in (1, 2, 3)),
    *(getattr(F, f"adaptive_max_pool{n}d") for n in (1, 2, 3)),
}


def share(graph: fx.Graph) -> None:
    """Let thresholds of one value, or of its largest ones, that are equal now be one, for as long as they are equal."""
    known: dict[tuple, list[fx.Node]] = {}  # a value, an operator, which parameter -> the different ones that there are
    for node in thresholds_in(graph):
        x, *arguments = node.args
        for i, t in enumerate(arguments):
            if not isinstance(t, fx.Node):
                continue
            others = known.setdefault((_before_pools(x), getattr(node.target, "overloadpacket", node.target), i), [])
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


def _before_pools(x: fx.Node) -> fx.Node:
    """What the value is a max pool of, where nothing reads that raw."""
    if x.target not in MAX_POOLS or not _is_read_forged(pooled := x.all_input_nodes[0]):
        return x
    return _before_pools(pooled)


def _is_read_forged(x: fx.Node) -> bool:
    return all(
        user.target in ops.BY_OPERATOR or (user.target in MAX_POOLS and _is_read_forged(user)) for user in x.users
    )


def _equal(a: fx.Node, b: fx.Node) -> bool:
    if a is b:
        return True
    values = [torch_internals.lifted_value(node) for node in (a, b)]
    plain = all(type(v) is Tensor and not v.is_inference() and not v.dim() for v in values)
    return plain and torch.equal(*values)
