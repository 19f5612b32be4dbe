"""The rows beyond AutoAttack: transfer, smooth surrogates, and what the thorough plan adds."""

import copy
from types import SimpleNamespace

import planted
import pytest
import torch
from planted import Cut, evaluate, inputs, linear
from pyautoattack.autopgd_base import APGDAttack
from torch import nn

import forged_fx
from forged_fx.digits import EPS
from forged_fx.evaluate import attacks, further, surrogate, transfer
from forged_fx.evaluate.gradients import Logits
from forged_fx.evaluate.result import KINDS
from forged_fx.evaluate.threat import Threat

pytestmark = pytest.mark.usefixtures("single_thread")


def tools(model, norm, eps, seed=0):
    return SimpleNamespace(model=Logits(model), norm=norm, epsilon=eps, get_seed=lambda: seed)


# --- transfer ---


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_on_two_classes_of_a_linear_model_the_examples_are_known(norm):
    """The loss's gradient always points along the difference of the weights, so both end on the ball's far side."""
    model, x = linear(classes=2), inputs(8)
    y = model(x).argmax(1)
    up = (model[1].weight[1] - model[1].weight[0]).detach().view(1, 6, 6)
    along = (1 - 2 * y.view(-1, 1, 1, 1)) * (up.sign() if norm == "Linf" else up / up.norm())
    mi = transfer.mi_fgsm(tools(model, norm, 0.1), x, y)
    torch.testing.assert_close(mi, x + 0.1 * along, atol=1e-6, rtol=0)
    di = transfer.di_fgsm(tools(model, norm, 0.1), x, y)  # some of its steps are of a shrunken input
    torch.testing.assert_close(di, x + 0.1 * along, atol=0.02, rtol=0)


@pytest.mark.parametrize("attack", [transfer.mi_fgsm, transfer.di_fgsm])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_examples_stay_in_the_ball_and_follow_from_the_seed(attack, norm):
    model, x, y = planted.small()
    found = attack(tools(model, norm, 0.7), x, y)
    assert Threat(0.7, norm).allows(x, found).all()
    torch.manual_seed(5)
    assert torch.equal(attack(tools(model, norm, 0.7), x, y), found)
    with torch.no_grad():
        assert (model(found).argmax(1) != y).sum() > (model(x).argmax(1) != y).sum() + 10


def test_momentum_carries_a_step_over_where_the_gradient_ends():
    """Past 0.55 this model's logits are flat: without momentum the attack would stop there."""
    model = planted.Changed(linear(classes=2, shape=(1, 1, 1)), before=lambda x: x.clamp(0.45, 0.55))
    with torch.no_grad():
        model.inner[1].weight.copy_(torch.tensor([[-1.0], [1.0]]))
        model.inner[1].bias.zero_()
    x, y = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0])
    assert transfer.mi_fgsm(tools(model, "Linf", 0.2), x, y).item() == pytest.approx(0.7)


def test_a_diverse_input_is_the_input_smaller_and_somewhere(monkeypatch):
    x = torch.rand(3, 2, 20, 30) + 0.1
    torch.manual_seed(0)
    sizes = set()
    for _ in range(50):
        seen = transfer._diverse(x)
        assert seen.shape == x.shape
        rows, columns = (seen[0, 0] != 0).any(1).sum().item(), (seen[0, 0] != 0).any(0).sum().item()
        assert rows >= 18 and columns >= 27 and int((seen[0, 0] != 0).sum()) == rows * columns
        sizes.add((rows, columns))
    assert (20, 30) in sizes and len(sizes) > 2


def test_both_sides_are_shown_what_is_made_to_transfer(monkeypatch):
    planted.hurry(monkeypatch)
    model, x, y = planted.small()
    result = evaluate(Cut(model), model, x=x, y=y, eps=EPS, attacks=["mi-fgsm", "di-fgsm"])
    rows = [(row.attack, row.attacked, row.broken) for row in result.model.rows if row.kind == "transfer"]
    assert [name for name, _, _ in rows] == [
        "examples of the base",
        *(f"{attack} on the {side}" for attack in ("mi-fgsm", "di-fgsm") for side in ("base", "model")),
    ]
    assert [row.attack for row in result.base.rows][2:] == [name for name, _, _ in rows][1:]
    # no row before found anything, and the model itself shows no gradient: all is found on the base, of both sides
    assert rows[1][2] > 10 and rows[2][2] == 0
    assert torch.equal(result.model.broken_by, result.base.broken_by)
    assert torch.equal(result.model.examples, result.base.examples)
    result.verify(Cut(model), x, y, model)


