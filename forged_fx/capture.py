"""Turn a module into a graph, or say why a graph would not be the same module.

A graph is what one run of the Python code recorded: whatever the code decides from its input, its mode or its
surroundings is frozen in it. So only the modules that must be looked into are opened (those with a site inside), all
others stay whole as `call_module`, and what a graph cannot carry is refused rather than dropped.
"""

import contextlib
import copy
import dataclasses
import inspect
import itertools
import operator
import sys
import threading
import types
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.fx as fx
import torch.nn.attention
from torch.overrides import TorchFunctionMode

from forged_fx import torch_internals
from forged_fx.checked import in_a_line
from forged_fx.graph_calls import AUGMENTED, of_type, ordered
from forged_fx.is_tensor import is_of_torch, values_are_tensors
from forged_fx.models import HELD, copied, has_hooks
from forged_fx.modes import kept_buffers, same_bits
from forged_fx.randomness import generator_state, kept_randomness
from forged_fx.sites import module_of, only_looks

Traced = tuple[fx.Graph, dict[str, torch.Tensor]]  # a graph, and the tensors that were made for it, by name


class Untraceable(Exception):
    """A module that cannot become a graph without changing what it does; the message says why."""


class _Value(fx.Proxy):
    """Stands for what only a run knows. Code that asks for more is no graph, also where torch.fx has an answer (another
    hash, other words than the value's) and where the code catches the error."""

    def __getattr__(self, name: str) -> "_Attribute":
        if not isinstance(self, _Attribute) and self.node.op == "placeholder":
            self.tracer.fields[self.node.target].add(name)
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OF_PROXIES:
            self.tracer.asked = f"sets {name!r} of a value"  # of the proxy it would be, and nobody's in a run
        super().__setattr__(name, value)

    def __hash__(self) -> int:
        return self._refuse("looks up, in a set or a dictionary, a value")

    def __len__(self) -> int:
        return self._refuse("asks for the length of a value")

    def __index__(self) -> int:
        return self._refuse("takes a number from a value")

    def __str__(self) -> str:
        self.tracer.asked = "puts into words a value"
        return repr(self)

    def __format__(self, _: str) -> str:  # for a message, in all likelihood: an assertion makes it in every run
        return repr(self)

    def __deepcopy__(self, _: dict) -> fx.Proxy:
        return self._refuse("makes a deep copy of a value")

    def _refuse(self, what: str) -> Any:
        self.tracer.asked = what
        raise TypeError(f"the forward {what} that only a run knows")

    __int__ = __float__ = __complex__ = __round__ = __divmod__ = lambda self, *_: self.__index__()


for _name, _function in AUGMENTED.items():  # (a function that is set on a class is a method)
    setattr(_Value, f"__{_name}__", _function)

_OF_PROXIES = ("__dict__", "tracer", "node", "_node", "root", "attr", "value")


class _Attribute(fx.proxy.Attribute, _Value):
    """Stands for an attribute of such a value: its shape, its dtype."""

    def __repr__(self) -> str:
        self.tracer.asked = "puts into words a value"
        return super().__repr__()

    def __format__(self, _: str) -> str:
        return fx.Proxy.__repr__(self)


