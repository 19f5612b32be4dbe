"""Two models on the same examples: how sure is the difference of their accuracies?

The examples on which both are right or both are wrong say nothing about which is better. What counts is `model_only`,
the number that only the model gets right, and `base_only`.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

LEVEL = 0.95
NEGLIGIBLE = 0.002  # auto-attack's check_square_sr


@functools.cache
def sign_tail(wins: int, losses: int) -> float:
    """P(at least `wins` heads in wins + losses fair throws): the one-sided exact sign test."""
    throws, ways, all_ways = wins + losses, 1, 0
    for k in range(losses + 1):  # ways: how to throw k tails, each from the one before
        all_ways += ways
        ways = ways * (throws - k) // (k + 1)
    return all_ways / 2**throws


def beyond_chance(taken: int, spared: int, n: int) -> bool:
    """Did a later round of attacks take more examples from one side alone than its new random starts explain?

    taken, spared: examples of n that it took from this side alone, and from the other alone. A one-sided sign test at
    5 % (5 against 0, 7 against 1) must call them different, and they must differ by more than `NEGLIGIBLE`.
    """
    return taken - spared > NEGLIGIBLE * n and sign_tail(taken, spared) <= 1 - LEVEL


def mcnemar(model_only: int, base_only: int) -> float:
    """Two-sided p-value of McNemar's test (1947), in its exact, conditional form: a sign test on the examples
    where the two differ."""
    return min(1.0, 2 * sign_tail(max(model_only, base_only), min(model_only, base_only)))


def tango(model_only: float, base_only: float, n: int) -> tuple[float, float]:
    """Score interval of the difference of two paired proportions, (model_only - base_only) / n.

    All differences that a score test does not reject. It keeps its level at small n and rare disagreement, where
    Wald's interval and the bootstrap are too short (they have no width at all where no example differs).
    T. Tango, Statistics in Medicine 17 (1998) 891-908; recommended by Fagerland, Lydersen and Laake, Statistics in
    Medicine 33 (2014) 2850-2875.
    """
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)

    def score(d: float) -> float:
        # q: the most likely share of base_only, if the difference were d
        b = (2 * n - model_only + base_only) * d - (model_only + base_only)
        q = (math.sqrt(max(b * b + 8 * n * base_only * d * (1 - d), 0.0)) - b) / (4 * n)
        excess, variance = model_only - base_only - n * d, n * (2 * q + d * (1 - d))
        if variance > 0:
            return excess / math.sqrt(variance)
        return math.copysign(math.inf, excess) if excess else 0.0

    def solve(target: float) -> float:  # score falls as d rises
        low, high = -1.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if score(middle) > target else (low, middle)
        return (low + high) / 2

    return solve(z), solve(-z)


def bootstrap(model_only: int, base_only: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of the paired bootstrap (Efron 1979) of (model_only - base_only) / n.

    Drawing n examples with replacement adds +1, -1 or 0 n times over. The distribution of that sum is known, as the
    n-th power of its characteristic function: nothing is drawn, so this is the limit of ever more resamples, without a
    seed. It has no width where no example differs; `tango` has.
    """
    size = 2 * n + 1  # the sum lies in -n..n
    step = torch.zeros(size, dtype=torch.float64)
    step[0], step[1], step[-1] = n - model_only - base_only, model_only, base_only
    mass = torch.fft.ifft(torch.fft.fft(step / n) ** n).real.roll(n)
    below = mass.clamp_min(0).cumsum(0)
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = (torch.searchsorted(below, tails * below[-1]) - n).tolist()
    return low / n, high / n


@dataclass(frozen=True)
class Paired:
    """A paired comparison of n examples; `difference` and both intervals are shares of n (model minus base).

    low, high: Tango's interval. boot_low, boot_high: the bootstrap's. p: of the exact McNemar test.
    """

    n: int
    model_only: int
    base_only: int
    low: float
    high: float
    p: float
    boot_low: float
    boot_high: float

    @property
    def difference(self) -> float:
        return (self.model_only - self.base_only) / self.n

    @property
    def direction(self) -> int:
        """1: the model is better, -1: worse, 0: not measurably either.

        Both must agree: the exact test (p <= 0.05) and the interval (0 is outside). The exact test is the stricter
        one at small counts: it asks for 6 examples against none where the interval is content with 4.
        """
        if self.p > 1 - LEVEL or self.low <= 0 <= self.high:
            return 0
        return 1 if self.difference > 0 else -1

    def needed(self, margin: float | None = None) -> int | None:
        """About how many examples would decide, if the two went on to differ at the rates seen.

        To decide: both tests find a difference or, with a `margin`, the interval leaves out every gain above that.
        None: no number up to ten million would.
        """

        def decides(n: int) -> bool:
            model_only, base_only = self.model_only * n / self.n, self.base_only * n / self.n
            low, high = tango(model_only, base_only, n)
            if margin is not None and high <= margin:
                return True
            if low <= 0 <= high:
                return False
            # where many differ the exact test agrees with the interval, and takes long to say so
            return model_only + base_only > 1000 or mcnemar(int(model_only), int(base_only)) <= 1 - LEVEL

        few, many = self.n, 10**7
        if not decides(many):
            return None
        while many - few > 1:
            middle = (few + many) // 2
            few, many = (few, middle) if decides(middle) else (middle, many)
        return many


def compare(model: Tensor, base: Tensor, *, same: bool = False, distinct: Tensor | None = None) -> Paired:
    """Compare two (n,) bool tensors, "this example is classified rightly"; of `distinct` examples alone, (n,) bool.

    same: the two models are known to be one function. Then a difference of 0 is a fact and no estimate, and the
    interval is [0, 0]. Between two functions that merely agree on n examples it is not: among other examples up
    to about 4/n may differ (`tango`).
    """
    if distinct is not None:
        model, base = model[distinct], base[distinct]
    return paired(len(model), int((model & ~base).sum()), int((base & ~model).sum()), same)


def paired(n: int, model_only: int, base_only: int, same: bool = False) -> Paired:
    """The same from the counts."""
    certain = same and model_only == base_only == 0
    low, high = (0.0, 0.0) if certain else tango(model_only, base_only, n)
    p = mcnemar(model_only, base_only)
    return Paired(n, model_only, base_only, low, high, p, *bootstrap(model_only, base_only, n))


def holm(ps: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, in the given order (Holm, Scandinavian Journal of Statistics 6 (1979) 65-70).

    Whoever calls only those at most a level significant calls any of them so by chance no more often than that level,
    whatever the dependence between the tests.
    """
    adjusted, least = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        least = max(least, (len(ps) - rank) * ps[i])
        adjusted[i] = min(1.0, least)
    return adjusted
