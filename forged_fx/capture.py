"""Turn a module into a graph, or say why a graph would not be the same module.

A graph is what one run of the Python code recorded: whatever the code decides from its input, its mode or its
surroundings is frozen in it. So only the modules that must be looked into are opened (those with a site inside), all
others stay whole as `call_module`, and what a graph cannot carry is refused rather than dropped.
"""

import contextlib
import inspect
import itertools
import threading
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.fx as fx
import torch.nn.attention
from torch.overrides import TorchFunctionMode

from forged_fx import torch_internals
from forged_fx.arguments import by_name, check_arguments, require, require_parts
from forged_fx.checked import in_a_line
from forged_fx.containers import Container
from forged_fx.graph_calls import of_type, ordered
from forged_fx.is_tensor import values_are_tensors
from forged_fx.models import copied, has_hooks
from forged_fx.modes import kept_buffers, same_bits
from forged_fx.proxies import Buffer, Value
from forged_fx.randomness import kept_randomness
from forged_fx.sites import module_of, only_looks
from forged_fx.state import kept, nothing_left, state, trains_its_own_way, trains_otherwise
from forged_fx.surroundings import contexts_refused, other_autocast
from forged_fx.train_mode import Asked, asking, check_names, hands_on, keeps_one, set_in
from forged_fx.untraceable import Untraceable

Traced = tuple[fx.Graph, dict[str, torch.Tensor]]  # a graph, and the tensors that were made for it, by name


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
                return Buffer(node, self, value)
        return Value(node, self)

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

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        modules = dict(root.named_modules())
        read = {"", *(name for name, module in modules.items() if isinstance(module, Container))}  # others run whole
        with set_in(root, lambda name: Asked(name) if name in read else modules[name].training):
            return super().trace(root, concrete_args)


# Looks at what `.half()`, `.to("cuda")`, `requires_grad_()` or a backward changes.
_CHANGING = {
    getattr(torch.Tensor, name).__get__
    for name in ("dtype", "device", "itemsize", "nbytes", "is_cuda", "requires_grad", "grad", "grad_fn", "is_leaf")
}


class _NoValues(TorchFunctionMode):
    """Refuses a forward that computes with the model's own tensors out of the tracer's sight: a graph would hold what
    comes of them as they are now. (It follows `self.weight`, and beside data what `self.parameters()` gives.)"""

    def __init__(self, model: torch.nn.Module, kept: Mapping[int, str]) -> None:
        """kept: id of a tensor that a whole module keeps -> the module's name."""
        super().__init__()
        self.tensors = {key: f"a tensor of {name}" for key, name in kept.items()}
        self.tensors |= {id(tensor): n for n, tensor in (*model.named_parameters(), *model.named_buffers())}

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
    try:
        return _capture(model, opened, given, contexts, example, modes_asked=False)
    except _ByMode:
        with contextlib.suppress(Untraceable):
            return _capture(model, opened, given, contexts, example, modes_asked=True)
        raise


class _ByMode(Untraceable):
    """The forward is another one in train mode than in eval mode."""


