"""How magnitudes are distributed: a histogram of log2|x| with eight bins per power of two, exact under addition.

A bin is the top eleven bits of the float32 |x|: its exponent and the first three bits of its fraction. So the edges
are `2^e * (1 + m/8)`, binning is integer arithmetic, and two histograms add up to the histogram of both.
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor

from forged_fx import torch_internals

BINS = 2048
_SHIFT = 20  # float32 bits that a bin ignores: 23 fraction bits less 3

# A batch contributes all of its elements up to this many, else an evenly spaced sample of about this many: counting
# takes longer than finding the maximum, and 8,192 elements give a share to within 0.6 points (one standard error), of
# ten batches to within 0.2.
SAMPLE = 2**13
AT_ONCE = 64  # samples: what they take then stays in a processor's cache

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


def count(samples: list[Tensor]) -> np.ndarray:
    """Of each sample: how many values are zero, and the other values' counts per bin; int64 [len(samples), 1 + BINS].

    Many samples together: on a CPU or a GPU, to call for each takes longer than to count.
    """
    found: np.ndarray = np.empty((len(samples), 1 + BINS), np.int64)
    for here in by_device(samples):
        for rows in (here[first : first + AT_ONCE] for first in range(0, len(here), AT_ONCE)):
            found[rows] = _count([samples[i] for i in rows]).cpu().numpy()
    return found


def by_device(tensors: list[Tensor]) -> list[list[int]]:
    """For each device, where in the list its tensors are."""
    found: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        found.setdefault(tensor.device, []).append(i)
    return [*found.values()]


def _count(samples: list[Tensor]) -> Tensor:
    """The same of samples of one device, and there."""
    bits = torch.cat(samples).abs().to(torch.float32).view(torch.int32)
    others = bits.clamp(max=1)
    places = bits.bitwise_right_shift_(_SHIFT).add_(others)  # in place: no memory to be had
    parts = places.split([sample.numel() for sample in samples])
    torch_internals.add_to_each(parts, [row * (1 + BINS) for row in range(len(parts))])
    return torch.bincount(places, minlength=len(parts) * (1 + BINS)).view(len(parts), -1)


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
