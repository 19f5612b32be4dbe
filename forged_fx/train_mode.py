"""A module's train or eval mode within a graph: `F.dropout(x, training=self.training)`.

A graph would hold the flag as it was when it was made. Where the forward only hands it on, as `training`, the graph
reads the module's own in each run.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx as fx

from forged_fx.untraceable import Untraceable


class Asked:
    """The `training` of a module, while its forward is traced. It can be handed on, and nothing else."""

    def __init__(self, module: str) -> None:
        self.module = module

    def __fx_create_arg__(self, tracer: fx.Tracer) -> fx.Node:
        return tracer.create_node("get_attr", f"{self.module}.training".lstrip("."), (), {})

    def __bool__(self) -> bool:
        """Untraceable: a graph of the other mode is another one."""
        raise Untraceable("its forward decides by its mode")

    def __eq__(self, other: object) -> bool:
        return bool(self)

    __hash__ = None


def check_names(model: torch.nn.Module, opened: Iterable[str]) -> None:
    """Untraceable where a mode of the opened modules could be set by ways of which a graph has none."""
    names = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    for module in map(model.get_submodule, opened):
        if "training" not in vars(module) or names[module] > 1:
            raise Untraceable("its mode is a property, or a module with several names has it")


@contextmanager
def set_in(model: torch.nn.Module, mode: Callable[[str], Any]) -> Iterator[None]:
    """Within, each module's `training` is what `mode` says of its name. Untraceable where it is another one at the end.

    (train() may do more: it may merge weights, and those are the user's.)
    """
    modes = {module: mode(name) for name, module in model.named_modules()}
    before = {module: module.training for module in modes}
    try:
        for module, training in modes.items():
            try:
                module.training = training
            except Exception as error:  # (a setter of the user's can raise anything)
                raise Untraceable(f"its mode is True or False, and nothing else: {error}") from error
        yield
        for name, module in model.named_modules():
            if module in modes and vars(module).get("training", modes[module]) is not modes[module]:
                raise Untraceable(f"its forward sets the mode of {name!r}, which a graph would not do")
    finally:
        for module, training in before.items():
            module.training = training


def keeps_one(model: torch.nn.Module) -> bool:
    """Whether a module keeps what was asked in another place."""
    kept = ((name, value) for module in model.modules() for name, value in vars(module).items())
    return any(isinstance(value, Asked) and name != "training" for name, value in kept)


def asking(graph: fx.Graph) -> Iterable[fx.Node]:
    """The nodes that read a mode."""
    return [node for node in graph.find_nodes(op="get_attr") if node.target.rpartition(".")[2] == "training"]


def hands_on(graph: fx.Graph) -> bool:
    """Whether what reads a mode is always called with it as `training`."""
    users = ((node, user) for node in asking(graph) for user in node.users)
    return all(user.op == "call_function" and user.kwargs.get("training") is node for node, user in users)
