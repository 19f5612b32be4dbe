"""A search finds what helps, says so where nothing does, and believes neither its own attack nor its luck."""

import csv
import json
import random
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import planted
import pytest
import torch
from stopped import stop_after

import forged_fx
from forged_fx import search_moves, trials
from forged_fx.configuration import Configuration
from forged_fx.digits import EPS, one_thread
from forged_fx.evaluate import Result, fingerprint, surrogate
from forged_fx.evaluate.blocks import Blocks
from forged_fx.evaluate.terminal import Progress
from forged_fx.evaluate.threat import Threat
from forged_fx.processes import Processes
from forged_fx.recorded import Run, answers
from forged_fx.search import Search, _confirmed, split, walk
from forged_fx.trials import Spent, Trial

QUICK = {"eps": 0.1, "budget": 20, "finalists": 1, "attacks": "standard"}


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    planted.hurry(monkeypatch, queries=20, steps=8)
    monkeypatch.setattr(trials, "STEPS", 8)
    with one_thread():  # networks this small only lose by more
        yield


@pytest.fixture(scope="module")
def toy():
    model, x, y = planted.overshooting(48)
    return model, forged_fx.calibrate(model, [x]), x, y


def without_seconds(found):
    return [trial.__class__(**vars(trial) | {"seconds": 0.0}) for trial in (found.base, *found.trials)]


# --- moves ---


def test_moves_change_one_site_by_one_step():
    sites = ["a", "b", "c"]
    kinds = ("hard", "clamp", "band")
    here = Configuration((("a", "band", (2**-6, 0.7)), ("c", "hard", 2**-8)))
    found = {str(move) for move in search_moves.at(here, "a", sites, kinds)}
    rest = "; hard 1/256 at c"
    assert found == {"hard 1/256 at c"} | {
        text + rest for text in (
            "band 1/128 to 0.7 at a", "band 1/32 to 0.7 at a", "band 1/64 to 0.8 at a", "band 1/64 to 0.6 at a",
            "clamp 0.7 at a",
        )
    } | {"hard 1/64 at a; hard 1/256 at c", "hard 1/256 at c; hard 1/64 at a"} & found  # fmt: skip
    assert len(found) == 7
    grown = {
        move.places for move in search_moves.at(here, "b", sites, kinds)
    }  # nothing stands there yet: the middle rungs
    assert grown == {
        (here.places[0], ("b", kind, ratio), here.places[1])
        for kind, ratio in (("hard", 2**-6), ("clamp", 0.6), ("band", (2**-6, 0.6)))
    }
    one_below_the_last = search_moves.at(
        Configuration.uniform("a", "hard", search_moves.LOW[-2]), "a", sites, ("hard",)
    )
    assert [str(move) for move in one_below_the_last] == ["nothing forged", "hard 1/64 at a", "hard 1/16 at a"]
    at_the_end = [str(move) for move in search_moves.at(here, "c", sites, ("hard",))]
    assert at_the_end == ["band 1/64 to 0.7 at a", "band 1/64 to 0.7 at a; hard 1/128 at c"]


def test_starts_are_all_sites_the_first_and_the_inner_ones():
    starts = list(search_moves.starts(["a", "b", "c"], ("clamp", "band")))
    assert len(starts) == 3 * len(search_moves.HIGH) == len(set(starts))
    assert {tuple(place[0] for place in start.places) for start in starts} == {("a", "b", "c"), ("a",), ("b",)}
    assert len(list(search_moves.starts(["a"], ("soft",)))) == len(search_moves.LOW)
    assert len(list(search_moves.starts(["a", "b"], ("soft",)))) == 3 * len(search_moves.LOW)


# --- where moves lead ---