class _Buffer(_Value):
    """Stands for a buffer of the model's. How large it is is the model's own, and no run's."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, value: torch.Tensor) -> None:
        super().__init__(node, tracer)
        self.value = value

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    @property
    def ndim(self) -> int:
        return self.value.ndim

    def size(self, *dim: Any) -> Any:
        return self.value.size(*dim)

    def numel(self) -> int:
        return self.value.numel()

    def dim(self) -> int:
        return self.value.dim()

    def __len__(self) -> int:
        return len(self.value)


class _SiteTracer(fx.Tracer):
    proxy_buffer_attributes = True  # what a forward makes of buffers is made anew in each run, as they may change

    def __init__(self, opened: set[str]) -> None:
        super().__init__()
        self.thread = threading.get_ident()
        self.opened = opened
        self.asked: str | None = None  # what the forward does with a value; it may catch the error that this is
        self.fields = defaultdict[str, set[str]](set)  # by argument, the attributes of it that were asked for

    def is_leaf_module(self, module: torch.nn.Module, name: str) -> bool:
        return name not in self.opened

    # While it traces, every module of the process calls it, and asks it for attributes: those of other threads, too.

    def call_module(self, m: torch.nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        elsewhere = threading.get_ident() != self.thread
        return forward(*args, **kwargs) if elsewhere else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict) -> Any:
        elsewhere = threading.get_ident() != self.thread
        return attr_val if elsewhere else super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        if node.op == "get_attr":
            owner, _, name = node.target.rpartition(".")
            if isinstance(value := self.root.get_submodule(owner)._buffers.get(name), torch.Tensor):
                return _Buffer(node, self, value)
        return _Value(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.asked = "decides by a value"
        return super().to_bool(obj)

    def asked_for_type(self) -> None:
        self.asked = "asks for the type of a value"

    def iter(self, obj: fx.Proxy) -> Iterator:
        self.asked = "goes through a value"
        return super().iter(obj)

    def create_arg(self, a: Any) -> Any:
        if type(a) is OrderedDict:
            return self.create_node("call_function", ordered, (self.create_arg(list(a.items())),), {})
        if isinstance(a, dict | list) and type(a) not in _CONTAINERS:
            raise Untraceable(f"its forward makes {type(a).__name__}, in the place of which a graph has no such class")
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if torch_internals.running({torch_internals.CHECKPOINT}):
            raise Untraceable("its forward checkpoints activations, which a graph would not do")
        if torch_internals.parametrizations_are_kept():
            raise Untraceable("its forward computes parametrizations once for several calls, which a graph would not")
        return super().create_node(*args, **kwargs)


_CONTAINERS = (dict, list, fx.immutable_collections.immutable_dict, fx.immutable_collections.immutable_list)


class Retracer(fx.Tracer):
    """What unpickling traces a graph's code with (`_SiteTracer` needs to be told what to open)."""

    proxy_buffer_attributes = True


# Looks at what `.half()`, `.to("cuda")`, `requires_grad_()` or a backward changes.
_CHANGING = {
    getattr(torch.Tensor, name).__get__
    for name in ("dtype", "device", "itemsize", "nbytes", "is_cuda", "requires_grad", "grad", "grad_fn", "is_leaf")
}


class _NoValues(TorchFunctionMode):
    """Refuses a forward that computes with the model's own tensors out of the tracer's sight: a graph would hold what
    comes of them as they are now. (It follows `self.weight`, and beside data what `self.parameters()` gives.)"""

    def __init__(self, model: torch.nn.Module, opened: set[str]) -> None:
        super().__init__()
        self.tensors = {id(tensor): n for n, tensor in (*model.named_parameters(), *model.named_buffers())}
        whole = [(name, module) for name, module in model.named_modules() if name not in opened]
        self.tensors |= {id(tensor): f"a tensor of {name}" for name, module in whole for tensor in _kept(module)}

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if only_looks(function, result) and function not in _CHANGING:
            return result
        given = torch_internals.tree_leaves((args, kwargs))
        read = next((name for value in given if (name := self.tensors.get(id(value)))), None)
        if read and not any(isinstance(value, fx.Proxy) for value in given):
            raise Untraceable(f"its forward reads {read!r} by another way than its attribute, once for a graph")
        return result


def opened_modules(sites: Iterable[str], layers: set[str]) -> set[str]:
    """The modules to look into: those that run a site in their own code, and all that contain one.

    A layer (it makes one call, on its own first argument) stays whole: its threshold goes ahead of it.
    """
    opened = {""}
    for site in sites:
        parts = module_of(site).split(".")
        if site in layers:
            parts.pop()
        opened |= {".".join(parts[:i]) for i in range(1, len(parts) + 1)}
    return opened


