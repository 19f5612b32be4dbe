"""What is printed and what is kept."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from planted import Hidden, inputs, linear, straight_through
from safetensors.torch import load_file, save_file

import forged_fx
from forged_fx.evaluate import Result, fingerprint, gallery, record, terminal
from forged_fx.evaluate.harness import Subject
from forged_fx.evaluate.result import Row, Side
from forged_fx.evaluate.threat import Threat

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(scope="module")
def judged():
    base, x = linear(classes=4), inputs(30)
    y = base(x).argmax(1)
    y[:3] = (y[:3] + 1) % 4
    model = Hidden(base)
    result = forged_fx.evaluate(model, base=base, x=x, y=y, eps=0.01, attacks="quick", bpda=straight_through)
    return result, model, base, x, y


FILES = ["examples.safetensors", "result.json", "timing.json"]


def test_saved_and_loaded_is_the_same(judged, tmp_path):
    result, model, base, x, y = judged
    result.save(tmp_path / "a")
    loaded = Result.load(tmp_path / "a")
    loaded.save(tmp_path / "b")
    for name in ("result.json", "examples.safetensors", "timing.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert str(loaded) == str(result) and loaded.verdict == result.verdict
    assert loaded.rows == result.rows and loaded.worst_case == result.worst_case
    for ours, theirs in zip(result.sides, loaded.sides, strict=True):
        assert torch.equal(ours.broken_by, theirs.broken_by) and torch.equal(ours.examples, theirs.examples)
    loaded.verify(model, x, y, base)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == FILES


def test_the_json_says_everything(judged, tmp_path):
    result, model, _, x, y = judged
    result.save(tmp_path)
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["headline"]["verdict"] == result.verdict
    assert record["headline"]["transfer"]["model"] == result.worst_case
    assert record["robustbench"] == {
        "eps": "0.01",
        "clean_acc": "90.00",
        "external": f"{100 * result.worst_case:.2f}",
    }  # no autoattack_acc: the quick attacks are not AutoAttack
    assert record["seed"] == 0 and record["n"] == 30
    assert {"torch", "pyautoattack", "forged_fx"} <= set(record["versions"])
    assert record["data"]["x_sha256"] == fingerprint.of_tensors([("x", x)])
    side = record["sides"][0]
    assert side["fingerprint"] == fingerprint.of_model(model)
    assert len(side["broken_by"]) == 30 and side["broken_by"][:3] == [0, 0, 0]
    examples = load_file(tmp_path / "examples.safetensors")
    wrong = [i for i, row in enumerate(side["broken_by"]) if row >= 0]
    assert examples["model.index"].tolist() == wrong
    with torch.no_grad():
        assert (model(examples["model.x"]).argmax(1) != y[wrong]).all()
    assert ((examples["model.x"] - x[wrong]).abs() <= 0.01 + 1e-6).all()


def test_evaluate_writes_its_folder_and_returns_what_it_holds(judged, tmp_path, monkeypatch):
    _, model, base, x, y = judged
    call = {"x": x, "y": y, "eps": 0.01, "attacks": ["apgd-ce"], "bpda": straight_through, "folder": tmp_path}
    result = forged_fx.evaluate(model, base=base, **call)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(files) == ["examples.safetensors", "log.txt", "result.json", "timing.json"]
    assert str(Result.load(tmp_path)) == str(result)
    with pytest.raises(FileExistsError, match="another folder"):
        result.save(tmp_path)
    monkeypatch.setattr(Subject, "natural", None)  # no attack is run again
    again = forged_fx.evaluate(model, base=base, **call)
    assert str(again) == str(result) and torch.equal(again.model.examples, result.model.examples)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    result.save(tmp_path, overwrite=True)


@pytest.mark.parametrize("file", [1, 3, 5])  # in between the folder itself is brought to the disk
def test_a_failed_save_leaves_nothing_half_written(judged, tmp_path, monkeypatch, file):
    result = judged[0]
    result.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    written = []

    def full(*args):
        written.append(args)
        if len(written) == file:
            raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        result.save(tmp_path, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_save_over_another_result_that_is_killed_leaves_one_of_them(judged, tmp_path, monkeypatch):
    """What is on the disk before and after each change of a name, when it is killed there, loads and is saved over."""
    new, model, base, x, y = judged
    old = forged_fx.evaluate(model, x=x, y=y, eps=0.02, attacks=["apgd-ce"], bpda=straight_through)
    old.save(tmp_path / "run")
    replace, states = os.replace, []

    def seen(*names):
        for act in (lambda: None, lambda: replace(*names)):
            act()
            states.append(shutil.copytree(tmp_path / "run", tmp_path / str(len(states))))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", seen)
        new.save(tmp_path / "run", overwrite=True)
    assert len(states) == 8  # examples, times, record, and the name of the examples
    loaded = [Result.load(state) for state in states]
    assert [str(one.threat.eps) for one in loaded] == ["0.02"] * 5 + ["0.01"] * 3
    for one in loaded[5:]:
        assert str(one) == str(new)
        one.verify(model, x, y, base)
    for state in states:
        new.save(state, overwrite=True)
        assert sorted(path.name for path in Path(state).iterdir() if path.name[0] != ".") == FILES
        assert str(Result.load(state)) == str(new)


def test_a_save_that_fails_at_last_has_saved(judged, tmp_path, monkeypatch):
    result, *_ = judged
    result.save(tmp_path)
    sync, written = os.fsync, []

    def fails(file):
        written.append(file)
        if len(written) == 6:  # the folder, when the record has its name
            raise OSError("no disk")
        sync(file)

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="no disk"):
        result.save(tmp_path, overwrite=True)
    assert str(Result.load(tmp_path)) == str(result)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


def edit(folder, change):
    path = folder / "result.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def swap(folder):
    tensors = load_file(folder / "examples.safetensors")
    tensors["model.x"] = tensors["model.x"] * 0
    save_file(tensors, folder / "examples.safetensors")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: edit(f, lambda r: r.update(format=99)), "format 99"),
        (swap, "is not the file"),
        (lambda f: edit(f, lambda r: r["sides"][0]["broken_by"].pop()), "do not agree"),
        (lambda f: edit(f, lambda r: r["sides"][0]["broken_by"].__setitem__(0, 99)), "do not agree"),
        (lambda f: edit(f, lambda r: r["sides"][1]["broken_by"].__setitem__(0, -1)), "do not agree"),
        (lambda f: edit(f, lambda r: r["sides"][0]["rows"][1].update(broken=1)), "row 1 and its outcomes"),
        (
            lambda f: edit(f, lambda r: r["sides"][0]["rows"][1].update(standing=30)),
            "row 1 and its outcomes do not agree",
        ),
        (lambda f: edit(f, lambda r: r["findings"][0].update(raised=True, value=None)), "raised without a value"),
        (lambda f: edit(f, lambda r: r.pop("seed")), "no complete result"),
        (lambda f: edit(f, lambda r: r["sides"][0]["rows"][0].pop("kind")), "no complete result"),
        (lambda f: edit(f, lambda r: r["data"].update(x_shape=[30, 1, 7, 7])), "do not agree"),
    ],
)
def test_a_spoilt_record_is_refused(judged, tmp_path, spoil, words):
    judged[0].save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=words):
        Result.load(tmp_path)


def test_a_missing_file_of_examples_is_told_as_a_truncated_one_is(judged, tmp_path):
    result = judged[0]
    result.save(tmp_path)
    examples = tmp_path / "examples.safetensors"
    there = examples.rename(tmp_path / "next.examples.safetensors")  # killed before it got its name
    assert str(Result.load(tmp_path)) == str(result)
    there.unlink()
    with pytest.raises(
        ValueError, match=r"no complete result \(examples.safetensors is missing\): evaluate anew, in ano"
    ):
        Result.load(tmp_path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda said: {**said, "seconds": {"model": [1.0]}},
        lambda said: {**said, "seconds": {name: [-1.0] * len(row) for name, row in said["seconds"].items()}},
        lambda said: {**said, "machine": 3},
        lambda said: {**said, "probe_seconds": "\x1b"},
        lambda said: {},
        lambda said: "half",
    ],
)
def test_a_damaged_record_of_times_is_read_as_none(judged, tmp_path, spoil):
    result = judged[0]
    result.save(tmp_path)
    path = tmp_path / "timing.json"
    path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
    loaded = Result.load(tmp_path)
    assert loaded.verdict == result.verdict and sum(row.seconds for row in loaded.rows) == 0
    (note,) = set(loaded.notes) - set(result.notes)
    assert note.startswith("timing.json is damaged (") and "\x1b" not in note and note in " ".join(str(loaded).split())


def test_verify_finds_what_does_not_hold(judged, tmp_path):
    result, model, _, x, y = judged
    for other in ((x.flip(0), y), (x, (y + 1) % 4)):
        with pytest.raises(ValueError, match="not the data"):
            result.verify(model, *other)
    result.save(tmp_path)
    loaded = Result.load(tmp_path)
    loaded.model.examples[-1] = x[loaded.model.broken[-1]]
    with pytest.raises(ValueError, match="1 are classified rightly, and 0 lie outside"):
        loaded.verify(model, x, y)
    loaded.model.examples[-1] = 1 - x[loaded.model.broken[-1]]
    with pytest.raises(ValueError, match="1 lie outside"):
        loaded.verify(model, x, y)


def test_what_falls_to_the_right_side_of_a_boundary_by_rounding_is_counted(judged, tmp_path):
    result, model, _, x, y = judged
    result.save(tmp_path)
    k = int(result.model.broken[-1])
    right, wrong = x[k], result.model.examples[-1]
    for _ in range(10):  # nearer to each other than is told from rounding
        middle = (right + wrong) / 2
        right, wrong = (middle, wrong) if model(middle[None]).argmax() == y[k] else (right, middle)
    for example, boundary in ((right, 1), (wrong, 0)):
        loaded = Result.load(tmp_path)
        loaded.model.examples[-1] = example
        assert loaded.verify(model, x, y) == boundary


def test_the_table(judged):
    result = judged[0]
    shown = str(result)
    for words in (
        result.verdict,
        "worst case",
        "true gradient alone",
        "apgd-t",
        "BPDA",
        "seed 0",
        "95 % interval",
        "bootstrap",
    ):
        assert words in shown
    assert shown.index("worst case") < shown.index("no attack")  # the least flattering leads
    assert "\x1b" not in shown
    assert repr(result).startswith("<Result: ")


def test_rows_are_listed_as_one_where_they_were_left_out_for_one_reason():
    out, odd = "left out: no gradient changes", "1 examples outside the ball or the box do not count"
    rows = [Row("model", "BPDA", name, note=note) for name, note in zip("abcde", (out, out, odd, odd, ""), strict=True)]
    side = Side("model", "", "", rows, torch.zeros(0), torch.zeros(0))
    assert [row.attack for row in side.listed] == ["a, b", "c", "d", "e"]


def test_progress_is_silent_unless_on_a_terminal(judged, monkeypatch):
    _, model, _, x, y = judged

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    written = {}
    for name, stream in (("file", io.StringIO()), ("terminal", Terminal())):
        monkeypatch.setattr(sys, "stderr", stream)
        forged_fx.evaluate(model, x=x, y=y, eps=0.01, attacks=["apgd-ce"], bpda=straight_through)
        written[name] = stream.getvalue()
    assert written["file"] == "" and "apgd-ce" in written["terminal"]
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert terminal.Progress(False)._bar is None


def test_progress_and_its_estimate_begin_within_the_first_block(judged, monkeypatch):
    _, model, _, x, y = judged
    shown = terminal.Progress(True)
    shown.begin("a row", total=20, passes=100)
    for _ in range(50):
        shown.fed(10)  # a block of 10, half done
    assert shown._bar.tasks[0].completed == pytest.approx(5)
    shown.advance(10)
    assert shown._bar.tasks[0].completed == 10
    shown.fed(10**6)  # no more than there are
    assert shown._bar.tasks[0].completed == 20

    fed = []
    monkeypatch.setattr(terminal.Progress, "fed", lambda self, inputs: fed.append(inputs))
    forged_fx.evaluate(model, x=x, y=y, eps=1e-4, attacks=["apgd-ce"], bpda=straight_through)
    assert sum(fed) == pytest.approx(2 * 27 * 102, rel=0.02)  # the true gradient and BPDA, 27 inputs, 102 passes


def test_robustbench_writes_grey_levels_as_fractions(judged):
    result = judged[0]
    for eps, norm, written in ((8 / 255, "Linf", "8/255"), (0.5, "L2", "0.5"), (0.3, "Linf", "0.3")):
        changed = dataclasses.replace(result, threat=Threat(eps, norm), complete=True)
        fields = record.robustbench(changed)
        assert fields["eps"] == written
        assert fields["autoattack_acc"] == f"{100 * result.model.accuracy('true gradient'):.2f}"
        assert float(fields["external"]) < float(fields["autoattack_acc"]) <= float(fields["clean_acc"]) == 90


def test_importing_needs_torch_only():
    code = (
        "import sys; import forged_fx.evaluate; "
        "print([name for name in ('pyautoattack', 'rich', 'safetensors', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_fingerprints_tell_tensors_apart():
    a = torch.arange(6.0)
    prints = {
        fingerprint.of_tensors([(name, value)])
        for name, value in [
            ("a", a),
            ("b", a),
            ("a", a.view(2, 3)),
            ("a", a.double()),
            ("a", a.to(torch.bfloat16)),
            ("a", a + 1),
            ("a", None),
        ]
    }
    assert len(prints) == 7
    assert fingerprint.of_tensors([("a", a)]) == fingerprint.of_tensors([("a", a.view(2, 3).T.T.reshape(6))])
    assert fingerprint.of_tensors([("a", torch.tensor(1.0))])  # 0-dimensional


def test_fingerprints_tell_programs_apart():
    """A program of torch.export has no record of its forging: its kinds are in its code."""
    layer, x = torch.nn.Linear(4, 3).eval(), torch.rand(5, 4)
    stats = forged_fx.calibrate(layer, [x])
    forged = [forged_fx.transform(layer, stats, 0.1, kind=kind) for kind in ("hard", "soft", "hard")]
    programs = [torch.export.export(one, (x,)) for one in forged]
    hard, soft, again = (fingerprint.of_model(program.module()) for program in programs)
    assert hard != soft and hard == again


@pytest.mark.parametrize(("norm", "length"), [("Linf", 0.5), ("L2", 1.0), ("L1", 2.0)])
def test_the_ball_in_each_norm(norm, length):
    x = torch.full((1, 1, 2, 2), 0.25)
    adv = x + 0.5
    assert Threat(length, norm).distance(x, adv).item() == length
    assert Threat(length, norm).allows(x, adv).all()
    assert not Threat(length * 0.9999, norm).allows(x, adv).any()
    assert not Threat(10.0, norm).allows(x, adv + 0.2501).any()  # out of the box
    assert not Threat(10.0, norm).allows(x, adv * torch.nan).any()


def test_the_gallery_holds_some_of_what_attacks_broke(judged, tmp_path):
    result, model, _, x, y = judged
    shown = result.gallery
    assert 0 < len(shown.index) <= gallery.SHOWN and bool((result.model.broken_by[shown.index] > 0).all())
    assert torch.equal(shown.x, x[shown.index]) and torch.equal(shown.y, y[shown.index])
    examples = result.model.examples[torch.isin(result.model.broken, shown.index)]
    assert torch.equal(model(examples).argmax(1), shown.predicted) and bool((shown.predicted != shown.y).all())
    result.save(tmp_path)
    loaded = Result.load(tmp_path).gallery
    assert all(torch.equal(value, vars(loaded)[name]) for name, value in vars(shown).items())


def test_the_gallery_takes_of_each_row_in_turn():
    rows = [Row("model", "natural", "none"), *(Row("model", "BPDA", name) for name in "ab")]
    side = Side("model", "", "", rows, torch.tensor([0, 1, -1, 1] + [1] * 20 + [2, 2]), torch.zeros(0))
    assert gallery.choose(side).tolist() == [1, *range(3, 12), 24, 25]


@pytest.mark.parametrize("others", ["not broken", "one again and again", "in no order"])
def test_a_gallery_of_other_inputs_is_refused(judged, tmp_path, others):
    result = judged[0]
    result.save(tmp_path)
    tensors = load_file(tmp_path / "examples.safetensors")
    shown = tensors["gallery.index"]
    tensors["gallery.index"] = {
        "not broken": (result.model.broken_by <= 0).nonzero().flatten()[: len(shown)],
        "one again and again": shown[-1:].repeat(len(shown)),
        "in no order": shown.flip(0),
    }[others]
    save_file(tensors, tmp_path / "examples.safetensors")
    edit(tmp_path, lambda record: record.update(examples_sha256=fingerprint.of_file(tmp_path / "examples.safetensors")))
    with pytest.raises(ValueError, match="its gallery shows other inputs"):
        Result.load(tmp_path)
