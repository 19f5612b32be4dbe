import math
import random
import time
from fractions import Fraction
from statistics import NormalDist

import pytest
import torch

from forged_fx.evaluate.statistics import bootstrap, compare, holm, mcnemar, paired, sign_tail, tango


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # the third holds the second up
    assert holm([0.7, 0.6]) == [1.0, 1.0] and holm([0.2]) == [0.2] and holm([]) == []


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        (1, 7, 18 / 256),  # Bentur et al. 2009, as in Fagerland et al. 2014: 0.0703
        (6, 0, 2 / 64),
        (5, 0, 2 / 32),
        (0, 0, 1.0),
        (3, 3, 1.0),
        (1, 0, 1.0),
    ],
)
def test_exact_mcnemar(first, second, p):
    assert mcnemar(first, second) == pytest.approx(p, rel=1e-15)
    assert mcnemar(second, first) == mcnemar(first, second)


def test_many_that_differ_take_no_time():
    began = time.process_time()
    p = mcnemar(19_700, 19_300)
    assert time.process_time() - began < 20  # term by term anew it took minutes
    z = (400 - 1) / math.sqrt(39_000)  # the normal approximation, with its correction
    assert p == pytest.approx(2 * NormalDist().cdf(-z), rel=1e-3)


def test_sign_tail_adds_up():
    for n in range(8):
        for wins in range(n + 1):
            direct = sum(Fraction(math.comb(n, k), 2**n) for k in range(wins, n + 1))
            assert sign_tail(wins, n - wins) == pytest.approx(float(direct), rel=1e-15)


def test_tango_known_values():
    # Fagerland, Lydersen, Laake 2014, airway hyper-responsiveness, 21 patients: -0.517 to -0.026
    assert tango(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)
    z2 = 1.959963984540054**2
    # closed form where none differs
    assert tango(0, 0, 200) == pytest.approx((-z2 / (200 + z2), z2 / (200 + z2)), abs=1e-12)


def quartic(b, c, n, z2):
    """Tango's limits as roots of a quartic: Yang, Sun, Hardin, Statistics in Medicine 32 (2013) 1336-1342."""
    import numpy as np

    g, d = z2, b - c
    m = [
        n**2 * (n / g + 1) ** 2,
        -n * d * (n / g + 1) * (4 * n / g + 1),
        2 * n * d**2 * (3 * n / g + 2) / g - n**2 * ((b + c) / g + 1),
        n * d * (2 * (b + c) / g + 1) - d**3 * (4 * n / g + 1) / g,
        d**2 * (d**2 / g - (b + c)) / g,
    ]
    roots = np.roots(m)
    return sorted(roots[abs(roots.imag) < 1e-6].real)


def test_tango_equals_its_closed_form():
    rng = random.Random(0)
    for _ in range(200):
        n = rng.randint(20, 500)
        b, c = rng.randint(1, n // 4), rng.randint(1, n // 4)
        roots = quartic(b, c, n, 1.959963984540054**2)
        low, high = tango(b, c, n)
        assert min(abs(low - root) for root in roots) < 1e-6
        assert min(abs(high - root) for root in roots) < 1e-6
        assert low < (b - c) / n < high


def test_tango_turns_with_its_arguments():
    for b, c, n in [(0, 9, 100), (3, 1, 50), (200, 0, 200), (10, 10, 20)]:
        low, high = tango(b, c, n)
        assert tango(c, b, n) == pytest.approx((-high, -low), abs=1e-12)
        assert -1 <= low <= (b - c) / n <= high <= 1


def test_the_exact_test_and_the_interval_must_agree():
    right = torch.ones(200, dtype=torch.bool)
    for differing, direction in [(0, 0), (4, 0), (5, 0), (6, 1), (50, 1)]:
        wrong = right.clone()
        wrong[:differing] = False
        assert compare(right, wrong).direction == direction
        assert compare(wrong, right).direction == -direction
    # at 4 the interval alone would have been content
    wrong = right.clone()
    wrong[:4] = False
    assert compare(right, wrong).low > 0


def test_one_function_differs_by_nothing_and_two_by_something():
    right = torch.tensor([True, False] * 50)
    same, other = compare(right, right, same=True), compare(right, right)
    assert (same.low, same.high, same.difference, same.p) == (0, 0, 0, 1)
    assert other.low < 0 < other.high
    # `same` is a claim about functions, and outcomes that differ refute it
    assert compare(right, ~right, same=True).low < 0


def test_how_many_would_decide():
    right = torch.ones(200, dtype=torch.bool)
    wrong = right.clone()
    wrong[0] = False
    assert compare(right, wrong).needed() == 1200  # 6 against none, at 1 of 200
    assert compare(right, right).needed() is None
    # 18 against 12 of 300: both counts grow with n, and the exact test, the stricter one, agrees last
    n = paired(300, 18, 12).needed()
    assert n is not None and tango(0.06 * n, 0.04 * n, n)[0] > 0
    assert mcnemar(int(0.06 * n), int(0.04 * n)) <= 0.05 < mcnemar(int(0.06 * (n - 1)), int(0.04 * (n - 1)))


def test_the_bootstrap_is_the_limit_of_drawing():
    for n, model_only, base_only in ((200, 12, 4), (50, 1, 9), (300, 0, 6)):
        examples = torch.tensor([1.0] * model_only + [-1.0] * base_only + [0.0] * (n - model_only - base_only))
        draws = torch.randint(n, (20_000, n), generator=torch.Generator().manual_seed(0))
        drawn = examples[draws].mean(1).quantile(torch.tensor([0.025, 0.975]))
        assert bootstrap(model_only, base_only, n) == pytest.approx(drawn.tolist(), abs=1.01 / n)


def test_the_bootstrap_by_hand():
    # two examples, one better and one equal: 0, 1 or 2 times the better one, with 1/4, 1/2, 1/4
    assert bootstrap(1, 0, 2, level=0.4) == (0.5, 0.5) and bootstrap(1, 0, 2, level=0.6) == (0.0, 1.0)
    assert bootstrap(0, 0, 9) == (0, 0) and bootstrap(9, 0, 9) == (1, 1) and bootstrap(0, 9, 9) == (-1, -1)
    low, high = bootstrap(700, 650, 20_000)
    assert low < 0.0025 < high and (low, high) == tuple(-limit for limit in reversed(bootstrap(650, 700, 20_000)))


def test_how_many_would_rule_a_gain_out():
    # none differs: z² / (n + z²) <= 0.05 from 73 on
    assert paired(20, 0, 0).needed(0.05) == 73 and tango(0, 0, 73)[1] <= 0.05 < tango(0, 0, 72)[1]
    few = paired(100, 3, 0)
    needed = few.needed(0.05)
    assert few.high > 0.05 and needed == few.needed() == 200  # 6 against none come before the interval shrinks
