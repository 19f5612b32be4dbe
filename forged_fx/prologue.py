"""The pass: offer thresholds to the matrix products that read them.

    attention ─ threshold ─ mm        becomes        attention ─ [threshold] mm

Where a threshold would cost a kernel or a write, and what reads it is a matrix product (or a 1x1 convolution, which is
one in channels_last), the product can apply it as it loads its input. Inductor's own products can do that, and under
mode="max-autotune" it takes its own where they are faster than the library's. By itself it would not try: half
precision is compared in float32, and it expects no gain of a prologue that computes in a wider type.

The pass marks the thresholds, and their lowering (`forged_fx/lowering.py`) makes the offer. Inductor looks at prologues
last: by then it would have joined a threshold with its producer, and written it beside the raw value. `Patience` keeps
it from that for one round of fusions. What no product has taken then is joined with its producer as ever.
"""

from typing import Any

import torch.fx as fx

from forged_fx.cost import WRITE, price
from forged_fx.ops import BY_OPERATOR
from forged_fx.share import thresholds_in
from forged_fx.torch_internals import offered_as_prologue


def offer(graph: fx.Graph) -> None:
    """Mark the thresholds of a graph of ATen calls that a product may apply, and those whose input is read raw too."""
    for node in thresholds_in(graph):
        cost = price(node)
        node.meta["prologue"] = BY_OPERATOR[node.target].moves and cost.prologue
        node.meta["raw"] = cost.kind == WRITE


class Patience:
    """Inductor's choices, as they were, but that what is offered to a product is offered to nothing else at first."""

    def __init__(self, choices: Any) -> None:
        self._choices = choices
        self._kept: set[tuple] = set()  # the pairs that were kept apart: in the first round, each of them is met once

    def __getattr__(self, name: str) -> Any:
        return getattr(self._choices, name)

    def can_fuse(self, scheduler: Any, node1: Any, node2: Any, shared_data_score: int) -> bool:
        if self._keep_apart(scheduler, node1, node2) or self._keep_apart(scheduler, node2, node1):
            return False
        return self._choices.can_fuse(scheduler, node1, node2, shared_data_score)

    def _keep_apart(self, scheduler: Any, threshold: Any, other: Any) -> bool:
        if other.is_template() or not offered_as_prologue(threshold):
            return False
        pair = (scheduler, threshold.get_name(), other.get_name())
        first_round = pair not in self._kept and len(other.get_nodes()) == 1
        self._kept.add(pair)
        return first_round
