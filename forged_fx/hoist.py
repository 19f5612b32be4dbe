"""The pass: move thresholds up to what makes their inputs, and let those that agree be one.

    relu ─ view ─ threshold ─ mm         becomes         relu ─ threshold ─ view ─ mm
              └── threshold ─ mm                                             └──── mm

A forged function works element by element and f(0) = 0, so it commutes with every operation that only moves elements
about, repeats them or fills in zeros: those of `MOVES`. Values and gradients stay what they are, bit for bit.
(MeanSparse's has another rule for each channel: it stays where it is.) What is gained: the threshold sits right behind
the kernel that computes its input and becomes a part of it, in the order in which that kernel writes. Behind a change
of the memory layout it would be a kernel of its own, or a slow loop.

And it never makes the larger of two values the smaller one, so it commutes with a maximum: max pools are passed, where
something else reads what they pool and wants the same threshold, as where a value and its pools are joined. (Else
nothing is gained: behind a pool there are fewer values.) Its gradient does not commute with one, as of values that are
all dropped the first is the largest; so not where anything asks which values were the largest, as a backward does.

A threshold moves past an operation only where everything that reads the operation's input wants the same threshold:
else the raw value would have to be written beside it. And it ends behind a kernel that Inductor generates, or where it
was: behind a library's (a convolution, a matrix product, attention) it would be a kernel of its own either way, and the
layout that it writes may not be the one that is asked for.

It runs on Inductor's graph of ATen calls, behind autograd. There every operation is a function: nothing is written in
place, nothing aliases, and a value's readers are its users in the graph.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from forged_fx import torch_internals
from forged_fx.ops import BY_OPERATOR
from forged_fx.share import thresholds_in

aten = torch.ops.aten

Demand = tuple[Callable, tuple]  # what all readers of a value apply to it: the operator, and its arguments besides x


def _always(node: fx.Node) -> bool:
    return True


def is_zero(value: Any) -> bool:
    """Whether a padding is what a threshold makes of what it drops: not -0.0, which it would make 0."""
    return repr(value) in ("None", "0", "0.0")


def _pads_with_zeros(node: fx.Node) -> bool:
    return len(node.args) < 3 or is_zero(node.args[2])


def _keeps_every_element(node: fx.Node) -> bool:
    """A roll keeps them all. Ahead of a selection, more elements would be computed and written than behind it."""
    before, after = node.args[0].meta["val"].numel(), node.meta["val"].numel()
    return statically_known_true(before == after)


# Operations that the forged function commutes with -> on which condition. Data comes in as their first argument.
MOVES: dict[Any, Callable[[fx.Node], bool]] = {
    aten.view.default: _always,
    aten.reshape.default: _always,
    aten._unsafe_view.default: _always,
    aten.permute.default: _always,
    aten.transpose.int: _always,
    aten.t.default: _always,
    aten.squeeze.default: _always,
    aten.squeeze.dim: _always,
    aten.squeeze.dims: _always,
    aten.unsqueeze.default: _always,
    aten.expand.default: _always,
    aten.repeat.default: _always,
    aten.clone.default: _always,
    aten.alias.default: _always,
    aten.flip.default: _always,
    aten.roll.default: _always,
    aten.index.Tensor: _keeps_every_element,
    aten.index_select.default: _keeps_every_element,
    aten.constant_pad_nd.default: _pads_with_zeros,
    aten.pixel_shuffle.default: _always,
    aten.cat.default: _always,
    aten.stack.default: _always,
    aten.split.Tensor: _always,
    aten.split_with_sizes.default: _always,
    aten.unbind.int: _always,
    operator.getitem: lambda node: _may_be_passed(node.args[0]),  # an item of a split, or the values of a max pool
}

# Of these moves, those that copy: a threshold behind one is a part of the copy.
COPIES = {
    aten.clone.default, aten.repeat.default, aten.flip.default, aten.roll.default, aten.index.Tensor,
    aten.index_select.default, aten.constant_pad_nd.default, aten.cat.default, aten.stack.default,
}  # fmt: skip

VIEWS = MOVES.keys() - COPIES  # those that do not

# And those that only name the dimensions anew: Inductor looks through them, so that nothing is gained by passing them,
# and a convolution's input had better be known by the convolution's own order.
RENAMINGS = {
    aten.permute.default, aten.transpose.int, aten.t.default, aten.squeeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.unsqueeze.default, aten.alias.default,
}  # fmt: skip


def made_by(node: fx.Node) -> fx.Node:
    """The call that computes the value, of which it may be a view."""
    return made_by(node.args[0]) if node.target in VIEWS else node


def read_by(node: fx.Node) -> list[fx.Node]:
    """The calls that read the value, or views of it."""
    return [reader for user in node.users for reader in (read_by(user) if user.target in VIEWS else [user])]


SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int}


def read_whole(node: fx.Node) -> list[fx.Node]:
    """Those of them that read all of it, and not a part that a split gives."""
    users = [user for user in node.users if user.target not in SPLITS]
    return [reader for user in users for reader in (read_whole(user) if user.target in VIEWS else [user])]


def _may_be_passed(node: fx.Node) -> bool:
    if node.target in torch_internals.max_pools():
        return _has_only_full_windows(node) and len(node.args[0].users) > 1
    return node.target in MOVES and MOVES[node.target](node)


def _has_only_full_windows(pool: fx.Node) -> bool:
    """Whether there is a value in each, as there is but for small inputs of dilated pools: the others give -inf."""
    dilation = pool.args[4] if len(pool.args) > 4 else ()
    return all(statically_known_true(step == 1) for step in dilation)


def hoist(graph: fx.Graph) -> None:
    """Move every threshold of the graph as far up as the rule lets it, and merge those that do the same."""
    _merge(graph)
    demands, passable = _demands(graph)
    first = next((node for node in graph.nodes if node.op not in ("placeholder", "get_attr")), None)
    old = [node for node in graph.nodes if _demand_of(node) and demands.get(node.args[0]) == _demand_of(node)]
    model = {_demand_of(node): node for node in old}
    for node, (op, arguments) in demands.items():
        if node in passable:
            continue
        for t in arguments:
            if isinstance(t, fx.Node) and t.op == "get_attr":
                first.prepend(t)
        readers = list(node.users)
        with graph.inserting_before(first) if node.op == "placeholder" else graph.inserting_after(node):
            new = graph.call_function(op, (node, *arguments))
        new.meta = {**model[op, arguments].meta, "val": torch.empty_like(node.meta["val"])}
        for reader in readers:
            reader.replace_input_with(node, new)
    for node in old:
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)


def _merge(graph: fx.Graph) -> None:
    """Thresholds of one value by one t are one."""
    made: dict[tuple, fx.Node] = {}
    for node in thresholds_in(graph):
        same = made.setdefault((node.target, node.args), node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)


def _demands(graph: fx.Graph) -> tuple[dict[fx.Node, Demand], set[fx.Node]]:
    """What all readers of a value want, for the values where they agree; and the moves that thresholds can pass."""
    passable = {node for node in graph.nodes if _may_be_passed(node)}
    while True:
        demands: dict[fx.Node, Demand] = {}
        for node in reversed(graph.nodes):
            wants = {_wants(reader, node, demands, passable) for reader in node.users}
            if len(wants) == 1 and None not in wants and (node in passable or isinstance(node.meta["val"], Tensor)):
                (demands[node],) = wants
        blocked = [m for m in passable if m in demands and not _passes(m, demands, passable)]
        if not blocked:
            return demands, passable
        passable.difference_update(blocked)


def _passes(move: fx.Node, demands: dict[fx.Node, Demand], passable: set[fx.Node]) -> bool:
    """Whether the threshold behind the move may and should go ahead of it."""
    for x in _data(move):
        if demands.get(x) != demands[move] or _dtype(x) != _dtype(move):  # a cat may convert
            return False
        if x not in passable and (move.target in RENAMINGS or not written_by_inductor(x)):
            return False
    return True


def _dtype(node: fx.Node) -> torch.dtype:
    value = node.meta["val"]
    return value.dtype if isinstance(value, Tensor) else value[0].dtype  # a split's


def _wants(reader: fx.Node, x: fx.Node, demands: dict[fx.Node, Demand], passable: set[fx.Node]) -> Demand | None:
    """What the reader, or everything behind it, does to `x` first."""
    if reader.target in BY_OPERATOR and reader.args[0] is x:
        return _demand_of(reader)
    return demands.get(reader) if reader in passable and x in _data(reader) else None


def written_by_inductor(node: fx.Node) -> bool:
    """Whether a kernel that Inductor generates writes this value, so that a threshold can be a part of it."""
    if node.target in COPIES:
        return True
    if node.target in MOVES:
        return written_by_inductor(node.args[0])
    return node.op == "call_function" and not torch_internals.is_library_call(node)


def _demand_of(node: fx.Node) -> Demand | None:
    function = BY_OPERATOR.get(node.target)
    if function is None or not function.moves:
        return None
    _, *parameters = node.args[: 1 + function.arguments]
    if any(t.op not in ("placeholder", "get_attr") for t in parameters):
        return None
    straight_through = len(node.args) > 1 + function.arguments and node.args[-1]
    return node.target, (*parameters, True) if straight_through else tuple(parameters)


def _data(move: fx.Node) -> list[fx.Node]:
    """The values that the move is given: several for a cat or a stack."""
    data = move.args[0]
    return list(data) if isinstance(data, list | tuple) else [data]
