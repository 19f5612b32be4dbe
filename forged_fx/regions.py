"""Forge a model that is not one graph: module by module, in the model's own skeleton.

Each module that runs a site gets a class of its own, derived from its old one, whose forward puts the thresholds in
place. It remains what it was to everyone else: its type, name, attributes, parameters, hooks, mode and control flow.

Two cases. A *layer* makes one call, on its own first argument: the threshold goes ahead of its forward. Any other
module runs its forward under a function mode that counts the module's own calls and thresholds the operands that
calibration found.

A module that runs several times in a forward pass has thresholds of its own for each run, by the number that the run
has in the pass. A pass begins where a thread enters the model: at the model, or at one of its parts that a user calls.
One that ran once in calibration may run once in a pass.
"""

import inspect
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from forged_fx import torch_internals
from forged_fx.graph_calls import to_be_kept
from forged_fx.kinds import Choice
from forged_fx.models import injected, is_parametrized
from forged_fx.places import place
from forged_fx.sites import (
    ACTIVATIONS,
    CALLS,
    OPENED,
    Key,
    call_of,
    get,
    is_activation,
    mark_of,
    module_of,
    other_call,
    parameter_in,
    part_of,
    replace,
    unseen_call,
)
from forged_fx.stats import Stats
from forged_fx.thresholds import HoldsThresholds, register
from forged_fx.told import Teller, Told
from forged_fx.traced_calls import ByWeight, TracedCalls, by_weight
from forged_fx.write_back import works_in_place

# Their fused eval-mode kernels would run past the layers within; under a function mode they take the open path.
_FUSES_CHILDREN = (torch.nn.TransformerEncoder, torch.nn.TransformerEncoderLayer)