class Scored:
    """Trials of which it is known how many inputs each leaves standing; the base leaves 5."""

    def __init__(self, standing, budget=10_000):
        self.standing, self.budget, self.made = standing, budget, {}
        self.base = Trial(Configuration(), 5, 0.0, 10, True, 0.0)

    def try_out(self, configurations):
        for one in configurations:
            if one.places and one not in self.made:
                if len(self.made) == self.budget:
                    raise Spent("the budget is spent")
                self.made[one] = Trial(one, *self.standing(one), 10, True, 0.0)
            yield self.made.get(one, self.base)


SITES = ["a", "b", "c"]


def walked(standing, budget=10_000, seed=0):
    tried = Scored(standing, budget)
    return *walk(tried, SITES, ("hard", "clamp"), random.Random(seed)), list(tried.made)


def test_moves_lead_to_the_best_from_the_three_best_starts():
    """A trap is the best start of all: nothing that lies beside it is better."""
    trap, start = (Configuration.uniform("a", "clamp", ratio) for ratio in (0.9, 0.4))
    goal = Configuration((*start.places, ("c", "hard", 2**-6)))
    known = {trap: 8, start: 7, goal: 9}
    ends, stopped, _ = walked(lambda one: (known.get(one, 3), 0.0))
    assert [end.configuration for end in ends] == [goal, trap] and stopped == "no move helps"


def test_a_better_margin_alone_is_no_finalist():
    ends, _, tried = walked(lambda one: (5, 0.9))
    assert tried and ends == []


def test_a_budget_that_ends_among_the_starts_leaves_the_best_of_them():
    best, worse = (Configuration.uniform(SITES, "hard", ratio) for ratio in search_moves.LOW[2:4])
    ends, stopped, tried = walked(lambda one: ({best: 9, worse: 8}.get(one, 4), 0.0), budget=4)
    assert [end.configuration for end in ends] == [best, worse] and stopped == "the budget is spent" and len(tried) == 4


def test_the_order_of_sites_follows_from_the_seed():
    score = lambda one: (len(one.places), 0.0)  # noqa: E731
    once, again, *others = (walked(score, seed=seed)[2] for seed in (0, 0, 1, 2))
    assert once == again and once not in others


# --- the search ---


def test_it_finds_what_was_planted_and_confirms_it_on_other_inputs(toy, tmp_path):
    model, stats, x, y = toy
    found = forged_fx.search(model, stats, x, y, **QUICK, kinds=("clamp",), folder=tmp_path)
    best = found.best
    assert best is not None and best.configuration.at("3")[0] == "clamp" and best.verdict == "gain"
    assert (best.base_worst, best.worst, best.natural, found.kept) == (6, 24, 24, 24)
    assert best.p_holm == best.p < 1e-4 and "beats the base" in found.sentence and len(found.trials) <= 20
    assert found.base.standing < max(trial.standing for trial in found.trials if trial.fit)
    confirmed = Result.load(tmp_path / best.folder)  # on inputs that the search has not seen
    (_, (kept, _)) = split(x, y, 0.5, 0)
    assert confirmed.data["x_sha256"] == fingerprint.of_tensors([("x", kept)])
    forged = found.forge(model, stats)
    with torch.no_grad():
        assert (forged(x).argmax(1) == y).all()
    # and what was written is what was found
    again = Search.load(tmp_path)
    assert (again.trials, again.finalists, again.base) == (found.trials, found.finalists, found.base)
    rows = list(csv.DictReader((tmp_path / "search.csv").open()))
    assert len(rows) == 1 + len(found.trials) and sum(row["confirmed_worst"] == "24" for row in rows) == 1
    assert "<svg" in (tmp_path / "search.svg").read_text() and "finalists" in str(found)


def test_where_nothing_can_help_it_says_so(toy):
    """The same network with the weak unit cut off: what is left of the margin no forging widens."""
    model, _, x, y = toy
    sound = planted.copy.deepcopy(model)
    sound[3].weight.data[:, 4] = 0
    stats = forged_fx.calibrate(sound, [x])
    found = forged_fx.search(sound, stats, x, y, **QUICK | {"budget": 12})
    assert found.best is None and not found.finalists and found.sentence.startswith("nothing beats the base")
    assert f"{found.kept} others kept, and not needed (attacks: " in found.small_print
    with pytest.raises(ValueError, match="nothing beats the base"):
        found.forge(sound, stats)


