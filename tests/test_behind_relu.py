"""A threshold of what a ReLU makes is one comparison in compiled code, and the result is what it was."""

import pytest
import torch
import torch.fx as fx
from written import code_of

from forged_fx import behind_relu, torch_internals
from forged_fx.ops import FUNCTIONS

INF, NAN = float("inf"), float("nan")
SPECIAL = [0.0, -0.0, 0.25, -0.25, 0.1249, 0.126, 1e-30, -1e-30, INF, -INF, NAN, 3.0, -3.0]


def applied(t, *values):
    """Each rule, of values of its own, where nothing else reads the ReLU, and where the caller does."""
    found = []
    for name, alone, read in zip(behind_relu.RULES, values[::2], values[1::2], strict=True):
        made = torch.relu(read)
        found += [FUNCTIONS[name].op(torch.relu(alone), t), FUNCTIONS[name].op(made, t), made]
    return found


def copies(v):
    return [v.clone() for _ in range(2 * len(behind_relu.RULES))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_values_are_eagers(dtype):
    v = torch.tensor(SPECIAL * 7, dtype=dtype)
    fast = torch.compile(applied, backend="forged")
    for t in map(torch.tensor, (0.125, 0.0, -1.0, INF)):
        torch.testing.assert_close(fast(t, *copies(v)), applied(t, *copies(v)), rtol=0, atol=0, equal_nan=True)


def test_the_code_compares_and_no_more():
    code = code_of(torch.compile(applied, backend="forged"), torch.tensor(0.5), *copies(torch.randn(4, 64)))
    assert ".abs()" not in code and "std::abs" not in code


def test_its_gradient_is_eagers():
    v = torch.tensor(SPECIAL).nan_to_num(posinf=9, neginf=-9)
    t = torch.tensor(0.125)
    gradients = []
    for function in (applied, torch.compile(applied, backend="forged")):
        leaves = [leaf.requires_grad_() for leaf in copies(v)]
        gradients.append(torch.autograd.grad(sum(y.sum() for y in function(t, *leaves)), leaves))
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