@dataclass(frozen=True)
class Forge:
    """What to do to one operand: of which kind of call it is and where it sits there, the operator's name, its buffers'
    names, its other arguments, and whether the call leaves its result in the operand."""

    kind: str
    key: Key
    function: str
    buffers: tuple[str, ...]
    rest: tuple[int, ...]
    in_place: bool = False

    def __call__(self, region: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        parameters = [getattr(region, name) for name in self.buffers]
        return getattr(torch.ops.forged_fx, self.function)(x, *parameters, *self.rest)

    def into(self, region: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The same in the memory of x."""
        return x.copy_(self(region, to_be_kept(x)))


class Pass(threading.local):
    """The forward pass of a forged model that a thread is in.

    counts: how many calls each plan has made in it, by the plan's id. running: the modules that are forged call by
    call, and run now.
    """

    depth: int
    counts: dict[Any, int]
    running: "list[_OwnCalls]"

    def __init__(self) -> None:
        self.running = []
        self.depth = 0  # a class's attribute would hide each thread's own from Dynamo of torch 2.11

    def enter(self) -> None:
        if self.depth == 0:
            self.counts = {}
        self.depth += 1

    def leave(self) -> None:
        self.depth -= 1

    def so_far(self) -> dict[Any, int]:
        """Outside of all passes a call is the first one."""
        return self.counts if self.depth else {}

    def __reduce__(self) -> tuple:
        return Pass, ()


@dataclass
class Plan:
    """What to do at each call of one module's own code.

    operands: call index -> what is done there. once: in calibration the module ran at most once in a forward pass, so
    that its calls are counted from its own start, and it must not run again; else they are counted from the pass's.
    calls: how many there were at most in calibration. told: what that tells of each.
    """

    module: str
    once: bool
    calls: int
    operands: dict[int, list[Forge]]
    told: Told | None = None

    def next(self, counts: dict[Any, int]) -> int:
        """The number of the call that is made now."""
        k = self._count(counts)
        if k >= self.calls:
            raise unseen_call(self.module, k, self.calls)
        return k

    def begin(self, counts: dict[Any, int]) -> int:
        """The number of a run's first call, where the module ran at most once in calibration."""
        # (By its id, Dynamo would compile anew for each copy of a model.)
        key = self.module if torch.compiler.is_compiling() else id(self)
        if key in counts:
            self._check_again()
        counts[key] = 1
        return 0

    @torch.compiler.disable  # (which looks at the stack)
    def _check_again(self) -> None:
        if torch_internals.checkpoints()[1] is None and not _hooks_may_run_layers():
            raise unseen_call(self.module, most := max(self.calls, 1), most)

    def _count(self, counts: dict[Any, int]) -> int:
        """The number of this call. What a backward recomputes has the numbers that it had when it ran first."""
        looks = not self.once and not torch.compiler.is_compiling()  # (Dynamo cannot look at the stack)
        first, again = torch_internals.checkpoints() if looks else ([], None)
        key = id(self)
        if again is not None and key in again:
            run = (key, torch_internals.current_graph_task_id())  # asked for here only: Dynamo does not record it
            k = again.get(run, again[key])
            again[run] = k + 1
        else:
            k = counts.get(key, 0)
            counts[key] = k + 1
        for notes in first:
            notes.setdefault(key, k)
        return k


def _hooks_may_run_layers() -> bool:
    """Whether someone has hooks within the model that runs: what those call besides is no run of the model's own."""
    if torch_internals.has_any_global_hook():
        return True
    running = [m for m in torch_internals.modules_on_stack() if isinstance(m, _Region)]
    modules = running[-1].modules() if running else ()
    hooks = (h for m in modules for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
    return any(str(getattr(hook, "__module__", "")).partition(".")[0] != "torch" for hook in hooks)


class _Region(HoldsThresholds):
    threshold_buffers = {}  # noqa: RUF012 (a slice of a Sequential is of its class, and has none)
    forged_pass = Pass()
    forged_plan: Plan  # (a name that the user's own class will not have)
    forged_activations: Plan | None = None  # the same for its calls of activations, which are counted apart

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":
            warnings.warn(
                f"a forward is set on a forged {type(self).__name__}, whose thresholds run within the one that it "
                "replaces: they are lost unless the new one calls that",
                stacklevel=2,
            )
        super().__setattr__(name, value)

    def __init_subclass__(cls) -> None:
        """What the user's class does with its subclasses is not for these, which it does not know."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        if "forged_from" not in vars(type(self)):  # of a class that others have put ahead of it since
            return super().__reduce_ex__(protocol)
        return _rebuild, type(self).forged_from, self.__getstate__()


class _OwnForward(torch.nn.Module):
    """Stands ahead of the plain class of a module whose instance has a forward of its own."""

    forged_forward: Callable

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.forged_forward(*args, **kwargs)


class ForgedLayer(_Region):
    """A layer, or an activation's module: `threshold -> forward`."""

    forged_input: str  # the name of its forward's first argument

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        input, *rest = args or (self._named(kwargs),)
        plan = self.forged_plan
        counts = self.forged_pass.so_far()
        k = plan.begin(counts) if plan.once else plan.next(counts)
        for forge in plan.operands.get(k, ()):  # (a call on a constant has none)
            input = forge.into(self, input) if forge.in_place else forge(self, input)
        return super().forward(input, *rest, **kwargs)

    def _named(self, kwargs: dict) -> torch.Tensor:
        """The first argument, out of the others, where all are named."""
        if self.forged_input not in kwargs:
            name = self.forged_plan.module
            raise TypeError(f"{name!r} is called without {self.forged_input!r}, which has a threshold")
        return kwargs.pop(self.forged_input)


class ForgedParent(_Region):
    """A module around others that run several times in a forward pass: one begins here, unless it has begun."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.forged_pass.enter()  # (Dynamo does not follow `with` here)
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.forged_pass.leave()


class ForgedCalls(ForgedParent):
    """Any other module: its forward runs as written, and its own calls find their operands thresholded.

    Where its weights do not tell Dynamo which call is which, it is left out of `torch.compile`: compiled code would run
    its own products under the function mode, once more. The plain model, compiled with `backend="forged"` and `stats`
    among the options, is forged on its way instead.
    """

    forged_by_weight: ByWeight | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.forged_by_weight is not None and torch.compiler.is_dynamo_compiling():
            calls = TracedCalls(self, self.forged_by_weight)
            self.forged_plan.begin(self.forged_pass.so_far())
            with calls:
                result = super().forward(*args, **kwargs)
                calls.check()
                return result
        return self.forged_uncompiled(*args, **kwargs)

    @torch.compiler.disable
    def forged_uncompiled(self, *args: Any, **kwargs: Any) -> Any:
        with _OwnCalls(self):
            return super().forward(*args, **kwargs)


class _OwnCalls(TorchFunctionMode):
    """Counts the calls of `CALLS` that a module makes itself, not its submodules, and thresholds their operands."""

    def __init__(self, region: ForgedCalls) -> None:
        super().__init__()
        self.region = region
        self.inside = {id(module) for module in region.modules()}
        self.own: dict[int, int] = {}  # the calls since the module's own start, by plan
        self.recording = torch.is_grad_enabled()

    def __enter__(self) -> Any:
        self.region.forged_pass.running.append(self)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        self.region.forged_pass.running.pop()
        super().__exit__(*exception)

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        call = CALLS.get(function) or ACTIVATIONS.get(function)
        plan = self.region.forged_activations if function in ACTIVATIONS else self.region.forged_plan
        if not ((call and plan) or function in OPENED):
            return function(*args, **kwargs)
        # What Dynamo records is a submodule's: of this module it records nothing.
        if torch.compiler.is_dynamo_compiling() or not self._is_own():
            return function(*args, **kwargs)
        if function in OPENED:
            with self:
                return OPENED[function](*args, **kwargs)
        k = plan.next(self.own if plan.once else self.region.forged_pass.so_far())
        if plan.once and k == 0 and plan.operands:
            plan.begin(self.region.forged_pass.so_far())
        forges = plan.operands.get(k, [])
        for forge in forges:
            x = get(args, kwargs, forge.key) if call.kind == forge.kind else None
            # (a caller may give a parameter as data: an image that is learned)
            if x is None or (isinstance(x, torch.nn.Parameter) and any(x is p for p in self.region.parameters())):
                raise other_call(plan.module, forge.kind, call.kind)
        if plan.told:
            values = [value for _, _, value in call.operands(args, kwargs)]
            met = [(p, part_of(value, p)) for value in values if (p := parameter_in(value)) is not None]
            plan.told.check(k, place(), self.region, met)
        for forge in forges:
            if self.recording and torch_internals.checkpoints_itself(self.region):
                raise RuntimeError(
                    f"{plan.module or 'the model'!r} checkpoints calls that it makes itself: they are run anew in the "
                    "backward, where no threshold reaches them. Put them into a module of their own, and calibrate; or "
                    "compile the plain model, with backend='forged' and options={'stats': ...}"
                )
            in_place = function in ACTIVATIONS and works_in_place(function, args, kwargs)
            new = (forge.into if in_place else forge)(self.region, get(args, kwargs, forge.key))
            args, kwargs = replace(args, kwargs, forge.key, new)
        return function(*args, **kwargs)

    def _is_own(self) -> bool:
        """Whether none of the submodules makes the call that is running, nor the module itself, called by itself. The
        stack tells; hooks around all modules would, too, but Dynamo would compile a submodule anew in each pass, as
        hooks are others each time."""
        if next(own for own in reversed(self.region.forged_pass.running) if own.region is self.region) is not self:
            return False
        for module in torch_internals.modules_on_stack(in_hooks=False):  # (to calibration a hook's are its caller's)
            if id(module) in self.inside:
                return module is self.region
        return True


_classes: dict[tuple[type, ...], type] = {}


def _derive(region: Any, *plain: Any) -> type:
    """The class of a forged module: `region` first, so that its forward wraps the plain one."""
    key = (region, *plain)
    if key not in _classes:

        def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            return region.forward(self, *args, **kwargs)

        forward.__code__ = forward.__code__.replace()  # its own: Dynamo counts how often it has compiled a code
        vars(forward)["__signature__"] = inspect.signature(plain[-1].forward)  # exporters and trainers read it
        members = {"forged_from": key, "forward": forward, "__module__": plain[-1].__module__}
        # (What only stands around layers keeps its name: Hugging Face writes the root's into configurations.)
        ahead = "" if region is ForgedParent else "Forged"
        _classes[key] = type(f"{ahead}{plain[-1].__name__}", key, members)
    return _classes[key]


def _rebuild(*bases: type) -> torch.nn.Module:
    derived: Any = _derive(*bases)
    return derived.__new__(derived)


def forge_regions(model: torch.nn.Module, stats: Stats, choice: Choice) -> dict[str, str]:
    """Forge the modules that run the chosen sites, in place; returns for each site how it was reached."""
    sites_of: dict[str, list[str]] = {}
    for site in choice.kinds:
        sites_of.setdefault(module_of(site), []).append(site)

    def is_around(name: str) -> bool:
        inside = f"{name}." if name else ""
        return any(m != name and m.startswith(inside) for m in sites_of)

    for name, module in model.named_modules():
        if isinstance(module, _FUSES_CHILDREN) and is_around(name):
            sites_of.setdefault(name, [])
    reached: dict[str, str] = {}
    teller = Teller(stats, model)
    for name, sites in sites_of.items():
        module = model.get_submodule(name)
        rows = [stats.sites[site] for site in sites]
        layer = bool(rows) and all(row.layer for row in rows) and not is_around(name)  # (there a pass may begin)
        module.threshold_buffers = {}
        plans = {}
        for mark in "#@":
            forged = {site: stats.sites[site] for site in sites if mark_of(site) == mark}  # without any, calls go by
            once = all(row.once for row in forged.values())
            calls = max((row.module_calls for row in forged.values()), default=sys.maxsize)
            # To calibration a hook's calls are its module's, and run ahead of its forward: the audit finds that.
            looks = forged and not layer and not module._forward_pre_hooks
            plans[mark] = Plan(name, once, calls, {}, teller.of(name, mark, module, forged) if looks else None)
        for site, row in zip(sites, rows, strict=True):
            kind = choice[site]
            module.threshold_buffers[site] = names = register(module, site, kind, row, model)
            known = row.in_place is not None  # older files do not say it
            in_place = row.in_place if known else is_activation(site) and getattr(module, "inplace", False)
            forge = Forge(row.kind, row.key, kind.function, names, kind.rest(row), bool(in_place))
            plans[mark_of(site)].operands.setdefault(call_of(site), []).append(forge)
        module.forged_plan = plans["@" if layer and is_activation(sites[0]) else "#"]
        if plans["@"].operands and not layer:
            module.forged_activations = plans["@"]
        elif not layer:
            module.forged_by_weight = by_weight(plans["#"])
        if layer:
            module.forged_input = next(iter(inspect.signature(module.forward).parameters))
        _become(ForgedLayer if layer else ForgedCalls, module)
        reached |= dict.fromkeys(sites, f"ahead of {name}" if layer else f"within {name or 'the model'}")
    _begin_passes(model)
    return reached


def _become(region: type[_Region], module: Any) -> None:
    """Give the module its class. A forward of the instance's own would hide the class's: that comes to run it. What
    torch.nn.utils.parametrize put ahead of the plain class comes ahead of this one, and can be taken off again."""
    plain = [*type(module).__bases__] if is_parametrized(module) else [type(module)]
    if "forward" in vars(module):
        module.forged_forward = vars(module).pop("forward")
        plain.insert(0, _OwnForward)
    derived = _derive(region, *plain)
    module.__class__ = injected(module, derived) if is_parametrized(module) else derived


def _begin_passes(model: torch.nn.Module) -> None:
    """A pass begins at the model, and at any part that is, or is around, one that runs several times."""
    regions = [module for module in model.modules() if isinstance(module, _Region)]
    several = {r for r in regions if not (r.forged_plan.once and (r.forged_activations or r.forged_plan).once)}
    for module in model.modules():
        forward = getattr(type(module), "forward", None)  # (a class of TorchScript's has none)
        has_forward = forward is not torch.nn.Module.forward or "forward" in vars(module)
        begins = module is model or several.intersection(module.modules())
        if not isinstance(module, _Region) and has_forward and begins:
            _become(ForgedParent, module)
    now = Pass()
    for module in model.modules():
        if isinstance(module, _Region):
            module.forged_pass = now
