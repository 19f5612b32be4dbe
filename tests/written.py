"""The code that Inductor writes for the first graph of a call: no C++ of it is compiled, and nothing runs."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch._inductor.graph import GraphLowering


class Written(BaseException):
    """(Not an Exception: nobody shall take it for a failure.)"""


def code_of(function: Callable, *args: Any) -> str:
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
