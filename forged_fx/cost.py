"""What each threshold costs in compiled code, read off the graph that Inductor gets.

A threshold is free where it becomes a part of the kernel that writes its input anyway, or of those that read it. It
costs one write more where something else reads the input too and needs it raw: a residual stream, say, which runs in a
later kernel, or a pool or a mean over places, which goes through it in another way. And it costs a kernel of its own,
which reads and writes the input once more, where no kernel of Inductor's makes the input: the network's input, what
attention's kernel or a matrix product returns; or none makes all of it: one part of several.
"""

import contextvars
import copy
import math
import operator
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from forged_fx import torch_internals
from forged_fx.hoist import COPIES, MOVES, SPLITS, VIEWS, hoist, made_by, read_by, read_whole, written_by_inductor
from forged_fx.lowering import register_lowerings
from forged_fx.models import copies
from forged_fx.modes import as_found
from forged_fx.ops import THRESHOLD_OPS
from forged_fx.randomness import kept_randomness
from forged_fx.share import share, thresholds_in
from forged_fx.thresholds import not_forged
from forged_fx.within import thresholds_within

aten = torch.ops.aten
SELECTIONS = (aten.select.int, aten.slice.Tensor)
JOINS = (aten.cat.default, aten.stack.default)
# Parts of the names of calls that read around a place: what they read is written first.
AROUND = ("pool", "index", "upsample", "grid_sampler", "im2col", "unfold")
FREE, SHARED, WRITE, LAUNCH = "free", "shared", "one more write", "a kernel of its own"
LONGEST_ROW = 8192  # that Inductor never has several of a GPU's programs share
TRIPS = {FREE: 0, WRITE: 1, LAUNCH: 2}  # of the input to or from memory, beyond those of the plain model


@dataclass(frozen=True)
class Cost:
    """What one site's threshold costs.

    kind: `FREE`, `SHARED` (another site's threshold on the same tensor serves it too), `WRITE` or `LAUNCH`. bytes: what
    is read and written beyond the plain model's; None where the data themselves say how many values there are. why:
    what makes the site's input, and who else reads it. prologue: a matrix product on a GPU can apply the threshold as
    it loads: under mode="max-autotune" it may cost nothing. alone: what it would cost without the other sites that read
    the same tensor, where that is something else.
    """

    kind: str
    bytes: int | None
    why: str
    prologue: bool = False
    alone: "Cost | None" = None

    @property
    def free(self) -> bool:
        """Whether it costs nothing, whichever sites that are not free are left out."""
        return (self.alone or self).kind == FREE

    def __str__(self) -> str:
        if self.bytes is None:
            return f"{self.kind}: {self.why} (MB: as the data say)"
        return f"{self.kind}: {self.why}" + (f" ({self.bytes / 1e6:.3g} MB)" if self.bytes else "")