def capture(
    model: torch.nn.Module, opened: set[str], given: set[str], contexts: set[str], example: tuple | None = None
) -> Traced:
    """The graph of `model`'s forward pass, with every module outside `opened` as one call.

    given: the names of the forward parameters that calls pass; the others keep their defaults. example: (args, kwargs)
    of a call, which tells which arguments are tensors. Also returns the tensors that the forward makes from literals
    alone: the graph reads them under these names.
    Raises Untraceable, with the reason, where the graph would lose something that the model does.
    """
    for name in sorted(opened & contexts):
        raise Untraceable(f"{name or 'the model'!r} makes calls under autocast, another grad mode or checkpointing")
    for name in sorted(opened):
        if has_hooks(module := model.get_submodule(name)):
            raise Untraceable(f"{name or 'the model'!r} has hooks, which a graph does not run")
        if any(vars(module).get(hooks) for hooks in _STATE_DICT_HOOKS):
            raise Untraceable(f"{name or 'the model'!r} has hooks on its state dict, which a graph would not have")
        if own := [n for n in _TELLS if getattr(type(module), n) is not getattr(torch.nn.Module, n)]:
            raise Untraceable(f"{name or 'the model'!r} has {own[0]}() of its own, which a graph would not have")
    if "forward" in vars(model):
        raise Untraceable("its forward was set on this one model, and a graph is of its class's")
    if type(model).__call__ is not torch.nn.Module.__call__ and not isinstance(model, fx.GraphModule):
        raise Untraceable("its class has a __call__ of its own, which a graph would not run")
    # A copy: code that keeps something it computed (a cache of tensors) must not keep a proxy in the user's model. It
    # shares the tensors: what the forward does to buffers alone is done while it is traced, and no part of the graph.
    shared = [*model.parameters(), *model.buffers()]
    twin = copied(model, shared)
    grad = torch.is_grad_enabled()
    called_with = _by_name(model, *example) if example else None

    def trace(
        model: torch.nn.Module, training: bool, grad: bool, other_autocast: bool = False, given: set[str] = given
    ) -> Traced:
        with torch.set_grad_enabled(grad), _other_autocast() if other_autocast else contextlib.nullcontext():
            for module in model.modules():
                module.training = training  # (train() may do more: it may merge weights, and those are the user's)
            return _trace(model, opened, given, called_with)

    before = _state(twin, opened)
    # A forward may ask for all of it at once (in train mode, where there are gradients, it adds a loss).
    changes = sorted(itertools.product((False, True), repeat=3), key=sum)
    modes = [(train, grad != other_grad, autocast) for train, other_grad, autocast in changes]
    classes = {cls for name in opened for cls in type(model.get_submodule(name)).__mro__}
    with _nothing_left(classes):
        traced, *others = [trace(twin, *how) for how in (modes[0], *reversed(modes[1:]))]
    after = _state(twin, opened)
    if not all(_alike(traced, other) for other in others):
        asked = (
            ", and ".join(itertools.compress(_ASKED, change))
            for change, how in zip(changes, modes, strict=True)
            if not _alike(traced, trace(copied(model, shared), *how))
        )
        raise Untraceable(f"its forward does {next(asked, '') or 'another thing when it runs again'}")
    whole = {name: None for name in after if name[0] not in opened}
    if changed := [name for name in whole | before if after.get(name, before.get(name)) != before.get(name)]:
        raise Untraceable(f"its forward changes {'.'.join(changed[0][:2]).lstrip('.')!r}, which a graph would not do")
    if any(_trains_its_own_way(model.get_submodule(name)) for name in opened):
        if name := _trains_otherwise(
            copied(model), sorted(opened)
        ):  # (it may merge weights: of a copy that has its own)
            raise Untraceable(f"{name!r} has a train() of its own, which a graph would not have")
    graph, constants = traced
    if of_the_model := [v for v in constants.values() if v.requires_grad or _shares_memory(v, shared)]:
        shape = tuple(of_the_model[0].shape)
        raise Untraceable(
            f"its forward reads tensors of the model's (shape {shape}) that a graph would hold as they are"
        )
    kept = {id(tensor): name for name, module in twin.named_modules() if name not in opened for tensor in _kept(module)}
    if holder := next((kept[id(value)] for value in constants.values() if id(value) in kept), None):
        raise Untraceable(f"its forward reads a tensor that {holder!r} keeps, which a graph would hold as it is now")
    for i, node in enumerate(graph.find_nodes(op="placeholder")):
        absent = node.args or ((None,) if i else ())  # (no model does without its first)
        if node.target in given and absent in ((None,), (False,), (True,)):
            try:
                without, _ = trace(copied(model, shared), False, grad, given=given - {node.target})
                (same,) = without.find_nodes(op="placeholder", target=node.target)
            except Untraceable:
                without = None
            if without is None or _text(graph, node) != _text(without, same):
                _require(node, *absent)
    for node in graph.find_nodes(op="get_attr"):
        if node.target in constants:  # made anew in each run: what a caller does to it, no later run should see
            with graph.inserting_after(node):
                own = graph.call_method("clone", (node,))
            node.replace_all_uses_with(own, delete_user_cb=lambda user, own=own: user is not own)
    return traced


