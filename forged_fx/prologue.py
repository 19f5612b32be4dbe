"""The pass: offer thresholds to the matrix products that read them.

    attention ─ threshold ─ mm        becomes        attention ─ [threshold] mm

Where a threshold would cost a kernel or a write, and what reads it is a matrix product (or a 1x1 convolution, which is
one in channels_last), the product can apply it as it loads its input. Inductor's own products can do that, and under
mode="max-autotune" it takes its own where they are faster than the library's. By itself it would not try: half
precision is compared in float32, and it expects no gain of a prologue that computes in a wider type.

The pass marks the thresholds, and their lowering makes the offer: see `forged_fx/ops.py`.
"""

import torch.fx as fx

from forged_fx.cost import price
from forged_fx.hoist import FORGED, thresholds


def offer(graph: fx.Graph) -> None:
    """Mark the thresholds of a graph of ATen calls that a product may apply."""
    for node in thresholds(graph):
        node.meta["prologue"] = FORGED[node.target].moves and price(node).prologue
