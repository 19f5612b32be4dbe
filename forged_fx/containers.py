"""The modules around the layers of a graph: they hold what the model's own hold, in the same order, and do not run.

A graph calls each layer by its path from the root, so that nothing calls what lies between. Parameters, buffers and
modules have to be there all the same, under the names and in the order that checkpoints, optimizers and
`zip(model.parameters(), forged.parameters())` rely on.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# Where a module has what it holds; of an ordinary module's copy, each is its own.
HELD = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")


def _refusing(what: str) -> Callable:
    def refuse(self: "Container", *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"{self.forged_path!r} does not run in this forged model, so that {what} would do nothing: the model is "
            "one graph, which calls the layers within by themselves. forged_fx.transform(..., graph=False) forges it "
            f"module by module, and then {self.forged_path!r} runs"
        )

    return refuse


class Container(nn.Module):
    """Stands for one of the model's modules whose code is in the graph. What would count on its running is refused.

    forged_path: its name in the model.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.forged_path = path

    forward = torch.jit.unused(_refusing("calling it"))
    register_forward_pre_hook = register_forward_hook = _refusing("a hook on it")
    register_full_backward_pre_hook = register_full_backward_hook = register_backward_hook = register_forward_hook

    def __setattr__(self, name: str, value: Any) -> None:
        _forward_of_its_own(self) if name == "forward" else super().__setattr__(name, value)


_forward_of_its_own = _refusing("a forward of its own")


def skeleton(model: nn.Module, opened: set[str], tensors: set[str]) -> nn.Module:
    """What a graph of the model is to hold: each opened module is a Container, all others are themselves.

    tensors: names of what the graph reads; what of it is a plain attribute of a module's is in no checkpoint.
    """
    made: dict[int, nn.Module] = {}

    def stand_in(module: nn.Module, path: str) -> nn.Module:
        if id(module) in made or path not in opened:  # (a module with two names is opened under the first)
            return made.get(id(module), module)
        container = made[id(module)] = Container(path)
        hold(container, module)
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
