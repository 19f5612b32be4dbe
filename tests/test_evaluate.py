"""The evaluator against answers known beforehand."""

import json
import logging
import sys
from contextlib import contextmanager
from itertools import count, product
from types import SimpleNamespace

import planted
import pytest
import torch
from planted import Cut, Hidden, _Hide, evaluate, inputs, linear, straight_through
from pyautoattack import AutoAttack, checks

from forged_fx.digits import EPS
from forged_fx.evaluate import attacks as table
from forged_fx.evaluate import blocks
from forged_fx.evaluate.attacks import Attack, Setting
from forged_fx.evaluate.gradients import Logits
from forged_fx.evaluate.protocol import COSTLY
from forged_fx.evaluate.result import KINDS
from forged_fx.evaluate.threat import Threat

GRADIENT = ["apgd-ce", "apgd-t", "fab-t"]


pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture
def small():
    return planted.small()


@pytest.fixture
def hurried(monkeypatch):
    planted.hurry(monkeypatch)


@contextmanager
def contained():
    """pyautoattack's own run loop, without its marks on the process."""
    trace, counts = sys.gettrace(), dict(checks.funcs)
    try:
        yield
    finally:
        sys.settrace(trace)
        checks.funcs.update(counts)


def own_loop(model, x, y, eps, batch_size, attacks=None, norm="Linf"):
    with contained():
        attack = AutoAttack(model, norm=norm, eps=eps, seed=0, version="standard")
        attack.attacks_to_run = attacks or attack.attacks_to_run
        return attack.run_standard_evaluation(x, y, batch_size=batch_size)[0]


# --- equal to pyautoattack, and to theory ---


def test_rows_equal_pyautoattacks_own(small, caplog, hurried, monkeypatch):
    model, x, y = small
    hidden = Hidden(model)
    monkeypatch.setattr(blocks, "BLOCK", 20)
    result = evaluate(hidden, model, x=x, y=y, eps=EPS)

    def examples(side):
        full = x.clone()
        full[side.broken] = side.examples
        return full

    # the base: AutoAttack as it is, row by row and example by example
    with caplog.at_level(logging.DEBUG, "auto-attack"):
        theirs = own_loop(model, x, y, EPS, 20)
    by_them = [float(r.getMessage().split("%")[0].split()[-1]) for r in caplog.records if "after" in r.getMessage()]
    ours = [100 * r.standing / 45 for r in result.base.rows if r.kind == "true gradient"]
    assert [round(share, 2) for share in ours] == by_them
    assert torch.equal(examples(result.base)[result.base.broken_by < 5], theirs[result.base.broken_by < 5])

    # the model: AutoAttack with the true gradient, then its gradient attacks under BPDA on what stands, but for FAB
    assert [row.note for row in result.model.rows if row.kind == "BPDA"][:3] == ["", "", f"left out: {COSTLY}"]
    stands = own_loop(hidden, x, y, EPS, 20)
    with torch.no_grad():
        stands = (hidden(stands).argmax(1) == y).nonzero().flatten()
    assert torch.equal(stands, result.model.right("true gradient").nonzero().flatten())
    with straight_through():
        theirs = own_loop(hidden, x[stands], y[stands], EPS, 20, GRADIENT)
    bpda = torch.tensor([row.kind == "BPDA" for row in result.model.rows])[result.model.broken_by]
    bpda &= result.model.broken_by >= 0
    assert bpda.sum() > 3
    full = torch.zeros_like(x)
    full[stands] = theirs
    assert torch.equal(examples(result.model)[bpda], full[bpda])


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("attack", table.AUTOATTACK)
def test_a_row_alone_equals_pyautoattacks_own(small, attack, norm, hurried, monkeypatch):
    model, x, y = small[0], small[1][:20], small[2][:20]
    eps = {"Linf": EPS, "L2": 1.0, "L1": 4.0}[norm]
    monkeypatch.setattr(blocks, "BLOCK", 12)
    result = evaluate(model, x=x, y=y, eps=eps, norm=norm, attacks=[attack])
    theirs = own_loop(model, x, y, eps, 12, [attack], norm)
    found = result.model.broken_by == 1
    assert found.any()
    assert torch.equal(result.model.examples[result.model.broken_by[result.model.broken] == 1], theirs[found])
    with torch.no_grad():
        assert torch.equal(result.model.right(), model(theirs).argmax(1) == y)


