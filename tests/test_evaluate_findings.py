"""Every check is raised by what it is for, and by nothing else; a raised one forbids a gain."""

import copy
import math
import threading
from dataclasses import replace
from pathlib import Path

import planted
import pytest
import torch
from planted import Changed, Cut, Hidden, evaluate

import forged_fx
from forged_fx.digits import EPS
from forged_fx.evaluate import further, scale
from forged_fx.evaluate.attacks import ATTACKS
from forged_fx.evaluate.findings import CHECKS, Case, examine
from forged_fx.evaluate.probes import Probes
from forged_fx.evaluate.result import STANDING, Row, Side
from forged_fx.evaluate.verdict import BASE_DOUBTED, REMEMBERS, STUCK, UNBOUNDED

MASKING = {check.name for check in CHECKS if check.masking}


pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture
def hurried(monkeypatch):
    planted.hurry(monkeypatch)


def raised(result):
    return {finding.name for finding in result.findings if finding.raised}


# --- planted defences that fool attacks ---


@pytest.mark.parametrize(
    ("defence", "finding"),
    [
        (Hidden, "zero gradient"),
        (Cut, "zero gradient"),
        (planted.loud, "zero gradient"),
        (planted.quantised, "zero gradient"),
        (planted.randomised, "output randomised"),
    ],
)
def test_a_defence_that_fools_attacks_is_found_and_never_gains(defence, finding, hurried):
    """Even where the model inside is measurably better than its base, which is a gain without the defence."""
    strong, weak, x, y = planted.strong_and_weak()
    options = {"x": x, "y": y, "eps": 0.1}
    result = evaluate(defence(strong), weak, **options)
    assert finding in raised(result) and finding in result.doubts
    assert result.compared().direction == 1  # the rule alone stands between it and a gain
    assert result.verdict == "cannot say" and finding in result.sentence and result.exit_code == 6
    # and around the weak model the defence is no gain over the weak model itself
    assert evaluate(defence(weak), weak, **options).verdict != "gain"


def test_a_base_that_draws_at_random_is_no_base_to_gain_over(hurried):
    strong, weak, x, y = planted.strong_and_weak()
    result = evaluate(strong, planted.randomised(weak), x=x, y=y, eps=0.1)
    assert result.compared().direction == 1
    assert result.verdict == "cannot say" and "output randomised" in result.doubts


def off_the_grid(x):
    """What rounds at random leaves the values alone that these inputs have (multiples of 1/16)."""
    rounded = (x * 16 + torch.rand_like(x)).floor() / 16
    return x + (rounded - x).detach()


def test_a_model_that_draws_only_where_attacks_go_is_found(hurried):
    strong, weak, x, y = planted.strong_and_weak()
    x = (x * 16).round() / 16
    for model, base in ((Changed(strong, before=off_the_grid), weak), (strong, Changed(weak, before=off_the_grid))):
        result = evaluate(model, base, x=x, y=y, eps=0.1)
        assert "output randomised" in result.doubts and result.verdict != "gain"


def test_a_base_on_which_attacks_fail_makes_no_loss(hurried):
    """It makes the model look worse than it is: without the rounding, the base stands no better."""
    strong, weak, x, y = planted.strong_and_weak()
    other = copy.deepcopy(weak)  # as weak, but that what breaks one of them is no help against the other
    with torch.no_grad():
        other[1].weight.copy_(2 * strong[1].weight - weak[1].weight)
    options = {"x": x, "y": y, "eps": 0.1, "attacks": "quick"}
    result = evaluate(weak, planted.quantised(other), **options)
    assert result.compared().direction == -1 and evaluate(weak, other, **options).base_worst_case == 0
    assert BASE_DOUBTED in raised(result) and result.verdict == "cannot say"
    assert "attacks on the base may have failed" in result.sentence


@pytest.mark.parametrize("change", [lambda x: x + 0.3 * torch.rand_like(x), lambda x: by_companions(x)])
def test_a_base_that_draws_or_looks_around_makes_no_loss(change, hurried):
    strong, weak, x, y = planted.strong_and_weak()
    result = evaluate(weak, Changed(strong, before=change), x=x, y=y, eps=0.1, attacks="quick")
    assert result.compared().direction == -1 and BASE_DOUBTED in raised(result) and result.verdict == "cannot say"


