"""The mean and standard deviation of each channel, exact under merge.

Sums and sums of squares are kept as unevaluated sums of a few float64 numbers each (Shewchuk 1997, "Adaptive Precision
Floating-Point Arithmetic"), to which a batch's own sums, taken in float64, are added without a rounding. So the result
does not depend on the order of the batches, nor on how they were shared out.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PARTS = 4  # 4 x 53 bits: what lies further below the largest part is lost


@dataclass
class ChannelCounts:
    """count: elements of each channel. sums, squares: float64 [PARTS, channels]; they add up to those of x and x^2."""

    count: int
    sums: np.ndarray
    squares: np.ndarray

    @classmethod
    def one(cls, count: int, sums: np.ndarray) -> "ChannelCounts":
        """What `measure` found in one batch."""
        rest = np.zeros((PARTS - 1, sums.shape[1]))
        return cls(count, *(np.concatenate([row[None], rest]) for row in sums))

    @property
    def size(self) -> int:
        """The number of channels."""
        return self.sums.shape[1]

    def merge(self, other: "ChannelCounts") -> "ChannelCounts":
        sums, squares = self.sums, self.squares
        for part, square in zip(other.sums, other.squares, strict=True):
            sums, squares = _add(sums, part), _add(squares, square)
        return ChannelCounts(self.count + other.count, sums, squares)

    def mean_std(self) -> tuple[np.ndarray, np.ndarray]:
        """float64 [channels] each; the deviation is that of the elements seen (divided by count).

        From sums rounded once, so bit for bit the same however they were merged. The variance is E[x^2] - E[x]^2: of
        its 53 bits it loses as many as mean^2 / variance has.
        """
        total, squares = (np.array([math.fsum(column) for column in parts.T]) for parts in (self.sums, self.squares))
        mean = total / max(self.count, 1)
        return mean, np.sqrt(np.maximum(squares / max(self.count, 1) - mean**2, 0))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChannelCounts) or (self.count, self.size) != (other.count, other.size):
            return False
        pairs = ((self.sums, other.sums), (self.squares, other.squares))
        return all(not any(map(math.fsum, np.concatenate([a, -b]).T)) for a, b in pairs)


def measure(x: Tensor, channel: int) -> Tensor:
    """Of one batch: the sums of x and of x^2 along all dimensions but `channel`; float64 [2, channels]."""
    rows = x.detach().movedim(channel, 0).reshape(x.shape[channel], -1).double()
    return torch.stack([rows.sum(1), rows.square().sum(1)])


def _add(parts: np.ndarray, value: np.ndarray) -> np.ndarray:
    """One more number to each column's sum: from the smallest part up, then the errors up to where they belong."""
    found = np.concatenate([np.zeros((1, parts.shape[1])), parts])
    for i in range(PARTS, 0, -1):
        value, found[i] = _two_sum(value, found[i])
    found[0] = value
    for _ in range(PARTS):
        for i in range(PARTS):
            found[i], found[i + 1] = _two_sum(found[i], found[i + 1])
    return found[:PARTS]


def _two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a + b, rounded, and what the rounding has left (Knuth)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)
