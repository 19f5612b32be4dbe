"""A threshold of what a ReLU makes is one comparison in compiled code, and the result is what it was."""

import pytest
import torch
import torch.fx as fx
from torch._inductor.utils import run_and_get_code

from forged_fx import behind_relu, torch_internals
from forged_fx.ops import FUNCTIONS

INF, NAN = float("inf"), float("nan")
SPECIAL = [0.0, -0.0, 0.25, -0.25, 0.1249, 0.126, 1e-30, -1e-30, INF, -INF, NAN, 3.0, -3.0]


def applied(name, t, v, also_raw=False):
    made = torch.relu(v)
    forged = FUNCTIONS[name].op(made, t)
    return (forged, made) if also_raw else forged


@pytest.mark.parametrize("t", [0.125, 0.0, -1.0, INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", behind_relu.RULES)
def test_the_values_are_eagers(name, dtype, t):
    torch._dynamo.reset()
    v, t = torch.tensor(SPECIAL * 7, dtype=dtype), torch.tensor(t)
    for also_raw in (False, True):
        found = torch.compile(applied, backend="forged")(name, t, v, also_raw)
        torch.testing.assert_close(found, applied(name, t, v, also_raw), rtol=0, atol=0, equal_nan=True)


def test_the_code_compares_and_no_more():
    v, t = torch.randn(4, 64), torch.tensor(0.5)
    for name in ("threshold", "soft"):  # the others do not ask for the absolute value
        torch._dynamo.reset()
        _, (code,) = run_and_get_code(torch.compile(applied, backend="forged"), name, t, v)
        assert ".abs()" not in code and "std::abs" not in code, name


def test_its_gradient_is_eagers():
    v = torch.tensor(SPECIAL).nan_to_num(posinf=9, neginf=-9).requires_grad_()
    t = torch.tensor(0.125)
    for name in behind_relu.RULES:
        torch._dynamo.reset()
        gradients = [
            torch.autograd.grad(function(name, t, v).sum(), v)
            for function in (applied, torch.compile(applied, backend="forged"))
        ]
        torch.testing.assert_close(*gradients, rtol=0, atol=0)


def traced(device):
    """threshold(relu(v), t) as it is in Inductor's graph."""
    graph = fx.Graph()
    v, t = graph.placeholder("v"), graph.placeholder("t")
    relu = graph.call_function(torch.ops.aten.relu.default, (v,))
    forged = graph.call_function(FUNCTIONS["threshold"].op, (relu, t))
    graph.output(forged)
    for node in graph.nodes:
        node.meta["val"] = torch.empty(() if node is t else 3, device=device)
    return graph


@pytest.mark.parametrize(("device", "freezing", "calls"), [("cpu", False, 1), ("cpu", True, 2), ("meta", False, 2)])
def test_on_a_cpu_alone_and_not_where_weights_are_frozen(device, freezing, calls):
    graph = traced(device)
    with torch_internals.inductor().config.patch(freezing=freezing):
        behind_relu.join(graph)
    graph.lint()
    assert sum(node.op == "call_function" for node in graph.nodes) == calls
