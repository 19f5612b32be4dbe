"""Proof, not hope: after a transform, run one batch through the model and the result, and compare.

At ratio 0 a threshold is the identity, so the two must agree bit for bit; and each site that the model's own run passes
through must have run its threshold exactly as often.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from forged_fx.modes import eval_mode, fast_path_off
from forged_fx.observe import Observer


class _CountThresholds(TorchFunctionMode):
    """Sets every threshold to 0 for the run, and counts them by the buffer that they read."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[int] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function in (torch.ops.forged_fx.threshold, torch.ops.forged_fx.threshold.default):
            x, t, *rest = args
            self.seen[id(t)] += 1
            return function(x, torch.zeros_like(t), *rest, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def audit(model: torch.nn.Module, forged: torch.nn.Module, wanted: list[str], args: tuple, kwargs: dict) -> None:
    """Raise RuntimeError unless `forged` at ratio 0 gives what `model` gives, bit for bit, and ran every threshold.

    Both run in eval mode; randomness is repeated, and the state of the random generators restored.
    """
    runs: Counter[str] = Counter()
    observer = Observer(model, lambda seen: runs.update([seen.name]))
    counted = _CountThresholds()
    with torch.no_grad(), torch.random.fork_rng(), eval_mode(model), eval_mode(forged):
        seed = torch.initial_seed()
        torch.manual_seed(seed)
        expected = observer.run(*args, **kwargs)
        torch.manual_seed(seed)
        with counted, fast_path_off():
            found = forged(*args, **kwargs)
    buffers = forged.forging.buffers
    for site in wanted:
        ran = counted.seen[id(forged.get_buffer(buffers[site]))]
        if ran != runs[site]:
            raise RuntimeError(
                f"audit: site {site!r} runs {runs[site]} times in the model, but its threshold {ran} times in the "
                f"result; leave it out with exclude={site!r}"
            )
    if not same(expected, found):
        raise RuntimeError("audit: with every threshold at 0 the result differs from the model: a bug in forged_fx")


def same(a: Any, b: Any) -> bool:
    """Bit-for-bit equality of nested outputs; NaN equals NaN."""
    left, right = tree_leaves(a), tree_leaves(b)
    return len(left) == len(right) and all(map(_same_leaf, left, right))


def _same_leaf(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())
