"""The pass: a threshold of what a ReLU makes is one comparison, on a CPU.

    v ─ relu ─ threshold(·, t)        becomes        v ─ elementwise_threshold(·, t, activation="relu")

No threshold is below 0, so max(v, 0) is below it where v is: neither the maximum nor the absolute value has to be
computed. A CPU's loop over what is in its cache takes as long as it computes. A GPU's waits for memory. (Of a threshold
that is NaN, which nothing but a hand sets, values below 0 come through.)

It runs on Inductor's graph of ATen calls, once thresholds are where they stay (forged_fx/hoist.py); what the operator
becomes is in forged_fx/lowering.py. Not where weights are frozen: there Inductor makes the ReLU a part of the
convolution ahead of it, or of the sum, and the threshold is alone.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from forged_fx import torch_internals
from forged_fx.ops import BY_OPERATOR
from forged_fx.share import thresholds_in


def _cut(o: Any, v: Any, t: Any) -> tuple:
    return o.lt(v, o.relu(t)), 0, v


def _shift(o: Any, v: Any, t: Any) -> tuple:
    dropped, zero, _ = _cut(o, v, t)
    return dropped, zero, o.sub(v, o.relu(t))


# Forged functions, by name, and what they make of max(v, 0): as the rules of kernels/reference.py, which they replace.
RULES: dict[str, Callable[..., tuple]] = {
    "threshold": _cut,
    "one_sided": _cut,
    "soft": _shift,
    "shifted": _shift,
}


def join(graph: fx.Graph) -> None:
    """Make one operator of every ReLU and the threshold behind it."""
    if torch_internals.inductor().config.freezing:
        return
    for node in thresholds_in(graph):
        function = BY_OPERATOR[node.target]
        relu, t, *_ = node.args
        on_cpu = node.meta["val"].device.type == "cpu"
        if not on_cpu or relu.target is not torch.ops.aten.relu.default or function.name not in RULES:
            continue
        arguments = {"activation": "relu", "function": function.name}
        with graph.inserting_before(node):
            one = graph.call_function(torch.ops.forged_fx.elementwise_threshold.default, (relu.args[0], t), arguments)
        one.meta = dict(node.meta)
        node.replace_all_uses_with(one)
        graph.erase_node(node)
        if not relu.users:
            graph.erase_node(relu)
