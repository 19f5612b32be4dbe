"""One model at many ratios and kinds, under one pool of examples."""

import csv
import json
import sys
from dataclasses import replace

import numpy as np
import planted
import pytest
import torch
from safetensors.torch import load_file
from stopped import stop_after

import forged_fx
from forged_fx import report
from forged_fx.configuration import Configuration, written
from forged_fx.digits import one_thread
from forged_fx.evaluate import attacks, findings
from forged_fx.evaluate.attacks import ATTACKS, Attack
from forged_fx.evaluate.findings import CHECKS
from forged_fx.sweep import Sweep, _grid, shares_changed

RATIOS = {"hard": [0.0, 0.25], "clamp": [0.9]}
OPTIONS = {"eps": 0.1, "ratios": RATIOS, "kinds": ("hard", "clamp"), "attacks": ["apgd-ce"], "rounds": 0}


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    planted.hurry(monkeypatch, steps=12)
    with one_thread():  # networks this small only lose by more
        yield


@pytest.fixture(scope="module")
def toy():
    return planted.overshooting()


def test_the_planted_ratio_stands_out_and_every_figure_is_paired_with_the_base(toy, tmp_path):
    model, x, y = toy
    found = forged_fx.sweep(model, [x], x, y, **OPTIONS | {"rounds": 1, "attacks": "standard"}, folder=tmp_path)
    off, hard, clamp = found.points
    assert (found.worst, found.natural, off.worst, off.natural) == (6, 24, 6, 24)  # class 0 alone
    assert clamp.worst == 24 and clamp.natural == 24 and found.best is clamp
    assert clamp.low > 0 and clamp.p < 1e-4 and clamp.p_holm == pytest.approx(3 * clamp.p)
    assert (off.p, off.zeroed, off.limited) == (1.0, 0.0, 0.0)
    assert hard.zeroed > 0 and clamp.limited > 0 and clamp.zeroed == 0
    assert "clamp 0.9 is measurably above the base" in found.sentence
    assert [point.verdict for point in found.points] == ["no measurable gain", "masking", "gain"]
    assert all(point.speed > 0 and point.speed_low <= point.speed <= point.speed_high for point in found.points)
    assert "clamp 0.9" in str(found)
    # what was written is what was found
    again = Sweep.load(tmp_path)
    assert (again.points, again.worst, again.facts) == (found.points, found.worst, json.loads(json.dumps(found.facts)))
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert [row["kind"] for row in rows] == ["none", "hard", "hard", "clamp"] and rows[3]["worst"] == "24"
    assert "<svg" in (tmp_path / "sweep.svg").read_text()
    found.plot(tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes()[1:4] == b"PNG"


def test_no_gain_is_shown_that_evaluate_would_not_show(toy, tmp_path, monkeypatch):
    """What is less than AutoAttack, and what a finding forbids, shows none: in print, on disk, on the page."""
    model, x, y = toy
    options = OPTIONS | {"ratios": {"clamp": [0.9]}, "kinds": ("clamp",)}
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0.9, kind="clamp")
    flat = replace(CHECKS[0], measure=lambda case: (1, 0))
    for attacks_, checks, words in (
        (["apgd-ce"], CHECKS, "only a part of AutoAttack was run"),
        ("standard", (flat,), "the attacks may have failed"),
    ):
        monkeypatch.setattr(findings, "CHECKS", checks)
        folder = tmp_path / words
        found = forged_fx.sweep(model, [x], x, y, **options | {"attacks": attacks_}, folder=folder)
        result = forged_fx.evaluate(forged, model, x=x, y=y, eps=0.1, attacks=attacks_)
        (point,) = found.points
        assert point.above and (point.verdict, point.sentence) == (result.verdict, result.sentence)
        assert not found.better and found.verdict == "none above the base"
        assert "none is shown to be above the base" in found.sentence and words in found.sentence
        assert "cannot say" in str(found) and "measurably above" not in str(found)
        assert (
            Sweep.load(folder).sentence == found.sentence == json.loads((folder / "sweep.json").read_text())["sentence"]
        )
        page = report.page(report.load(folder))
        assert ">none above the base<" in page and words in page and "cannot say" in page


