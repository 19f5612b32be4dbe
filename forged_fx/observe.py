"""Watch a model run, and see every site's input on its way in.

Calibration watches the run, not the graph: a function mode sees each call of `sites.CALLS`, whoever makes it
(`nn.Linear`, `F.conv2d` on weights made on the fly, attention's packed projection), and module hooks say which module
makes it. So any Python model can be observed, control flow included, and nothing in the model is touched.
"""

import contextlib
import sys
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from forged_fx import torch_internals
from forged_fx.effects import named_in_place
from forged_fx.modes import fast_path_off, module_hooks
from forged_fx.places import place
from forged_fx.sites import (
    ACTIVATIONS,
    ANY_PART,
    CALLS,
    IN_FUNCTION,
    OPENED,
    Call,
    Key,
    Numbering,
    Operand,
    Origin,
    Ways,
    both_ways,
    data_operands,
    joined,
    names_of,
    only_looks,
    operand_name,
    parameter_in,
    part_of,
    replace,
)
from forged_fx.straight import is_straight
from forged_fx.torch_internals import CHECKPOINT, MODULE_CALL, forwards_of_functions, memory_of, tree_leaves
from forged_fx.write_back import works_in_place

# Factories that take their values from Python: what they hold may well come from the input (numpy in the middle).
_FROM_PYTHON = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy}

_SETS_DATA = Tensor.data.__set__

_SCALARS = (int, float, str, type(None))
_FLAT = (Tensor, *_SCALARS, torch.dtype, torch.device)

# Which dimension of its result a norm holds the channels in; None: the last.
_NORMS = {F.batch_norm: 1, F.instance_norm: 1, F.group_norm: 1, F.layer_norm: None, F.rms_norm: None}


class Sighting(NamedTuple):
    """One operand of one call, as it runs."""

    name: str  # the site's name
    module: str  # the module that runs the call
    kind: str
    operand: Operand
    channel: int  # which dimension of the operand holds its channels, from behind
    reads_module_input: bool  # the operand is that module's own first argument, untouched (see Observer.not_layers)
    first_run: bool  # that module runs for the first time in this forward pass
    in_place: bool  # it is an activation that leaves its result in the operand


@dataclass(slots=True, eq=False)
class _Frame:
    """A module call in progress."""

    name: str
    first_input: Any
    modes: tuple  # autocast and grad mode on entry
    calls: int = 0
    in_place: bool = False  # one of them leaves its result in its input


