"""The pass: insert thresholds into a graph.

    x ── linear(x, w)        becomes        x ── threshold(x, t) ── linear(·, w)

One pass serves every dialect (call_module, call_function, call_method, aten, Dynamo's graphs with lifted parameters):
what differs between them is only how a node's module and a value's origin are known, and both are passed in.
"""

from collections.abc import Callable

import torch
import torch.fx as fx

import forged_fx.ops  # noqa: F401 (defines the op)
from forged_fx.sites import CALLS, Call, Numbering, Origin, data_operands, get, operand_name, replace

_LAYER = Call("layer", "x", ((0, "input"),))


def insert_thresholds(
    graph: fx.Graph,
    place: Callable[[str], fx.Node | None],
    module: Callable[[fx.Node], str],
    layers: set[str],
    source: Callable[[fx.Node], Origin],
    straight_through: bool = False,
) -> list[str]:
    """Put a threshold ahead of each site of `graph`; returns the names of the sites, in execution order.

    place: called for each site, with the insertion point set ahead of its call; the node that gives its threshold, or
        None to leave the site alone.
    module: node -> the name of the module that runs it.
    layers: names of modules that are a site as a whole, where the graph calls them as modules.
    source: the origin of a placeholder or get_attr node.
    """
    numbering, done = Numbering(), []
    origins: dict[fx.Node, Origin] = {}
    for node in list(graph.nodes):
        for name, key in _sites(node, module, layers, origins, numbering):
            with graph.inserting_before(node):
                threshold = place(name)
                if threshold is None:
                    continue
                x = get(node.args, node.kwargs, key)
                args = (x, threshold, True) if straight_through else (x, threshold)
                new = graph.create_node("call_function", torch.ops.forged_fx.threshold.default, args, name="threshold")
            new.meta = {**{k: node.meta[k] for k in ("nn_module_stack", "stack_trace") if k in node.meta}, "site": name}
            if "example_value" in x.meta:
                new.meta["example_value"] = x.meta["example_value"]
            origins[new] = Origin.DATA
            node.args, node.kwargs = replace(node.args, node.kwargs, key, new)
            done.append(name)
        origins[node] = _origin(node, origins, source)
    graph.lint()
    return done


def _sites(
    node: fx.Node, module: Callable, layers: set[str], origins: dict[fx.Node, Origin], numbering: Numbering
) -> list[tuple[str, tuple]]:
    if node.op == "call_module" and node.target in layers:
        call: Call | None = _LAYER
    elif node.op in ("call_function", "call_method"):
        call = CALLS.get(getattr(torch.Tensor, node.target, None) if node.op == "call_method" else node.target)
    else:
        return []
    if call is None:
        return []
    name = numbering.call(node.target if call is _LAYER else module(node))
    if call is _LAYER:
        return [(name, call.operands(node.args, node.kwargs)[0][1])]
    operands = data_operands(call, node.args, node.kwargs, lambda v: origins.get(v, Origin.CONSTANT))
    return [(operand_name(name, i), operand.key) for i, operand in enumerate(operands)]


def _origin(node: fx.Node, origins: dict[fx.Node, Origin], source: Callable[[fx.Node], Origin]) -> Origin:
    if node.op in ("placeholder", "get_attr"):
        return source(node)
    inputs = max((origins[n] for n in node.all_input_nodes), default=Origin.CONSTANT)
    return max(inputs, Origin.PARAMETER) if node.op == "call_module" else inputs
