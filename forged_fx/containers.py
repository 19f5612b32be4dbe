"""The modules around the layers of a graph: they hold what the model's own hold, in the same order, and do not run.

A graph calls each layer by its path from the root, so that nothing calls what lies between. Parameters, buffers and
modules have to be there all the same, under the names and in the order that checkpoints, optimizers and
`zip(model.parameters(), forged.parameters())` rely on.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from forged_fx.models import HELD
from forged_fx.thresholds import keep_thresholds

TAKEN_OUT = "a graph calls its layers, and none can be taken out: take it out of the plain model, and forge that"


def _nothing(path: str, what: str) -> str:
    return (
        f"{path!r} does not run in this forged model, so that {what} does nothing: the model is one graph, which calls "
        "the layers within by themselves. forged_fx.transform(..., graph=False) forges it module by module, and then "
        f"{path!r} runs"
    )


def _warning(register: Callable) -> Callable:
    """A hook may be one of many, on all modules alike: it is taken, and a warning says that nothing will call it."""

    @functools.wraps(register)
    def warned(self: "Container", *args: Any, **kwargs: Any) -> Any:
        warnings.warn(_nothing(self.forged_path, "a hook on it"), stacklevel=2)
        return register(self, *args, **kwargs)

    return warned


def check_place(holder: nn.Module, name: str, value: Any) -> None:
    """Warn of what is about to be set in vain: a module in the place of one that does not run (a wrapper of it, say),
    or a number or flag, or nothing, that the forward read when the graph was made."""
    own = vars(holder).get("_modules", {}).get(name)
    if vars(holder).get("_is_replica"):
        return  # nn.DataParallel puts together what it copied
    if isinstance(own, Container) and isinstance(value, nn.Module):
        warnings.warn(_nothing(own.forged_path, "what takes its place"), stacklevel=3)
    groups = (vars(holder).get(kind, {}) for kind in ("_parameters", "_buffers", "_modules"))
    was_none = value is not None and any(name in group and group[name] is None for group in groups)
    if was_none or (name in vars(holder).get(ATTRIBUTES, ()) and value != vars(holder).get(name)):
        warnings.warn(
            f"setting {name!r} changes nothing that this forged model computes: it is one graph, and what its forward "
            "may have read there is a part of it. Set it in the plain model, and forge that; or forge it with "
            "forged_fx.transform(..., graph=False)",
            stacklevel=3,
        )


# Where a module of a graph names the attributes that the model's had: people read them (timm's `pretrained_cfg`).
ATTRIBUTES = "forged_attributes"

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format)
_NOT_THEIRS = {*vars(nn.Module()), ATTRIBUTES, "forged_path"}


def take_attributes(module: nn.Module, other: nn.Module) -> None:
    """Give the module what the other has besides parameters, buffers and modules: numbers, text, and groups of them."""
    own = {n: v for n, v in vars(other).items() if n not in _NOT_THEIRS and not n.startswith("_") and _is_plain(v)}
    theirs = {n: v for n, v in own.items() if not hasattr(module, n)}
    vars(module).update(theirs, **{ATTRIBUTES: tuple(theirs)})


def _is_plain(value: Any, around: tuple[int, ...] = ()) -> bool:
    """Of these very types: what is derived from them may be anything, and beyond pickling. around: what holds it."""
    if type(value) in _PLAIN:
        return True
    if id(value) in around or type(value) not in (dict, tuple, list, set, frozenset):
        return False
    inside = (*value, *value.values()) if type(value) is dict else value
    return all(_is_plain(part, (*around, id(value))) for part in inside)


class Container(nn.Module):
    """Stands for one of the model's modules whose code is in the graph. Who counts on its running is told.

    forged_path: its name in the model.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.forged_path = path

    @torch.jit.unused
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """RuntimeError: the code is the graph's."""
        raise RuntimeError(_nothing(self.forged_path, "calling it"))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":
            raise RuntimeError(_nothing(self.forged_path, "a forward of its own"))
        check_place(self, name, value)
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        keep_thresholds(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Nothing but a warning: what does not run cannot be compiled."""
        warnings.warn(_nothing(self.forged_path, "compiling it"), stacklevel=2)

    register_forward_pre_hook = _warning(nn.Module.register_forward_pre_hook)
    register_forward_hook = _warning(nn.Module.register_forward_hook)
    register_full_backward_pre_hook = _warning(nn.Module.register_full_backward_pre_hook)
    register_full_backward_hook = _warning(nn.Module.register_full_backward_hook)
    register_backward_hook = _warning(nn.Module.register_backward_hook)


class Numbered:
    """The layers of a Sequential or a ModuleList by their place. A slice is a list, as nothing in it runs."""

    _modules: dict[str, nn.Module | None]

    def _numbered(self) -> dict[str, nn.Module | None]:
        """The modules, in order; TypeError where they have no numbers."""
        return self._modules

    def __getitem__(self, index: int | slice) -> Any:
        return list(self._numbered().values())[index]

    def __setitem__(self, index: int, module: nn.Module) -> None:
        setattr(self, list(self._numbered())[index], module)

    def __delitem__(self, index: int | slice) -> None:
        raise TypeError(TAKEN_OUT)


class ListContainer(Numbered, Container):
    """Of a Sequential or a ModuleList."""

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[nn.Module | None]:
        return iter(self._modules.values())


class DictContainer(Container):
    """Of a ModuleDict."""

    __len__ = nn.ModuleDict.__len__
    __iter__ = nn.ModuleDict.__iter__
    __contains__ = nn.ModuleDict.__contains__
    __getitem__ = nn.ModuleDict.__getitem__
    keys = nn.ModuleDict.keys
    items = nn.ModuleDict.items
    values = nn.ModuleDict.values


# What is indexed in the model is indexed here: to freeze some blocks, say.
INDEXED: dict[type[nn.Module], type[Container]] = {
    nn.Sequential: ListContainer,
    nn.ModuleList: ListContainer,
    nn.ModuleDict: DictContainer,
}
INDEXING = ("__getitem__", "__iter__", "__len__")


def container_for(module: nn.Module) -> type[Container]:
    """One that is indexed as the module is. What its class's own methods find there, none here would."""
    for kind, container in INDEXED.items():
        if isinstance(module, kind) and all(getattr(type(module), name) is getattr(kind, name) for name in INDEXING):
            return container
    return Container


def skeleton(model: nn.Module, opened: set[str], tensors: set[str]) -> nn.Module:
    """What a graph of the model is to hold: each opened module is a Container, all others are themselves.

    tensors: names of what the graph reads; what of it is a plain attribute of a module's is in no checkpoint.
    """
    made: dict[int, nn.Module] = {}

    def stand_in(module: nn.Module, path: str) -> nn.Module:
        if id(module) in made or path not in opened:  # (a module with two names is opened under the first)
            return made.get(id(module), module)
        container = made[id(module)] = container_for(module)(path)
        hold(container, module)
        take_attributes(container, module)
        container.training = module.training
        for name, child in container._modules.items():
            if child is not None:
                container._modules[name] = stand_in(child, f"{path}.{name}".removeprefix("."))
        return container

    root = stand_in(model, "")
    for owner, _, name in (tensor.rpartition(".") for tensor in sorted(tensors)):
        value, container = getattr(model.get_submodule(owner), name), root.get_submodule(owner)
        if isinstance(container, Container) and isinstance(value, torch.Tensor) and not hasattr(container, name):
            container.register_buffer(name, value, persistent=False)
    return root


def hold(module: nn.Module, other: nn.Module) -> None:
    """Give the module, in mappings of its own, exactly what the other holds."""
    vars(module).update({name: vars(other)[name].copy() for name in HELD})
