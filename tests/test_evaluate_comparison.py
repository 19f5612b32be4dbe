"""Two results side by side."""

from types import SimpleNamespace

import planted
import pytest
import torch
from planted import Hidden, inputs, linear

import forged_fx
from forged_fx.cli import main
from forged_fx.digits import EPS, one_thread
from forged_fx.evaluate import Result
from forged_fx.evaluate.comparison import Comparison
from forged_fx.evaluate.verdict import EXIT_CODES, FORBID


@pytest.fixture(scope="module")
def case():
    base, x = linear(classes=4), inputs(40)
    y = base(x).argmax(1)
    y[:3] = (y[:3] + 1) % 4
    return base, {"x": x, "y": y, "eps": 0.04, "attacks": ["apgd-ce"]}


@pytest.fixture(scope="module")
def runs(case, tmp_path_factory):
    """Folders of a model whose second half breaks more easily, and of its base alone under another seed."""
    folder = tmp_path_factory.mktemp("runs")
    base, call = case
    weaker = linear(classes=4)
    with torch.no_grad():
        weaker[1].bias += torch.tensor([0.0, 0.0, 0.2, 0.0])
    with one_thread():
        planted.evaluate(base, base, **call, folder=folder / "plain")
        planted.evaluate(weaker, base, **call, folder=folder / "biased", seed=1)
    return folder


def test_example_by_example(runs):
    result = forged_fx.compare(runs / "plain", runs / "biased")
    a, b = result.a.model.right(), result.b.model.right()
    paired = result.paired()
    assert paired.n == 40 and paired.difference == pytest.approx((int(b.sum()) - int(a.sum())) / 40)
    assert (paired.base_only, paired.model_only) == (int((a & ~b).sum()), int((b & ~a).sum()))
    assert [flip.index for flip in result.flips] == (a != b).nonzero().flatten().tolist() and result.flips
    for flip in result.flips:
        assert flip.right_in == ("plain" if a[flip.index] else "biased")
        loser = result.b.model if a[flip.index] else result.a.model
        row = loser.rows[int(loser.broken_by[flip.index])]
        assert flip.broken == f"{row.kind}, {row.attack}"
    turned = forged_fx.compare(runs / "biased", runs / "plain").paired()
    assert turned.difference == -paired.difference and (turned.low, turned.high) == pytest.approx(
        (-paired.high, -paired.low)
    )


def test_it_prints_every_figure_and_what_else_differs(runs):
    result = forged_fx.compare(runs / "plain", runs / "biased")
    shown = str(result)
    for words in ("plain", "biased", "model: worst case", "model: no attack", "base: worst case", "McNemar p"):
        assert words in shown
    for index, flip in enumerate(result.flips):
        assert index >= 20 or flip.broken in shown
    assert "seed: 0 in plain, 1 in biased" in shown and "so much comes of the attacks' chance" in " ".join(
        shown.split()
    )
    assert "\x1b" not in shown and shown.startswith("in the worst case biased is right on")


def test_models_beside_themselves_are_not_held_against_each_other():
    """The checks that compare a model with its base see nothing there, and what rows take is taken from both."""
    strong, weak, x, y = planted.strong_and_weak()
    pairs = (strong, strong), (weak, weak), (weak, strong)
    with one_thread():
        a, b, beside = (planted.evaluate(*pair, x=x, y=y, eps=0.1, attacks=["apgd-ce"]) for pair in pairs)
    found = forged_fx.compare(a, b)
    assert found.paired().direction == -1 and found.verdict == "cannot say"
    assert any("beside the same base" in caution for caution in found.cautions)
    found = forged_fx.compare(a, beside)
    assert found.verdict == "loss" and not any("one pool" in caution for caution in found.cautions)