def test_a_base_that_is_only_loud_may_be_lost_against(hurried):
    """Its cross-entropy has no gradient; that of the same logits in another size has."""
    strong, weak, x, y = planted.strong_and_weak()
    result = evaluate(weak, planted.loud(strong), x=x, y=y, eps=0.1, attacks="quick")
    assert BASE_DOUBTED not in raised(result) and result.verdict == "loss"


@pytest.mark.parametrize(
    ("size", "finding", "words"), [(1e5, STUCK, "divide logits"), (1e-9, "logits too small", "multiply them")]
)
def test_logits_of_a_size_that_the_cross_entropy_does_not_see_say_nothing_in_a_model_s_favour(
    size, finding, words, hurried
):
    model, x, y = planted.small()
    scaled = Changed(model, after=lambda logits: size * logits)
    result = evaluate(scaled, model, x=x, y=y, eps=EPS, attacks="quick")
    assert finding in raised(result) and result.verdict == "cannot say" and words in result.sentence
    for usual in (1e-2, 5):
        scaled = Changed(model, after=lambda logits, usual=usual: usual * logits)
        assert raised(evaluate(scaled, model, x=x, y=y, eps=EPS, attacks="quick")) == set()
    for proper in (lambda logits: logits.log_softmax(1), lambda logits: logits.softmax(1)):
        assert "logits too small" not in raised(evaluate(Changed(model, after=proper), x=x, y=y, attacks=["apgd-ce"]))


def test_thresholds_that_cut_all_to_zero_let_bpda_through(hurried):
    model, x, y = planted.small()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0.4)
    result = forged_fx.evaluate(forged, model, x=x, y=y, eps=EPS, attacks="quick", progress=False)
    assert raised(result) == {"zero gradient"} and result.verdict == "no measurable gain"


def test_a_base_of_logits_that_no_loss_sees_makes_no_loss(hurried):
    strong, weak, x, y = planted.strong_and_weak()
    small = Changed(strong, after=lambda logits: 1e-9 * logits)
    result = evaluate(weak, small, x=x, y=y, eps=0.1, attacks=["apgd-ce"])
    assert result.compared().direction == -1 and result.verdict == "cannot say" and BASE_DOUBTED in raised(result)


def test_attacks_that_fail_on_both_say_nothing_in_either_s_favour(hurried):
    strong, weak, x, y = planted.strong_and_weak()
    result = evaluate(planted.quantised(weak), planted.quantised(strong), x=x, y=y, eps=0.1, attacks="quick")
    assert result.compared().direction == 0
    assert {UNBOUNDED, BASE_DOUBTED} <= raised(result) and result.verdict == "cannot say"


def test_a_base_that_looks_at_its_companions_is_no_base_to_gain_over(hurried):
    strong, weak, x, y = planted.strong_and_weak()
    result = evaluate(strong, Changed(weak, before=by_companions), x=x, y=y, eps=0.1)
    assert "output depends on the batch" in result.doubts and result.verdict != "gain"


def test_log_probabilities_are_not_clipped_and_rounded_probabilities_are_some(hurried):
    model, x, y = planted.small()
    options = {"x": x, "y": y, "eps": EPS, "attacks": ["apgd-ce"]}
    sure = Changed(model, after=lambda logits: (50 * logits).log_softmax(1))
    assert (sure(x) == 0).double().mean() > 0.01 and "logits clipped" not in raised(evaluate(sure, **options))
    rounded = Changed(model, after=lambda logits: logits.bfloat16().softmax(1).float())
    assert "output is a probability" in raised(evaluate(rounded, **options))


def test_logits_beyond_a_square_root_of_float32_are_told_apart(hurried):
    model, x, y = planted.small()
    loud = Changed(model, before=lambda x: x + 0.3 * torch.rand_like(x), after=lambda logits: 1e25 * logits)
    assert "output randomised" in raised(evaluate(loud, x=x, y=y, eps=EPS, attacks=["apgd-ce"]))


def shared(logits, size=3e4):
    return logits + size