def test_what_looks_better_to_the_search_alone_is_not_reported(monkeypatch):
    """Its own attack made blind, every configuration looks better than the base: the confirmation sees through it."""
    model, x, y = planted.small()
    attack = trials.Trials._attack
    blind = lambda self, module, x, y, along: attack(self, module, x, y, along if module is self.model else [])  # noqa: E731
    monkeypatch.setattr(trials.Trials, "_attack", blind)
    found = forged_fx.search(
        model,
        forged_fx.calibrate(model, [x]),
        x,
        y,
        **QUICK | {"eps": EPS, "budget": 8, "attacks": ["apgd-ce"]},
        kinds=("hard",),
    )
    (finalist,) = found.finalists
    assert finalist.worst <= finalist.base_worst + 1 and finalist.reason and found.best is None
    assert max(t.standing for t in found.trials if t.fit) > found.base.standing
    assert "nothing beats the base" in found.sentence and finalist.reason in found.sentence


def test_finalists_are_judged_as_was_asked(toy, tmp_path, monkeypatch):
    model, stats, x, y = toy
    few = [Configuration.uniform(["3"], "clamp", ratio) for ratio in (0.7, 0.8, 0.9)]
    ends = lambda tried, *_: (list(tried.try_out(few)), "")  # noqa: E731
    monkeypatch.setattr(sys.modules["forged_fx.search"], "walk", ends)
    call = {"eps": 0.5, "norm": "L2", "attacks": ["noise"], "seed": 3, "finalists": 2, "budget": 3}
    found = forged_fx.search(model, stats, x, y, **call, include="3", folder=tmp_path)
    assert found.facts["call"]["sites"] == ["3"] and len(found.finalists) == 2
    assert {finalist.configuration for finalist in found.finalists} == set(few[:2])
    _, (kept_x, _) = split(x, y, 0.5, 3)
    for finalist in found.finalists:
        result = Result.load(tmp_path / finalist.folder)
        assert (result.threat, result.attacks, result.seed) == (found.threat, ["noise"], 3)
        assert found.threat.norm == "L2" and result.data["x_sha256"] == fingerprint.of_tensors([("x", kept_x)])
        assert result.base.fingerprint == fingerprint.of_model(model)
        forged = finalist.configuration.forge(model, stats)
        assert result.model.fingerprint == fingerprint.of_model(forged)


def confirmed(*judged, most=0.01):
    """Finalists of (verdict, p, natural, worst); the base is right on 90 of 100, in the worst case on 50."""
    right = lambda natural, worst: lambda kind: torch.arange(100) < {"natural": natural, "further": worst}[kind]  # noqa: E731
    results = [
        SimpleNamespace(
            n=100,
            verdict=verdict,
            kinds=["natural", "further"],
            compared=lambda p=p: SimpleNamespace(p=p, low=0.0, high=0.2),
            model=SimpleNamespace(right=right(natural, worst), undefined=[]),
            base=SimpleNamespace(right=right(90, 50)),
        )
        for verdict, p, natural, worst in judged
    ]
    named = [(Configuration.uniform(["a"], "hard", 0.1 * k), None, one) for k, one in enumerate(results, start=1)]
    return _confirmed(named, max_natural_loss=most)


