"""Compiled models without C++, each file of which takes seconds: run as they are traced, or their code alone."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor.graph import GraphLowering

from forged_fx import torch_internals


@contextlib.contextmanager
def graphs_run_as_traced() -> Iterator[None]:
    """For what is asked of where thresholds get."""
    with mock.patch.object(torch_internals.inductor(), "compile_fx", lambda gm, inputs, **_: aot_eager(gm, inputs)):
        yield


class Written(BaseException):
    """(Not an Exception: nobody shall take it for a failure.)"""


def code_of(function: Callable, *args: Any) -> str:
    """What Inductor writes for the first graph of a call. Nothing runs."""

    def stop(graph: GraphLowering) -> None:
        code, _ = graph.codegen()
        raise Written(code.value)

    torch._dynamo.reset()
    with (
        torch.no_grad(),
        mock.patch.object(GraphLowering, "compile_to_module", stop),
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        try:
            function(*args)
        except Written as written:
            return written.args[0]
    raise AssertionError("Inductor was given no graph")