class Cached(torch.nn.Module):
    """What is near to an input that it has seen it answers as it answered that."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, None
        self.eval()

    def forward(self, x):
        logits = self.inner(x)
        if self.seen is None:
            self.seen = x.detach().clone(), logits.detach().clone()
        far, nearest = torch.cdist(x.detach().flatten(1), self.seen[0].flatten(1), p=torch.inf).min(1)
        return torch.where((far <= 0.11)[:, None], self.seen[1][nearest] + 1e-3 * (logits - logits.detach()), logits)


class Counted(torch.nn.Module):
    """A buffer says how often it was asked; weighed: its answers depend on that."""

    def __init__(self, inner, weighed):
        super().__init__()
        self.inner, self.weighed = inner, weighed
        self.register_buffer("asked", torch.zeros(()))
        self.eval()

    def forward(self, x):
        self.asked += 1
        return self.inner(x) + self.weighed * (self.asked > 20) * torch.eye(4)[0]


def test_a_model_that_remembers_what_it_was_asked_gains_nothing(hurried):
    strong, weak, x, y = planted.strong_and_weak()
    call = {"x": x, "y": y, "eps": 0.1}
    result = evaluate(Cached(weak), weak, **call)
    assert result.compared().direction == 1 and result.verdict == "cannot say"
    assert REMEMBERS in raised(result) and "asked before" in result.sentence
    assert REMEMBERS in raised(evaluate(Cached(weak), **call, attacks=["apgd-ce"]))  # no base has found an example
    result = evaluate(weak, Cached(strong), **call)
    assert result.compared().direction == -1 and result.verdict == "cannot say" and BASE_DOUBTED in raised(result)
    model = Counted(strong, weighed=1e-3)
    assert REMEMBERS in raised(evaluate(model, weak, **call)) and model.asked == 0


def test_a_model_that_draws_or_counts_or_cannot_be_copied_is_not_accused_of_a_memory(hurried):
    strong, weak, x, y = planted.strong_and_weak()
    uncopied = Changed(strong)
    uncopied.lock = threading.Lock()
    hooked = Changed(strong)
    known = {hooked: None}
    hooked.register_forward_pre_hook(lambda module, args: known[module])
    found = {}
    for name, model in (
        ("draws", planted.randomised(strong)), ("counts", Counted(strong, 0)), ("plain", strong),
        ("uncopied", uncopied), ("hooked", hooked),
    ):  # fmt: skip
        result = evaluate(model, weak, x=x, y=y, eps=0.1)
        (found[name],) = (finding for finding in result.findings if finding.name == REMEMBERS)
        assert not found[name].raised and BASE_DOUBTED not in raised(result)
        assert (result.verdict == "gain") is (name != "draws")
    assert found["counts"].value == found["plain"].value == 0
    assert "its output is randomised" in found["draws"].note and "'lock' is a lock" in found["uncopied"].note
    assert "does not run (KeyError" in found["hooked"].note
    drawn = Changed(strong, after=lambda logits: logits + 1e-7 * torch.rand_like(logits))  # less than is told
    assert REMEMBERS not in raised(evaluate(drawn, weak, x=x, y=y, eps=0.1, attacks=["apgd-ce"]))


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (lambda x: x + 0.05 * torch.rand_like(x), "output randomised"),
        (lambda x: by_companions(x), "output depends on the batch"),
    ],
)
def test_what_all_classes_share_hides_nothing(change, finding, hurried):
    model, x, y = planted.small()
    for one, other in ((Changed(model, before=change, after=shared), model), (Changed(model, after=shared), model)):
        result = evaluate(one, other, x=x, y=y, eps=0.05, attacks=["apgd-ce"])
        assert (finding in raised(result)) is (one.before is change)


def test_a_plain_model_raises_nothing(hurried):
    model, x, y = planted.small()
    other = Changed(model[:-1], after=lambda hidden: hidden @ model[-1].weight.T)  # not the base: without a bias
    assert raised(evaluate(other, model, x=x, y=y, eps=EPS)) == set()
    assert raised(evaluate(model, x=x, y=y, eps=1.0, norm="L2", attacks="quick")) == set()
    assert raised(evaluate(model, x=x, y=y, eps=4.0, norm="L1", attacks=["apgd-ce"])) == set()
    assert raised(evaluate(model, model, x=x, y=y, eps=EPS, attacks="quick")) == {"base and model identical"}


# --- a weakness that a single kind of row sees ---


@pytest.mark.parametrize(
    ("defence", "base", "kind", "attack", "finding"),
    [
        (Hidden, None, "BPDA", "apgd-ce", "true gradient above BPDA"),
        (Cut, "itself", "transfer", "examples of the base", "white box above transfer"),
        (Cut, None, "true gradient", "square", "white box above black box"),
    ],
)
def test_the_row_that_finds_a_weakness_is_named(defence, base, kind, attack, finding, monkeypatch):
    _, weak, x, y = planted.strong_and_weak()
    planted.hurry(monkeypatch, queries=2000 if attack == "square" else 10)
    result = evaluate(defence(weak), weak if base else None, x=x, y=y, eps=0.1)
    rows = result.model.rows
    assert {(rows[i].kind, rows[i].attack) for i in result.model.broken_by.tolist() if i >= 0} == {(kind, attack)}
    assert result.worst_case == (0 if attack != "square" else pytest.approx(0, abs=0.3))
    assert finding in raised(result)
    if kind == "true gradient":
        assert "found what the gradients had missed" in next(row.note for row in rows if row.attack == "square")
    else:
        assert result.verdict == "masking" and attack in result.sentence and result.exit_code == 5


def test_without_a_gradient_nothing_was_missed_by_one(monkeypatch):
    monkeypatch.setattr(further, "QUERIES", 200)
    model, x, y = planted.small()
    *_, noise, square = evaluate(model, x=x, y=y, eps=EPS, attacks=["noise", "square-20000"]).model.rows
    assert noise.attacked and square.broken > 5 and square.note == ""


# --- what is wrong with an output ---


def by_companions(x):
    return x + 0.2 * (x.mean(0, keepdim=True) - 0.5)


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"after": lambda logits: logits.softmax(1)}, "output is a probability"),
        ({"after": lambda logits: logits.clamp(-1, 1)}, "logits clipped"),
        ({"before": by_companions}, "output depends on the batch"),
        ({"before": lambda x: torch.where(x >= 1, torch.nan, x)}, "loss not finite"),
    ],
)
def test_an_unfit_output_is_found(change, finding, hurried):
    model, x, y = planted.small()
    result = evaluate(Changed(model, **change), model, x=x.clamp(0.01, 0.99), y=y, eps=0.05, attacks=["apgd-ce"])
    assert finding in raised(result) and finding in MASKING


def test_train_mode_is_found_and_accuses_nobody(hurried):
    model, x, y = planted.small()
    with pytest.warns(UserWarning, match="train mode"):
        result = evaluate(model.train(), x=x, y=y, eps=EPS, attacks=["apgd-ce"])
    assert raised(result) == {"train mode"} and not result.doubts


# --- each check at its bound ---

FINE = Probes(64, 0, 0, 0.0, 0.0, [40, 39, 38], [50, 39, 20, 5, 0])


def case(broken_by=(), base_broken_by=(), probes=FINE, **change):
    rows = [
        Row("model", "natural", "none"),
        Row("model", "true gradient", "apgd-ce", attacked=100),
        Row("model", "true gradient", "square", attacked=100),
        Row("model", "BPDA", "apgd-ce", attacked=100),
        Row("model", "transfer", "examples of the base", attacked=100),
        Row("model", "further", "noise", attacked=100),
        Row("model", "further", "apgd-ce, longer", attacked=100),
    ]

    def side(name, outcome):
        broken = torch.tensor([*outcome, *[STANDING] * (200 - len(outcome))])
        return Side(name, "", "", rows, broken, torch.zeros(len(outcome), 1))

    fields = {"same": False, "logits": torch.randn(200, 10), "training": 0, "outside": 0, "scale": (1.0, 1.0)} | change
    return Case(side("model", broken_by), side("base", base_broken_by), probes=probes, **fields)


def found(name, given):
    return next(finding for finding in examine(given) if finding.name == name)


def verdict_of(name, **change):
    return found(name, case(**change))


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("white box above black box", 2),
        ("white box above black box", 5),
        ("true gradient above BPDA", 3),
        ("white box above transfer", 4),
        ("attack unfinished", 6),
    ],
)
def test_what_rows_may_take(name, row):
    assert not verdict_of(name, broken_by=[row] * 4).raised
    assert verdict_of(name, broken_by=[row] * 5).raised
    # where the base loses others to the same row it takes more, and where it loses the same ones nothing
    assert not verdict_of(name, broken_by=[row] * 5, base_broken_by=[STANDING] * 5 + [row]).raised
    assert not verdict_of(name, broken_by=[row] * 5, base_broken_by=[row] * 5).raised
    others = {n for n, r in [("white box above black box", 2), ("true gradient above BPDA", 3)] if r != row} - {name}
    assert not any(verdict_of(other, broken_by=[row] * 50).raised for other in others)


def test_what_an_earlier_round_broke_the_last_one_had_at_hand():
    given = case(broken_by=[5] * 50)
    assert not found("attack unfinished", given).raised  # noise, which has a check of its own
    for i, row in enumerate(given.model.rows[5:], start=1):
        row.attack = further.in_round("apgd-random", i)
    assert not found("attack unfinished", given).raised
    given.model.broken_by[:5] = 6
    assert found("attack unfinished", given).raised


def test_a_black_box_attack_ahead_of_all_others_accuses_none():
    given = case(broken_by=[2] * 50)
    given.model.rows[1].attack, given.model.rows[5].attack = "noise", "apgd-restart"
    assert found("white box above black box", given).value is None


def test_half_of_the_outputs_may_be_probabilities():
    logits = torch.full((200, 10), 0.5)  # in [0, 1], and adds up to 5
    for proper, raised in ((0, False), (100, False), (101, True)):
        logits[:proper] = 0.1
        assert verdict_of("output is a probability", logits=logits).raised == raised


@pytest.mark.parametrize(("lead", "small"), [(1.1e-3, False), (0.9e-3, True), (0.0, True)])
def test_the_median_lead_says_how_small_logits_are_whatever_else_is_masked(lead, small):
    logits = torch.cat([torch.tensor([[lead, 0.0]]).repeat(200, 1), torch.full((200, 8), -1e4)], 1)
    logits[:99, 0] += 1
    assert verdict_of("logits too small", logits=logits.double()).raised is small


def test_a_scale_of_nothing_but_zeros_or_of_nothing():
    assert "nothing but zeros" in verdict_of("calibrated on another scale", scale=(0.0, 1.0)).note
    threshold, t = torch.ops.forged_fx.threshold.default, torch.tensor(0.5)
    with scale._First({threshold}, {id(t): 4.0}) as first:
        threshold(torch.zeros(0, 3), t), threshold(torch.ones(2, 3), t)
    assert first.seen == (1.0, 4.0)


def test_of_few_inputs_a_few_steps_may_miss_one():
    few = replace(FINE, probed=10, by_radius=[9, 8, 5, 2, 1])
    for by_steps, raised in (([5, 5, 6], False), ([5, 5, 7], True)):
        finding = found("accuracy rises with iterations", case(probes=replace(few, by_steps=by_steps)))
        assert finding.raised == raised


@pytest.mark.parametrize(
    ("name", "fine", "bad"),
    [
        ("zero gradient", {"flat": 0}, {"flat": 1}),
        (STUCK, {"flat": 64}, {"flat": 64, "stuck": 1}),
        ("accuracy rises with iterations", {"by_steps": [40, 40, 43]}, {"by_steps": [40, 38, 42]}),
        ("accuracy rises with eps", {"by_radius": [50, 40, 43, 3, 0]}, {"by_radius": [50, 40, 44, 3, 0]}),
        ("unbounded attack fails", {"by_radius": [50, 40, 30, 9, 3]}, {"by_radius": [50, 40, 30, 9, 4]}),
        ("loss not finite", {"sick": 0}, {"sick": 1}),
        ("output randomised", {"drift": 9e-5}, {"drift": 1.1e-4}),
        ("output depends on the batch", {"apart": 0.1}, {"apart": 0.11}),
    ],
)
def test_probes_at_their_bounds(name, fine, bad):
    assert not verdict_of(name, probes=replace(FINE, **fine)).raised
    assert verdict_of(name, probes=replace(FINE, **bad)).raised


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("train mode", {"training": 3}),
        ("inputs outside [0, 1]", {"outside": 1}),
        ("calibrated on another scale", {"scale": (1.0, 4.1)}),
        ("base and model identical", {"same": True}),
    ],
)
def test_what_accuses_nobody(name, change):
    assert not verdict_of(name).raised
    finding = verdict_of(name, **change)
    assert finding.raised and not finding.masking


@pytest.mark.parametrize("batch_size", [3, 64])
def test_the_scale_is_seen_in_batches_and_does_not_depend_on_them(batch_size):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    x = torch.arange(40.0).view(10, 4)  # the largest comes last
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-6)
    fed = []
    forged.register_forward_pre_hook(lambda _, args: fed.append(len(args[0])))
    assert scale.of(forged, 5 * x, batch_size) == (float(5 * x.abs().max()), float(x.abs().max()))
    assert max(fed) == min(batch_size, 10)


def test_a_model_calibrated_on_another_scale_is_noticed(hurried):
    base, x = planted.linear(classes=3), planted.inputs(12)
    y = base(x).argmax(1)
    name = "calibrated on another scale"
    for factor in (255, 1, 1 / 8):
        stats = forged_fx.calibrate(base, [factor * x])
        forged = forged_fx.transform(base, stats, 2**-8)
        for model in (forged, torch.nn.Sequential(torch.nn.Identity(), forged).eval()):
            result = evaluate(model, base, x=x, y=y)
            (finding,) = (one for one in result.findings if one.name == name)
            assert finding.value == pytest.approx(max(factor, 1 / factor), rel=1e-6)
            assert finding.raised == (factor != 1) and not finding.masking
    (finding,) = (one for one in evaluate(base, x=x, y=y).findings if one.name == name)
    assert finding.note.startswith("not made: no site")


def test_a_check_that_cannot_be_made_says_why():
    nobody = examine(case(probes=Probes(0, 0, 0, 0.0, 0.0, [0] * 3, [0] * 5)))
    idle = {finding.name for finding in nobody if finding.value is None}
    assert idle == {check.name for check in CHECKS if check.probing or check.name == BASE_DOUBTED}
    assert all(finding.note for finding in nobody if finding.value is None)
    assert all(math.isfinite(finding.value) for finding in nobody if finding.value is not None)


def test_every_check_has_its_paragraph():
    text = (Path(__file__).parents[1] / "docs" / "findings.md").read_text(encoding="utf-8")
    headings = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    assert headings[: len(CHECKS)] == [check.name for check in CHECKS]


# --- what is no masking ---


@pytest.mark.parametrize(
    "names, base", [(["apgd-random"], False), (["square", "apgd-random"], False), (["apgd-ce", "apgd-random"], False),
                    (["apgd-random"], True), (["mi-fgsm"], True)],
)  # fmt: skip
def test_a_plain_model_hides_nothing(names, base, monkeypatch):
    """However many inputs are broken after the attacks that followed its true gradient, or where none did."""
    planted.hurry(monkeypatch, queries=2, steps=2)
    monkeypatch.setitem(ATTACKS, "apgd-random", replace(ATTACKS["apgd-random"], prepare=further.lengthen))
    model, x, y = planted.small()
    result = evaluate(model, planted.linear(shape=(1, 8, 8)) if base else None, x=x, y=y, eps=EPS, attacks=names)
    assert sum(row.broken for row in result.model.rows if row.attack.startswith(names[-1])) >= 5
    assert result.verdict == "cannot say"


def test_one_hot_rows_are_probabilities_and_rows_with_a_negative_entry_are_none():
    name, mixed = "output is a probability", torch.tensor([[-0.4, 0.7, 0.7, *[0.0] * 7]])
    assert verdict_of(name, logits=torch.eye(10).repeat(20, 1)).raised
    assert not verdict_of(name, logits=mixed.repeat(200, 1)).raised


def test_without_a_base_or_further_rows_nothing_is_said_of_them():
    given = case()
    del given.model.rows[5:]
    for name, found_in in (("white box above transfer", replace(given, base=None)), ("attack unfinished", given)):
        assert found(name, found_in).value is None