def test_too_few_inputs_say_nothing(case, tmp_path):
    """As `evaluate` says of them."""
    base, call = case
    for n, words in ((5, "fewer than 6 inputs"), (12, "12 inputs leave a gain of more than 5 points possible")):
        few = {**call, "x": call["x"][5 : 5 + n], "y": call["y"][5 : 5 + n]}
        shifted = linear(classes=4)
        with torch.no_grad():
            shifted[1].bias += 1  # another model that answers alike
        one, other = (forged_fx.evaluate(model, base, **few) for model in (base, shifted))
        found = forged_fx.compare(one, other)
        assert found.verdict == other.verdict == "cannot say" and words in str(found)


def test_against_itself(runs):
    result = forged_fx.compare(runs / "plain", runs / "plain")
    assert result.flips == [] and result.paired().difference == 0 and result.paired().p == 1
    assert any("same model" in caution for caution in result.cautions)
    assert not any("may have failed" in caution for caution in result.cautions)
    assert "not measurably different" in str(result)


def test_results_as_well_as_folders_and_without_a_base(case, runs):
    base, call = case
    with one_thread():
        alone = planted.evaluate(Hidden(base), **(call | {"attacks": "quick"}))
    result = forged_fx.compare(runs / "plain", alone)
    assert result.names == ("plain", "b") and result.paired(side="base") is None
    assert "Attacked by different rows" in result.cautions[0]
    assert "base:" not in str(result)


def test_a_folder_that_is_called_as_a_result_is(runs, tmp_path):
    plain = Result.load(runs / "plain")
    plain.save(tmp_path / "a")
    assert forged_fx.compare(plain, tmp_path / "a").names == ("the result a", str(tmp_path / "a"))


def test_other_examples_or_another_threat_are_refused(case, runs):
    base, call = case
    with one_thread():
        other = planted.evaluate(base, **(call | {"x": call["x"].flip(0), "eps": 0.05}))
        fewer = planted.evaluate(base, **(call | {"x": call["x"][:30], "y": call["y"][:30]}))
    with pytest.raises(ValueError, match=r"threat.eps: 0.04 in plain, 0.05 in b; data.x_sha256: \w{12}... in plain, "):
        forged_fx.compare(runs / "plain", other)
    with pytest.raises(ValueError, match=r"data.x_shape: \[40, 1, 6, 6\] in plain, \[30, 1, 6, 6\] in b"):
        forged_fx.compare(runs / "plain", fewer)
    with pytest.raises(FileNotFoundError):
        forged_fx.compare(runs / "plain", runs / "nowhere")


def test_no_gain_over_what_was_attacked_otherwise_or_by_attacks_that_may_have_failed(monkeypatch, tmp_path):
    """`plain` and `better` are one model, attacked by more and by less; `rounded` has no gradient."""
    planted.hurry(monkeypatch)
    model, x, y = planted.small()
    call = {"x": x, "y": y, "eps": EPS}
    with one_thread():
        planted.evaluate(model, **call, attacks=["apgd-ce"], folder=tmp_path / "plain")
        planted.evaluate(model, **call, attacks=["noise"], folder=tmp_path / "better")
        planted.evaluate(planted.quantised(model), **call, attacks=["apgd-ce"], folder=tmp_path / "rounded")
        masking = planted.evaluate(Hidden(model), model, **call, attacks=["apgd-ce"])
    for name, words in (
        ("better", "Attacked by different rows"),
        ("rounded", "Attacks on rounded may have failed: zero"),
    ):
        found = forged_fx.compare(tmp_path / "plain", tmp_path / name)
        assert found.paired().direction == 1 and found.verdict == "cannot say"
        assert words in "\n".join(found.cautions) and "may be the attacks' doing" in str(found).replace("\n", " ")
        assert main(["compare", str(tmp_path / "plain"), str(tmp_path / name)]) == EXIT_CODES["cannot say"]
        back = forged_fx.compare(tmp_path / name, tmp_path / "plain")  # whoever was attacked less looks better
        assert back.paired().direction == -1 and back.verdict == "cannot say" and "below it, which may" in repr(back)
    assert masking.verdict == "masking"
    found = forged_fx.compare(tmp_path / "plain", masking)
    assert any("b by itself is judged masking" in one for one in found.cautions)
    masking.model.broken_by[:], masking.findings, masking.plan = -1, [], found.a.plan  # nothing else stands against it
    assert found.paired().direction == 1 and found.verdict == "cannot say"