class _Origins:
    """What each tensor of the runs was made from."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._known = WeakTensorKeyDictionary()  # of all but data
        self._ids: set[int] = set()  # of all that were ever there: most tensors were not, and that is seen at once
        # By its id, all data. (An id may be another tensor's later: one's too that comes out of code that is not seen.)
        self._data: dict[int, weakref.ref[Tensor]] = {}
        held = (v for module in model.modules() for v in (*module._buffers.values(), *vars(module).values()))
        self._models = {id(value): value for value in held if isinstance(value, Tensor)}
        self._written = [*self._models]  # which of them are not known for what they are when a run begins

    def begin(self) -> None:
        """What the model holds is made from no data when it begins to run, whatever the last run wrote there."""
        for value in map(self._models.__getitem__, self._written):
            self.mark((value,), Origin.PARAMETER if value.requires_grad else Origin.CONSTANT)
        self._written = []

    def of(self, value: Any) -> Origin:
        if not isinstance(value, Tensor):
            return Origin.CONSTANT
        if _is_parameter(value):
            return Origin.PARAMETER
        known = self._known.get(value) if id(value) in self._ids else None
        if known is not None:
            return known
        if self._is_data(value):
            return Origin.DATA
        if torch_internals.is_vmapped(value):  # torch.vmap made it, out of sight, of what it was given
            return self.of(torch_internals.unwrapped_once(value))
        return Origin.UNKNOWN

    def _is_data(self, tensor: Tensor) -> bool:
        found = self._data.get(id(tensor))
        return found is not None and found() is tensor

    def mark(self, values: Iterable[Any], origin: Origin) -> None:
        for tensor in _tensors(values):
            if _is_parameter(tensor):
                continue
            if origin is not Origin.DATA:
                self._ids.add(id(tensor))
                self._known[tensor] = origin
                continue
            self._data[id(tensor)] = weakref.ref(tensor)
            if id(tensor) in self._ids:
                self._known.pop(tensor, None)
                if id(tensor) in self._models:
                    self._written.append(id(tensor))

    def follow(self, function: Callable, args: tuple, kwargs: dict, result: Any) -> None:
        """Join the origins of a call's inputs: they are its results', and that of what it writes to."""
        if args and type(args[0]) is type(result) is Tensor:
            first, made = id(args[0]), id(result)
            if first not in self._ids and made not in self._ids and self._is_data(args[0]):
                self._data[made] = weakref.ref(result)  # most calls: data first, and data out of it
                return
        tensors = _tensors((*args, *kwargs.values()))
        made_from = joined(*map(self.of, tensors))
        if made_from is Origin.DATA and function is Tensor.__getitem__ and all(map(_is_number, tensors[1:])):
            # A part that data picks: `weights[expert]` is used as a weight, `embeddings[step]` as data.
            made_from = joined(self.of(tensors[0]), Origin.UNKNOWN)
        if made_from is not Origin.DATA and _reads(function) and self.of(_first(args, kwargs)) >= Origin.UNKNOWN:
            made_from = Origin.DATA  # as `data_operands` takes it to be
        if function in _FROM_PYTHON and not tensors:
            made_from = Origin.UNKNOWN
        writes = bool(args) and (named_in_place(function) or function == _SETS_DATA)
        for target in _tensors((args[0] if writes else None, kwargs.get("out"))):
            if joined(self.of(target), made_from) is not self.of(target):
                for tensor in self._in_memory_of(target):
                    self.mark((tensor,), joined(self.of(tensor), made_from))
        if isinstance(result, Tensor | tuple | list | dict):
            self.mark((result,), made_from)

    def _in_memory_of(self, tensor: Tensor) -> list[Tensor]:
        """All that would be data when it is written there: the tensor, what it is a view of, and its other views."""
        memory = memory_of(tensor)
        others = [] if memory is None else [other for other in self._known if memory_of(other) == memory]
        return [tensor, *others]


def _is_number(index: Tensor) -> bool:
    """Whether a tensor, as an index, is a whole number, which picks; truth values and longer ones gather."""
    return index.dim() == 0 and not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)


def _reads(function: Callable) -> bool:
    """Whether its first argument is an input, not one of two factors: a layer or a norm."""
    return function in _NORMS or (function in CALLS and CALLS[function].roles.startswith("x"))


def _first(args: tuple, kwargs: dict) -> Any:
    return args[0] if args else kwargs.get("input")


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among the values and inside them. Most calls nest none, and walking a tree takes longer than they."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _tensors(value)
        elif not isinstance(value, _SCALARS):
            found += (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
    return found


def _is_parameter(value: Tensor) -> bool:
    """`isinstance(value, Parameter)`, which runs Python code; of a plain tensor the type says enough."""
    return type(value) is not Tensor and isinstance(value, torch.nn.Parameter)


# What exchanges dimensions.
_PERMUTES = {getattr(owner, name) for owner in (torch, Tensor) for name in (
    "permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "moveaxis", "adjoint"
)} | {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH")}  # fmt: skip


class _Layouts:
    """Where the channels of each tensor of the run lie: a layer or norm says so. What exchanges dimensions takes them
    along, and whatever else keeps the number of dimensions, and that of the channels, leaves them there."""

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()

    def channel(self, value: Tensor, key: Key) -> int:
        """From behind. Where nothing is known, an image's second dimension, and else the last one."""
        return self._known.get(value, 1 - value.dim() if value.dim() in (4, 5) else -1)

    def follow(self, function: Callable, args: tuple, kwargs: dict, result: Any) -> None:
        if not isinstance(result, Tensor) or not result.dim():
            return
        if function in CALLS:
            self._known[result] = CALLS[function].channel_of(result)
        elif function in _NORMS:
            self._known[result] = -1 if _NORMS[function] is None else _NORMS[function] - result.dim()
        elif function in _PERMUTES:
            if (x := args[0]) in self._known:
                sizes = [*range(x.dim())]  # each another: of the result they say where each dimension went
                there = function(torch.empty(sizes, device="meta"), *args[1:], **kwargs).shape
                self._known[result] = there.index(sizes[self._known[x]]) - len(sizes)
        else:
            kept = (
                channel
                for x in args
                if isinstance(x, Tensor) and x in self._known and x.dim() == result.dim()
                if x.shape[channel := self._known[x]] == result.shape[channel]
            )
            if (channel := next(kept, None)) is not None:
                self._known[result] = channel