def _by_name(model: torch.nn.Module, args: tuple, kwargs: dict) -> Mapping[str, Any]:
    return inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments


_ASKED = (
    "one thing in train mode and another in eval mode",
    "one thing with gradients and another without",
    "one thing under autocast and another without",
)

# What a class may answer otherwise than others, which nobody would notice in a graph. (Where `_load_from_state_dict` is
# a class's own, a checkpoint that only it could read is refused.)
_TELLS = (
    "parameters", "named_parameters", "buffers", "named_buffers", "named_modules", "requires_grad_", "_apply",
    "state_dict", "_save_to_state_dict", "load_state_dict",
)  # fmt: skip

_STATE_DICT_HOOKS = (
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_state_dict_pre_hooks", "_state_dict_hooks",
)  # fmt: skip


@contextlib.contextmanager
def _other_autocast() -> Iterator[None]:
    """Autocast where there is none, and none where there is."""
    found = {device: torch.is_autocast_enabled(device) for device in ("cpu", "cuda")}
    try:
        for device, on in found.items():
            torch.set_autocast_enabled(device, not on)
        yield
    finally:
        for device, on in found.items():
            torch.set_autocast_enabled(device, on)


def _kept(module: torch.nn.Module) -> list[torch.Tensor]:
    """The tensors that a module holds in a dict, a list or the like of its own: those of an earlier run, say."""
    held = [value for name, value in vars(module).items() if name not in HELD]
    return [leaf for leaf in torch_internals.tree_leaves(held) if isinstance(leaf, torch.Tensor)]


def _shares_memory(value: torch.Tensor, others: list[torch.Tensor]) -> bool:
    memory = torch_internals.memory_of(value)
    return memory is not None and any(torch_internals.memory_of(other) == memory for other in others)


def _trains_its_own_way(module: torch.nn.Module) -> bool:
    return any(getattr(type(module), name) is not getattr(torch.nn.Module, name) for name in ("train", "eval"))


def _trains_otherwise(model: torch.nn.Module, opened: Iterable[str]) -> str | None:
    """A module whose train() and eval() do more than set a mode (they freeze a BatchNorm, say, or merge weights), which
    they do to this model."""
    for name in opened:
        if _trains_its_own_way(module := model.get_submodule(name)):
            before = _state(model, set()), [tensor.clone() for tensor in (*model.parameters(), *model.buffers())]
            for mode in (not module.training, module.training):
                module.train(mode)
                module.train() if mode else module.eval()
                tensors = (*model.parameters(), *model.buffers())
                same = _state(model, set()) == before[0] and all(map(same_bits, tensors, before[1]))
                if not same or any(m.training is not mode for m in module.modules()):
                    return name or "the model"
    return None


