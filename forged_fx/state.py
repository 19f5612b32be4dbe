"""What a forward may find elsewhere than in its input, and leave there: it counts, or keeps what it computed."""

import contextlib
import copy
import itertools
import operator
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.fx as fx

from forged_fx import torch_internals
from forged_fx.models import HELD
from forged_fx.modes import same_bits
from forged_fx.places import codes_in
from forged_fx.randomness import generator_state
from forged_fx.untraceable import Untraceable


def kept(module: torch.nn.Module) -> list[torch.Tensor]:
    """The tensors that a module holds in a dict, a list or the like of its own: those of an earlier run, say."""
    held = [value for name, value in vars(module).items() if name not in HELD]
    return [leaf for leaf in torch_internals.tree_leaves(held) if isinstance(leaf, torch.Tensor)]


def trains_its_own_way(module: torch.nn.Module) -> bool:
    own = {name for name in ("train", "eval") if getattr(type(module), name) is not getattr(torch.nn.Module, name)}
    return bool(own) or not {"train", "eval"}.isdisjoint(vars(module))


def trains_otherwise(model: torch.nn.Module, opened: Iterable[str]) -> str | None:
    """A module whose train() and eval() do more than set a mode (they freeze a BatchNorm, say, or merge weights), which
    they do to this model."""
    for name in opened:
        if trains_its_own_way(module := model.get_submodule(name)):
            before = state(model, set()), [tensor.clone() for tensor in (*model.parameters(), *model.buffers())]
            for mode in (not module.training, module.training):
                module.train(mode)
                module.train() if mode else module.eval()
                tensors = (*model.parameters(), *model.buffers())
                same = state(model, set()) == before[0] and all(map(same_bits, tensors, before[1]))
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
_A_VALUE = "a value"  # that a run computed


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
        return _A_VALUE
    if isinstance(value, set | frozenset):
        return repr(sorted(repr(held) for held in value if isinstance(held, _PLAIN)))
    if isinstance(value, Mapping | list | tuple | deque):
        return f"{len(value)} of {type(value).__name__}"
    if _top(type(value)) == "numpy":
        return str(value.tolist()) if hasattr(value, "tolist") else repr(value)  # (an array's text leaves out most)
    return None


def state(model: torch.nn.Module, opened: set[str]) -> dict[tuple, Any]:
    """What a forward may count with: numbers and text among the modules' attributes, also in lists, dicts and objects
    there, what their random generators would draw next, and how often tensors were written to. Of the opened modules
    what is replaced (what a run computed, to be looked at later) is left out. A whole one reads what it is given."""
    found: dict[tuple, Any] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # cannot be looked into: what it holds is made anew each time it is asked for
        held = dict(vars(module))
        for name in ("_parameters", "_buffers") if path not in opened else ():
            held |= held[name]
        for name, value in held.items():
            if name in (*HELD, "training"):
                continue
            same = (path, name, id(value)) if path in opened else (path, name)
            if isinstance(value, _PLAIN):
                found[path, name] = str(value)
            elif (drawn := generator_state(value)) is not None:
                found[path, name] = drawn
            elif isinstance(value, torch.Tensor) and not value.is_inference():
                found[same] = id(value), value._version
            else:
                inside = itertools.islice(_inside(value), _MOST)
                words = [word for word in map(_counted, inside) if word]
                found[same] = id(value), [w for w in words if w != _A_VALUE] if path in opened else words
    return found


@contextlib.contextmanager
def nothing_left(classes: Iterable[type]) -> Iterator[None]:
    """A forward may keep things in containers of its class's or its file's. Untraceable where it does; afterwards none
    holds a proxy."""
    held = {id(value): (name, value, copy.copy(value)) for name, value in _containers(classes)}
    changed = []
    try:
        yield
    finally:
        for name, value, before in held.values():
            if not _same_items(value, before):
                changed.append(name)
                _take_proxies_out(value, before)
    if changed:
        raise Untraceable(f"its forward changes {changed[0]!r}, which a graph would not do")


_CHANGEABLE = (dict, OrderedDict, defaultdict, Counter, list, set, deque)


def _containers(classes: Iterable[type]) -> Iterator[tuple[str, Any]]:
    """Those of the classes and of their files that the code of their methods names, or of functions that it names."""
    own = [cls for cls in classes if _top(cls) not in ("torch", "builtins")]
    ahead = [getattr(value, "__func__", value) for cls in own for value in vars(cls).values()]
    seen: set[int] = set()
    while ahead:
        function = ahead.pop()
        if not isinstance(function, types.FunctionType) or id(function) in seen:
            continue
        seen.add(id(function))
        ahead.append(getattr(function, "__wrapped__", None))
        if _top_name(function.__module__) == "torch":
            continue
        for name in itertools.chain.from_iterable(code.co_names for code in codes_in(function.__code__)):
            found = [place[name] for place in (function.__globals__, *map(vars, own)) if name in place]
            ahead += found
            yield from ((name, value) for value in found if type(value) in _CHANGEABLE)


def _same_items(a: Any, b: Any) -> bool:
    if isinstance(a, set):  # a copy has another order
        return {*map(id, a)} == {*map(id, b)}
    a, b = ([*v.keys(), *v.values()] if isinstance(v, Mapping) else [*v] for v in (a, b))
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _take_proxies_out(value: Any, before: Any) -> None:
    """What was there before is there again in their place. The rest stays: another thread may have put it there."""

    def is_left(one: Any) -> bool:
        return any(isinstance(part, fx.Proxy) for part in _inside(one))

    if isinstance(value, dict):
        for key in [key for key, one in value.items() if is_left(key) or is_left(one)]:
            if key in before:
                value[key] = before[key]
            else:
                del value[key]
    elif isinstance(value, set):
        value -= {one for one in value if is_left(one)}
    elif len(value) == len(before):
        for k, one in enumerate(value):
            value[k] = before[k] if is_left(one) else one
    else:
        kept = [one for one in value if not is_left(one)]
        value.clear()
        value.extend(kept)