def test_a_point_that_differs_only_where_attacks_go_is_not_taken_for_the_base(toy):
    """At a limit of all that calibration saw the logits are the same, bit for bit, on unattacked inputs alone."""
    model, x, y = toy
    call = {"eps": 0.02, "attacks": ["apgd-ce"]}
    (point,) = forged_fx.sweep(model, [x], x, y, **call, ratios={"clamp": [1.0]}, rounds=0).points
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 1.0, kind="clamp")
    result = forged_fx.evaluate(forged, model, x=x, y=y, **call)
    assert torch.equal(forged(x), model(x)) and point.worst == 24
    assert (point.verdict, point.sentence) == (result.verdict, result.sentence) and "about 73 would" in point.sentence


def test_inputs_for_which_autoattack_is_not_defined_show_no_gain_after_a_part_of_it(toy):
    model, x, y = toy
    call = OPTIONS | {"ratios": {"clamp": [0.9]}, "kinds": None, "attacks": "standard"}
    found = forged_fx.sweep(model, [x.flatten(1)], x.flatten(1), y, **call)
    (point,) = found.points
    assert point.above and point.verdict == "cannot say" and not found.better
    assert "square: needs images" in point.sentence


def test_the_sentence_names_a_range_where_there_is_one(toy):
    model, x, y = toy
    found = forged_fx.sweep(model, [x], x, y, **OPTIONS)
    low, high = replace(found.points[0], worst=5), replace(found.points[2], worst=7)
    for points, words in (
        ([low, high], "5 (hard 0) to 7 (clamp 0.9)"),
        ([low, replace(high, worst=5)], "5 at every point"),
        ([high], "7 (clamp 0.9)"),
    ):
        found.points = points
        assert f"worst case {found.worst} of {found.n} at the base, {words}, Holm p" in found.sentence


def test_masking_shows_no_gain(toy):
    """The best worst case of all, and a gradient that hides examples."""
    model, x, y = toy
    found = forged_fx.sweep(model, [x], x, y, **OPTIONS)
    *rest, clamp = found.points
    found.points = [
        *(replace(point, verdict="loss") for point in rest),
        replace(clamp, verdict="masking", sentence="it hides examples"),
    ]
    assert found.best.name == "clamp 0.9" and not found.better
    assert ", 1 masking" in found.sentence and found.sentence.endswith("verdict on it is masking: it hides examples")


def test_what_is_above_or_below_is_so_after_holms_correction_too(toy):
    """A point of many is not called above the base, nor below it, for what chance finds in so many."""
    model, x, y = toy
    found = forged_fx.sweep(model, [x], x, y, **OPTIONS | {"ratios": {"clamp": [0.9]}, "kinds": None})
    clear = replace(found.points[0], worst=24, low=0.1, high=0.3, p_holm=0.04, verdict="gain")
    below = replace(clear, worst=2, low=-0.3, high=-0.1, verdict="loss")
    found.points = [clear, replace(clear, worst=20, low=-0.1), below]
    assert found.better and found.best is clear and not below.above
    assert found.sentence.startswith("of 3 points clamp 0.9 is measurably above the base, 1 measurably below:")
    assert ", 2 (clamp 0.9) to 24 (clamp 0.9), Holm p = 0.04" in found.sentence
    found.points = [replace(point, p_holm=0.06) for point in found.points]
    assert not found.better and found.sentence.startswith("of 3 points none is measurably above the base: ")
    found.points = [below]  # a loss is beyond chance, too
    assert found.sentence.startswith("of 1 points none is measurably above the base, 1 measurably below: ")