class _SeeCalls(TorchFunctionMode):
    def __init__(self, observer: "Observer") -> None:
        super().__init__()
        self.observer = observer

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is torch_internals.set_grad_enabled:
            self.observer.changes_context()
        if function in OPENED:
            with self:  # an opened composition reports its inner calls, and needs no report of its own
                return OPENED[function](*args, **kwargs)
        call = self.observer.table.get(function)
        if call is not None:
            args, kwargs = self.observer.saw(function, call, args, kwargs)
        result = function(*args, **kwargs)
        if call is None:
            self.observer.called(function, args, kwargs, result)
        self.observer.origins.follow(function, args, kwargs, result)
        if self.observer.layouts is not None:
            self.observer.layouts.follow(function, args, kwargs, result)
        return result


class Observer:
    """Runs a model and reports every operand that data could enter a call of `CALLS` through, in execution order.

    on_call: called with each `Sighting` before the call runs; whatever tensor it returns takes the operand's place
    (None leaves it as it is). activations: report those of `ACTIVATIONS` too.
    """

    def __init__(
        self, model: torch.nn.Module, on_call: Callable[[Sighting], Tensor | None], activations: bool = False
    ) -> None:
        self.model = model
        self.on_call = on_call
        self.table = {**CALLS, **ACTIVATIONS} if activations else CALLS
        self.names = names_of(model)
        self.origins = _Origins(model)
        self.contexts: set[str] = set()  # modules whose own code runs calls in a context that a graph would drop
        self.not_layers: set[str] = set()  # modules that do more with their first argument than one call of the table
        self.no_sites: set[str] = set()  # calls of the table that no data met weights in
        self.ways: dict[str, Ways] = {}  # call -> how it was made
        self.parameters = {id(parameter): name for name, parameter in model.named_parameters()}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """One forward pass. The fast path of attention is off within: it would hide the products inside it."""
        self.origins.begin()
        self.origins.mark((args, kwargs), Origin.DATA)
        self.layouts = _Layouts() if self.table is not CALLS else None
        self.numbering = Numbering()
        self.runs: Counter[str] = Counter()
        self.frames: list[_Frame] = []
        self._could_be_layers: dict[int, list[_Frame]] = {}  # by the id of what they were given first
        self.functions = forwards_of_functions()
        with self._follow_modules(), fast_path_off(), _SeeCalls(self):
            return self.model(*args, **kwargs)

    def saw(self, function: Callable, call: Call, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        frame = self.frames[-1]
        function_runs = self._check_context(frame, _modes())
        frame.calls += 1
        self._read_by_call(frame, args, kwargs)
        name = self.numbering.call(frame.name, call.mark)
        met = (self._weight_in(frame.name, value) for _, _, value in call.operands(args, kwargs))
        way = (place(), *filter(None, met))
        self.ways[name] = both_ways(self.ways.get(name, ()), (way,))
        operands = data_operands(call, args, kwargs, self.origins.of)
        if not operands:
            self.no_sites.add(name)
        for i, operand in enumerate(operands):
            if function_runs:
                operand = operand._replace(left_out=IN_FUNCTION)
            reads_input = operand.value is frame.first_input and i == 0
            first_run = self.runs[frame.name] <= 1
            along = call.channel_of if call.mark == "#" else self.layouts.channel
            channel = along(operand.value, operand.key)
            site = operand_name(name, i)
            in_place = call.mark == "@" and works_in_place(function, args, kwargs)
            frame.in_place |= in_place
            new = self.on_call(
                Sighting(site, frame.name, call.kind, operand, channel, reads_input, first_run, in_place)
            )
            if new is not None:
                self.origins.mark((new,), self.origins.of(operand.value))  # it stands for it
                args, kwargs = replace(args, kwargs, operand.key, new)
        return args, kwargs

    def name_of(self, module: str, value: Any) -> str | None:
        """The name of a parameter; of one that is sharded, gathered for its module since that began to run."""
        if name := self.parameters.get(id(value)):
            return name
        own = self.model.get_submodule(module).named_parameters(recurse=False)
        return next((f"{module}.{name}".removeprefix(".") for name, p in own if p is value), None)

    def _weight_in(self, module: str, value: Any) -> str | None:
        """The name of the parameter that a value is, or is a view of; and which part of it."""
        parameter = parameter_in(value)
        name = None if parameter is None else self.name_of(module, parameter)
        return name and name + (ANY_PART if self.origins.of(value) is Origin.MIXED else part_of(value, parameter))

    def called(self, function: Callable, args: tuple, kwargs: dict, result: Any) -> None:
        """Note a use of a running module's first argument: a layer may look at it besides its one call."""
        if not only_looks(function, result):
            self._used((*args, *kwargs.values()))

    def _used(self, values: Iterable[Any]) -> None:
        """Modules that were given one of the values first do more with it than their one call: they are no layers."""
        if could_be := self._could_be_layers:
            for value in values:  # (no two objects have one id)
                if id(value) in could_be:
                    self.not_layers.update(frame.name for frame in could_be.pop(id(value)))
                elif not isinstance(value, _FLAT):
                    self._used(_tensors((value,)))

    def _read_by_call(self, frame: _Frame, args: tuple, kwargs: dict) -> None:
        """The same of a call of the table: a layer makes it, once, and its input stands in one place there."""
        if could_be := self._could_be_layers:
            read = [id(value) for value in _tensors((*args, *kwargs.values())) if id(value) in could_be]
            for value in read:
                several = read.count(value) > 1
                self.not_layers.update(other.name for other in could_be[value] if other is not frame or several)

    def changes_context(self) -> None:
        if self.frames:
            self.contexts.add(self.frames[-1].name)

    def _check_context(self, frame: _Frame, modes: tuple) -> bool:
        """Autocast, the grad mode, or activation checkpointing, between the module's start and this call. Returns
        whether a torch.autograd.Function is running it."""
        checkpointed, function_runs = _within(self.functions)
        if modes != frame.modes or checkpointed:
            self.contexts.add(frame.name)
        return function_runs

    def _follow_modules(self) -> contextlib.AbstractContextManager[None]:
        """Keep the stack of module calls."""

        def enter(module: torch.nn.Module, args: tuple) -> None:
            modes = _modes()
            caller = self.frames[-1] if self.frames else None
            if caller is not None:
                self._check_context(caller, modes)
                self._used(args)
            if id(module) in self.names:
                frame = _Frame(self.names[id(module)], args[0] if args else None, modes)
                self.runs[frame.name] += 1
            else:  # not registered (kept in a plain list or a closure): its calls count as its caller's own
                frame = _Frame(caller.name if caller else "", None, modes)
            self.frames.append(frame)
            if isinstance(frame.first_input, Tensor) and frame.name not in self.not_layers:
                self._could_be_layers.setdefault(id(frame.first_input), []).append(frame)

        def leave(module: torch.nn.Module, result: Any) -> None:
            frame = self.frames.pop()
            if not frame.in_place:
                self._used((result,))  # what came in is a part of what goes out
            if frame.calls > 1 or (frame.calls and not is_straight(module)):
                self.not_layers.add(frame.name)
            readers = self._could_be_layers.get(id(frame.first_input), [])
            if frame in readers:
                readers.remove(frame)
                if not readers:
                    del self._could_be_layers[id(frame.first_input)]

        return module_hooks(enter, leave)


def _modes() -> tuple:
    autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


def _within(functions: set[types.CodeType]) -> tuple[bool, bool]:
    """Whether torch.utils.checkpoint, and whether one of these functions, stands between this call and the forward of
    the module that makes it."""
    frame = sys._getframe(2)
    forwards = 0  # the innermost _call_impl runs the hook that asks; the next one is the caller's
    checkpointed = function_runs = False
    while frame is not None:
        code = frame.f_code
        checkpointed |= code is CHECKPOINT
        function_runs |= code in functions
        if code is MODULE_CALL:
            forwards += 1
            if forwards == 2:
                break
        frame = frame.f_back
    return checkpointed, function_runs