def test_what_cannot_transfer_says_why(monkeypatch):
    planted.hurry(monkeypatch)
    model, x = linear(classes=4, shape=(12,)), inputs(9, (12,))
    y = model(x).argmax(1)
    base = linear(classes=4, shape=(12,), seed=1)

    def notes(*sides, **options):
        rows = evaluate(*sides, x=x, y=y, attacks=["mi-fgsm", "di-fgsm"], **options).model.rows
        return {row.attack.split()[0]: row.note for row in rows if "fgsm" in row.attack}

    assert "there is no base" in notes(model)["mi-fgsm"]
    assert notes(model, base)["mi-fgsm"] == "" and "needs images" in notes(model, base)["di-fgsm"]
    assert "Linf and L2 only" in notes(model, base, norm="L1")["mi-fgsm"]


# --- smooth surrogates ---


@pytest.mark.parametrize("temperature", [*surrogate.TEMPERATURES, 0.01])
def test_the_slope_is_that_of_the_gate(temperature):
    x = torch.linspace(-3, 3, 301, dtype=torch.float64, requires_grad=True)
    t = torch.tensor(0.5, dtype=torch.float64)
    (expected,) = torch.autograd.grad((x * torch.sigmoid((x.abs() - t) / (temperature * t))).sum(), x)
    torch.testing.assert_close(surrogate.slope(x, t, temperature), expected)
    assert torch.equal(surrogate.slope(x, torch.tensor(0.0), temperature), torch.ones_like(x))
    far = surrogate.slope(torch.tensor([1e-6, 50.0]), torch.tensor(0.5), 0.01)  # the threshold's own gradient
    torch.testing.assert_close(far, torch.tensor([0.0, 1.0]), atol=1e-6, rtol=0)


def test_a_smooth_surrogate_changes_the_gradient_and_no_value():
    model, x, y = planted.small()
    stats = forged_fx.calibrate(model, [x])
    forged = forged_fx.transform(model, stats, ratio=0.07)  # no pixel, a multiple of 1/16, lies on the threshold

    def gradient(context):
        leaf = x.clone().requires_grad_()
        with context:
            out = forged(leaf)
        return out.detach(), torch.autograd.grad(nn.functional.cross_entropy(out, y), leaf)[0]

    plain, true = gradient(torch.enable_grad())
    _, through = gradient(forged_fx.straight_through())
    for temperature in surrogate.TEMPERATURES:
        out, smooth = gradient(surrogate.smooth(temperature))
        assert torch.equal(out, plain)
        assert not torch.allclose(smooth, true) and not torch.allclose(smooth, through)
    _, nearly = gradient(surrogate.smooth(1e-6))
    assert (nearly - true).norm() < 0.1 * true.norm()
    after, again = gradient(torch.enable_grad())
    assert torch.equal(after, plain) and torch.equal(again, true)