def test_the_true_gradients_figure_counts_its_rows_alone(toy):
    model, x, y = toy
    call = {"eps": 0.1, "attacks": ["apgd-ce"]}
    stats = forged_fx.calibrate(model, [x])
    (point,) = forged_fx.sweep(model, stats, x, y, **call, ratios=[0.25], rounds=0).points
    side = forged_fx.evaluate(forged_fx.transform(model, stats, 0.25), model, x=x, y=y, **call).model
    figures = [int(side.right(kind).sum()) for kind in ("natural", "true gradient", "BPDA")]
    assert (point.natural, point.true) == tuple(figures[:2]) and point.true > figures[2] >= point.worst


def test_a_point_that_stands_is_better_than_one_that_does_not(toy):
    model, x, y = toy
    found = forged_fx.sweep(model, [x], x, y, **OPTIONS | {"ratios": {"clamp": [0.9]}, "kinds": None})
    stands = replace(found.points[0], worst=20, natural=20, low=0.1, high=0.3, p_holm=0.04, verdict="gain")
    found.points = [replace(stands, worst=24, verdict="masking"), stands, replace(stands, natural=19)]
    assert found.best is stands and found.better


def test_a_sweep_of_an_earlier_version_says_that_it_did_not_ask(toy, tmp_path):
    model, x, y = toy
    forged_fx.sweep(model, [x], x, y, **OPTIONS | {"attacks": "standard"}).save(tmp_path)
    record = json.loads((tmp_path / "sweep.json").read_text())
    for point in record["points"]:
        del point["verdict"], point["sentence"]
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    found = Sweep.load(tmp_path)
    assert not found.better and "earlier version, which did not ask" in found.sentence


def test_what_is_found_on_any_is_shown_to_all(toy, monkeypatch):
    """An attack that works on the last point alone: its examples break the others all the same."""
    model, x, y = toy
    shift = x.clone()
    shift[:, 0] = x[:, 0].flip(-1)  # another quadrant is bright
    seen = []

    def once(tools, inputs, classes):
        seen.append(len(inputs))
        return shift[: len(inputs)] if len(seen) == 4 else inputs  # base, two of hard, clamp

    monkeypatch.setitem(ATTACKS, "once", Attack("once", once, gradient=False))
    found = forged_fx.sweep(model, [x], x, y, **OPTIONS | {"attacks": ["once"], "eps": 0.9})
    assert len(seen) == 4  # the base too is attacked once
    assert [point.true for point in found.points] == [24, 24, 0] and found.true == 24
    assert [point.worst for point in found.points] == [0, 0, 0] and found.worst == 0


def test_stopped_anywhere_it_goes_on_and_a_finished_one_is_returned(toy, tmp_path, monkeypatch):
    model, x, y = toy
    options = {key: value for key, value in OPTIONS.items()}
    whole = forged_fx.sweep(model, [x], x, y, **options, folder=tmp_path / "whole")
    attempts = 0
    while not (tmp_path / "parts" / "sweep.json").exists():
        attempts += 1
        stop_after(3, monkeypatch)
        try:
            parts = forged_fx.sweep(model, [x], x, y, **options, folder=tmp_path / "parts")
        except KeyboardInterrupt:
            assert attempts < 30
    assert attempts > 3 and parts.points == whole.points
    monkeypatch.setattr(attacks, "toolbox", None)  # nothing is attacked any more
    assert forged_fx.sweep(model, [x], x, y, **options, folder=tmp_path / "parts").points == whole.points
    with pytest.raises(FileExistsError, match="seed: 0 there, 1 here"):
        forged_fx.sweep(model, [x], x, y, **options, folder=tmp_path / "parts", seed=1)


def test_other_points_and_figures_that_cannot_be_are_refused(toy, tmp_path):
    model, x, y = toy
    call = OPTIONS | {"attacks": ["noise"], "kinds": None, "ratios": [0.25], "folder": tmp_path}
    forged_fx.sweep(model, [x], x, y, **call)
    with pytest.raises(FileExistsError, match=r"models.hard 0.25: \w{12}... there, none here; models.hard 0.3: none"):
        forged_fx.sweep(model, [x], x, y, **call | {"ratios": [0.3]})
    other = planted.copy.deepcopy(model)
    other[1].bias.data += 1
    with pytest.raises(FileExistsError, match=r"models.base: \w{12}... there"):
        forged_fx.sweep(other, [x], x, y, **call)
    record = json.loads((tmp_path / "sweep.json").read_text())
    for name, figure in (("worst", 25), ("natural", -1), ("p_holm", 1.5)):
        point = record["points"][0] | {name: figure}
        (tmp_path / "sweep.json").write_text(json.dumps(record | {"points": [point]}))
        with pytest.raises(ValueError, match=f": {figure} is not in "):
            Sweep.load(tmp_path)


