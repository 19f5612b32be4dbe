"""What a graph may be given: it is of calls of one kind, and refuses others, saying what to do."""

import dataclasses
import inspect
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.fx as fx

from forged_fx import torch_internals


def by_name(model: torch.nn.Module, args: tuple, kwargs: dict) -> Mapping[str, Any]:
    """A call's arguments, by the names of the forward's parameters. TypeError where it does not take them."""
    return inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments


def check_arguments(graph: fx.Graph) -> None:
    """Arguments that calibration did not give are fixed in a graph: it refuses other values, and says what to do."""
    for node in graph.find_nodes(op="call_function", target=torch_internals.assert_is_none):
        # Unpickling a graph that holds this function breaks every later trace of the process (torch 2.14).
        value, message = node.args
        with graph.inserting_before(node):
            graph.call_function(torch_internals.assertion, (graph.call_function(operator.eq, (value, None)), message))
        graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=torch_internals.assertion):
        if "has been specialized to have value" in str(node.args[-1]):  # the tracer's words
            node.args = (node.args[0], f"{node.args[1]}: calibrate with a batch that gives it besides")


def require_parts(argument: fx.Node, value: Any, fields: Iterable[str]) -> None:
    """`require`, of the items and fields that the forward takes from an argument which is a group of values.

    value: it, in calibration; what was not there is not asked for. fields: of the argument's attributes those that were
    asked for, which are no nodes yet.
    """
    if not (isinstance(value, Mapping | list | tuple) or dataclasses.is_dataclass(value)):
        return
    for node in [n for n in argument.users if n.target in (operator.getitem, "get") and n.args[0] is argument]:
        if isinstance(key := node.args[1], str | int) and _item(value, key) is not None:
            require(node, None)
    for name in sorted(fields):
        held = getattr(value, name, None)
        if held is not None and not callable(held):
            with argument.graph.inserting_after(argument):
                field = argument.graph.call_function(getattr, (argument, name))
            require(field, None)


def _item(value: Any, key: str | int) -> Any:
    try:
        return value[key]
    except (LookupError, TypeError):
        return None


def require(argument: fx.Node, absent: Any) -> None:
    """Have a graph refuse calls without an argument: the forward would do something else, and a graph cannot ask."""
    graph = argument.graph
    with graph.inserting_after(argument):  # (what fixes another argument stands ahead of it)
        there = graph.call_function(operator.is_not, (argument, absent))
    with graph.inserting_after(there):
        name = argument.target if argument.op == "placeholder" else str(argument.args[1])
        graph.call_function(torch_internals.assertion, (there, _LEFT_OUT.format(name)))


_LEFT_OUT = (
    "calibration gave {0!r}, and this graph is of calls that give it: give it, or forge with an example that does "
    "not, transform(..., example=((x,), {{}})), which takes both"
)
