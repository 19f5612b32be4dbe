"""A module's train or eval mode within a graph: `F.dropout(x, training=self.training)`.

A graph would hold the flag as it was when it was made. Where the forward only hands it on, the graph asks the module
that it is of anew, in each run.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.fx as fx

NAME = "forged_mode"


class Asked:
    """The `training` of a module, while its forward is traced."""

    def __init__(self, module: str, training: bool) -> None:
        self.node = f"{module}.{NAME}".lstrip(".")
        self.training = training

    def __bool__(self) -> bool:
        """What code decides by is decided: a graph of the other mode is another one."""
        return self.training

    def __fx_create_arg__(self, tracer: fx.Tracer) -> fx.Node:
        return tracer.create_node("call_module", self.node, (), {})


class Mode(torch.nn.Module):
    """Stands in a module for its mode, which a graph asks for by calling it."""

    def forward(self) -> bool:
        return self.training


def asking(graph: fx.Graph) -> Iterator[fx.Node]:
    """The nodes that ask for a mode."""
    return (node for node in graph.nodes if node.op == "call_module" and node.target.rpartition(".")[2] == NAME)


def answer(graph: fx.Graph, model: torch.nn.Module) -> None:
    """Give the model's modules what the graph asks."""
    for node in asking(graph):
        owner: Any = model.get_submodule(node.target.rpartition(".")[0])
        if NAME not in owner._modules:
            owner.add_module(NAME, Mode().train(owner.training))
