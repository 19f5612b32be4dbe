"""Attacks that go on until the figure stops moving, and those along another model's gradient."""

import planted
import pytest
import torch
from planted import Cut, evaluate, inputs, linear

from forged_fx.digits import EPS
from forged_fx.evaluate import attacks, further
from forged_fx.evaluate.attacks import ATTACKS, Attack, Plan
from forged_fx.evaluate.gradients import Borrowed
from forged_fx.evaluate.statistics import holm

pytestmark = pytest.mark.usefixtures("single_thread")


def test_a_borrowed_gradient_sees_through_what_has_none(monkeypatch):
    """No gradient of the model's own, nor BPDA's, leads anywhere: that of the model that it was made from does."""
    planted.hurry(monkeypatch)
    model, x, y = planted.small()
    own = evaluate(Cut(model), model, x=x, y=y, eps=EPS, attacks=["noise"])
    lent = evaluate(Cut(model), model, x=x, y=y, eps=EPS, attacks=["apgd-borrowed"])
    plain = evaluate(model, x=x, y=y, eps=EPS, attacks=["apgd-ce"])
    assert lent.worst_case < own.worst_case - 0.2 and lent.worst_case <= plain.worst_case + 0.05
    lent.verify(Cut(model), x, y, model)
    alone = evaluate(model, x=x, y=y, eps=EPS, attacks=["apgd-borrowed"])
    assert alone.model.rows[1].note == "left out: there is no other side"


def test_what_is_borrowed_is_the_gradient_and_nothing_else():
    model, lender, x = linear(seed=0), linear(seed=1), inputs(3).requires_grad_()
    out = Borrowed(model, lender)(x)
    torch.testing.assert_close(out, model(x))
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    expected = (2 * model(x) @ lender[1].weight).view_as(x)
    torch.testing.assert_close(grad, expected)


class Lucky:
    """Breaks so many more inputs in each of the rounds that it is told, and notes seeds and steps."""

    def __init__(self, rounds, inputs=1):
        self.rounds, self.inputs, self.seen = rounds, inputs, []

    def __call__(self, tools, x, y):
        self.seen.append((tools.get_seed(), tools.apgd.n_iter))
        if len(self.seen) not in self.rounds:
            return x
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            (grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(tools.model(leaf), y), leaf)
        return torch.cat([(x + 0.3 * grad.sign()).clamp(0, 1)[: self.inputs], x[self.inputs :]])


@pytest.fixture
def relentless(monkeypatch):
    """judge(attack) -> the result of an evaluation in which that attack is all that is run in rounds."""

    def judge(attack):
        monkeypatch.setitem(ATTACKS, "lucky", Attack("lucky", attack, stage="further"))
        monkeypatch.setitem(attacks.PRESETS, "relentless", Plan((), (), rounds=("lucky",)))
        model, x = linear(classes=4), inputs(60)
        return evaluate(model, x=x, y=model(x).argmax(1), eps=0.3, attacks="relentless", seed=7)

    return judge


@pytest.mark.parametrize("rounds, stop", [((), 2), ((2, 4), 6), (range(1, 99), further.ROUNDS)])
def test_rounds_go_on_until_two_in_a_row_break_nothing(relentless, rounds, stop):
    lucky = Lucky(rounds)
    rows = relentless(lucky).model.rows[1:]
    assert [further.round_of(row.attack) for row in rows] == list(range(1, stop + 1))
    assert lucky.seen == [(7 + k, 100 * k) for k in range(1, stop + 1)]  # new starts, more steps
    assert sum(row.broken for row in rows) == sum(k <= stop for k in rounds)
    assert {row.kind for row in rows} == {"further"}


def test_only_a_figure_that_still_moves_is_an_unfinished_attack(relentless, monkeypatch):
    monkeypatch.setattr(further, "ROUNDS", 4)
    came_to_rest, moving = (relentless(Lucky(rounds, inputs=8)) for rounds in ((1, 2), (1, 2, 3, 4)))
    raised = [[f.raised for f in r.findings if f.name == "attack unfinished"] for r in (came_to_rest, moving)]
    assert raised == [[False], [True]]


def test_holm():
    assert holm([]) == []
    assert holm([0.01]) == [0.01]
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
