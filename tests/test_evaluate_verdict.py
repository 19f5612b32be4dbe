"""The truth table of the verdict, written out independently of the rules."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from forged_fx.evaluate.result import Row, Side, judged
from forged_fx.evaluate.statistics import paired
from forged_fx.evaluate.verdict import EXIT_CODES, RULES, SMALL, VERDICTS, Evidence, judge, weigh

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


def side(*rows):
    """Of 100 inputs: each row breaks so many of those that stand."""
    made, left = [], 100
    for kind, attack, broken in rows:
        made.append(Row("model", kind, attack, left, broken, left - broken))
        left -= broken
    broken_by = torch.tensor([i for i, row in enumerate(made) for _ in range(row.broken)] + [-1] * left)
    return Side("model", "", "", made, broken_by, torch.zeros(0))


def test_masking_names_the_rows_that_do_not_follow_the_true_gradient():
    model = side(
        ("natural", "none", 5),
        ("true gradient", "apgd-ce", 10),
        ("BPDA", "apgd-ce", 20),
        ("transfer", "examples of the base", 0),
        ("further", "apgd-random, true gradient, round 1", 2),
        ("further", "apgd-random, BPDA, round 1", 3),
    )
    verdict, sentence = judged(model, None, complete=True, same=False)
    assert verdict == "masking"
    assert sentence.endswith("found by apgd-ce under BPDA (20), apgd-random, BPDA, round 1 (3)")


def test_where_nothing_is_right_unattacked_that_is_a_loss_and_no_want_of_attacks():
    nothing = side(("natural", "none", 100))
    assert judged(nothing, side(("natural", "none", 5)), complete=True, same=False)[0] == "loss"
    verdict, sentence = judged(side(("natural", "none", 5)), side(("natural", "none", 100)), complete=True, same=False)
    assert verdict == "cannot say" and sentence.startswith("no attack was run")


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


def test_six_inputs_are_the_least_that_show_something():
    for n, verdict in ((5, "cannot say"), (6, "gain")):
        assert judge(Evidence(n, n, n, 0, 0, 0, 0, paired(n, n, 0)))[0] == verdict


def test_one_example_that_vanishes_is_no_masking():
    assert judge(Evidence(N, 121, 120, 1, 120, 120, 0, paired(N, 0, 0)))[0] == "no measurable gain"


def test_the_sentence_says_how_many_inputs_would_decide():
    assert "inputs would show it" in judge(Evidence(N, 122, 122, 0, 120, 120, 0, paired(N, 3, 1)))[1]


def test_a_raised_finding_forbids_a_gain_and_nothing_else():
    up, level, down = (
        Evidence(N, 120, 118, 0, 120, 118, 0, paired(N, *d), doubts=["logits clipped"]) for d in (UP, LEVEL, DOWN)
    )
    verdict, sentence = judge(up)
    assert verdict == "cannot say" and "logits clipped" in sentence
    assert judge(replace(up, doubts=[]))[0] == "gain"
    assert judge(level)[0] == "no measurable gain" and judge(down)[0] == "loss"
    assert judge(replace(up, taken=9, true=130, finders=["apgd-t under BPDA (9)"]))[0] == "masking"


def test_logits_too_small_are_neither_masking_nor_no_gain():
    masked = Evidence(N, 130, 118, 9, 120, 118, 0, paired(N, *LEVEL), doubts=[SMALL])
    assert judge(masked)[0] == "cannot say" and "multiply them by a constant" in judge(masked)[1]
    assert judge(replace(masked, doubts=[]))[0] == "masking"
    assert judge(replace(masked, paired=paired(N, *DOWN)))[0] == "loss"


@pytest.mark.parametrize(
    ("n", "differs", "verdict", "needed"),
    [
        (72, (0, 0), "cannot say", "about 73 would decide"),
        (73, (0, 0), "no measurable gain", None),
        (100, (3, 0), "cannot say", "about 200 would decide"),
        (100, (0, 3), "no measurable gain", None),
        (20, (6, 0), "gain", None),
    ],
)
def test_too_few_inputs_to_rule_a_gain_out(n, differs, verdict, needed):
    found, sentence = judge(Evidence(n, n, n, 0, n, n, 0, paired(n, *differs)))
    assert found == verdict and (needed is None or needed in sentence)
    assert judge(Evidence(n, n, n, 0, n, n, 0, paired(n, 0, 0, same=True), same=True))[0] == "no measurable gain"


def test_exit_codes_tell_verdicts_apart():
    assert set(EXIT_CODES) == set(VERDICTS) and len(set(EXIT_CODES.values())) == len(VERDICTS)
    assert [verdict for verdict, code in EXIT_CODES.items() if code == 0] == ["gain"]
    assert not {1, 2} & set(EXIT_CODES.values())


def test_what_is_not_defined_takes_all_else_and_is_named():
    up = Evidence(N, 130, 118, 0, 120, 106, 0, paired(N, *UP), complete=False)
    flat = replace(up, undefined=["square: needs images"])
    for case, verdict, words in (
        (up, "cannot say", "attacks='standard'"),
        (replace(up, relentless=True), "cannot say", "attacks='standard'"),  # it was left out, not ruled out
        (flat, "cannot say", "(square: needs images): claim it after attacks='relentless'"),
        (replace(flat, relentless=True), "gain", "not all of AutoAttack can be run here (square: needs images)"),
        (replace(flat, relentless=True, doubts=["zero gradient"]), "cannot say", "zero gradient"),
    ):
        assert judge(case)[0] == verdict and words in judge(case)[1]


def test_without_a_row_that_follows_the_true_gradient_there_is_nothing_that_it_hides():
    masked, alone = evidence(masked=True), evidence(base=False, masked=True)
    assert judge(masked)[0] == judge(alone)[0] == "masking"
    assert judge(replace(masked, followed=False))[0] == "no measurable gain"
    assert judge(replace(alone, followed=False))[0] == "cannot say"


def test_further_attacks_along_the_true_gradient_show_what_it_shows():
    model = {"true gradient": bits(10, [0]), "further": bits(10, [0, 1, 2, 3])}
    base = {"true gradient": bits(10, [0, 5]), "further": bits(10, [0, 3, 5, 6])}
    again = ~bits(10, [2]), ~bits(10, [3])
    e = weigh(lambda kind="further": model[kind], lambda kind="further": base[kind], None, True, False, again=again)
    assert (e.true, e.worst, e.taken, e.spared) == (9, 6, 2, 1)  # 1 and 3; 6
