"""Where no gradient sees through what was made of the base, nothing is said in its favour: in every form of a model."""

import copy
import threading
import warnings

import planted
import pytest
import torch
from planted import Changed
from torch import nn

import forged_fx
from forged_fx.digits import EPS, one_thread
from forged_fx.evaluate import probes
from forged_fx.evaluate.reach import JUMPS
from forged_fx.evaluate.result import LEFT_OUT
from forged_fx.evaluate.verdict import BASE_DOUBTED

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(scope="module")
def made():
    """(base, x, y, kind -> the base forged)"""
    base, x, y = planted.small()
    stats = forged_fx.calibrate(base, [x])
    return base, x, y, lambda kind="hard", ratio=2**-4: forged_fx.transform(base, stats, ratio, kind=kind)


def traced(model, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model, x[:2])


def traced_beside(model, x):
    """With a part that is never called, of which TorchScript makes no forward."""
    whole = Changed(model)
    whole.unused = nn.Linear(2, 2)
    return traced(whole, x)


def decomposed(model, x):
    program = torch.export.export(model, (x[:3],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    return program.run_decompositions(forged_fx.decompositions()).module()


def in_a_thread(model, x):
    """Its forward as torch.nn.DataParallel runs it, which takes the grad mode along and no other."""
    found, grad = [], torch.is_grad_enabled()

    def run():
        with torch.set_grad_enabled(grad):
            found.append(model(x))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def threaded(model, x):
    return Changed(lambda x: in_a_thread(model, x))


def nameless(model, x):
    """No name and no operator is left: a function."""
    program = decomposed(model, x)
    return Changed(lambda x: program(x))


def judged(made, model, **options):
    base, x, y, _ = made
    return forged_fx.evaluate(model, base, x=x, y=y, eps=EPS, **{"attacks": "quick"} | options)


def raised(result):
    return {finding.name for finding in result.findings if finding.raised}


def seen_through(result):
    return [not row.left_out for row in result.model.rows if row.kind == "BPDA"]


@pytest.fixture(scope="module")
def as_made(made):
    """kind -> the result of the forged model itself"""
    with one_thread(), pytest.MonkeyPatch.context() as patch:
        planted.hurry(patch)
        return {kind: judged(made, made[3](kind)) for kind in ("hard", "soft")}


REACH, ADDS = "thresholds out of reach", "gradient does not add up"


@pytest.mark.parametrize(
    ("form", "kind", "found"),
    [
        (traced, "hard", {REACH, ADDS}),
        (traced, "soft", {REACH}),
        (traced_beside, "soft", {REACH}),
        (decomposed, "hard", {REACH, ADDS}),
        (threaded, "hard", {ADDS}),
        (nameless, "hard", {ADDS}),
    ],
)
def test_what_no_gradient_sees_through_is_given_no_verdict_in_its_favour(made, as_made, monkeypatch, form, kind, found):
    planted.hurry(monkeypatch)
    assert seen_through(as_made[kind]) == [True] * 5 and not raised(as_made[kind]) & {REACH, ADDS}
    result = judged(made, form(made[3](kind), made[1]))
    assert not any(seen_through(result)) and found <= raised(result)
    assert (REACH in raised(result)) is (REACH in found)
    assert result.verdict == "cannot say" and "judge the" in result.sentence and "bpda=" in result.sentence


def test_a_model_without_thresholds_is_judged_as_ever(made, monkeypatch):
    planted.hurry(monkeypatch)
    base, *_ = made
    tuned = Changed(base[:-1], after=lambda hidden: hidden @ base[-1].weight.T)
    result = judged(made, tuned)
    assert not any(seen_through(result)) and not raised(result) and result.verdict == "no measurable gain"
    coarse = Changed(base, before=lambda x: x.bfloat16().float())  # it jumps, and so does its base
    result = forged_fx.evaluate(
        Changed(coarse, after=lambda y: 1.01 * y), coarse, x=made[1], y=made[2], eps=0.01, attacks=["apgd-ce"]
    )
    assert ADDS not in raised(result)


def test_thresholds_that_do_nothing_are_not_held_against_a_model(made, monkeypatch):
    planted.hurry(monkeypatch)
    result = judged(made, traced(made[3](ratio=0), made[1]))
    assert raised(result) == {"base and model identical"} and result.verdict == "no measurable gain"


def test_thresholds_that_are_turned_off_are_not_held_against_a_model(made, monkeypatch):
    planted.hurry(monkeypatch)
    base, x, y, forge = made
    other = Changed(base, after=lambda logits: 1.01 * logits)
    result = forged_fx.evaluate(traced(forge(ratio=None), x), other, x=x, y=y, eps=EPS, attacks="quick")
    assert not raised(result)


def test_rounding_to_half_precision_is_no_hidden_jump(made, monkeypatch):
    planted.hurry(monkeypatch)
    base, x, y, _ = made
    half = Changed(copy.deepcopy(base).bfloat16(), before=lambda x: x.bfloat16(), after=lambda logits: logits.float())
    result = forged_fx.evaluate(half, base, x=x, y=y, eps=1 / 255, attacks=["apgd-ce"])
    assert ADDS not in raised(result)


class Mixed(nn.Module):
    """Float32 parameters, and products in half precision."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x).float()


def test_rounding_under_autocast_is_no_hidden_jump_either(made, monkeypatch):
    planted.hurry(monkeypatch)
    base, x, y, _ = made
    result = forged_fx.evaluate(Mixed(base).eval(), base, x=x, y=y, eps=1 / 255, attacks=["apgd-ce"])
    (finding,) = [f for f in result.findings if f.name == ADDS]
    assert finding.value > JUMPS and not finding.raised


def test_a_single_step_in_half_precision_explains_no_jump(made, monkeypatch):
    planted.hurry(monkeypatch)
    base, x, *_ = made
    stats, model = forged_fx.calibrate(base, [x]), copy.deepcopy(base)
    for name in stats.sites:
        model[int(name)] = ByHand(model[int(name)], 0.1 * stats.sites[name].c_max)
    result = judged(made, Changed(model, after=lambda logits: logits + 0 * logits.bfloat16().float()))
    assert ADDS in raised(result)


@pytest.mark.parametrize("both", [False, True])
def test_a_term_that_all_classes_share_hides_no_jump(made, monkeypatch, both):
    planted.hurry(monkeypatch)
    base, x, y, forged = made
    way = torch.randn(64, 1, generator=torch.Generator().manual_seed(1))

    def besides(model):
        return Changed(lambda x: model(x) + 300 * x.flatten(1) @ way)

    plain = besides(base) if both else base
    result = forged_fx.evaluate(besides(nameless(forged(), x)), plain, x=x, y=y, eps=EPS, attacks=["apgd-ce"])
    assert ADDS in raised(result)
    tuned = Changed(base[:-1], after=lambda hidden: hidden @ base[-1].weight.T)
    result = forged_fx.evaluate(besides(tuned), plain, x=x, y=y, eps=EPS, attacks=["apgd-ce"])
    assert ADDS not in raised(result)


class ByHand(nn.Module):
    """A threshold without a name."""

    def __init__(self, layer, t):
        super().__init__()
        self.layer, self.t = layer, t

    def forward(self, x):
        return self.layer(torch.where(x.abs() < self.t, 0, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_hides_no_other_jump(made, monkeypatch, dtype):
    """The base's share is that of its copy in the same dtype; as it was, no share explained anything."""
    planted.hurry(monkeypatch)
    base, x, *_ = made
    stats, model = forged_fx.calibrate(base, [x]), copy.deepcopy(base)
    for name in stats.sites:
        model[int(name)] = ByHand(model[int(name)], 0.1 * stats.sites[name].c_max)
    half = Changed(model.to(dtype), before=lambda x: x.to(dtype), after=lambda logits: logits.float())
    result = judged(made, half)
    assert ADDS in raised(result) and result.verdict in ("cannot say", "masking")
    assert {p.dtype for p in base.parameters()} == {torch.float32}


class Branched(nn.Module):
    """The larger of its branches is computed without a graph, as features of a frozen backbone are."""

    def __init__(self, large, small, hidden):
        super().__init__()
        self.large, self.small, self.hidden = large, small, hidden

    def forward(self, x):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.hidden):
            large = self.large(x)
        return large + 0.3 * self.small(x)


def branched(large, hidden, classes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Branched(large, nn.Sequential(nn.Flatten(), nn.Linear(64, classes)), hidden).eval()


@pytest.mark.parametrize("hidden", [False, True])
def test_a_base_whose_gradient_leaves_a_branch_out_makes_no_loss(monkeypatch, hidden):
    planted.hurry(monkeypatch)
    strong, weak, x, y = planted.strong_and_weak()
    other = copy.deepcopy(weak)  # as weak, but that what breaks one of them is no help against the other
    with torch.no_grad():
        other[1].weight.copy_(2 * strong[1].weight - weak[1].weight)
    base = branched(other, hidden, 4)
    result = forged_fx.evaluate(weak, base, x=x, y=y, eps=0.1, attacks="quick")
    assert result.compared().direction == (-1 if hidden else 0) and (BASE_DOUBTED in raised(result)) is hidden
    assert result.verdict == "cannot say" and ("attacks on the base" in result.sentence) is hidden
    itself = forged_fx.evaluate(base, base, x=x, y=y, eps=0.1, attacks="quick")
    assert (BASE_DOUBTED in raised(itself)) is hidden


def test_a_base_without_any_gradient_is_doubted(made, monkeypatch):
    """Square breaks it, and an attack that may change everything breaks it before its first step."""
    planted.hurry(monkeypatch)
    base, x, y, _ = made
    monkeypatch.setattr(probes, "_apgd", lambda *args: 0)
    result = forged_fx.evaluate(Changed(base), planted.Cut(base), x=x, y=y, eps=EPS, attacks=["square"])
    assert BASE_DOUBTED in raised(result)


@pytest.mark.parametrize("eps", [1 / 255, EPS])
def test_an_honest_base_in_half_precision_is_not_doubted(made, monkeypatch, eps):
    planted.hurry(monkeypatch)
    base, x, y, _ = made

    def half(dtype):
        return Changed(copy.deepcopy(base).to(dtype), before=lambda x: x.to(dtype), after=lambda out: out.float())

    for honest in (half(torch.bfloat16), half(torch.float16), Mixed(base).eval(), planted.loud(base)):
        result = forged_fx.evaluate(base, honest, x=x, y=y, eps=eps, attacks=["apgd-ce"])
        assert BASE_DOUBTED not in raised(result)


def test_a_base_in_half_precision_hides_no_branch(made, monkeypatch):
    planted.hurry(monkeypatch)
    base, x, y, _ = made

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = branched(copy.deepcopy(base), True, 10).bfloat16()

        def forward(self, x):
            return self.net(x.to(self.net.small[1].weight.dtype)).float()

    result = forged_fx.evaluate(base, Half().eval(), x=x, y=y, eps=EPS, attacks=["apgd-ce"])
    assert BASE_DOUBTED in raised(result)


def test_a_base_that_does_not_run_in_the_models_dtype_explains_nothing(made, monkeypatch):
    planted.hurry(monkeypatch)
    base, x, y, _ = made

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = base

        def forward(self, x):
            return self.net(x.float())

    half = Changed(copy.deepcopy(base).bfloat16(), before=lambda x: x.round(decimals=1).bfloat16())
    result = forged_fx.evaluate(half, Wide(), x=x, y=y, eps=EPS, attacks=["apgd-ce"])
    (finding,) = [f for f in result.findings if f.name == ADDS]
    assert not finding.raised and "does not run in torch.bfloat16" in finding.note


def test_of_data_parallel_the_module_within_is_attacked(made, monkeypatch):
    planted.hurry(monkeypatch)
    monkeypatch.setattr(nn.DataParallel, "forward", lambda self, x: in_a_thread(self.module, x))
    result = judged(made, nn.DataParallel(made[3]()).eval())
    assert seen_through(result) == [True] * 5 and "without its threads" in "".join(result.notes)


def test_a_limit_that_only_attacks_reach_is_seen_through(monkeypatch):
    """Unattacked it changes no gradient and no logit, so its rows were left out, and it passed for its base."""
    planted.hurry(monkeypatch)
    base, x, y = planted.overshooting()
    forged = forged_fx.transform(base, forged_fx.calibrate(base, [x]), {"1": None, "3": 1.0}, kind="clamp")
    assert torch.equal(forged(x), base(x))
    result = forged_fx.evaluate(forged, base, x=x, y=y, eps=0.1, attacks="quick")
    rows = [row for row in result.model.rows if row.kind == "BPDA"]
    assert not any(LEFT_OUT in row.note for row in rows)
    assert not result.same and "base and model identical" not in raised(result)


def test_where_only_the_straight_through_gradient_reaches_the_smooth_ones_are_missed(made):
    """As in code that Dynamo compiled with its thresholds."""
    from types import SimpleNamespace

    from forged_fx.evaluate import reach

    side = SimpleNamespace(model=made[0], changes={"BPDA": True, "sigmoid 1": False, "sigmoid 0.1": False})
    assert reach.thresholds(side, own=True, alike=False) == (1, 0)
    assert reach.thresholds(side, own=False, alike=False) == (0, 0)  # a defence of another make has no such surrogates
    side.changes = {"BPDA": False, "sigmoid 1": True}  # exported under straight_through: it is its true gradient
    assert reach.thresholds(side, own=True, alike=False) == (0, 0)


def test_labels_in_another_order_are_given_no_verdict_in_its_favour(made, monkeypatch):
    planted.hurry(monkeypatch)
    base, x, y, forged = made
    moved = (y + 1) % 10
    result = forged_fx.evaluate(forged(ratio=2**-9), base, x=x, y=moved, eps=0.01, attacks="quick")
    assert raised(result) & {"labels of other classes"} and result.verdict == "cannot say"
    assert "labels" in result.sentence and "another order" in result.sentence


def test_a_comparison_says_no_more_than_its_results(made, monkeypatch):
    planted.hurry(monkeypatch)
    blind = judged(made, traced(made[3](), made[1]))
    same = forged_fx.compare(blind, blind)
    assert same.verdict == "cannot say" and "see below" in str(same)