def _capture(
    model: torch.nn.Module,
    opened: set[str],
    given: set[str],
    contexts: set[str],
    example: tuple | None,
    modes_asked: bool,
) -> Traced:
    """modes_asked: the graph asks its modules for their modes where the forward hands them on."""
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
    called_with = by_name(model, *example) if example else None
    holders = _holders(twin, opened)

    def trace(
        model: torch.nn.Module, training: bool, grad: bool, autocast: bool = False, given: set[str] = given,
        modes_asked: bool = modes_asked,
    ) -> Traced:  # fmt: skip
        asked = set_in(model, lambda name: Asked(name) if modes_asked and name in opened else training)
        with torch.set_grad_enabled(grad), other_autocast() if autocast else contextlib.nullcontext(), asked:
            return _trace(model, opened, given, called_with, holders if model is twin else _holders(model, opened))

    if modes_asked:
        check_names(twin, opened)
    before = state(twin, opened)
    # A forward may ask for all of it at once (in train mode, where there are gradients, it adds a loss).
    changes = sorted(itertools.product((False, True), repeat=3), key=sum)
    modes = [(train, grad != other_grad, autocast) for train, other_grad, autocast in changes]
    classes = {cls for name in opened for cls in type(model.get_submodule(name)).__mro__}
    with nothing_left(classes):
        traced, *others = [trace(twin, *how) for how in (modes[0], *reversed(modes[1:]))]
    after = state(twin, opened)
    whole = {name: None for name in after if name[0] not in opened}
    changed = [name for name in whole | before if after.get(name, before.get(name)) != before.get(name)]
    if not all(_alike(traced, other) for other in others):
        asked = (
            ", and ".join(itertools.compress(_ASKED, change))
            for change, how in zip(changes, modes, strict=True)
            if not _alike(traced, trace(copied(model, shared), *how))
        )
        does = next(asked, "") or "another thing when it runs again"
        raise (_ByMode if does == _ASKED[0] and not changed else Untraceable)(f"its forward does {does}")
    if changed:
        raise Untraceable(f"its forward changes {'.'.join(changed[0][:2]).lstrip('.')!r}, which a graph would not do")
    if modes_asked:  # code may tell what is asked from True and False: by `is`, or in words
        plain = ((how[0], trace(copied(model, shared), *how, modes_asked=False)) for how in modes)
        same = all(_alike(traced, other, training) for training, other in plain)
        if not same or not hands_on(traced[0]) or keeps_one(twin):
            raise Untraceable(f"its forward does {_ASKED[0]}")
    if any(trains_its_own_way(model.get_submodule(name)) for name in opened):
        own_weights = copied(model)  # (it may merge some)
        if name := trains_otherwise(own_weights, sorted(opened)):
            raise Untraceable(f"{name!r} has a train() of its own, which a graph would not have")
    graph, constants = traced
    if of_the_model := [v for v in constants.values() if v.requires_grad or _shares_memory(v, shared)]:
        shape = tuple(of_the_model[0].shape)
        raise Untraceable(
            f"its forward reads tensors of the model's (shape {shape}) that a graph would hold as they are"
        )
    if holder := next((holders[id(value)] for value in constants.values() if id(value) in holders), None):
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
                require(node, *absent)
    for node in graph.find_nodes(op="get_attr"):
        if node.target in constants:  # made anew in each run: what a caller does to it, no later run should see
            with graph.inserting_after(node):
                own = graph.call_method("clone", (node,))
            node.replace_all_uses_with(own, delete_user_cb=lambda user, own=own: user is not own)
    return traced


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


def _shares_memory(value: torch.Tensor, others: list[torch.Tensor]) -> bool:
    memory = torch_internals.memory_of(value)
    return memory is not None and any(torch_internals.memory_of(other) == memory for other in others)


def _holders(model: torch.nn.Module, opened: set[str]) -> dict[int, str]:
    """id of a tensor that a whole module keeps -> the module's name."""
    whole = [(name, module) for name, module in model.named_modules() if name not in opened]
    return {id(tensor): name for name, module in whole for tensor in kept(module)}


def _trace(
    model: torch.nn.Module,
    opened: set[str],
    given: set[str],
    called_with: Mapping[str, Any] | None,
    holders: Mapping[int, str],
) -> Traced:
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
            with contexts_refused(), asking as asked, warnings.catch_warnings(), _NoValues(model, holders):
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
    check_arguments(graph)
    for node in graph.find_nodes(op="placeholder"):
        if node.target in asked:
            with graph.inserting_after(node):
                graph.call_function(of_type, (node, asked[node.target], node.target))
        if called_with and node.target in called_with:
            require_parts(node, called_with[node.target], tracer.fields[node.target])
    literals = [n.target for n in graph.find_nodes(op="get_attr") if n.target.startswith("_tensor_constant")]
    return graph, {name: vars(model).pop(name) for name in dict.fromkeys(literals)}  # the next trace names its own


def _what(model: torch.nn.Module) -> str:
    """What is beyond torch.fx, where that is known."""
    takes = getattr(getattr(type(model).forward, "__code__", None), "co_flags", 0)
    any_arguments = takes & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    return "a forward that takes any arguments (*args, **kwargs), its own or a decorator's" if any_arguments else "it"


def _alike(a: Traced, b: Traced, training: bool | None = None) -> bool:
    """Whether two runs did the same, and made the same tensors (a generator of the model's own draws other ones).
    training: what a mode is that they read."""
    (graph, constants), (other, others) = a, b
    same = _text(graph, training=training) == _text(other, training=training)
    return same and all(same_bits(value, others[name]) for name, value in constants.items())


def _text(graph: fx.Graph, left_out: fx.Node | None = None, training: bool | None = None) -> list[tuple]:
    """The graph's calls; or those that it makes where one of its arguments is None, or in train or eval mode."""
    modes = set() if training is None else {*asking(graph)}

    def given(node: fx.Node) -> fx.Node | bool | None:
        return training if node in modes else None if node is left_out else node

    fixed = {n for n in graph.find_nodes(op="call_function", target=torch_internals.assertion) if left_out}
    fixed |= {n for assertion in fixed for n in assertion.all_input_nodes}
    nodes = [n for n in graph.nodes if n not in fixed | modes and not (left_out and n.op == "placeholder")]
    args = [(fx.map_arg(n.args, given), fx.map_arg(n.kwargs, given)) for n in nodes]
    return [(n.op, str(n.target), *map(str, of)) for n, of in zip(nodes, args, strict=True)]