def test_a_finalist_stands_after_holms_correction_and_within_the_bound_on_natural_accuracy():
    (one,) = confirmed(("gain", 0.03, 89, 60))
    assert one.stands and (one.natural, one.worst, one.base_natural, one.base_worst) == (89, 60, 90, 50)
    two = confirmed(("gain", 0.03, 90, 58), ("gain", 0.03, 90, 60))
    assert [(f.worst, f.p, f.p_holm, f.stands, f.reason) for f in two] == [
        (60, 0.03, 0.06, False, "p = 0.06 for 2 finalists"),  # the best worst case first
        (58, 0.03, 0.06, False, "p = 0.06 for 2 finalists"),
    ]
    (harsh,) = confirmed(("gain", 0.01, 88, 60))
    assert not harsh.stands and harsh.reason == "loses 2.0 points of natural accuracy"
    assert [confirmed(("gain", 0.01, left, 60), most=0.29)[0].stands for left in (61, 60)] == [True, False]
    (none,) = confirmed(("no measurable gain", 0.5, 90, 51))
    assert not none.stands and none.reason == "evaluate: no measurable gain"


def test_of_several_that_stand_the_one_with_the_best_worst_case_is_best(toy):
    model, stats, x, y = toy
    found = forged_fx.search(model, stats, x, y, eps=0.1, budget=1, seconds=0)
    found.finalists = confirmed(("gain", 0.01, 90, 58), ("gain", 0.01, 90, 60))
    assert found.best.worst == 60 and "in the worst case it is right on 60 of" in found.sentence
    found.finalists = [replace(finalist, stands=False, reason="why") for finalist in found.finalists]
    assert found.best is None and "the least bad, hard 0.2 at a, is right on 60 in the worst case" in found.sentence