def cost(forged: torch.nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> dict[str, Cost]:
    """Site -> what its threshold costs in a forward pass of `torch.compile(forged, backend="forged")`, in eval mode.

    args, kwargs: an input, on the model's device. The pass is run twice, uncompiled. It is an estimate by rule, on the
    graph that Inductor gets; `benchmarks/gpu_static.py` holds it against what Inductor generates. Where several forged
    models are within `forged`, a site's name begins with the path to its own.

    Of a site that runs more than once, the dearest. Raises ValueError for a model that is not forged, or whose layers
    were replaced since, or where compiling is turned off, and TypeError for args that are no tuple.
    """
    sites = thresholds_within(forged)
    if not sites:
        raise ValueError(not_forged(forged, "cost"))
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        raise ValueError(
            "cost looks at what a compiler is given, and TORCHDYNAMO_DISABLE=1 turns compilers off: unset it"
        )
    if not isinstance(args, tuple):
        raise TypeError(f"args is {type(args).__name__}: pass the forward's arguments as a tuple, (x,)")
    register_lowerings()
    tensors = {id(tensor): tensor for tensor in (*forged.parameters(), *forged.buffers())}
    twin = copy.deepcopy(forged, tensors)  # a graph's code is its own: what is compiled here leaves the user's alone
    compiled = torch.compile(twin, backend=_backend, dynamic=False)  # (a dynamic graph has one size's bytes)
    mine = _Collected(sites)
    before, how = _collecting.set(mine), torch_internals.many_compilations()
    try:
        with torch.no_grad(), as_found(twin), kept_randomness(), torch.compiler.set_stance("default"), how:
            for run in (twin, compiled):  # of a wrong input the model itself says it best
                own_args, own_kwargs = copies((args, kwargs or {}))
                run(*own_args, **own_kwargs)
    finally:
        _collecting.reset(before)
    unseen = Cost(LAUNCH, 0, "it runs uncompiled")
    return {site: mine.found.get(site, unseen) for site in sites.values()}


@dataclass
class _Collected:
    """What one call of `cost` has found. sites: id of a threshold's buffer -> site. given: what a next graph reads."""

    sites: dict[int, str]
    found: dict[str, Cost] = field(default_factory=dict)
    given: str = "the network's input"


_collecting: contextvars.ContextVar[_Collected] = contextvars.ContextVar("forged_fx.cost")


def _backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable:
    """One for all calls of `cost`, so that Dynamo has what it compiled for an earlier one of a model that is alike: one
    that is no graph shares its code with the user's, and few compilations are let to one code."""
    collected = _collecting.get()
    graph, collected.given = _Graph(gm, collected.given), "what runs ahead of a graph break"
    run = torch_internals.on_inductors_graph(gm, inputs, graph.read)

    def priced(*args: Any) -> Any:
        if (now := _collecting.get(None)) is None:  # where PyTorch was told to run whatever is compiled
            return run(*args)
        for site, of_it in graph.costs([now.sites.get(id(arg)) for arg in args]):
            if site not in now.found or _bytes(of_it) > _bytes(now.found[site]):  # (it may be in several graphs)
                now.found[site] = of_it
        return run(*args)

    return priced


class _Graph:
    """The costs in one of Dynamo's graphs. Which sites it holds is known as it runs: modules alike have it in common.

    given: what its inputs are, for people.
    """

    def __init__(self, gm: fx.GraphModule, given: str) -> None:
        self.given = given
        calls = thresholds_in(gm.graph)
        inputs = gm.graph.find_nodes(op="placeholder")
        own = {node: inputs.index(node.args[1]) for node in calls if node.args[1] in inputs}
        share(gm.graph)
        # The operator, and which of the graph's inputs are its parameters, from behind -> those by which the thresholds
        # are known that are one now; each once, however often it runs.
        self.served: dict[tuple, dict[int, None]] = {}
        for node, known in own.items():
            parameters = (inputs.index(t) - len(inputs) for t in node.args[1:] if isinstance(t, fx.Node))
            self.served.setdefault((getattr(node.target, "default", node.target), *parameters), {})[known] = None
        self.priced: list[tuple[list[int], Cost]] = []

    def read(self, graph: fx.Graph) -> None:
        """From the graph that Inductor would get. It is changed: where a threshold moves, so do strides, and Inductor
        alone takes a view for a copy then."""
        hoist(graph)
        placeholders = graph.find_nodes(op="placeholder")
        for (op, *positions), known in self.served.items():
            parameters = [placeholders[position] for position in positions]
            made = (node for node in parameters[0].users if node.target is op)
            costs = [price(node, self.given) for node in made if [*node.args[1 : 1 + len(parameters)]] == parameters]
            self.priced.append(([*known], max(costs, key=_bytes, default=Cost(FREE, 0, "no one reads it"))))

    def costs(self, sites: list[str | None]) -> Iterator[tuple[str, Cost]]:
        """Of the sites that it runs, for each tensor that they read. sites: of each of its inputs, whose first
        parameter that is."""
        for known, dearest in self.priced:
            here = [*dict.fromkeys(site for i in known if (site := sites[i]) is not None)]
            yield from ((site, dearest) for site in here[:1])
            yield from ((site, Cost(SHARED, 0, f"with {here[0]}", alone=dearest)) for site in here[1:])


def price(threshold: fx.Node, given: str = "the network's input") -> Cost:
    """The cost of one threshold in a graph of ATen calls that `hoist` went over. given: what the graph's inputs are."""
    x = threshold.args[0]
    size = x.meta["val"].numel() * x.meta["val"].element_size()
    size = size if isinstance(size, int) else size.node.hint  # (None where the data say it)
    maker, prologue = _maker(x, given), _read_by_products(threshold)

    def costs(kind: str, why: str) -> Cost:
        return Cost(kind, 0 if kind == FREE else size and TRIPS[kind] * size, why, prologue and kind != FREE)

    if threshold.users and not any(map(_needs_memory, read_by(threshold))):
        return costs(FREE, f"a part of {' and '.join(dict.fromkeys(map(_name, threshold.users)))} behind it")
    if not written_by_inductor(x):
        return costs(LAUNCH, f"its input comes from {maker}")
    made, whole = made_by(x), _whole(x)
    is_part = made is not whole  # of a split
    later = _later(made, threshold)
    others = [reader for reader in read_whole(made) if reader is not threshold]
    raw = [r for r in others if _needs_memory(r) or _reads_around(r) or r in later]
    if x.target in SELECTIONS or (is_part and (raw or _is_written(made, but=threshold))):
        return costs(LAUNCH, f"its input is a part of what {_maker(x.args[0], given)} makes")
    if made.target in JOINS and any(_is_written_for_others(part, made) for part in made.args[0]):
        return costs(LAUNCH, f"what {maker} joins is written there by what makes it")
    if raw:
        return costs(WRITE, f"{_name(raw[0])} reads the raw result of {maker}")
    free = costs(FREE, f"a part of {maker}")
    beside = [user for user in read_by(whole) if user.target in THRESHOLD_OPS and _is_written(user)]
    if len(beside) < 2:
        return free
    # No one reads the raw result: one of its thresholds is written in its place.
    written = costs(WRITE, f"another threshold of what {maker} makes is written, too")
    return replace(free, alone=written) if threshold is beside[0] else written


def _bytes(cost: Cost) -> float:
    """To tell the dearest: what no one knows may be more than anything."""
    return math.inf if cost.bytes is None else cost.bytes


def _read_by_products(node: fx.Node) -> bool:
    """Whether one kernel reads the value, and it could apply a threshold as it loads: a matrix product on a GPU."""
    if node.meta["val"].device.type == "cpu" or len(node.users) != 1:
        return False
    (reader,) = node.users
    if reader.target in VIEWS:
        return _read_by_products(reader)
    if reader.target is aten.convolution.default and reader.args[0] is node:
        _, weight, _, stride, padding, dilation, transposed, _, groups = reader.args
        window = {*weight.meta["val"].shape[2:], *stride, *dilation}
        return window == {1} and len(stride) == 2 and not any(padding) and not transposed and groups == 1
    return reader.target in (aten.mm.default, aten.addmm.default)


def _maker(x: fx.Node, given: str) -> str:
    x = made_by(x)
    return given if x.op == "placeholder" else _name(x)


def _name(node: fx.Node) -> str:
    if node.op == "output":
        return "the caller"
    return str(node.target).removeprefix("aten.").removeprefix("prims.").partition(".")[0].lstrip("_")


def _needs_memory(reader: fx.Node) -> bool:
    """Whether the reader cannot be in the kernel that makes the value."""
    if reader.target in SELECTIONS:
        return _is_written(reader)
    return reader.op == "output" or _reads_by_a_library(reader)


def _reads_by_a_library(node: fx.Node) -> bool:
    """(So does a convolution, also where its result, which a bias is added to, is a kernel of Inductor's.)"""
    is_convolution = node.target is aten.convolution.default
    return is_convolution or (node.target not in MOVES and torch_internals.is_library_call(node))


def _is_written(value: fx.Node, but: fx.Node | None = None) -> bool:
    """Whether something reads the value, as it is or behind a threshold, out of memory. but: a reader left out."""
    readers = (reader for reader in read_by(value) if reader is not but)
    return any(_is_written(r) if r.target in THRESHOLD_OPS else _needs_memory(r) for r in readers)


def _whole(x: fx.Node) -> fx.Node:
    """Of what the value is a view that has all of its elements."""
    return _whole(x.args[0]) if x.target in VIEWS and x.target is not operator.getitem else x


def _is_written_for_others(part: fx.Node, join: fx.Node) -> bool:
    """Whether a kernel of Inductor's writes the value, which others read than this cat: it writes it there, too."""
    return written_by_inductor(part) and any(reader is not join for reader in read_by(made_by(part)))


def _reads_around(reader: fx.Node) -> bool:
    return any(word in _name(reader) for word in AROUND)


def _later(made: fx.Node, threshold: fx.Node) -> set[fx.Node]:
    """What cannot be in the kernel that makes the value: what depends on the threshold, or on a library's call, a
    reduction or a copy that depends on the value; and what becomes a part of their kernels. (What is written is
    computed where its input is.)"""
    found: set[fx.Node] = set()
    depend = {made: None}  # in order
    for node in made.graph.nodes:
        inputs = node.all_input_nodes
        if not depend.keys().isdisjoint(inputs):
            depend[node] = None
            apart = _reads_by_a_library(node) or _rearranges(node) or _sums_up(node, threshold.meta["val"].numel())
            if node is threshold or apart or not found.isdisjoint(inputs):
                found.add(node)
    for node in reversed(depend):
        if node not in found and not found.isdisjoint(node.users) and not _is_written(node) and not _reduces(node):
            found.add(node)
    return found


def _reduces(node: fx.Node) -> bool:
    """Whether the call gives fewer elements than it reads, as a sum does: they are written, whoever reads them. (Parts
    of what there is are not.)"""
    if node.target in (*SELECTIONS, *SPLITS, operator.getitem, aten.glu.default):
        return False
    value, read = node.meta.get("val"), [x.meta.get("val") for x in node.all_input_nodes]
    if not isinstance(value, torch.Tensor):
        return True  # a mean and a variance, say
    return any(isinstance(x, torch.Tensor) and statically_known_true(value.numel() < x.numel()) for x in read)


def _rearranges(node: fx.Node) -> bool:
    """Whether the call copies what it reads into another order of memory. (A join has its parts written in place.)"""
    if node.target is aten.clone.default:
        strides = zip(node.meta["val"].stride(), node.args[0].meta["val"].stride(), strict=True)
        return not all(statically_known_true(after == before) for after, before in strides)
    return node.target is torch.ops.prims.rev.default or (node.target in COPIES and node.target not in JOINS)


def _sums_up(node: fx.Node, size: int | torch.SymInt) -> bool:
    """Whether the call is a reduction, such as a mean, in passes of its own over the value: one along all rows of the
    memory, as a norm's, can be in the kernel that makes it. Others may have several programs share what they add up, or
    go through the value in another order than it is written in.

    size: of the value.
    """
    if not _reduces(node) or _reads_around(node):
        return False
    names = [argument.name for schema in torch_internals.schemas_of(node.target) for argument in schema.arguments]
    if "dim" not in names[: len(node.args)]:
        return True
    rows, dim = node.args[0].meta["val"], node.args[names.index("dim")]
    if not rows.dim() or dim not in (-1, [-1], rows.dim() - 1, [rows.dim() - 1]):
        return True
    along_all_rows = (rows.stride(-1) == 1, rows.shape[-1] <= LONGEST_ROW, rows.numel() == size)
    return not all(map(statically_known_true, along_all_rows))