def test_another_calibration_and_another_timing_are_another_sweep(toy, tmp_path):
    """Though the thresholds are the same: what is zeroed is another share."""
    model, x, y = toy
    call = OPTIONS | {"attacks": ["noise"], "kinds": None, "ratios": [0.25], "folder": tmp_path}
    stats = forged_fx.calibrate(model, [x])
    forged_fx.sweep(model, stats, x, y, **call)
    forged_fx.sweep(model, stats, x, y, **call, batch_size=7)  # nothing is timed
    more = stats.merge(forged_fx.calibrate(model, [x / 2]))
    assert [site.c_max for site in more.sites.values()] == [site.c_max for site in stats.sites.values()]
    with pytest.raises(FileExistsError, match=r"stats: \w{12}... there, \w{12}... here"):
        forged_fx.sweep(model, more, x, y, **call)
    timed = call | {"rounds": 1, "folder": tmp_path / "timed"}
    forged_fx.sweep(model, stats, x, y, **timed, batch_size=5)
    with pytest.raises(FileExistsError, match="timed: 5 there, 7 here"):
        forged_fx.sweep(model, stats, x, y, **timed, batch_size=7)


def test_points_in_another_order_are_another_sweep(toy, tmp_path):
    """Its points stand in their order; and a set, which has none that two processes agree on, is put into one."""
    model, x, y = toy
    call = OPTIONS | {"attacks": ["noise"], "kinds": None, "folder": tmp_path, "ratios": [0.25, 0.5]}
    found = forged_fx.sweep(model, [x], x, y, **call)
    assert [point.ratio for point in found.points] == [0.25, 0.5]
    with pytest.raises(FileExistsError, match=r"the order of models: .*0\.25, .*0\.5 there, .*0\.5, .*0\.25 here"):
        forged_fx.sweep(model, [x], x, y, **call | {"ratios": [0.5, 0.25]})
    assert _grid({"soft": [1.0], "hard": {0.5, 1e-5}}, None) == [
        ("soft", 1.0), ("hard", 1e-5), ("hard", 0.5)
    ]  # fmt: skip
    by_kind = {"soft": [0.1], "clamp": [0.9]}
    assert _grid(by_kind, by_kind.keys()) == [("soft", 0.1), ("clamp", 0.9)]
    assert _grid([0.25], {"soft", "hard", "clamp"}) == [(kind, 0.25) for kind in ("clamp", "hard", "soft")]