@pytest.mark.parametrize(("norm", "dual"), [("Linf", 1), ("L2", 2)])
def test_linear_classifier_meets_the_closed_form(norm, dual):
    model, x = linear(classes=4), inputs(100)
    weight, bias = model[1].weight.detach(), model[1].bias.detach()
    logits = x.flatten(1) @ weight.T + bias
    y = logits.argmax(1)
    y[::10] = (y[::10] + 1) % 4  # some that are wrong without attack
    margins = logits.gather(1, y[:, None]) - logits
    reach = (weight[y][:, None] - weight).norm(dual, dim=2)
    radius = (margins / reach).scatter(1, y[:, None], torch.inf).min(1).values  # of the ball that just breaks it
    eps = radius.median().item()
    assert radius.max() < 0.2 or norm != "Linf"  # the ball, not the box, is what limits the attack
    clear = (radius - eps).abs() > 0.01 * eps
    result = evaluate(model, x=x[clear], y=y[clear], eps=eps, norm=norm, attacks=GRADIENT)
    assert torch.equal(result.model.right(), (radius > eps)[clear])
    assert 0.4 < result.worst_case < 0.6


def test_l1_runs_and_stays_in_its_ball():
    model, x = linear(classes=4), inputs(20)
    y = model(x).argmax(1)
    result = evaluate(model, x=x, y=y, eps=1.0, norm="L1", attacks="quick")
    assert 0 < result.worst_case < 1
    result.verify(model, x, y)


# --- verdicts ---


def test_hidden_gradient_is_masking(small, hurried):
    model, x, y = small
    result = evaluate(Hidden(model), model, x=x, y=y, eps=EPS, attacks="quick")
    assert result.verdict == "masking"
    assert result.model.accuracy("true gradient") > result.base.accuracy("true gradient")
    assert result.worst_case == result.base_worst_case
    assert result.same  # the same forward: so the difference is 0 for certain
    assert (result.compared().low, result.compared().high) == (0, 0)
    # and without a base
    assert evaluate(Hidden(model), x=x, y=y, eps=EPS, attacks="quick").verdict == "masking"


@pytest.mark.parametrize("attacks", [["noise"], ["noise", "apgd-random"]])
def test_where_the_true_gradient_was_not_followed_first_it_hides_nothing(small, attacks):
    model, x, y = small
    result = evaluate(model, x=x, y=y, eps=0.3, attacks=attacks)
    assert result.model.rows[1].broken > 10 and result.model.accuracy("true gradient") == result.model.rows[0].alone
    assert result.verdict == "cannot say" and "takes the model that it was made from" in result.sentence


def test_what_only_transfer_sees_is_masking(small, hurried):
    model, x, y = small
    result = evaluate(Cut(model), model, x=x, y=y, eps=EPS, attacks="quick")
    assert result.verdict == "masking"
    by_kind = {row.kind: row for row in result.model.rows}
    assert by_kind["BPDA"].note.startswith("left out")
    assert by_kind["transfer"].broken > 5
    assert result.worst_case == result.base_worst_case == by_kind["transfer"].alone


def test_a_model_against_itself(small, hurried):
    model, x, y = small
    result = evaluate(model, model, x=x, y=y, eps=EPS, attacks="quick")
    assert result.verdict == "no measurable gain"
    compared = result.compared()
    assert (compared.difference, compared.low, compared.high, compared.p) == (0, 0, 0, 1)
    assert result.worst_case == result.base_worst_case


def test_a_gain_a_loss_and_what_a_part_may_claim(hurried):
    strong, weak, x, y = planted.strong_and_weak()
    options = {"x": x, "y": y, "eps": 0.1}
    loss = evaluate(weak, strong, attacks="quick", **options)
    assert (loss.verdict, loss.worst_case, loss.base_worst_case) == ("loss", 0, 1)
    part = evaluate(strong, weak, attacks="quick", **options)
    assert part.verdict == "cannot say" and "standard" in part.sentence
    gain = evaluate(strong, weak, **options)
    assert (gain.verdict, gain.worst_case, gain.base_worst_case) == ("gain", 1, 0)


def test_too_few_inputs_and_no_base(small, hurried):
    model, x, y = small
    assert "fewer than 6" in evaluate(model, model, x=x[:5], y=y[:5], attacks="quick").sentence
    result = evaluate(model, x=x, y=y, attacks="quick")
    assert result.verdict == "cannot say" and "base=" in result.sentence
    assert result.base_worst_case is None and result.compared() is None


# --- the books ---


