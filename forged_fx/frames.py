"""Which sites the calls in Dynamo's graphs are.

Dynamo cuts a forward pass into graphs, one for each stretch of a frame that it can record, and lets all modules of one
class share the graph of their code. Where a graph always runs the same call, its site is known when it is compiled.
Elsewhere (a layer called on both sides of a graph break; a class with several instances) it is found each time that the
graph runs: the weight which the graph is handed tells the module, and a count tells which of its calls this is.
"""

import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from forged_fx import torch_internals
from forged_fx.kinds import OWN, Choice, Value
from forged_fx.places import innermost, steps_at
from forged_fx.rewrite import CallNode, Placed, outermost
from forged_fx.sites import (
    Numbering,
    call_name,
    call_of,
    check_weight,
    mark_of,
    module_of,
    operand_name,
    unseen_call,
)
from forged_fx.stats import Stats
from forged_fx.thresholds import near_to, tensors_beside


class Compilation:
    """What the graphs of one model share, compiled with one set of options: thresholds, and what has been reached.

    options: as they were when they were read, but for the statistics. written: of which version of their file, if they
    had one. repeats: the model runs inside another one, which may call it several times in a pass.
    """

    def __init__(
        self,
        root: torch.nn.Module,
        stats: Stats,
        choice: Choice,
        options: dict[str, Any],
        written: tuple[int, int] | None,
        repeats: bool,
    ) -> None:
        wanted = list(choice.kinds)
        self.root = weakref.ref(root)
        self.stats, self.choice, self.options, self.written, self.repeats = stats, choice, options, written, repeats
        self.strict = options.get("strict", True)
        self.values = choice.values(stats, options.get("ratio", OWN))
        self.calls: dict[str, int] = {}  # how many calls of the table each module makes in a pass, at most
        for name, site in stats.sites.items():
            self.calls[module_of(name)] = max(self.calls.get(module_of(name), 0), site.module_calls)
        # What every pass must run. A site that only some batches reached is not missed where a pass goes without it.
        self.always = frozenset(s for s in wanted if stats.sites[s].calls >= stats.batches)
        self.unreached = set(self.always)
        # One scalar kind at all sites: a graph may run as any of them.
        self.uniform = len(set(choice.kinds.values())) <= 1 and not any(choice[s].rest(stats.sites[s]) for s in wanted)
        # what was last in force at each site, and a tensor beside it: the thresholds move where it moves
        self._parameters: dict[tuple[str, str], tuple[weakref.ref[Tensor] | None, tuple[Tensor, ...]]] = {}
        self._names: dict[int, str | None] = {}  # by a parameter's id, where it is; None where in several modules

    def parameters(self, site: str, like: str) -> tuple[Tensor, ...]:
        """What is in force at a site; at a call that is none, the identity, as of the kind that the site `like` has."""
        beside, tensors = self._parameters.get((site, like), (None, ()))
        near = None if beside is None else beside()
        if not tensors or (beside is not None and (near is None or near.device != tensors[0].device)):
            owner = self.root().get_submodule(module_of(site))
            values = self.values.get(site) or self.choice[like].off(self.stats.sites[like])
            near, tensors = near_to(owner, self.root()), tensors_beside(owner, self.root(), values)
            self._parameters[site, like] = None if near is None else weakref.ref(near), tensors
        return tensors

    def owner(self, weight: Tensor) -> str | None:
        """The name of the module that a parameter belongs to; None where it belongs to several."""
        if not self._still(weight):
            self._names.clear()  # parameters were exchanged
            for name, parameter in self.root().named_parameters(remove_duplicate=False):
                self._names[id(parameter)] = None if id(parameter) in self._names else name
        name = self._names.get(id(weight))
        return None if name is None else name.rpartition(".")[0]

    def _still(self, weight: Tensor) -> bool:
        """Whether what is known of a parameter holds: its id may be another's by now, and it may have moved."""
        name = self._names.get(id(weight), "")
        try:
            return name is None or self.root().get_parameter(name) is weight
        except AttributeError:
            return False

    def call(self, numbering: Numbering, module: str) -> str:
        """The name of a module's next call in a pass."""
        k, most = numbering.calls(module), self.calls.get(module)
        if most is not None and k >= most:
            if not self.repeats:
                raise unseen_call(module, k, most)
            numbering.restart(module)
        return numbering.call(module)

    def this_pass(self) -> "Pass | None":
        """The forward pass that is running now."""
        at_end = torch_internals.at_end_of_call()
        if at_end is None:
            return None
        for check in at_end:
            if isinstance(check, Pass) and check.compilation is self:
                return check
        at_end.append(new := Pass(self))
        return new

    def refuse(self, missed: AbstractSet[str]) -> None:
        names = [site for site in self.stats.sites if site in missed]
        raise ValueError(
            f"sites {', '.join(map(repr, names))} did not run in any graph that torch.compile made: their code runs "
            "uncompiled (beside an LSTM or GRU, torch._dynamo.config.allow_rnn=True lets Dynamo in; under torch.func "
            "or a dispatch mode it stays out), in attention's fused eval-mode kernel "
            "(torch.backends.mha.set_fastpath_enabled(False) opens it), or beyond "
            "torch._dynamo.config.recompile_limit; or an input that the model refused (it raised an error of its own) "
            "had Dynamo give its code up, until torch._dynamo.reset(); or this input took a branch that none in "
            "calibration took. Forge the model with forged_fx.transform, leave them out with exclude=, or accept it "
            "with strict=False"
        )


