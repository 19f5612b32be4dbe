"""How magnitudes are distributed: a histogram of log2|x| with eight bins per power of two, exact under addition.

A bin is the top eleven bits of the float32 |x|: its exponent and the first three bits of its fraction. So the edges
are `2^e * (1 + m/8)`, binning is integer arithmetic, and two histograms add up to the histogram of both.
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor

BINS = 2048
_SHIFT = 20  # float32 bits that a bin ignores: 23 fraction bits less 3

# A batch contributes all of its elements up to this many, else an evenly spaced sample of about this many: counting
# takes longer than finding the maximum, and 32,768 elements give a share to within 0.3 points (one standard error).
SAMPLE = 2**15

EDGES = (np.arange(BINS + 1, dtype=np.uint32) << _SHIFT)[:BINS].view(np.float32)


def flat(x: Tensor) -> Tensor:
    """All of `x` in one dimension, in memory order and so without a copy where there are no gaps."""
    if not x.is_contiguous() and torch.ops.aten.is_non_overlapping_and_dense(x):
        return x.as_strided((x.numel(),), (1,), x.storage_offset())
    return x.reshape(-1)


def sample(x: Tensor) -> Tensor:
    """Every k-th element of `x` in memory order, flat; all of them where there are at most `SAMPLE`.

    k has no common factor with any dimension, so that no row, column or channel is favoured.
    """
    return flat(x)[:: _step(x.shape)]


@functools.lru_cache(maxsize=2**12)
def _step(shape: tuple[int, ...]) -> int:
    step = max(1, math.prod(shape) // SAMPLE)
    while any(math.gcd(step, size) > 1 for size in shape):
        step += 1
    return step


def count(values: Tensor) -> tuple[Tensor, Tensor]:
    """(how many values are not zero, all values' counts per bin, zeros in the first): int64 scalar and int64 [BINS].

    They stay on the device; `counted` reads them.
    """
    bits = values.detach().abs().to(torch.float32).view(torch.int32)
    others = bits.count_nonzero()  # of integers: three times as fast
    return others, torch.bincount(bits.bitwise_right_shift_(_SHIFT), minlength=BINS)  # in place: no memory to be had


def counted(values: int, others: Tensor, bins: Tensor) -> tuple[int, np.ndarray]:
    """What `count` gave for so many values, waited for: (number of exact zeros, the other values' counts per bin).

    On a CPU the counts are those of `bins` itself.
    """
    zeros, found = values - int(others), bins.cpu().numpy()
    found[0] -= zeros
    return zeros, found


def share_below(threshold: float, zeros: int, bins: np.ndarray) -> float:
    """The share of values with |x| < threshold, in [0, 1]; inside the threshold's own bin it is interpolated."""
    total = zeros + int(bins.sum())
    if total == 0 or threshold <= 0:
        return 0.0
    i = min(int(np.float32(threshold).view(np.uint32)) >> _SHIFT, BINS - 2)
    low, high = float(EDGES[i]), float(EDGES[i + 1])
    inside = (threshold - low) / (high - low) if math.isfinite(high) else 1.0
    return (zeros + int(bins[:i].sum()) + inside * int(bins[i])) / total


def quantile(q: float, zeros: int, bins: np.ndarray) -> float:
    """The value below which a share q of the |x| lies: `share_below`'s inverse. 0 where there was none."""
    below = zeros + np.concatenate([[0], np.cumsum(bins)])  # at each edge
    wanted = q * int(below[-1])
    if wanted <= zeros:
        return 0.0
    i = int(np.searchsorted(below, wanted)) - 1
    low, high = float(EDGES[i]), float(EDGES[min(i + 1, BINS - 1)])
    return low + (high - low) * (wanted - int(below[i])) / int(bins[i])