def test_rows_add_up(small, hurried, monkeypatch):
    model, x, y = (small[0], small[1][:24], small[2][:24])
    monkeypatch.setattr(blocks, "BLOCK", 10)
    result = evaluate(Hidden(model), model, x=x, y=y, eps=EPS, attacks="quick")
    for side in result.sides:
        left = result.n
        for i, row in enumerate(side.rows):
            assert row.side == side.name and row.attacked <= left
            left -= row.broken
            assert row.standing == left
            assert row.broken == int((side.broken_by == i).sum())
            assert result.n * side.accuracy() <= row.standing  # worst case <= every row
            assert row.alone is None or side.accuracy() <= row.alone
        figures = [side.accuracy(kind) for kind in KINDS]
        assert figures == sorted(figures, reverse=True)
        assert side.examples.shape == (len(side.broken), *x.shape[1:])
    assert [row.kind for row in result.model.rows] == [
        "natural", *["true gradient"] * 2, *["BPDA"] * 5, "transfer"
    ]  # fmt: skip
    assert result.rows == [*result.model.rows, *result.base.rows]
    result.verify(Hidden(model), x, y, model)


def test_a_rows_seconds_are_those_of_all_its_blocks(monkeypatch):
    clock = count()
    monkeypatch.setattr(blocks, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    monkeypatch.setattr(blocks, "BLOCK", 10)
    model, x = linear(classes=4), inputs(24)
    rows = evaluate(model, x=x, y=model(x).argmax(1), attacks=["apgd-ce"], eps=1e-4).rows
    assert [row.seconds for row in rows[:2]] == [3, 3]


class HiddenWhereBright(Hidden):
    def forward(self, x):
        return self.inner(torch.where(x[:, :, :1, :1] > 0.5, _Hide.apply(x), x))


def test_bpda_is_run_on_all_where_it_changes_the_gradient_of_one_block(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 10)
    model, x = linear(classes=4), inputs(20)
    x[:10, :, 0, 0], x[10:, :, 0, 0] = 0.7, 0.3
    result = evaluate(HiddenWhereBright(model), x=x, y=model(x).argmax(1), attacks=["apgd-ce"], eps=0.15)
    bpda = next(row for row in result.model.rows if row.kind == "BPDA")
    assert not bpda.note and bpda.broken and result.worst_case < result.model.accuracy("true gradient")


def test_bpda_rows_are_left_out_where_they_would_repeat(small, hurried):
    model, x, y = small
    result = evaluate(model, x=x, y=y, attacks="quick")
    assert [row.note for row in result.rows if row.kind == "BPDA"] == [
        "left out: no gradient changes: the same row again"
    ] * 5


def test_saturated_logits_do_not_pass_for_a_model_without_thresholds():
    # float32 logits so large that cross-entropy is 0, and its gradient too, in either mode
    model, x = linear(classes=4), inputs(20)
    y = model(x).argmax(1)
    with torch.no_grad():
        model[1].weight *= 1e6
    result = evaluate(Hidden(model), x=x, y=y, attacks=["apgd-ce"])
    assert [row.note for row in result.rows if row.kind == "BPDA" and row.attack == "apgd-ce"] == [""]


@pytest.mark.parametrize("labels", ["the model's", "the base's"])
def test_transfer_is_of_what_both_get_right_unattacked(labels):
    model, base, x = linear(classes=4), linear(classes=4, seed=1), inputs(30)
    y = (model if labels == "the model's" else base)(x).argmax(1)
    result = evaluate(model, base, x=x, y=y, eps=0.02, attacks=["apgd-ce", "mi-fgsm"])
    rows, found = result.model.rows, result.base
    at = [row.attack for row in rows].index("examples of the base")
    assert 0 < rows[0].broken + int((found.broken_by == 0).sum()) < 30
    stood = (result.model.broken_by < 0) | (result.model.broken_by >= at)
    by_gradient = (found.broken_by > 0) & (found.broken_by < at)
    assert 0 < rows[at].attacked == int((stood & by_gradient).sum())
    examples, right = x.clone(), model(x).argmax(1) == y
    examples[found.broken] = found.examples
    assert rows[0].alone == pytest.approx(float(right.double().mean()))
    right &= (model(examples).argmax(1) == y) | ~by_gradient
    assert rows[at].alone == pytest.approx(float(right.double().mean()))
    result.verify(model, x, y, base)


def test_both_sides_face_the_same_examples(small, hurried):
    """A base that hides its gradient is found out by the model's examples."""
    model, x, y = small
    result = evaluate(model, Cut(model), x=x, y=y, eps=EPS, attacks="quick")
    assert result.base.accuracy("true gradient") > result.model.accuracy("true gradient")
    assert result.base.rows[-1].broken > 5
    assert result.base_worst_case == result.worst_case
    assert result.verdict == "no measurable gain"


def test_batch_of_one_and_inputs_that_are_no_images(hurried):
    model, x = linear(classes=4, shape=(12,)), inputs(9, (12,))
    y = model(x).argmax(1)
    result = evaluate(model, x=x, y=y, batch_size=1)
    notes = {row.attack: row.note for row in result.rows if row.kind == "true gradient"}
    assert "needs images" in notes.pop("square") and not any(notes.values())
    result.verify(model, x, y)


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes(classes):
    model, x = linear(classes), inputs(12)
    y = model(x).argmax(1)
    result = evaluate(model, x=x, y=y, attacks=GRADIENT)
    note = next(row.note for row in result.rows if row.attack == "apgd-t")
    assert note == ("" if classes == 4 else f"left out: the targeted DLR loss needs 4 classes, and there are {classes}")


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_square_is_left_out_exactly_where_it_would_fail(norm):
    for height, width in product((4, 5, 8, 12, 14), (4, 5, 11, 12, 30)):
        shape = (1, height, width)
        model, x = linear(3, shape=shape), inputs(3, shape)
        y = model(x).argmax(1)
        setting = Setting(Threat(0.1, norm), 3, shape, 0, x.device)
        square, tools = table.ATTACKS["square"], table.toolbox(Logits(model), setting)
        tools.square.n_queries = 2
        try:
            square.run(tools, x, y)
        except (RuntimeError, ZeroDivisionError, ValueError):
            assert "does not fit" in square.unfit(setting), shape
        else:
            assert not square.unfit(setting), shape


# --- claims are checked ---


@pytest.mark.parametrize(
    ("claim", "counts"),
    [
        (lambda x, far: x, "nothing"),
        (lambda x, far: far, "rejected"),  # fools, from outside the ball
        (lambda x, far: x + (far - x).sign() * 0.1, "broken"),
        (lambda x, far: x + (far - x).sign() * 0.1001, "rejected"),
        (lambda x, far: torch.full_like(x, torch.nan), "no break"),
        (lambda x, far: -x, "no break"),  # outside the box
    ],
)
def test_a_claimed_example_counts_only_if_it_keeps_the_rules(claim, counts, monkeypatch):
    model, x = linear(classes=2), inputs(30)
    y = model(x).argmax(1)
    direction = model[1].weight.detach()[1] - model[1].weight.detach()[0]
    far = x + (1 - 2 * y.view(-1, 1, 1, 1)) * direction.view(1, 1, 6, 6).sign() * 0.19
    lookup = {tuple(a.flatten().tolist()): b for a, b in zip(x, far, strict=True)}

    def run(tools, x, y):
        return claim(x, torch.stack([lookup[tuple(a.flatten().tolist())] for a in x]))

    monkeypatch.setitem(table.ATTACKS, "liar", Attack("liar", run, gradient=False))
    result = evaluate(model, x=x, y=y, eps=0.1, attacks=["liar"])
    row = result.model.rows[1]
    assert row.attacked == 30
    assert (row.broken > 0) is (counts == "broken")
    if counts == "rejected":
        assert row.rejected > 0 and f"{row.rejected} examples outside" in row.note
    if counts == "broken":
        assert row.rejected == 0
        result.verify(model, x, y)


# --- what is not defined for the inputs ---


def test_no_gain_after_all_of_autoattack_where_it_cannot_all_be_run(hurried, tmp_path):
    strong, weak, x, y = planted.strong_and_weak()
    call = {"x": x.flatten(1), "y": y}
    standard = evaluate(strong, weak, **call)
    assert standard.compared().direction == 1
    assert (standard.complete, standard.verdict) == (False, "cannot say")
    assert "square: needs images" in standard.sentence and "attacks='relentless'" in standard.sentence
    for less in ("adaptive", "thorough"):
        assert evaluate(strong, weak, **call, attacks=less).verdict == "cannot say"
    whole = evaluate(strong, weak, **call, attacks="relentless", folder=tmp_path)
    assert (whole.complete, whole.verdict) == (False, "gain")
    rounds = {row.attack for row in whole.model.rows if row.attack.endswith("round 1") and "borrowed" not in row.attack}
    assert {attack.split(", ")[1] for attack in rounds} == {"true gradient"}  # no other one differs from it
    assert next(row.attacked for row in whole.model.rows if row.attack == "apgd-borrowed, round 1") == 24
    assert "not all of AutoAttack can be run here (square: needs images" in whole.sentence
    assert "autoattack_acc" not in json.loads((tmp_path / "result.json").read_text())["robustbench"]
    assert evaluate(strong, weak, x=x, y=y).verdict == "gain"


def test_where_nothing_was_attacked_no_figure_is_a_worst_case():
    model, x = linear(shape=(12,)), inputs(20, (12,))
    result = evaluate(model, x=x, y=model(x).argmax(1), attacks=["square"])
    assert result.verdict == "cannot say" and result.sentence.startswith("no attack was run (square: needs images")
    assert "worst case" not in result.sentence
    with pytest.raises(ValueError, match=r"attacks='strongest': that runs again.*name one of them"):
        evaluate(model, x=x, y=model(x).argmax(1), attacks="strongest")