class Pass:
    """One forward pass of a compiled model; Dynamo calls it when the pass is through."""

    def __init__(self, compilation: Compilation) -> None:
        self.compilation = compilation
        self.numbering = Numbering()
        self.reached: set[str] = set()
        self._handled = sys.exc_info()[1]  # the caller may run the model while it handles an exception

    def __call__(self) -> None:
        passes.ended += 1
        passes.last = self.compilation
        if not self.compilation.strict or sys.exc_info()[1] is not self._handled:
            return
        self.compilation.unreached -= self.reached
        if missed := self.compilation.unreached or (set() if self.reached else self.compilation.always):
            self.compilation.refuse(missed)


class _Passes(threading.local):
    ended = 0  # forward passes of compiled models that a graph ran in, on this thread
    last: Compilation  # of the latest one


passes = _Passes()


@dataclass(frozen=True, eq=False)
class Counted:
    """A call that is counted when its graph runs.

    module: the one that ran it when it was compiled. weight: which of the graph's inputs tells the module at run time,
    None where none does.
    """

    module: str
    weight: int | None


class Frame:
    """One of Dynamo's graphs: names for its calls, and a way to run it with the thresholds of whatever it runs as."""

    def __init__(self, gm: fx.GraphModule, calls: list[CallNode], compilation: Compilation, shared: bool) -> None:
        """shared: other modules of the same class may run this graph too, and each of their weights tells which."""
        self.gm, self.compilation = gm, compilation
        self.buffers: dict[str, tuple[str, ...]] = {}  # site that is known at compile time -> its buffers
        # per site whose thresholds are inputs: which counted call, which operand, a site of the same kind
        self.slots: list[tuple[int, int, str]] = []
        self.examples: list[Tensor] = []
        self.counted: list[Counted] = []
        self._index: dict[str, int] = {}  # label of a counted call -> its index
        self._buffer_of: dict[tuple | int, str] = {}  # a scalar and its device, or the id of a tensor -> its buffer
        inputs = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
        inputs |= {inner: inputs[outer] for inner, outer in outermost(gm.graph).items() if outer in inputs}
        in_graph: dict[str, list[CallNode]] = {}
        for call in calls:
            in_graph.setdefault(call.module, []).append(call)
        self._lifted = [torch_internals.lifted_value(node) for node in gm.graph.find_nodes(op="placeholder")]
        self.bound = False  # some call is known by the module that it was compiled for
        self.names = [self._name(call, in_graph[call.module], inputs, shared) for call in calls]
        for name, call in zip(self.names, calls, strict=True):
            weight = self._weight(call, inputs) if name in compilation.values else None
            if weight is not None and (site := compilation.stats.sites[name]).weight and not site.layer:
                check_weight(name, compilation.root(), (site.weight,), [self._lifted[weight]])

    def _name(self, call: CallNode, group: list[CallNode], inputs: dict[fx.Node, int], shared: bool) -> str:
        weight = self._weight(call, inputs)
        told = weight is not None and self.compilation.owner(self._lifted[weight]) == call.module
        open_to_others = shared and told and self.compilation.uniform
        self.bound |= not open_to_others
        most = self.compilation.calls.get(call.module, len(group))
        whole = len(group) == most or (self.compilation.repeats and len(group) % most == 0)
        if whole and not open_to_others:  # no other graph makes calls of this module
            return call_name(call.module, group.index(call) % most)
        index = len(self.counted)
        self.counted.append(Counted(call.module, weight if told else None))
        for tell in () if open_to_others else (self._told_by_weight, self._told_by_place):
            if (k := tell(call, weight)) is not None:
                return call_name(call.module, k)
        self._index[label := f"{call.module}#?{index}"] = index
        return label

    def _told_by_weight(self, call: CallNode, weight: int | None) -> int | None:
        """Which of its module's calls it is, where only one of them reads this parameter."""
        parameter = None if weight is None else self._lifted[weight]
        name = next((n for n, p in self.compilation.root().named_parameters() if p is parameter), None)
        same = [
            call_of(site)
            for site, s in self.compilation.stats.sites.items()
            if module_of(site) == call.module and (s.kind, s.weight) == (call.call.kind, name)
        ]
        return same[0] if len(same) == 1 and name is not None else None

    def _told_by_place(self, call: CallNode, _: int | None) -> int | None:
        """Which of its module's calls it is, where only one of them was made in this line of the code."""
        steps = steps_at(call.node.meta.get("stack_trace") or "")
        here = [
            call_of(name)
            for name, ways in self.compilation.stats.ways.items()
            if (module_of(name), mark_of(name)) == (call.module, "#") and any(innermost(p) in steps for p, *_ in ways)
        ]
        return here[0] if len(here) == 1 else None

    def _weight(self, call: CallNode, inputs: dict[fx.Node, int]) -> int | None:
        """Which of the graph's inputs is the call's weight, where it reads a parameter as it is."""
        operands = (inputs.get(value) for _, _, value in call.call.operands(call.node.args, call.node.kwargs))
        parameters = [i for i in operands if i is not None and isinstance(self._lifted[i], torch.nn.Parameter)]
        return parameters[-1] if parameters else None

    def place(self, site: str) -> Placed | None:
        """What goes ahead of a site; with buffers, or with inputs where the site is known at run time only."""
        of = self.compilation
        label, _, operand = site.partition(":")
        if label in self._index:
            index = self._index[label]
            module = self.counted[index].module
            like = self._one_of(module)
            if like is None:
                return None
            self.slots.append((index, int(operand or 0), like))
            off = of.choice[like].off(of.stats.sites[like])
            examples = tensors_beside(of.root().get_submodule(module), of.root(), off)
            self.examples += examples
            names = [f"forged_threshold_input_{len(self.examples)}_{i}" for i in range(len(examples))]
            nodes = [torch_internals.add_input(self.gm, name) for name in names]
            return self._placed(like, nodes)
        if site not in of.values:
            return None
        if site not in self.buffers:
            self.buffers[site] = tuple(map(self._buffer, of.values[site], of.parameters(site, site)))
        return self._placed(site, map(self.gm.graph.get_attr, self.buffers[site]))

    def _placed(self, site: str, nodes: Iterable[fx.Node]) -> Placed:
        kind = self.compilation.choice[site]
        return Placed(kind.op, (*nodes, *kind.rest(self.compilation.stats.sites[site])))

    def _buffer(self, value: Value, tensor: Tensor) -> str:
        """A buffer's name. Equal scalars are one here, so that sites with one input share one result."""
        key = (value, tensor.device) if isinstance(value, float) else id(tensor)
        if key not in self._buffer_of:
            self._buffer_of[key] = name = f"forged_threshold_{len(self._buffer_of)}"
            self.gm.register_buffer(name, tensor)
            torch_internals.declare_buffer(self.gm, name)
        return self._buffer_of[key]

    def scalars(self) -> list[float]:
        """The values of the scalar buffers, in the graph's order."""
        return [key[0] for key in self._buffer_of if isinstance(key, tuple)]

    def _one_of(self, module: str) -> str | None:
        """A site that stands for those that a call may turn out to be when it runs: they must be forged alike."""
        of = self.compilation
        sites = [site for site in of.values if of.uniform or module_of(site) == module]
        rows = [(of.choice[site], of.stats.sites[site]) for site in sites]
        if not of.uniform and len({(kind.function, kind.rest(row), row.channels) for kind, row in rows}) > 1:
            raise ValueError(
                f"the calls of {module or 'the model'!r} run in several graphs of torch.compile, where they cannot be "
                "told apart, and are to be forged in different ways: forge the model with forged_fx.transform, and "
                "compile that"
            )
        return sites[0] if sites else None

    def bind(self, compiled: Callable) -> Callable:
        """What runs in the graph's place."""
        of, slots, counted, reached = self.compilation, self.slots, self.counted, set(self.buffers)
        if not (counted or of.strict):
            return compiled

        def run(*args: Any) -> Any:
            this = of.this_pass() or Pass(of)
            this.reached |= reached
            names = [
                of.call(this.numbering, c.module if c.weight is None else of.owner(args[c.weight])) for c in counted
            ]
            sites = [(operand_name(names[call], operand), like) for call, operand, like in slots]
            this.reached.update(site for site, _ in sites)
            return compiled(*args, *(t for site in sites for t in of.parameters(*site)))

        return run
