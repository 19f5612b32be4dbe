"""The pass: insert thresholds into a graph.

    x ── linear(x, w)        becomes        x ── threshold(x, t) ── linear(·, w)

One pass serves every dialect (call_module, call_function, call_method, aten, Dynamo's graphs with lifted parameters):
what differs between them is how a node's module, a call's name and a value's origin are known, and these are passed in.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from forged_fx.sites import CALLS, Call, Numbering, Origin, data_operands, get, joined, operand_name, replace

# A module that is a site as a whole, by the mark in the site's name.
WHOLE = {"#": Call("layer", "x", ((0, "input"),)), "@": Call("activation layer", "a", ((0, "input"),))}


@dataclass(frozen=True, eq=False)
class Placed:
    """What goes ahead of a site: an operator, and its arguments besides x: nodes of its buffers, a channel."""

    op: Callable
    args: tuple


@dataclass(frozen=True, eq=False)
class CallNode:
    """A node that calls a function of `CALLS`, or a module that is a site as a whole."""

    node: fx.Node
    call: Call
    module: str  # the module that runs it


def nested(node: fx.Node) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]] | None:
    """The graph that a node runs, as Dynamo keeps what is checkpointed: it, and its placeholders' values outside."""
    if node.target is not torch.ops.higher_order.tag_activation_checkpoint:
        return None
    name, *operands = node.args
    body = getattr(node.graph.owning_module, name.target)
    return body, dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))


def outermost(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Each placeholder of a nested graph, however deep -> the node of `graph` that it stands for."""
    found: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if body := nested(node):
            found |= body[1] | {inner: body[1].get(outer, outer) for inner, outer in outermost(body[0].graph).items()}
    return found


def find_calls(
    graph: fx.Graph,
    module: Callable[[fx.Node], str],
    layers: Mapping[str, Call],
    table: Mapping[Callable, Call] = CALLS,
) -> list[CallNode]:
    """The calls that could be sites, in execution order, those in nested graphs among them.

    module: node -> the name of the module that runs it. layers: names of modules that are a site as a whole, where the
    graph calls them as modules, and as what. table: the functions that could be sites.
    """
    found = []
    for node in graph.nodes:
        if body := nested(node):
            found += find_calls(body[0].graph, module, layers, table)
        elif node.op == "call_module" and node.target in layers:
            found.append(CallNode(node, layers[node.target], node.target))
        elif is_call(node):
            if (target := function_of(node)) in table:
                found.append(CallNode(node, table[target], module(node)))
    return found


def is_call(node: fx.Node) -> bool:
    """Whether it calls a function or a method; what a module does is another question."""
    return node.op in ("call_function", "call_method")


def function_of(node: fx.Node) -> Any:
    """What a call of a function or method calls; a method as `torch.Tensor` holds it, None if it does not."""
    return getattr(torch.Tensor, node.target, None) if node.op == "call_method" else node.target


def number(calls: list[CallNode]) -> list[str]:
    """The calls' names, where the graph holds a whole forward pass."""
    numbering = Numbering()
    return [numbering.call(call.module, call.call.mark) for call in calls]


def insert_thresholds(
    graph: fx.Graph,
    calls: list[CallNode],
    names: list[str],
    place: Callable[[str], Placed | None],
    source: Callable[[fx.Node], Origin],
) -> None:
    """Put a forged function ahead of each site among the calls.

    place: called with a site's name, the insertion point being ahead of its call; returns what to put there, or None to
        leave the site alone.
    source: the origin of a placeholder or get_attr node.
    """
    _insert(graph, {c.node: (c.call, name) for c, name in zip(calls, names, strict=True)}, place, source)


def _insert(
    graph: fx.Graph,
    name_of: dict[fx.Node, tuple[Call, str]],
    place: Callable[[str], Placed | None],
    source: Callable[[fx.Node], Origin],
) -> None:
    origins: dict[fx.Node, Origin] = {}
    for node in list(graph.nodes):
        if body := nested(node):
            _insert_nested(node, *body, name_of, place, origins)
        for name, key in _operands(node, *name_of[node], origins) if node in name_of else ():
            with graph.inserting_before(node):
                placed = place(name)
                if placed is None:
                    continue
                x = get(node.args, node.kwargs, key)
                new = graph.create_node("call_function", placed.op, (x, *placed.args), name="threshold")
            new.meta = {**{k: node.meta[k] for k in ("nn_module_stack", "stack_trace") if k in node.meta}, "site": name}
            if "example_value" in x.meta:
                new.meta["example_value"] = x.meta["example_value"]
            origins[new] = Origin.DATA
            node.args, node.kwargs = replace(node.args, node.kwargs, key, new)
        origins[node] = _origin(node, origins, source)
    graph.lint()


def _insert_nested(
    node: fx.Node,
    body: fx.GraphModule,
    outside: dict[fx.Node, fx.Node],
    name_of: dict[fx.Node, tuple[Call, str]],
    place: Callable[[str], Placed | None],
    origins: dict[fx.Node, Origin],
) -> None:
    """The same in a nested graph: it gets each threshold from outside, as one more operand."""
    after_inputs = next(n for n in body.graph.nodes if n.op != "placeholder")

    def inside(threshold: fx.Node) -> fx.Node:
        origins[threshold] = Origin.CONSTANT
        node.args = (*node.args, threshold)
        with body.graph.inserting_before(after_inputs):
            return body.graph.placeholder(f"forged_threshold_{len(node.args)}")

    def place_inside(site: str) -> Placed | None:
        with node.graph.inserting_before(node):
            placed = place(site)
        return placed and Placed(placed.op, fx.node.map_arg(placed.args, inside))

    def source_inside(inner: fx.Node) -> Origin:
        return origins[outside[inner]] if inner in outside else Origin.CONSTANT

    _insert(body.graph, name_of, place_inside, source_inside)
    body.recompile()


def _operands(node: fx.Node, call: Call, name: str, origins: dict[fx.Node, Origin]) -> list[tuple[str, tuple]]:
    if call in WHOLE.values():
        return [(name, call.operands(node.args, node.kwargs)[0][1])]
    operands = data_operands(call, node.args, node.kwargs, lambda v: origins.get(v, Origin.CONSTANT))
    return [(operand_name(name, i), operand.key) for i, operand in enumerate(operands)]


# What a tensor says about itself is no data, nor is what is computed from it (`w.expand(x.shape[0], -1)`).
_FACTS = {"shape", "ndim", "dtype", "device", "size", "dim", "numel", "stride"}


def fact_of(node: fx.Node) -> str | None:
    """What of `_FACTS` the node asks a tensor for, as an attribute or by a method."""
    name = node.args[1] if node.target is getattr else node.target if node.op == "call_method" else None
    return name if name in _FACTS else None


def _origin(node: fx.Node, origins: dict[fx.Node, Origin], source: Callable[[fx.Node], Origin]) -> Origin:
    if node.op in ("placeholder", "get_attr"):
        return source(node)
    if fact_of(node) is not None:
        return Origin.CONSTANT
    return joined(*(origins[n] for n in node.all_input_nodes))
