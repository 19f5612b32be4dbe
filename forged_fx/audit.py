"""Proof, not hope: after a transform, run one batch through the model and the result, and compare.

At ratio 0 a threshold is the identity, so the two must agree bit for bit; and each site that the model's own run passes
through must have run its threshold exactly as often.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from forged_fx.modes import eval_mode, fast_path_off
from forged_fx.observe import Observer
from forged_fx.thresholds import thresholds_of


class AuditFailed(RuntimeError):
    """The result is not the model, or not all of it is forged."""


class _CountThresholds(TorchDispatchMode):
    """Counts the thresholds that run, by the buffer that they read. (A function mode would change which path attention
    takes, and so see thresholds run that do not run without it.)"""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[int] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.ops.forged_fx.threshold.default:
            self.seen[id(args[1])] += 1
        return function(*args, **(kwargs or {}))


def audit(model: torch.nn.Module, forged: torch.nn.Module, wanted: list[str], args: tuple, kwargs: dict) -> None:
    """Raise AuditFailed unless `forged`, its thresholds at 0, gives what `model` gives, bit for bit, and ran them all.

    Both run in eval mode; randomness is repeated, and the state of the random generators restored.
    """
    runs: Counter[str] = Counter()
    observer = Observer(model, lambda seen: runs.update([seen.name]))
    thresholds = thresholds_of(forged)
    as_used, on_slow_path = _CountThresholds(), _CountThresholds()
    with torch.no_grad(), torch.random.fork_rng(), eval_mode(model), eval_mode(forged):
        seed = torch.initial_seed()
        torch.manual_seed(seed)
        expected = observer.run(*args, **kwargs)
        torch.manual_seed(seed)
        with on_slow_path, fast_path_off():
            found = forged(*args, **kwargs)
        if any(isinstance(module, torch.nn.MultiheadAttention) for module in forged.modules()):
            with as_used:
                forged(*args, **kwargs)
        else:
            as_used = on_slow_path
    for site in wanted:
        for counted in (on_slow_path, as_used):
            if (ran := counted.seen[id(thresholds[site])]) != runs[site]:
                raise AuditFailed(
                    f"audit: site {site!r} runs {runs[site]} times in the model, but its threshold {ran} times in the "
                    f"result; leave it out with exclude={site!r}"
                )
    if not same(expected, found):
        raise AuditFailed("audit: with every threshold at 0 the result differs from the model")


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
