"""The pass: a threshold and the producer ahead of it become one call, which is one kernel on a GPU in eager mode.

    x ─ bn ─ relu ─ threshold ─ conv       becomes       x ─ producer_threshold(·, t, [bn, relu]) ─ conv

The producer is what `forged_fx/fused_ops.py` can compute: an addition, a norm or another affine map, an addition, an
activation. Each step has a row in `forged_fx/producers.py`. A value on the way that others read too, such as a residual
stream, becomes a second result.

A threshold is any forged function here whose parameters are scalars (`fused_ops.FORGED`).

The call holds the modules themselves, and asks them each time: in train mode, with hooks, replaced by another module
or under autocast they run one by one, as written. So nothing is frozen, and every name stays in the checkpoint. A
compiler too gets them one by one, and fuses them by itself.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from forged_fx import fused_ops, in_place
from forged_fx.effects import draws, is_fresh, modules_of, writes
from forged_fx.fused_ops import FORGED
from forged_fx.hoist_traced import lift, top
from forged_fx.models import has_hooks, is_as_its_class
from forged_fx.producers import FUNCTIONS, MAPS, MODULES, NAMES, ROLES, Arguments, Producer, name_of, row_of
from forged_fx.rewrite import fact_of, function_of, is_call
from forged_fx.torch_internals import has_any_global_hook

THRESHOLDS = {function.op: name for name, function in FORGED.items()}

# ---- what runs

# The name of a function, or of a module's class; the module; where x goes; the other arguments.
Step = tuple[str, nn.Module | None, int, tuple, dict]


def producer_threshold(
    x: Tensor, parameters: tuple[Tensor, ...], steps: list[Step], keep: int | None, function: str
) -> Any:
    """The steps, one after the other, and the forged function: as one operator if that can be, else one by one.

    keep: the index of the step whose result is returned too.
    """
    if isinstance(x, fx.Proxy):  # a graph is unpickled by tracing it again: the call is to stay one
        return x.tracer.create_proxy("call_function", producer_threshold, (x, parameters, steps, keep, function), {})
    one = None if torch.compiler.is_compiling() else _as_one(x, steps, keep)
    if one is not None:
        op, arguments = one
        t, *limit = parameters
        return op(x, t, function=function, limit=limit[0] if limit else None, **arguments)
    kept = None
    for i, (name, module, position, args, kwargs) in enumerate(steps):
        step = FUNCTIONS[name][0] if module is None else module
        x = step(*args[:position], x, *args[position:], **kwargs)
        kept = x if i == keep else kept
    y = FORGED[function].op(x, *parameters)
    return y if keep is None else (y, kept)


def _unrecorded(x: Tensor, parameters: tuple[Tensor, ...], steps: list[Step], keep: int | None, function: str) -> Any:
    if (one := _as_one(x, steps, keep)) is None:
        return producer_threshold(x, parameters, steps, keep, function)
    op, arguments = one
    return fused_ops.unrecorded(op, x, parameters, {**arguments, "function": function})


in_place.UNRECORDED[producer_threshold] = _unrecorded


def _as_one(x: Tensor, steps: list[Step], keep: int | None) -> tuple[Callable, Arguments] | None:
    """The fused operator and its arguments; None where the steps have to run one by one now."""
    if not isinstance(x, Tensor) or x.is_meta or has_any_global_hook() or torch.is_autocast_enabled(x.device.type):
        return None
    found: Arguments = {}
    roles = []
    for name, module, position, args, kwargs in steps:
        row, more = FUNCTIONS[name][1] if module is None else row_of(module), None
        if row is None or (module is not None and row.role != MODULES[name].role):
            return None  # another module is there now, which has another place in the chain, if any
        if row.dims and x.dim() not in row.dims:
            return None
        if module is None:
            more = row.arguments(*args, **kwargs)
        elif is_as_its_class(module):
            more = row.arguments(module)
        if more is not None and row.role in ("add", "scale"):
            more = _operand(x, row.role, position, *more.values())
        if more is None or not _goes_with(found, more):
            return None
        if row.role in MAPS and "residual" in found:
            found["add_first"] = True
        found |= more
        roles.append(row.role)
    norm = "shape" in found
    op = torch.ops.forged_fx.norm_threshold if norm else torch.ops.forged_fx.elementwise_threshold
    if keep is None:
        return op.default, found
    first = roles[keep] == "add" and (norm or "add_first" in found)
    return op.keep, {**found, "keep": "sum" if first else "value"}


def _goes_with(found: Arguments, more: Arguments) -> bool:
    """One operator takes one of each, along one dimension, and a scale ahead of a bias."""
    same_channel = "channel" not in more or found.get("channel", more["channel"]) == more["channel"]
    return same_channel and found.keys() & more.keys() <= {"channel"} and not ("weight" in more and "bias" in found)


def _operand(x: Tensor, role: str, position: int, value: Any) -> Arguments | None:
    """The other operand of an addition or a product: of x's shape, or one element per channel."""
    if not isinstance(value, Tensor) or value.dtype != x.dtype or value.device != x.device or value.dim() > x.dim():
        return None
    if role == "add" and value.shape == x.shape:
        # Where two layouts differ, a sum has that of its first operand.
        return {"residual": value} if position == 0 or value.stride() == x.stride() else None
    wide = [d for d, size in enumerate(value.shape) if size > 1]
    channel = x.dim() - value.dim() + wide[0] if len(wide) == 1 else -1
    if channel < 0 or value.numel() != x.shape[channel]:
        return None
    return {"weight" if role == "scale" else "bias": value.reshape(-1), "channel": channel}