def test_a_smooth_surrogate_sees_into_fused_thresholds():
    """One operator for BatchNorm, activation and threshold: the gradient is that of the three, one by one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Conv2d(4, 10, 6), nn.Flatten()).eval()
    x = torch.rand(5, 1, 8, 8)
    stats = forged_fx.calibrate(model, [x])
    gradients = []
    for fused in (False, True):
        forged, leaf = forged_fx.transform(model, stats, ratio=0.1, fuse=fused), x.clone().requires_grad_()
        assert bool(forged.forging.fused) == fused
        with surrogate.smooth(0.3):
            out = forged(leaf)
        gradients.append(torch.autograd.grad(out.square().sum(), leaf)[0])
    torch.testing.assert_close(*gradients)
    with forged_fx.straight_through():
        out = forged(leaf)
    assert not torch.allclose(torch.autograd.grad(out.square().sum(), leaf)[0], gradients[1], rtol=1e-2)


# --- the thorough plan ---


def test_the_thorough_plan(monkeypatch):
    planted.hurry(monkeypatch, steps=6)
    monkeypatch.setattr(further, "QUERIES", 150)
    monkeypatch.setattr(further, "LONGER", 2)
    monkeypatch.setattr(surrogate, "TEMPERATURES", (1.0, 0.1))
    model, x, y = planted.small()
    x, y = x[:20], y[:20]
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), ratio=2**-5)
    result = forged_fx.evaluate(forged, model, x=x, y=y, eps=EPS, attacks="thorough")
    rows = result.model.rows
    kinds = [row.kind for row in rows]
    assert kinds == sorted(kinds, key=KINDS.index) and set(kinds) == set(KINDS)
    assert [row.attack for row in rows if row.kind == "BPDA"] == [
        "apgd-ce", "apgd-t", "fab-t",
        *(f"{attack}, sigmoid {t:g}" for t in surrogate.TEMPERATURES for attack in ("apgd-ce", "apgd-t")),
    ]  # fmt: skip
    last = [row.attack for row in rows if row.kind == "further"]
    assert last[:3] == ["apgd-restart, BPDA", "square-20000", "noise"] and last[-1] == "examples of the base"
    assert last[3].startswith("apgd-ce (true gradient), 2 times as long")
    found = [row for row in rows if row.kind in KINDS[1:3] and row.broken]
    again = [row for row in found if row is found[-1] or row is max(found, key=lambda row: row.broken)]
    assert last[3:-1] == [f"{row.attack} ({row.kind}), 2 times as long" for row in again] and len(again) == 2
    assert not any(row.note for row in rows if row.kind == "BPDA")
    assert all(row.note for row in result.base.rows if row.kind == "BPDA")
    for side in result.sides:
        left = result.n
        for i, row in enumerate(side.rows):
            left -= row.broken
            assert row.standing == left and row.broken == int((side.broken_by == i).sum())
            assert result.n * side.accuracy() <= row.standing
    assert list(result.figures) == [
        "worst case", "true gradient, BPDA and transfer", "true gradient and BPDA", "true gradient alone", "no attack",
    ]  # fmt: skip
    result.verify(forged, x, y, model)
    made = next(finding for finding in result.findings if finding.name == "attack unfinished")
    assert made.value is not None
    assert "sigmoid" in str(result)


def test_longer_is_what_the_constructor_makes_of_so_many_steps():
    model = Logits(linear())
    setting = attacks.Setting(Threat(0.1, "Linf"), 10, (1, 6, 6), 0, torch.device("cpu"))
    longer = attacks.toolbox(model, setting)
    further.lengthen(longer)
    fresh = APGDAttack(model, n_iter=500, eps=0.1)
    for name in ("n_iter", "n_iter_orig", "n_iter_2", "n_iter_min", "size_decr"):
        assert getattr(longer.apgd, name) == getattr(longer.apgd_targeted, name) == getattr(fresh, name)
    assert longer.square.n_queries == 25_000 and longer.fab.n_iter == 500


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_restarts_begin_at_the_other_sides_examples(norm, monkeypatch):
    """Where the model shows no gradient, a start that is adversarial already is all that can help."""
    planted.hurry(monkeypatch)
    model, x, y = planted.small()
    model.requires_grad_(False)
    eps = {"Linf": EPS, "L2": 1.0, "L1": 4.0}[norm]
    found = evaluate(model, x=x, y=y, eps=eps, norm=norm, attacks=["apgd-ce"])
    starts, broken = x.clone(), found.model.broken_by > 0
    starts[found.model.broken] = found.model.examples
    setting = attacks.Setting(Threat(eps, norm), 10, (1, 8, 8), 0, x.device)
    restarted = further.restart(attacks.toolbox(Logits(Cut(model)), setting), x[broken], y[broken], starts[broken])
    with torch.no_grad():
        assert (model(restarted).argmax(1) != y[broken]).all()
    assert Threat(eps, norm).allows(x[broken], restarted).all()


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_noise_fills_the_ball(norm):
    model, x = linear(classes=2), inputs(40)
    with torch.no_grad():
        model[1].bias.copy_(-model[1](x.flatten(1)).mean(0))  # through the middle of the inputs
    y = model(x).argmax(1)
    eps = {"Linf": 0.2, "L2": 1.0, "L1": 3.0}[norm]
    found = further.noise(tools(model, norm, eps), x, y)
    fooled = model(found).argmax(1) != y
    assert Threat(eps, norm).allows(x, found).all() and 0 < fooled.sum() < 40
    assert torch.equal(found[~fooled], x[~fooled])
    drawn = further._draw((4, 1, 6, 6), norm, torch.Generator().manual_seed(0))
    length = Threat(1.0, norm).distance(torch.zeros(4, 36), drawn.flatten(1))
    assert ((0.8 < length) & (length <= 1.000001)).all()


def test_presets_and_names():
    assert attacks.choose("standard").complete and not attacks.choose("quick").complete
    assert all(plan.smooth for plan in attacks.PRESETS.values())
    assert attacks.choose("thorough").names[:4] == list(attacks.AUTOATTACK)
    plan = attacks.choose(["noise", "square", "mi-fgsm", "apgd-ce", "apgd-ce", "strongest"])
    assert (plan.true, plan.bpda, plan.transfer) == (("square", "apgd-ce"), ("apgd-ce",), ("mi-fgsm",))
    assert plan.further == ("noise", "strongest") and plan.smooth == ("apgd-ce",)
    assert attacks.choose("apgd-t") == attacks.choose(["apgd-t"]) and not attacks.choose("apgd-t").smooth
    assert attacks.choose(["apgd-ce", "apgd-t"]) == attacks.choose("quick")


def test_named_extras_run_without_a_base(monkeypatch):
    planted.hurry(monkeypatch)
    monkeypatch.setattr(further, "QUERIES", 20)
    model, x, y = planted.small()
    before = copy.deepcopy(model.state_dict())
    names = ["noise", "square-20000", "apgd-restart", "strongest"]
    result = evaluate(model, x=x[:10], y=y[:10], eps=EPS, attacks=names)
    notes = {row.attack: row.note for row in result.model.rows[1:]}
    assert notes == {"noise": "", "square-20000": "", "apgd-restart": "left out: there is no other side"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
