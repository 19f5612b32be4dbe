"""What each threshold costs in compiled code, read off the graph that Inductor gets.

A threshold is free where it becomes a part of the kernel that writes its input anyway, or of those that read it. It
costs one write more where something else reads the input too and needs it raw: a residual stream. And it costs a kernel
of its own, which reads and writes the input once more, where no kernel of Inductor's makes the input: the network's
input, what attention's kernel or a matrix product returns.
"""

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from forged_fx import torch_internals
from forged_fx.hoist import COPIES, VIEWS, hoist, made_by, written_by_inductor
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
FREE, SHARED, WRITE, LAUNCH = "free", "shared", "one more write", "a kernel of its own"


@dataclass(frozen=True)
class Cost:
    """What one site's threshold costs.

    kind: `FREE`, `SHARED` (another site's threshold on the same tensor serves it too), `WRITE` or `LAUNCH`. bytes: what
    is read and written beyond the plain model's. why: what makes the site's input, and who else reads it. prologue: a
    matrix product on a GPU can apply the threshold as it loads: under mode="max-autotune" it may cost nothing. alone:
    what it would cost without the other sites that read the same tensor, where that is something else.
    """

    kind: str
    bytes: int
    why: str
    prologue: bool = False
    alone: "Cost | None" = None

    @property
    def free(self) -> bool:
        """Whether it costs nothing, whichever sites that are not free are left out."""
        return (self.alone or self).kind == FREE

    def __str__(self) -> str:
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
    found: dict[str, Cost] = {}
    given = "the network's input"

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable:
        nonlocal given
        graph, given = _Graph(gm, given), "what runs ahead of a graph break"
        run = torch_internals.on_inductors_graph(gm, inputs, graph.read)

        def priced(*args: Any) -> Any:
            for site, of_it in graph.costs([sites.get(id(arg)) for arg in args]):
                if site not in found or of_it.bytes > found[site].bytes:  # (it may be in several graphs)
                    found[site] = of_it
            return run(*args)

        return priced

    register_lowerings()
    tensors = {id(tensor): tensor for tensor in (*forged.parameters(), *forged.buffers())}
    twin = copy.deepcopy(forged, tensors)  # what is compiled here must not count against the user's own compilations
    with torch.no_grad(), as_found(twin), kept_randomness(), torch.compiler.set_stance("default"):
        for run in (twin, torch.compile(twin, backend=backend)):  # of a wrong input the model itself says it best
            own_args, own_kwargs = copies((args, kwargs or {}))
            run(*own_args, **own_kwargs)
    unseen = Cost(LAUNCH, 0, "it runs uncompiled")
    return {site: found.get(site, unseen) for site in sites.values()}


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
        """From the graph that Inductor would get."""
        hoist(graph)
        placeholders = graph.find_nodes(op="placeholder")
        for (op, *positions), known in self.served.items():
            parameters = [placeholders[position] for position in positions]
            made = (node for node in parameters[0].users if node.target is op)
            costs = [price(node, self.given) for node in made if [*node.args[1 : 1 + len(parameters)]] == parameters]
            self.priced.append(([*known], max(costs, key=lambda c: c.bytes, default=Cost(FREE, 0, "no one reads it"))))

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
    size = size if isinstance(size, int) else size.node.hint
    maker, prologue = _maker(x, given), _read_by_products(threshold)
    if threshold.users and not any(map(_needs_memory, threshold.users)):
        return Cost(FREE, 0, f"a part of {' and '.join(dict.fromkeys(map(_name, threshold.users)))} behind it")
    if not written_by_inductor(x):
        return Cost(LAUNCH, 2 * size, f"its input comes from {maker}", prologue)
    if x.target in SELECTIONS:
        return Cost(LAUNCH, 2 * size, f"its input is a part of what {_maker(x.args[0], given)} makes", prologue)
    behind = _behind(threshold)
    for reader in x.users:
        if reader is not threshold and (reader in behind or _needs_memory(reader)):
            return Cost(WRITE, size, f"{_name(reader)} reads the raw result of {maker}", prologue)
    beside = [user for user in x.users if user.target in THRESHOLD_OPS and any(map(_needs_memory, user.users))]
    if len(beside) < 2:
        return Cost(FREE, 0, f"a part of {maker}")
    # No one reads the raw result: one of its thresholds is written in its place.
    written = Cost(WRITE, size, f"another threshold of what {maker} makes is written, too", prologue)
    return Cost(FREE, 0, f"a part of {maker}", alone=written) if threshold is beside[0] else written


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
    if reader.op == "output":
        return True
    if reader.target in COPIES:
        return False
    if reader.target in VIEWS:
        return any(_needs_memory(next_reader) for next_reader in reader.users)
    # (A convolution reads by a library, also where its result, which a bias is added to, is a kernel of Inductor's.)
    return reader.target is aten.convolution.default or torch_internals.is_library_call(reader)


def _behind(node: fx.Node) -> set[fx.Node]:
    """Everything that depends on the node."""
    found, waiting = set(), [node]
    while waiting:
        for user in waiting.pop().users:
            if user not in found:
                found.add(user)
                waiting.append(user)
    return found