def network(name):
    return SimpleNamespace(identity=name)


OTHER = network("another")
OTHERS = ["a finding that forbids a gain alone"]


@pytest.mark.parametrize(
    ("direction", "a", "b", "verdict"),
    [
        (1, {}, {}, "gain"),
        (0, {}, {}, "no measurable gain"),
        (-1, {}, {}, "loss"),
        (1, {"doubts": OTHERS}, {}, "gain"),
        (1, {}, {"doubts": OTHERS}, "cannot say"),
        (1, {}, {"verdict": "masking"}, "cannot say"),
        (1, {}, {"plan": "another"}, "cannot say"),
        (1, {}, {"enough": False}, "cannot say"),
        (1, {"enough": False}, {}, "cannot say"),
        (1, {"base": None}, {}, "cannot say"),
        (1, {"base": None}, {"base": None}, "cannot say"),
        (1, {"base": OTHER}, {}, "cannot say"),
        (-1, {"base": OTHER}, {}, "cannot say"),
        (0, {"base": OTHER}, {}, "no measurable gain"),
        (1, {"base": network("a")}, {"base": network("b")}, "cannot say"),
        (1, {"base": network("a")}, {"base": network("a")}, "gain"),
        (1, {"base": network("b")}, {"base": OTHER}, "gain"),
        (1, {"same": True}, {}, "cannot say"),
        (-1, {}, {"same": True}, "cannot say"),
        (1, {"model": SimpleNamespace(identity="b")}, {}, "cannot say"),
        (-1, {}, {"base": None}, "cannot say"),
        (-1, {"enough": False}, {"enough": False}, "loss"),
        (0, {}, {"doubts": OTHERS, "plan": "another"}, "no measurable gain"),
        (0, {}, {"doubts": [*OTHERS, next(iter(FORBID))]}, "cannot say"),
        (0, {"doubts": [next(iter(FORBID))]}, {}, "no measurable gain"),
        (-1, {"doubts": OTHERS}, {}, "cannot say"),
        (-1, {}, {"doubts": OTHERS, "verdict": "masking"}, "loss"),
        (-1, {}, {"doubts": [next(iter(FORBID))]}, "loss"),
        (-1, {}, {"plan": "another"}, "cannot say"),
    ],
)
def test_what_forbids_a_verdict(monkeypatch, direction, a, b, verdict):
    def result(name, changes):
        usual = {"plan": "one", "doubts": [], "verdict": "no measurable gain", "enough": True} | {
            "base": network("base"),
            "same": False,
        }
        return SimpleNamespace(**usual | {"model": SimpleNamespace(identity=name)} | changes)

    pair = SimpleNamespace(direction=direction, n=1000, high=0.0)
    monkeypatch.setattr(Comparison, "paired", lambda self: pair)
    assert Comparison(result("a", a), result("b", b), ("a", "b"), []).verdict == verdict


def test_a_figure_is_shown_where_both_have_rows_of_its_kind(case, runs):
    base, call = case
    with one_thread():
        alone = planted.evaluate(base, **call)
        thorough = planted.evaluate(base, **(call | {"attacks": ["apgd-ce", "noise"]}))
    names = ["worst case", "true gradient and BPDA", "true gradient alone", "no attack"]
    assert list(forged_fx.compare(runs / "plain", alone).figures) == names
    assert list(forged_fx.compare(alone, runs / "plain").figures) == names
    assert list(forged_fx.compare(thorough, thorough).figures) == names