def _is_ones_own(value: Any) -> bool:
    """Whether it is an object of the model's code, and no lock, logger or the like of Python's own library."""
    if isinstance(value, torch.Tensor | torch.nn.Module | type) or callable(value):
        return False
    return isinstance(value, types.SimpleNamespace) or _top(type(value)) not in sys.stdlib_module_names


def _top(kind: type) -> str:
    return _top_name(kind.__module__)


def _top_name(module: str | None) -> str:
    return (module or "").partition(".")[0]


_PLAIN, _MOST = (bool, int, float, str), 10_000


def _inside(value: Any, depth: int = 4) -> Iterator[Any]:
    """What a container or an object holds, and what these hold; the value itself first."""
    yield value
    held: Iterable = ()
    if isinstance(value, Mapping):
        held = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | deque):
        held = value
    elif _is_ones_own(value):
        slots = (name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ()))
        own = {name: getattr(value, name, None) for name in slots} | getattr(value, "__dict__", {})
        held = own.values()
    for one in held if depth else ():
        yield from _inside(one, depth - 1)


def _counted(value: Any) -> str | None:
    """What of a value a forward may count with: a number or text, how long a container is. None of anything else."""
    if isinstance(value, _PLAIN) or type(value) is itertools.count:
        return repr(value)
    if isinstance(value, fx.Proxy):
        return "a value"
    if isinstance(value, set | frozenset):
        return repr(sorted(repr(held) for held in value if isinstance(held, _PLAIN)))
    if isinstance(value, Mapping | list | tuple | deque):
        return f"{len(value)} of {type(value).__name__}"
    if _top(type(value)) == "numpy":
        return str(value.tolist()) if hasattr(value, "tolist") else repr(value)  # (an array's text leaves out most)
    return None


def _state(model: torch.nn.Module, opened: set[str]) -> dict[tuple, Any]:
    """What a forward may count with: numbers and text among the modules' attributes, also in lists, dicts and objects
    there, what their random generators would draw next, and how often tensors were written to. Of the opened modules
    what is replaced (what a run computed, to be looked at later) is left out. A whole one reads what it is given."""
    found: dict[tuple, Any] = {}
    for path, module in model.named_modules():
        held = dict(vars(module))
        for name in ("_parameters", "_buffers") if path not in opened else ():
            held |= held[name]
        for name, value in held.items():
            if name in (*HELD, "training"):
                continue
            same = (path, name, id(value)) if path in opened else (path, name)
            if isinstance(value, _PLAIN):
                found[path, name] = str(value)
            elif (state := generator_state(value)) is not None:
                found[path, name] = state
            elif isinstance(value, torch.Tensor) and not value.is_inference():
                found[same] = id(value), value._version
            else:
                found[same] = id(value), [*filter(None, map(_counted, itertools.islice(_inside(value), _MOST)))]
    return found


@contextlib.contextmanager
def _nothing_left(classes: Iterable[type]) -> Iterator[None]:
    """A forward may keep things in containers of its class's or its file's. Untraceable where it does; afterwards none
    holds a proxy."""
    forwards = [function for cls in classes if isinstance(function := vars(cls).get("forward"), types.FunctionType)]
    places = [*map(vars, classes), *(function.__globals__ for function in forwards)]
    places = [place for place in places if _top_name(place.get("__module__") or place.get("__name__")) != "torch"]
    held = {
        id(v): (name, v, copy.copy(v))
        for place in places
        for name, v in place.items()
        if type(v) in _CHANGEABLE and not name.startswith("__")
    }
    changed = []
    try:
        yield
    finally:
        for name, value, before in held.values():
            if not _same_items(value, before):
                changed.append(name)
                if any(isinstance(one, fx.Proxy) for one in _inside(value)):
                    value.clear()
                    (value.update if hasattr(value, "update") else value.extend)(before)
    if changed:
        raise Untraceable(f"its forward changes {changed[0]!r}, which a graph would not do")