# ---- the pass


@dataclass(frozen=True, eq=False)
class _Found:
    """A step in the graph: its node, the node of x, and the rest of `Step`."""

    node: fx.Node
    x: fx.Node
    row: Producer
    name: str
    module: nn.Module | None
    position: int
    args: tuple

    @property
    def label(self) -> str:
        """For people."""
        return self.name.rpartition(".")[2].strip("_")


def fuse(forged: fx.GraphModule) -> dict[str, str]:
    """Replace each threshold that has a producer ahead of it, and the producer, by one call; in place.

    Returns site -> what its kernel computes besides, for each of them.
    """
    done = {}
    thresholds = [node for node in forged.graph.nodes if node.op == "call_function" and node.target in THRESHOLDS]
    for threshold in thresholds:
        node, reader = threshold.args[0], threshold
        if FORGED[THRESHOLDS[threshold.target]].moves:
            node, reader = top(threshold)
        steps, keep = _chain(node, reader, forged)
        # Past moves, which are no steps: where it stands now it has no chain. Nobody else may read what it moves up to,
        # now or later: a move may be a copy, which keeps what is written there from the threshold's gradient.
        moved = reader is not threshold
        if all(step.row.role == "pass" for step in steps) or (moved and keep is not None):
            continue
        if moved:
            lift(threshold, node, reader)
        _replace(threshold, steps, keep)
        done[threshold.meta["site"]] = " + ".join(step.label for step in steps if step.row.role != "pass")
    forged.graph.lint()
    forged.recompile()
    return done


def _chain(last: fx.Node, reader: fx.Node, root: nn.Module) -> tuple[list[_Found], int | None]:
    """The steps that end in the node `last`, which `reader` reads, first to last, and the index of the one whose result
    others read too."""
    order = {node: i for i, node in enumerate(reader.graph.nodes)}
    steps: list[_Found] = []
    roles: list[str] = []
    shared = None
    node = last
    while (step := _step(node, root)) is not None:
        role = step.row.role
        if role == "add" and {*MAPS, "norm"}.intersection(roles):
            role = "first"
        if role != "pass":
            below = [*ROLES].index(role)
            if any([*ROLES].index(r) >= below or r in ROLES[role] for r in roles):
                break
        others = set(node.users) - {steps[0].node if steps else reader}
        if any(order[other] < order[last] for other in others):
            break  # it would have to be there before the call that makes it, which stands where the last step does
        if not roles:  # what is behind this step has its shape, too
            others = {other for other in others if fact_of(other) is None}
        if others and (shared is not None or (roles and role != "first")):
            break
        if not _may_move([step, *steps], reader, order, root):
            break
        shared = step if others else shared
        steps.insert(0, step)
        roles += [role] * (role != "pass")
        node = step.x
    return steps, None if shared is None else steps.index(shared)


