"""The truth table of the verdict, written out independently of the rules."""

from itertools import product

import pytest
import torch

from forged_fx.evaluate.statistics import paired
from forged_fx.evaluate.verdict import RULES, VERDICTS, Evidence, judge, weigh

N = 200
UP, LEVEL, DOWN = (12, 0), (3, 3), (0, 12)  # examples that only the model, only the base gets right


def evidence(n=N, base=True, seems=True, masked=False, differs=LEVEL, complete=True):
    base_true = 120 if base else None
    return Evidence(
        n=n,
        true=130 if seems else 120,
        worst=118,
        taken=12 if masked else 1,
        base_true=base_true,
        base_worst=base_true,
        spared=0,
        paired=paired(n, *differs) if base else None,
        complete=complete,
    )


def expected(few, base, seems, masked, differs, complete):
    if few:
        return "cannot say"
    if not base:
        return "masking" if masked else "cannot say"
    if masked and seems:
        return "masking"
    return {
        UP: "gain" if complete else "cannot say",
        LEVEL: "no measurable gain",
        DOWN: "loss",
    }[differs]


@pytest.mark.parametrize(
    ("few", "base", "seems", "masked", "differs", "complete"),
    list(product((False, True), (True, False), (True, False), (False, True), (UP, LEVEL, DOWN), (True, False))),
)
def test_truth_table(few, base, seems, masked, differs, complete):
    if few:
        case = Evidence(5, 5, 0, 5, 0, 0, 0, paired(5, 5, 0), complete)
    else:
        case = evidence(N, base, seems, masked, differs, complete)
    verdict, sentence = judge(case)
    assert verdict == expected(few, base, seems, masked, differs, complete)
    assert sentence and "None" not in sentence


def test_every_verdict_can_be_given():
    assert set(VERDICTS) == {"gain", "no measurable gain", "loss", "masking", "cannot say"}
    assert RULES[-1][1](evidence()) is True


@pytest.mark.parametrize(
    ("n", "taken", "spared", "masked"),
    [
        (200, 0, 0, False),
        (200, 4, 0, False),  # a second round's luck
        (200, 5, 0, True),
        (200, 6, 1, False),
        (200, 7, 1, True),
        (200, 7, 7, False),
        (200, 0, 12, False),  # it is the base that hides something
        (10_000, 20, 0, False),  # beyond chance, and 0.2 points: negligible
        (10_000, 21, 0, True),
    ],
)
def test_what_counts_as_taken_away(n, taken, spared, masked):
    assert Evidence(n, n, n, taken, n, n, spared).masked is masked


def bits(n, wrong):
    right = torch.ones(n, dtype=torch.bool)
    right[list(wrong)] = False
    return right


def test_weigh_counts_by_example():
    model = {"true gradient": bits(10, [0]), "further": bits(10, [0, 1, 2, 3])}
    base = {"true gradient": bits(10, [0, 5]), "further": bits(10, [0, 3, 5, 6])}
    e = weigh(lambda kind="further": model[kind], lambda kind="further": base[kind], None, True, False)
    assert (e.true, e.worst, e.base_true, e.base_worst) == (9, 6, 8, 6)
    assert (e.taken, e.spared) == (2, 1)  # 1 and 2; 6. Both lost 3.


def test_one_example_that_vanishes_is_no_masking():
    assert judge(Evidence(N, 121, 120, 1, 120, 120, 0, paired(N, 0, 0)))[0] == "no measurable gain"


def test_the_sentence_says_how_many_inputs_would_decide():
    assert "inputs would show it" in judge(Evidence(N, 122, 122, 0, 120, 120, 0, paired(N, 3, 1)))[1]