@pytest.mark.parametrize("name", ["sweep.csv", "sweep.svg", "sweep.examples.safetensors", "sweep.stats.safetensors"])
def test_somebodys_files_are_not_written_over(toy, tmp_path, name):
    """Which is said ahead of all work."""
    model, x, y = toy
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=rf"{name} of something else, which would be written over"):
        forged_fx.sweep(model, [x], x, y, **OPTIONS, folder=tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


def test_a_result_and_a_sweep_may_lie_in_one_folder(toy, tmp_path):
    model, x, y = toy
    (tmp_path / "stats.safetensors").write_text("the caller's")

    def evaluate():
        return forged_fx.evaluate(model, x=x, y=y, eps=0.1, attacks=["apgd-ce"], folder=tmp_path)

    def sweep():
        return forged_fx.sweep(model, [x], x, y, **OPTIONS, folder=tmp_path)

    judged, found = evaluate(), sweep()
    assert torch.equal(evaluate().model.examples, judged.model.examples) and sweep().points == found.points
    assert len(load_file(tmp_path / "sweep.examples.safetensors")) == 8
    assert len(forged_fx.Stats.load(tmp_path / "sweep.stats.safetensors").sites) == 2
    assert (tmp_path / "stats.safetensors").read_text() == "the caller's"


def test_the_examples_of_an_earlier_versions_sweep_are_not_written_over(toy, tmp_path):
    model, x, y = toy
    call = {"x": x, "y": y, "eps": 0.1, "attacks": ["apgd-ce"]}
    (tmp_path / "examples.safetensors").write_text("a sweep's")
    with pytest.raises(FileExistsError, match=r"examples\.safetensors of something else"):
        forged_fx.evaluate(model, **call, folder=tmp_path)
    with pytest.raises(FileExistsError, match=r"examples\.safetensors of something else"):
        forged_fx.evaluate(model, **call).save(tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["a sweep's"]


def test_ratios_that_are_close_are_points_of_their_own(toy):
    model, x, y = toy
    close = {"ratios": [0.1234561, 0.1234562, np.float32(0.1)], "kinds": ["hard"], "attacks": ["noise"]}
    found = forged_fx.sweep(model, [x], x, y, **OPTIONS | close)
    assert [point.name for point in found.points] == ["hard 0.1234561", "hard 0.1234562", "hard 0.10000000149011612"]
    pairs = {"ratios": [[2**-8, 0.5], (2**-8, 0.7)], "kinds": ["band"], "attacks": ["noise"]}
    found = forged_fx.sweep(model, [x], x, y, **OPTIONS | pairs)
    assert [point.name for point in found.points] == ["band 1/256 to 0.5", "band 1/256 to 0.7"]


def test_kinds_are_those_that_ratios_are_by(toy):
    model, x, y = toy
    quick = {"attacks": ["noise"], "kinds": None}
    found = forged_fx.sweep(model, [x], x, y, **OPTIONS | quick)
    assert [point.name for point in found.points] == ["hard 0", "hard 0.25", "clamp 0.9"]
    found = forged_fx.sweep(model, [x], x, y, **OPTIONS | quick | {"ratios": [0.25]})
    assert [point.name for point in found.points] == ["hard 0.25"]


def test_what_is_asked_for_is_what_is_swept(toy):
    model, x, y = toy
    call = OPTIONS | {"attacks": ["noise"], "eps": 2.0, "norm": "L2"}
    found = forged_fx.sweep(model, [x], x, y, **call, include="3", seed=1)
    same, other = (forged_fx.sweep(model, [x], x, y, **call, exclude="1", seed=seed) for seed in (1, 2))
    assert found.sites == same.sites == ["3"] and found.threat.norm == "L2"
    assert found.points == same.points
    assert (found.worst, found.points) != (other.worst, other.points)  # noise is drawn from the seed
    table = found.tables()[0].rows
    assert table[0][1] == str(found.worst)
    assert [row[2] for row in table[1:]] == [f"{100 * (p.worst - found.worst) / 24:+.1f}" for p in found.points]


def test_batches_are_calibrated_by_channel_where_the_kind_asks(toy):
    model, x, y = toy
    call = OPTIONS | {"attacks": ["noise"], "kinds": None, "ratios": {"mean": [0.1]}}
    assert [point.name for point in forged_fx.sweep(model, [x], x, y, **call).points] == ["mean 0.1"]


def test_throughput_is_a_share_of_the_bases(toy, monkeypatch):
    model, x, y = toy
    times = {"base": [2.0, 2.0, 2.0], "hard 0.25": [1.0, 2.0, 8.0]}
    monkeypatch.setattr(
        sys.modules["forged_fx.sweep"],
        "interleave",
        lambda calls, rounds, wait: {call: np.array(times[call[1]]) for call in calls},
    )
    call = OPTIONS | {"attacks": ["noise"], "kinds": None, "ratios": [0.25], "rounds": 3}
    (point,) = forged_fx.sweep(model, [x], x, y, **call).points
    assert (point.speed, point.speed_low, point.speed_high) == (1.0, 0.625, 1.5)


def test_shares_are_of_all_elements_that_enter_forged_sites():
    """What is zero already was not zeroed, and a site counts by its elements."""
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(40, 9), torch.nn.ReLU(), torch.nn.Linear(9, 3)), torch.randn(200, 40)
    stats = forged_fx.calibrate(model, [x])
    zeroed, limited = shares_changed(forged_fx.transform(model, stats, (2**-5, 0.3), kind="band"), stats)
    entering = [x, model[:2](x)]
    low, high = (sum(int(part.sum()) for part in parts) for parts in zip(*(
        ((v.abs() < 2**-5 * v.abs().max()) & (v != 0), v.abs() > 0.3 * v.abs().max()) for v in entering
    ), strict=True))  # fmt: skip
    elements = sum(v.numel() for v in entering)
    assert zeroed == pytest.approx(low / elements, rel=0.02) and limited == pytest.approx(high / elements, rel=0.02)
    assert shares_changed(forged_fx.transform(model, stats, 0.1, kind="one_sided"), stats)[0] is None


def test_the_audit_has_its_example_on_the_models_device(toy, monkeypatch):
    """Where the model is on another device than x: moved there, as the attacks move what they ask."""
    model, x, y = toy
    stats, seen = forged_fx.calibrate(model, [x]), []

    def forge(self, model, stats, example):
        seen.append(example[0][0].device.type)
        raise KeyboardInterrupt

    monkeypatch.setattr(Configuration, "forge", forge)
    with pytest.raises(KeyboardInterrupt):
        forged_fx.sweep(planted.copy.deepcopy(model).to("meta"), stats, x, y, **OPTIONS)
    assert seen == ["meta"]


def test_the_model_is_left_as_it_was(toy):
    model, x, y = toy
    model.train()
    before, state = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    forged_fx.sweep(model, forged_fx.calibrate(model, [x]), x, y, **OPTIONS)
    assert torch.equal(torch.get_rng_state(), before) and model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    model.eval()


def test_errors_name_what_is_wrong(toy, tmp_path):
    model, x, y = toy
    for change, message in (
        ({"kinds": ()}, "at least one point"),
        ({"ratios": [0.5, 0.5]}, "none twice"),
        ({"ratios": {"hard": [0.5]}}, "none for kind 'clamp'"),
        ({"kinds": ["hard"]}, "some for kind 'clamp', which is not among"),
        ({"ratios": {"hard": [0.5], "clmp": [0.5]}, "kinds": None}, "no kind 'clmp'; did you mean 'clamp'"),
        ({"ratios": [3.0]}, "ratio"),
    ):
        with pytest.raises(ValueError, match=message):
            forged_fx.sweep(model, [x], x, y, **OPTIONS | change)
    for change, message in (
        ({"kinds": "hard"}, r"kinds='hard': a list of names, such as \['hard'\]"),
        ({"ratios": 0.1}, r"ratios=0.1: a list of numbers, such as \[0.1\]"),
        ({"ratios": {"hard": 0.1, "clamp": [0.5]}}, r"ratios=0.1: a list of numbers"),
        ({"ratios": [{"1": 0.1, "*": 0.2}]}, r"\{'1': 0.1, '\*': 0.2\} is no ratio.*include= or exclude="),
        ({"ratios": {"hard": [{"1": 0.1}], "clamp": [0.5]}}, r"one ratio, at every site.*forged_fx.search"),
    ):
        with pytest.raises(TypeError, match=message):
            forged_fx.sweep(model, [x], x, y, **OPTIONS | change)
    (tmp_path / "sweep.json").write_text('{"format": 1, "points": [[]]}')
    with pytest.raises(ValueError, match="holds no sweep"):
        Sweep.load(tmp_path)


def test_a_configuration_reads_as_people_write_it(toy):
    model, x, _ = toy
    both = Configuration((("1", "clamp", 0.7), ("3", "band", (2**-6, 0.5))))
    assert str(both) == "band 1/64 to 0.5 at 3; clamp 0.7 at 1" and str(Configuration()) == "nothing forged"
    assert Configuration.of(json.loads(json.dumps(both.record()))) == both
    assert [written(ratio) for ratio in (2**-8, 0.3, 0.5, None, 0.0)] == ["1/256", "0.3", "0.5", "off", "0"]
    for wrong in (3, [["1", "clamp"]], [["1", "clamp", "x"]], [["1", "clamp", [1, 2, 3]]]):
        with pytest.raises(ValueError, match="is no configuration"):
            Configuration.of(wrong)
    forged = both.forge(model, forged_fx.calibrate(model, [x]), ((x[:2],), {}))
    assert {row.site: row.forging for row in forged_fx.describe(forged)} == {"1": "clamp", "3": "band"}
    with pytest.raises(ValueError, match="forges nothing"):
        Configuration().forge(model, forged_fx.calibrate(model, [x]))


class Rounds(torch.nn.Module):
    """Its gradient is 0, and no attack knows what to make of it."""

    def forward(self, x):
        return (x * 16).round() / 16


def test_it_says_no_more_than_evaluate_where_no_attack_sees_through():
    base, x, y = planted.small()
    model, how = torch.nn.Sequential(Rounds(), *base).eval(), {"eps": 0.1, "attacks": ["apgd-ce"]}
    stats = forged_fx.calibrate(model, [x])
    *_, point = forged_fx.sweep(model, stats, x, y, ratios=[2**-9], rounds=0, **how).points
    result = forged_fx.evaluate(forged_fx.transform(model, stats, 2**-9), model, x=x, y=y, **how)
    assert point.verdict == result.verdict == "cannot say"
    assert "no attack saw through them" in point.sentence and "no attack saw through them" in result.sentence


def test_a_point_that_is_the_base_has_no_interval(toy):
    model, x, y = toy
    stats = forged_fx.calibrate(model, [x])
    (point,) = forged_fx.sweep(model, stats, x, y, eps=0.1, attacks=["apgd-ce"], ratios=[0.0], rounds=0).points
    assert (point.low, point.high) == (0, 0) and "the same logits on every input" in point.sentence


def test_copies_of_inputs_are_no_further_inputs(toy):
    model, x, y = toy
    copies = {"x": torch.cat([x[:6], x[:3]]), "y": torch.cat([y[:6], y[:3]])}
    with pytest.warns(UserWarning, match=r"3 of 9 inputs are copies of others: .* of the other 6 alone"):
        result = forged_fx.evaluate(model, **copies, eps=0.1, attacks="apgd-ce")
    assert any("3 of 9 inputs are copies of others" in note for note in result.notes)
    stats = forged_fx.calibrate(model, [x])
    options = {"eps": 0.1, "attacks": "apgd-ce", "ratios": [0.1], "kinds": ["hard"], "rounds": 0}
    with pytest.warns(UserWarning, match=r"3 of 9 inputs are copies of others") as warned:
        many = forged_fx.sweep(model, stats, **copies, **options)
    assert {warning.filename for warning in warned} == {__file__}  # the caller's
    few = forged_fx.sweep(model, stats, x[:6], y[:6], **options)
    assert (many.n, many.points[0].low, many.points[0].p) == (9, few.points[0].low, few.points[0].p)
    assert "of the 6 inputs that are no copies of others" in many.sentence and "copies" not in few.sentence


def test_throughput_is_that_of_eager_models(toy, monkeypatch):
    model, x, y = toy
    seen = []
    timing = sys.modules["forged_fx.sweep"]

    def interleave(calls, *_):
        seen.extend(call.func for call in calls.values())
        return dict.fromkeys(calls, np.ones(3))

    monkeypatch.setattr(timing, "interleave", interleave)
    forged_fx.sweep(torch.compile(model, backend="eager"), [x], x, y, **OPTIONS | {"rounds": 1})
    assert seen and not any(hasattr(one, "_orig_mod") for one in seen)