def _step(node: Any, root: nn.Module) -> _Found | None:
    """What the node does to one of its inputs, if there is a row for it."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "call_module":
        module = root.get_submodule(node.target)
        row = row_of(module)
        plain = len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs
        if row is None or not plain or has_hooks(module):
            return None
        return _Found(node, node.args[0], row, name_of(type(module)), module, 0, ())  # type: ignore[arg-type]
    name = NAMES.get(function_of(node)) if is_call(node) else None
    if name is None:
        return None
    row, position = FUNCTIONS[name][1], 0
    if row.role in ("add", "scale"):
        if len(node.args) != 2 or node.kwargs or not all(isinstance(arg, fx.Node) for arg in node.args):
            return None
        if (position := _data(node, root, row.role)) is None:
            return None
    if not node.args or not isinstance(node.args[position], fx.Node):
        return None
    x, rest = node.args[position], (*node.args[:position], *node.args[position + 1 :])
    again = x in rest or x in node.kwargs.values()
    return None if again else _Found(node, x, row, name, None, position, rest)


def _data(node: fx.Node, root: nn.Module, role: str) -> int | None:
    """Which operand of a product or an addition the chain goes on with: the one that is not a parameter, and of two
    such that are added, the one whose own maker can join it."""
    parameters = [_parameter(arg, root) for arg in node.args]
    if any(p is not None for p in parameters) or role == "scale":
        position = 0 if parameters[0] is None else 1
        per_channel = parameters[1 - position] is not None and sum(n > 1 for n in parameters[1 - position].shape) == 1
        return position if per_channel and parameters[position] is None else None
    if not writes(node, root):
        makers = [_step(arg, root) if len(arg.users) == 1 and not _adds(arg) else None for arg in node.args]
        if [maker is not None and maker.row.role in ("affine", "scale") for maker in makers] == [False, True]:
            return 1
    return 0


def _adds(node: fx.Node) -> bool:
    """Whether the node is an addition: `_data` does not ask `_step` about one, which would ask about its operands."""
    name = NAMES.get(function_of(node))
    return name is not None and FUNCTIONS[name][1].role == "add"


def _parameter(node: fx.Node, root: nn.Module) -> Tensor | None:
    """The parameter or buffer that the node reads, reshaped or not."""
    while node.op == "call_method" and node.target in ("reshape", "view"):
        node = node.args[0]
    value = operator.attrgetter(node.target)(root) if node.op == "get_attr" else None
    return value if isinstance(value, Tensor) else None


def _may_move(steps: list[_Found], reader: fx.Node, order: dict[fx.Node, int], root: nn.Module) -> bool:
    """Whether the steps may run together, where the last of them is: what the first one writes into must be nobody
    else's, and nothing in between may write, or in train mode draw random numbers that a step draws, or run a step's
    module again."""
    first, chain = steps[0], {step.node for step in steps}
    if writes(first.node, root) and not (len(first.x.users) == 1 and first.position == 0 and _is_own(first.x, root)):
        return False
    between = [node for node in order if order[first.node] < order[node] < order[reader] and node not in chain]
    if any(writes(node, root) for node in between):
        return False
    if any(draws(node, root) for node in chain) and any(draws(node, root) for node in between):
        return False
    return {step.module for step in steps}.isdisjoint(module for node in between for module in modules_of(node, root))


def _is_own(node: fx.Node, root: nn.Module) -> bool:
    """Whether a step may write into the node's result: it is a tensor of its own, which nothing else reads."""
    step = _step(node, root)
    if step is not None and step.row.role == "pass":
        return len(step.x.users) == 1 and _is_own(step.x, root)
    return is_fresh(node, root)


def _replace(threshold: fx.Node, steps: list[_Found], keep: int | None) -> None:
    graph, last = threshold.graph, threshold.args[0]
    parameters = threshold.args[1:]
    for parameter in parameters:
        last.prepend(parameter)
    with graph.inserting_before(last):
        written = []
        for step in steps:
            module = None if step.module is None else graph.get_attr(step.node.target)
            written.append((step.name, module, step.position, step.args, dict(step.node.kwargs)))
        function = THRESHOLDS[threshold.target]
        new = graph.call_function(producer_threshold, (steps[0].x, parameters, written, keep, function))
        new.meta = dict(threshold.meta)
        y = new if keep is None else graph.call_function(operator.getitem, (new, 0))
        kept = y if keep is None else graph.call_function(operator.getitem, (new, 1))
    for node in (threshold, *(step.node for step in reversed(steps))):
        shared = keep is not None and node is steps[keep].node
        node.replace_all_uses_with(kept if shared else y)  # (of the last one, a shape or strides may be read)
        graph.erase_node(node)