_CHANGEABLE = (dict, OrderedDict, defaultdict, list, set, deque)


def _same_items(a: Any, b: Any) -> bool:
    a, b = ([*v.keys(), *v.values()] if isinstance(v, Mapping) else [*v] for v in (a, b))
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _trace(model: torch.nn.Module, opened: set[str], given: set[str], called_with: Mapping[str, Any] | None) -> Traced:
    parameters = inspect.signature(model.forward).parameters
    first = next(iter(parameters.values()), None)
    if first is not None and first.kind is first.POSITIONAL_OR_KEYWORD and first.default is first.empty:
        if first.name not in given:
            raise Untraceable(f"its statistics do not say that it was given {first.name!r}")
    defaults = {
        name: None if parameter.default is parameter.empty else parameter.default  # (who has to give it gave None)
        for name, parameter in parameters.items()
        if name not in given and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    try:
        tracer = _SiteTracer(opened)
        with kept_buffers(model) as written, kept_randomness() as drawn:
            asking = values_are_tensors(called_with, tracer.asked_for_type)
            with _contexts_refused(), asking as asked, warnings.catch_warnings(), _NoValues(model, opened):
                warnings.filterwarnings("error", "Was not able to add assertion")
                graph = tracer.trace(model, concrete_args=defaults or None)
            drew = drawn()
    except Untraceable:
        raise
    except UserWarning as warning:  # torch.fx compares numbers, text and the like, and nothing else
        raise Untraceable(f"a graph cannot hold an argument to its default: {in_a_line(warning)}") from warning
    except Exception as error:  # tracing runs the user's code on proxies: anything can be raised from it
        raise Untraceable(f"torch.fx cannot trace {_what(model)}: {in_a_line(error)}") from error
    if tracer.asked:
        raise Untraceable(f"its forward {tracer.asked} that only a run knows")
    if drew:
        raise Untraceable("its forward draws random numbers, which a graph would hold as they fell once")
    if written:
        raise Untraceable(f"its forward writes into {written[0]!r}, which a graph would not do")
    graph._tracer_cls = Retracer
    for node in graph.find_nodes(op="placeholder"):
        if (name := node.target.removesuffix("_1")) in defaults:
            node.target = name  # the tracer renames a parameter that it fixes; callers use its own name
    _check_arguments(graph)
    for node in graph.find_nodes(op="placeholder"):
        if node.target in asked:
            with graph.inserting_after(node):
                graph.call_function(of_type, (node, asked[node.target], node.target))
        if called_with and node.target in called_with:
            _require_parts(node, called_with[node.target], tracer.fields[node.target])
    literals = [n.target for n in graph.find_nodes(op="get_attr") if n.target.startswith("_tensor_constant")]
    return graph, {name: vars(model).pop(name) for name in dict.fromkeys(literals)}  # the next trace names its own


def _what(model: torch.nn.Module) -> str:
    """What is beyond torch.fx, where that is known."""
    takes = getattr(getattr(type(model).forward, "__code__", None), "co_flags", 0)
    any_arguments = takes & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    return "a forward that takes any arguments (*args, **kwargs), its own or a decorator's" if any_arguments else "it"


_SEEDS = "sets the state of a random generator"
_FUNCTION = "runs an autograd.Function"
_DTYPES = ("get_autocast_dtype", "get_autocast_cpu_dtype", "get_autocast_gpu_dtype")

# (where, the function that begins it or asks for it, what the forward does by that)
_CONTEXTS: list[tuple[Any, str, str]] = [
    (torch, "set_autocast_enabled", "sets autocast"),
    *((torch, name, "asks for the dtype of autocast") for name in _DTYPES),
    (torch.inference_mode, "__enter__", "sets inference mode"),
    (torch, "is_inference_mode_enabled", "asks for inference mode"),
    (torch.nn.attention, torch_internals.CHOOSE_ATTENTION, "sets the kernels of attention"),
    (torch.enable_grad, "__enter__", "sets the grad mode"),
    (torch.set_grad_enabled, "__init__", "sets the grad mode"),
    (torch.autograd.graph.saved_tensors_hooks, "__enter__", "says how tensors are saved for the backward"),
    *((owner, name, _SEEDS) for owner in (torch, torch.random) for name in ("manual_seed", "seed", "set_rng_state")),
    (torch.cuda, "manual_seed", _SEEDS),
    (torch.cuda, "manual_seed_all", _SEEDS),
]


_tracing = threading.RLock()


@contextlib.contextmanager
def _contexts_refused() -> Iterator[None]:
    """Within it, a forward that begins a context, or asks for one, is Untraceable: a graph holds the calls in it, and
    not the context. Other threads begin theirs, and trace one after the other."""
    tracing = threading.get_ident()

    def refusing(function: Any, what: str) -> Any:
        if isinstance(function, staticmethod):
            return staticmethod(refusing(function.__func__, what))

        def refuse(*args: Any, **kwargs: Any) -> Any:
            by_torch = what.startswith("asks") and is_of_torch(sys._getframe(1))
            if by_torch or threading.get_ident() != tracing:
                return function(*args, **kwargs)
            raise Untraceable(f"its forward {what}, which a graph would drop")

        return refuse

    with _tracing:
        rows = [*_CONTEXTS, *((function, "forward", _FUNCTION) for function in torch_internals.functions())]
        plain = [inspect.getattr_static(owner, name) for owner, name, _ in rows]
        for (owner, name, what), function in zip(rows, plain, strict=True):
            setattr(owner, name, refusing(function, what))
        try:
            yield
        finally:
            for (owner, name, _), function in zip(rows, plain, strict=True):
                setattr(owner, name, function)


def _check_arguments(graph: fx.Graph) -> None:
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


def _require_parts(argument: fx.Node, value: Any, fields: Iterable[str]) -> None:
    """The same of the items and fields that the forward takes from an argument which is a group of values.

    fields: of the argument's attributes those that were asked for, which are no nodes yet.
    """
    if not (isinstance(value, Mapping | list | tuple) or dataclasses.is_dataclass(value)):
        return
    parts = [n for n in argument.users if n.target in (operator.getitem, "get") and n.args[0] is argument]
    for name in sorted(fields):
        if not callable(getattr(value, name, None)):
            with argument.graph.inserting_after(argument):
                parts.append(argument.graph.call_function(getattr, (argument, name)))
    for part in parts:
        _require(part, None)


def _require(argument: fx.Node, absent: Any) -> None:
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


def _alike(a: Traced, b: Traced) -> bool:
    """Whether two runs did the same, and made the same tensors (a generator of the model's own draws other ones)."""
    (graph, constants), (other, others) = a, b
    return _text(graph) == _text(other) and all(same_bits(value, others[name]) for name, value in constants.items())


def _text(graph: fx.Graph, left_out: fx.Node | None = None) -> list[tuple]:
    """The graph's calls; or those that it makes where one of its arguments is None."""

    def given(node: fx.Node) -> fx.Node | None:
        return None if node is left_out else node

    fixed = {n for n in graph.find_nodes(op="call_function", target=torch_internals.assertion) if left_out}
    fixed |= {n for assertion in fixed for n in assertion.all_input_nodes}
    nodes = [n for n in graph.nodes if n not in fixed and not (left_out and n.op == "placeholder")]
    args = [(fx.map_arg(n.args, given), fx.map_arg(n.kwargs, given)) for n in nodes]
    return [(n.op, str(n.target), *map(str, of)) for n, of in zip(nodes, args, strict=True)]