def test_natural_accuracy_is_bounded_in_the_search(toy):
    model, stats, x, y = toy
    harsh = {"kinds": ("clamp",), "attacks": ["noise"], "max_natural_loss": 0.0, "budget": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(search_moves.LADDERS, "clamp", ((0.01,),))  # no pixel is brighter than another
        found = forged_fx.search(model, stats, x, y, **QUICK | harsh)
    lost = [trial for trial in found.trials if trial.natural < found.base.natural]
    assert lost and not any(trial.fit for trial in lost) and found.best is None


def test_what_was_not_attacked_has_no_figures_of_an_attack(toy, tmp_path, monkeypatch):
    model, stats, x, y = toy
    harsh = {"kinds": ("clamp",), "attacks": ["noise"], "max_natural_loss": 0.0, "budget": 3}
    monkeypatch.setitem(search_moves.LADDERS, "clamp", ((0.01,),))
    found = forged_fx.search(model, stats, x, y, **QUICK | harsh, folder=tmp_path)
    out = [trial for trial in found.trials if not trial.fit]
    assert out and {(trial.standing, trial.margin) for trial in out} == {(None, None)}
    assert found.base.standing is not None
    assert not any("-1.000" in cell for _, *cells in found._tried().rows for cell in cells)
    rows = [row for row in csv.DictReader((tmp_path / "search.csv").open()) if row["fit"] == "False"]
    assert rows and {(row["standing"], row["margin"]) for row in rows} == {("", "")}
    assert "too few: not attacked" in (tmp_path / "log.txt").read_text()
    record = json.loads((tmp_path / "search.json").read_text())
    assert [trial["standing"] for trial in record["trials"]] == [trial.standing for trial in found.trials]
    assert Search.load(tmp_path).trials == found.trials
    for trial in record["trials"]:  # as earlier versions wrote it
        if not trial["fit"]:
            trial.update(standing=0, margin=-1.0)
    (tmp_path / "search.json").write_text(json.dumps(record))
    assert Search.load(tmp_path).trials == found.trials
    record["base"].update(margin=None)
    (tmp_path / "search.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="its standing and margin are numbers"):
        Search.load(tmp_path)


# --- trials ---


class Signed(torch.nn.Module):
    """The lead of class 0 is twice the input."""

    def forward(self, x):
        return torch.cat([x, -x], 1)


def trying(monkeypatch, margins, y=(0, 0, 0, 0, 0, 1), near=3, **options):
    """Trials of inputs at 0.5, where an attack ends at so large a lead. The last is of the other class."""
    monkeypatch.setattr(trials, "NEAR", near)
    least = torch.tensor(margins, dtype=torch.float64)
    monkeypatch.setattr(trials.Trials, "_attack", lambda self, module, x, y, along: (least[: len(x)], x.clone()))
    x = torch.full((len(y), 1), 0.5)
    options = {"max_natural_loss": 1 / 6, "budget": 9, "seconds": None, "batch_size": 4} | options
    asked = {"blocks": Blocks(0), "progress": Progress(False)}
    return trials.Trials(Signed(), None, x, torch.tensor(y), Threat(0.1, "Linf"), **asked, **options)


def test_inputs_near_the_boundary_are_right_unattacked_and_lead_or_lag_least(monkeypatch):
    tried = trying(monkeypatch, [-0.9, 0.3, -0.2, 0.8, -0.4, 0.01])
    assert tried.near.tolist() == [1, 2, 4] and (tried.base.standing, tried.base.natural) == (1, 5)
    assert tried.base.margin == pytest.approx((1 - 2 / 3 - 1) / 3)  # in units of 0.3, cut at 1
    assert tried._trial(Configuration(), torch.tensor([torch.nan, 0.6]), 5, 0.0).margin == 0  # the one -1, the other 1
    level = trying(monkeypatch, [0.0, 0.2, 0.4, 0.9, 0.9, 0.9])
    assert level.near.tolist() == [0, 1, 2] and level.base.standing == 2  # a lead of 0 is none


@pytest.mark.parametrize(("bound", "fit"), [(1 / 6, True), (0.1, False)])
def test_a_trial_may_lose_as_many_as_was_said(monkeypatch, bound, fit):
    tried = trying(monkeypatch, [0.1] * 6, max_natural_loss=bound)
    costly = planted.Changed(Signed(), after=lambda out: torch.cat([-out[:1], out[1:]]))  # the first of each batch
    monkeypatch.setattr(Configuration, "forge", lambda *_: costly)
    tried.batch_size = 250
    with torch.no_grad():
        (trial,) = tried.try_out([Configuration.uniform(["a"], "hard", 0.1)])
    assert (trial.natural, trial.fit) == (4, fit)


def test_of_trials_that_do_as_well_the_one_with_fewer_sites_is_better():
    one, two = (Trial(Configuration.uniform(sites, "hard", 0.1), 5, 0.2, 9, True, 0.0) for sites in ("a", "ab"))
    assert replace(two, margin=0.3).score > one.score > two.score > replace(one, standing=4, margin=0.9).score
    assert replace(one, standing=0, margin=-1.0).score > replace(one, standing=None, margin=None, fit=False).score


def test_an_attack_ends_where_the_lead_was_smallest(monkeypatch):
    points = [torch.tensor([row]).T for row in ((0.2, 0.6, 0.4), (0.3, 0.1, 0.9))]

    class Apgd:
        init_hyperparam = staticmethod(lambda x: None)
        attack_single_run = staticmethod(lambda x, y: (points[0], None, None, points[1]))

    monkeypatch.setattr(trials, "toolbox", lambda *_: SimpleNamespace(apgd=Apgd()))
    model, x = Signed(), torch.full((3, 1), 0.5)
    this = SimpleNamespace(threat=None, classes=2, blocks=Blocks(0), batch_size=9, device=x.device)
    least, at = trials.Trials._attack(this, model, x, torch.zeros(3, dtype=torch.int64), [None])
    assert at.flatten().tolist() == pytest.approx([0.2, 0.1, 0.4])
    assert least.tolist() == pytest.approx([0.4, 0.2, 0.8])


def test_a_trial_is_attacked_along_each_gradient_and_shown_the_bases_examples(toy, monkeypatch):
    model, stats, x, y = toy
    made, toolbox = [], trials.toolbox
    monkeypatch.setattr(
        trials, "toolbox", lambda *given: made.append((given[0].context, toolbox(*given))) or made[-1][1]
    )
    monkeypatch.setattr(trials, "STEPS", 5)
    call = {"eps": 0.1, "budget": 1, "attacks": ["noise"], "kinds": ("hard",)}
    found = forged_fx.search(model, stats, x, y, **call)
    of_base, true, through, smooth = (context for context, _ in made)
    assert of_base is true is nullcontext and through is forged_fx.straight_through
    assert smooth.func is surrogate.smooth and smooth.args == (trials.SMOOTH,)
    assert {(tools.apgd.n_iter, tools.apgd.loss) for _, tools in made} == {(5, "ce")}
    # its own attack made blind, it stands no better than the base where it is the same function
    attack = trials.Trials._attack
    blind = lambda self, module, x, y, along: attack(self, module, x, y, along if module is self.model else [])  # noqa: E731
    monkeypatch.setattr(trials.Trials, "_attack", blind)
    found = forged_fx.search(model, stats, x, y, **call)
    assert found.trials[0].standing == found.base.standing < found.near


def test_trials_are_attacked_along_the_smooth_surrogate_too(toy, monkeypatch):
    model, stats, x, y = toy
    kept, used = surrogate._Gate.backward, []

    def backward(ctx, grad):
        used.append(ctx.temperature)
        return kept(ctx, grad)

    monkeypatch.setattr(surrogate._Gate, "backward", backward)
    forged_fx.search(model, stats, x, y, eps=0.1, budget=1, finalists=1, attacks=["apgd-ce"])
    assert set(used) == {trials.SMOOTH}


def test_the_budget_counts_configurations_and_seconds(toy):
    model, stats, x, y = toy
    few = QUICK | {"attacks": ["noise"], "kinds": ("clamp",)}
    five = forged_fx.search(model, stats, x, y, **few | {"budget": 5})
    assert len(five.trials) == 5 and five.facts["stopped"] == "the budget is spent"
    more = forged_fx.search(model, stats, x, y, **few | {"budget": 7})
    assert without_seconds(more)[:6] == without_seconds(five)  # the same, further on
    none = forged_fx.search(model, stats, x, y, **few, seconds=0)
    assert not none.trials and none.best is None
    assert none.sentence == "nothing is known: 0 configurations tried, as the time is spent"
    assert none.facts["stopped"] == "the time is spent" and "the time is spent" in none.small_print


def test_stopped_anywhere_it_goes_on_and_ends_alike(toy, tmp_path, monkeypatch):
    model, stats, x, y = toy
    options = QUICK | {"attacks": ["apgd-ce"], "kinds": ("clamp",), "budget": 6}
    whole = forged_fx.search(model, stats, x, y, **options, folder=tmp_path / "whole")
    attempts = 0
    while not (tmp_path / "parts" / "search.json").exists():
        attempts += 1
        stop_after(5, monkeypatch)
        try:
            parts = forged_fx.search(model, stats, x, y, **options, folder=tmp_path / "parts")
        except KeyboardInterrupt:
            assert attempts < 20
    assert attempts > 2
    assert without_seconds(parts) == without_seconds(whole) and parts.finalists == whole.finalists
    stop_after(0, monkeypatch)
    again = forged_fx.search(model, stats, x, y, **options, folder=tmp_path / "parts")  # nothing is left to do
    assert again.trials == parts.trials
    with pytest.raises(FileExistsError, match="budget: 6 there, 7 here"):
        forged_fx.search(model, stats, x, y, **options | {"budget": 7}, folder=tmp_path / "parts")


def test_statistics_that_differ_anywhere_are_other_ones(toy, tmp_path):
    """In the middle of a histogram, or at one of many channels, which a printed array leaves out."""
    model, _, x, y = toy
    call = QUICK | {"kinds": ("clamp",), "budget": 1, "attacks": ["noise"], "folder": tmp_path}
    forged_fx.search(model, forged_fx.calibrate(model, [x]), x, y, **call)
    other = forged_fx.calibrate(model, [x])
    histogram = other.sites["3"].histogram
    histogram[len(histogram) // 2] += 1
    with pytest.raises(FileExistsError, match=r"stats: \w{12}... there, \w{12}... here"):
        forged_fx.search(model, other, x, y, **call)
    wide = torch.nn.Linear(1500, 3)
    parts = torch.rand(3, 1500).split(1)
    once, again, other = (forged_fx.calibrate(wide, parts, channels=True).sites for _ in range(3))
    next(iter(other.values())).channel_counts.sums[0, 700] += 1
    one, same, moved = map(fingerprint.of_sites, (once, again, other))
    assert one == same != moved
    last, first = (forged_fx.calibrate(wide, some, channels=True) for some in (parts[2:], parts[:2]))
    merged = last.merge(first).sites  # in another order
    assert merged == once and fingerprint.of_sites(merged) == one


# --- what is held out ---


@pytest.mark.parametrize("share", [0.5, 0.25, 0.1])
@pytest.mark.parametrize("order", ["sorted", "in turn"])
def test_both_sides_are_alike_and_share_nothing(order, share):
    y = torch.arange(200) % 5 if order == "in turn" else torch.arange(200) // 40
    x = torch.arange(200.0)[:, None] / 200
    (seen, _), (kept, of_kept) = split(x, y, share, 3)
    assert of_kept.bincount().tolist() == [round(40 * share)] * 5 and len(seen) + len(kept) == 200
    assert sorted(torch.cat([seen, kept]).flatten().tolist()) == x.flatten().tolist()
    assert torch.equal(y[(200 * kept.flatten()).round().long()], of_kept)
    assert torch.equal(split(x, y, share, 3)[1][0], kept) and not torch.equal(split(x, y, share, 4)[1][0], kept)


@pytest.mark.parametrize("noise", [0, 1e-3])
def test_copies_of_an_input_stay_on_one_side(noise):
    x, y = torch.rand(20, 3, generator=torch.Generator().manual_seed(0)).repeat(2, 1), torch.arange(20).repeat(2) % 2
    x = x + noise * torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    (seen, _), (kept, _) = split(x, y, 0.5, 0)
    assert len(seen) == len(kept) == 20
    assert torch.cdist(seen, kept, p=torch.inf).min() > 2 * noise


def test_the_kept_inputs_are_checked_before_the_search(toy, monkeypatch):
    model, stats, x, y = toy
    monkeypatch.setattr(trials.Trials, "_attack", None)  # nothing is attacked
    for confirm, message in (
        ((x[:10], y[:10]), "confirm has 10 inputs that are in x too"),
        ((x[:10] / 2, y[:10] + 70), r"y spans \[70, 73\], and the model has 4 classes, counted from 0"),
        ((x[:10, :, :4], y[:10]), r"confirm has inputs of shape \(1, 4, 8\), and x \(1, 8, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            forged_fx.search(model, stats, x, y, **QUICK, confirm=confirm)
    late = y.clone()
    late[20] = 21
    for swapped in (late, late.flip(0)):
        with pytest.raises(ValueError, match=r"y spans \[0, 21\], and the model has 4 classes"):
            forged_fx.search(model, stats, x, swapped, **QUICK)


def test_copies_are_said_in_the_callers_name(toy):
    model, stats, x, y = toy
    twice = {"x": torch.cat([x[:8], x[:2]]), "y": torch.cat([y[:8], y[:2]])}
    with (
        pytest.warns(UserWarning, match="2 of 10 inputs are copies") as warned,
        pytest.raises(ValueError, match="in x"),
    ):
        forged_fx.search(model, stats, **twice, **QUICK, confirm=(twice["x"], twice["y"]))
    assert [warning.filename for warning in warned] == [__file__] * 2


# --- the same state, another model or other statistics ---


class Scaled(torch.nn.Module):
    """Its state does not show its scale."""

    def __init__(self, inner, scale):
        super().__init__()
        self.inner, self.scale = inner, scale

    def forward(self, x):
        return self.inner(self.scale * x)


def test_code_that_changed_is_noticed(toy, tmp_path, monkeypatch):
    model, _, x, y = toy
    before, after = (Scaled(model, scale).eval() for scale in (1.0, 0.9))
    stats = forged_fx.calibrate(before, [x])
    quick = {"eps": 0.1, "attacks": ["noise"]}
    search = {"kinds": ("clamp",), "budget": 2, "finalists": 1}
    works = {
        "search": lambda model, folder: forged_fx.search(model, stats, x, y, **quick, **search, folder=folder),
        "sweep": lambda model, folder: forged_fx.sweep(
            model, stats, x, y, **quick, ratios=[0.1], rounds=0, folder=folder
        ),
    }
    for name, work in works.items():
        whole, part = tmp_path / name, tmp_path / f"{name} in part"
        found = work(before, whole)
        assert str(work(before, whole)) == str(found)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_after(3, patch)
            work(before, part)
        for folder in (whole, part):
            with pytest.raises(ValueError, match=r"other logits than when the .*code has changed"):
                work(after, folder)
        with pytest.raises(FileExistsError, match="class: Scaled there, Sub here"):
            work(type("Sub", (Scaled,), {})(model, 1.0).eval(), whole)


def test_code_that_changed_is_noticed_where_the_logits_of_a_class_cancel():
    """Of x and of 1 - x they are opposite, and so are they at any scale."""
    model = planted.Changed(planted.linear(classes=4), before=lambda x: x - 0.5)
    model.inner[1].bias.data.zero_()
    x = planted.inputs(6)
    both = torch.cat([x, 1 - x])
    finished = SimpleNamespace(facts={"logits": answers(model, both, 12)})
    run = Run(Processes(), Blocks(0), Progress(False), finished=finished)
    assert run.again(model, both, 5) is finished
    assert run.again(planted.Changed(model, after=lambda out: out + 1e-7), both, 12) is finished  # rounding
    for after in (lambda out: 2 * out, lambda out: out[:, :3]):
        with pytest.raises(ValueError, match="its code has changed"):
            run.again(planted.Changed(model, after=after), both, 12)


def test_what_was_found_is_forged_from_what_it_was_found_of(toy):
    model, stats, x, y = toy
    found = forged_fx.search(model, stats, x, y, **QUICK, kinds=("clamp",))
    other = planted.copy.deepcopy(model)
    other[1].weight.data *= 2
    with pytest.raises(ValueError, match="other model than the search had"):
        found.forge(other, stats)
    for these in (forged_fx.calibrate(model, [x[:3]]), forged_fx.calibrate(model[:2], [x])):
        with pytest.raises(ValueError, match="other stats than the search had"):
            found.forge(model, these)


def test_errors_name_what_is_wrong(toy, tmp_path):
    model, stats, x, y = toy
    for change, message in (
        ({"seconds": -5}, "seconds=-5: 0 or more"),
        ({"seconds": float("nan")}, "seconds=nan: 0 or more"),
        ({"kinds": ("softly",)}, "does not know kind 'softly'"),
        ({"budget": 0}, "at least one"),
        ({"confirm": 1.0}, "confirm=1.0"),
        ({"max_natural_loss": 2}, "in \\[0, 1\\]"),
        ({"attacks": "gentle"}, "unknown 'gentle'"),
    ):
        with pytest.raises(ValueError, match=message):
            forged_fx.search(model, stats, x, y, **QUICK | change)
    with pytest.raises(TypeError, match=r"kinds='hard': a list of names, such as \['hard'\]"):
        forged_fx.search(model, stats, x, y, **QUICK, kinds="hard")
    with pytest.raises(ValueError, match="wrong on every input"):
        forged_fx.search(model, stats, x, (y + 1) % 4, **QUICK)
    (tmp_path / "search.json").write_text(json.dumps({"format": 1, "sentence": "", "base": {}, "trials": 3}))
    with pytest.raises(ValueError, match="holds no search"):
        Search.load(tmp_path)
