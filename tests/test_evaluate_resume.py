"""An unfinished run goes on, and nothing else does."""

import json
import os
import platform
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import planted
import pytest
import torch
from planted import Hidden, inputs, linear
from safetensors.torch import load

from forged_fx import calibrate, transform
from forged_fx.evaluate import Result, answers, blocks
from forged_fx.evaluate.harness import Subject
from forged_fx.evaluate.journal import Journal, differences, pack
from forged_fx.sources.classifier import Classifier

pytestmark = pytest.mark.usefixtures("single_thread")


def test_killed_at_any_moment_the_same_call_ends_with_the_same_result(tmp_path):
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("killed.py"), tmp_path, "23"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert len(told["once"]) >= 20 and told["changes"] > 100
    redone = []
    for moment, killed, resumed, blocks_done, same in told["once"]:
        assert (killed, resumed, same) == (9, 0, True), f"killed at change {moment} of {told['changes']}"
        redone.append(blocks_done)
    # and what was finished is not done again
    assert redone == sorted(redone, reverse=True)
    assert redone[0] == told["blocks"] and redone[-1] == 0 and len(set(redone)) > 10
    ends, same = told["often"]
    assert len(ends) > 4 and set(ends[:-1]) == {9} and ends[-1] == 0 and same


class Stop(Exception):
    pass


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 10)
    base, x = linear(classes=4), inputs(30)
    y = base(x).argmax(1)
    return {
        "model": Hidden(base),
        "base": base,
        "x": x,
        "y": y,
        "eps": 0.05,
        "attacks": ["apgd-ce"],
        "folder": tmp_path,
    }


@pytest.fixture
def unfinished(call, monkeypatch):
    """A folder with three finished blocks: those of the base's first row."""
    with monkeypatch.context() as patch:
        patch.setattr(Subject, "sees_through", lambda *args: (_ for _ in ()).throw(Stop("enough")))
        with pytest.raises(Stop):
            planted.evaluate(**call)
    assert len(list((call["folder"] / "unfinished").glob("*.safetensors"))) == 7  # and both sides' logits and slopes
    return call


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


OTHER = {
    "threat.eps: 0.05 there, 0.06 here": {"eps": 0.06},
    "threat.norm: Linf there, L2 here": {"norm": "L2"},
    "seed: 0 there, 1 here": {"seed": 1},
    r"plan.true: \['apgd-ce'\] there, \['apgd-t'\] here": {"attacks": ["apgd-t"]},
    "bpda: planted.straight_through there, contextlib.nullcontext here": {"bpda": nullcontext},
    r"model.fingerprint: \w{12}... there, \w{12}... here": {"model": Hidden(linear(classes=4, seed=1))},
    "model.class: Hidden there, Sequential here": {"model": linear(classes=4)},
    "base: {.*} there, none here": {"base": None},
    r"data.x_shape: \[30, 1, 6, 6\] there, \[29, 1, 6, 6\] here": {"x": inputs(30)[:29], "y": torch.zeros(29).long()},
    r"data.x_sha256: \w{12}... there": {"x": inputs(30).flip(0)},
    r"data.y_sha256: \w{12}... there": {"y": torch.zeros(30).long()},
}
_BPDA = "bpda: planted.straight_through there, contextlib.nullcontext here"
OTHER[_BPDA] = OTHER.pop(_BPDA)


@pytest.mark.parametrize("words", OTHER)
@pytest.mark.parametrize("state", ["unfinished", "finished"])
def test_another_call_is_refused_with_the_difference(request, call, state, words):
    if state == "finished":
        planted.evaluate(**call)
    else:
        request.getfixturevalue("unfinished")
    before = snapshot(call["folder"])
    with pytest.raises(FileExistsError, match=f"another call; choose another folder. .*{words}"):
        planted.evaluate(**(call | OTHER[words]))
    assert snapshot(call["folder"]) == before


@contextmanager
def weighed(weight, name="one"):
    yield


def test_a_backward_is_known_by_its_arguments(call):
    planted.evaluate(**call | {"bpda": partial(weighed, 1)})
    assert planted.evaluate(**call | {"bpda": partial(weighed, 1)}).bpda == f"{__name__}.weighed(1)"
    with pytest.raises(FileExistsError, match=r"bpda: .*\.weighed\(1\) there, .*\.weighed\(1, name='two'\) here"):
        planted.evaluate(**call | {"bpda": partial(weighed, 1, name="two")})


def closure(weight):
    return lambda: weighed(weight)


def named_closure(weight):
    @contextmanager
    def own():
        with weighed(weight):
            yield

    return own


class Context:
    def __call__(self):
        return weighed(1)

    @contextmanager
    def method(self):
        with weighed(self):
            yield


@pytest.mark.parametrize(
    "bpda", [closure(1), named_closure(1), Context(), Context().method, partial(weighed, Context())]
)
def test_a_backward_that_no_name_tells_from_others_is_refused_in_a_folder(call, bpda):
    with pytest.raises(ValueError, match=r"bpda is .*, by which a run in a folder cannot be told.*functools.partial"):
        planted.evaluate(**call | {"bpda": bpda})
    assert planted.evaluate(**call | {"bpda": bpda, "folder": None}).n == 30


def test_another_kind_at_the_same_thresholds_is_refused_by_its_name(call):
    """Kinds share the names of their buffers: the state alone is the same."""
    stats = calibrate(call["base"], [call["x"]])
    hard, soft = (transform(call["base"], stats, 2**-4, kind=kind) for kind in ("hard", "soft"))
    assert all(torch.equal(a, b) for a, b in zip(hard.state_dict().values(), soft.state_dict().values(), strict=True))
    found = planted.evaluate(**call | {"model": soft})
    assert found.model.forging.startswith("soft at 1 (sum ")
    before = snapshot(call["folder"])
    words = r"model.forging: soft at 1 \(sum \w{12}\) there, hard at 1 \(sum \w{12}\) here"
    with pytest.raises(FileExistsError, match=words):
        planted.evaluate(**call | {"model": hard})
    assert snapshot(call["folder"]) == before
    planted.evaluate(**call | {"model": soft})  # its own


def test_another_normalisation_is_refused(call):
    """Mean and deviation are in no state_dict."""
    here, there = (Classifier(Hidden(call["base"]), ((mean,), (0.5,))) for mean in (0.5, 0.4))
    planted.evaluate(**call | {"model": there})
    with pytest.raises(FileExistsError, match=r"model.fingerprint: \w{12}... there"):
        planted.evaluate(**call | {"model": here})


def test_what_only_one_call_says_is_a_difference():
    there, here = {"a": 1, "b": {"c": 2}, "command": ["x"]}, {"a": 1, "b": {"c": 2, "d": 3}, "command": ["y"]}
    assert list(differences(there, here)) == [("b.d", "none", "3")]
    assert list(differences(here, there)) == [("b.d", "3", "none")]


def test_another_version_is_refused(unfinished, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "9.9")
    with pytest.raises(FileExistsError, match=r"versions.torch: 2.* there, 9.9 here"):
        planted.evaluate(**unfinished)


def test_another_python_goes_on(unfinished, monkeypatch):
    monkeypatch.setattr(platform, "python_version", lambda: "9.9")
    assert planted.evaluate(**unfinished).n == 30 == planted.evaluate(**unfinished).n
    assert "7 blocks are finished" in (unfinished["folder"] / "log.txt").read_text()


def test_other_memory_goes_on_where_it_was(unfinished):
    """Killed for memory, the run goes on at a smaller batch size."""
    result = planted.evaluate(**unfinished, batch_size=5)
    again = planted.evaluate(**(unfinished | {"folder": None}))
    assert torch.equal(result.model.broken_by, again.model.broken_by)
    log = (unfinished["folder"] / "log.txt").read_text()
    for words in ("began: 30 inputs", "stopped by Stop: enough", "7 blocks are finished", "finished: "):
        assert words in log
    assert log.count("base: true gradient, apgd-ce") == 1  # said once, though it was run through twice


def test_where_nothing_is_finished_another_call_may_begin(call, monkeypatch):
    with pytest.raises(ValueError, match="classes"):
        planted.evaluate(**(call | {"y": call["y"] + 9}))
    assert planted.evaluate(**call).n == 30


def test_an_unfinished_run_is_no_result(unfinished):
    with pytest.raises(FileNotFoundError, match="the same call of evaluate finishes it"):
        Result.load(unfinished["folder"])
    with pytest.raises(FileExistsError, match="unfinished"):
        planted.evaluate(**(unfinished | {"folder": None})).save(unfinished["folder"])


def test_two_processes_do_not_share_a_folder(unfinished, call):
    holder = (
        "import sys; from forged_fx.evaluate.journal import Journal; from pathlib import Path; import json;"
        "folder = Path(sys.argv[1]); call = json.loads((folder / 'unfinished' / 'call.json').read_text());"
        "journal = Journal(folder, call); print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", holder, str(call["folder"])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match="another process works on"):
            planted.evaluate(**call)
        process.kill()
    assert planted.evaluate(**call).n == 30  # a killed process holds nothing


@pytest.mark.parametrize("held", [False, True])
def test_a_finished_run_that_is_asked_for_again_leaves_the_unfinished_run_of_another_call(call, held):
    planted.evaluate(**call)
    with Journal(call["folder"], {"command": [], "of": "a sweep"}) as other:
        other.keep("a", 0, b"found")
        if held:
            assert planted.evaluate(**call).n == 30
    assert planted.evaluate(**call).n == 30
    with Journal(call["folder"], {"command": [], "of": "a sweep"}) as other:
        assert other.resumed == 1


def test_files_of_others_are_left_alone(call):
    folder = call["folder"]
    (folder / ".film.mkv.part").write_text("the caller's")
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "notes.txt").write_text("the caller's")
    before = snapshot(folder)
    with pytest.raises(FileExistsError, match=r"unfinished is no run's, it holds 'notes.txt': choose another folder"):
        planted.evaluate(**call)
    assert snapshot(folder) == before
    (folder / "unfinished").rename(folder / "mine")
    planted.evaluate(**call)
    (folder / "mine").rename(folder / "unfinished")
    planted.evaluate(**call)
    assert snapshot(folder).items() >= before.items()


def test_a_link_leads_to_no_files_of_others(call, tmp_path):
    (tmp_path / "theirs").mkdir()
    for name in ("call.json", "precious.txt"):
        (tmp_path / "theirs" / name).write_text("{}")
    call["folder"].mkdir(exist_ok=True)
    (call["folder"] / "unfinished").symlink_to(tmp_path / "theirs")
    with pytest.raises(FileExistsError, match="unfinished is a link"):
        planted.evaluate(**call)
    assert {path.name for path in (tmp_path / "theirs").iterdir()} == {"call.json", "precious.txt"}


def test_a_folder_within_does_not_keep_the_result_back(unfinished):
    folder = unfinished["folder"] / "unfinished" / ".ipynb_checkpoints"
    folder.mkdir()
    planted.evaluate(**unfinished)
    assert not folder.parent.exists()


def test_a_damaged_block_is_done_anew(unfinished):
    victim = next((unfinished["folder"] / "unfinished").glob("base_1*0001.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1])
    result = planted.evaluate(**unfinished)
    assert "is damaged, and its block done anew" in (unfinished["folder"] / "log.txt").read_text()
    assert torch.equal(result.base.broken_by, planted.evaluate(**(unfinished | {"folder": None})).base.broken_by)


def test_a_block_that_breaks_the_rules_is_refused(unfinished):
    victim = next((unfinished["folder"] / "unfinished").glob("base_1*0001.safetensors"))
    tensors = load(victim.read_bytes())  # a copy: what `load_file` returns changes with the file
    broken = tensors["broken"]
    for change, words in (
        ({"examples": tensors["examples"] + 0.06}, "outside the ball or the box"),
        ({"broken": broken - 10}, "other inputs than those that stand"),
        ({"broken": broken[:1].expand(len(broken))}, "other inputs than those that stand"),
        ({"block": tensors["block"] - 10}, "other inputs stand"),
        ({"broken": broken.float(), "extra": broken}, "holds broken, extra"),
    ):
        victim.write_bytes(pack(tensors | change))  # else it is damaged, and done anew
        with pytest.raises(ValueError, match=words):
            planted.evaluate(**unfinished)


class Scaled(Hidden):
    factor, shared = 1, 0

    def forward(self, x):
        return super().forward(x) * self.factor + self.shared


@pytest.mark.parametrize("shared", [0, 100])
def test_a_model_whose_code_has_changed_is_refused(call, monkeypatch, shared):
    """The state is the same, and so is every prediction."""
    monkeypatch.setattr(Scaled, "shared", shared)
    call["model"] = Scaled(call["base"])
    with monkeypatch.context() as patch:
        patch.setattr(Subject, "replay", lambda *args: (_ for _ in ()).throw(Stop("enough")))
        with pytest.raises(Stop):
            planted.evaluate(**call)
    monkeypatch.setattr(Scaled, "factor", 1.01)
    with pytest.raises(ValueError, match="the model gives other logits"):
        planted.evaluate(**call)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="the model gives other logits"):
        patch.setattr(Scaled, "factor", 1)
        patch.setattr(Scaled, "shared", shared + 1)  # for all classes
        planted.evaluate(**call)
    monkeypatch.setattr(Scaled, "factor", 1 + 1e-6)  # rounding
    assert planted.evaluate(**call).n == 30
    assert planted.evaluate(**call).n == 30  # the finished one
    monkeypatch.setattr(Scaled, "factor", 1.01)
    with pytest.raises(ValueError, match="the model gives other logits"):
        planted.evaluate(**call)


class Repaired(Hidden):
    """The same logits, along another gradient."""

    repaired, drawn = False, 0.0

    def forward(self, x):
        out = self.inner(x + self.drawn * torch.rand_like(x) if self.drawn else x)
        return out if self.repaired else out.detach()


@pytest.mark.parametrize("finished", [False, True])
def test_a_model_whose_backward_has_changed_is_refused(call, monkeypatch, finished):
    call["model"] = Repaired(call["base"])
    with monkeypatch.context() as patch:
        if not finished:
            patch.setattr(Subject, "replay", lambda *args: (_ for _ in ()).throw(Stop("enough")))
        with nullcontext() if finished else pytest.raises(Stop):
            planted.evaluate(**call)
    monkeypatch.setattr(Repaired, "repaired", True)
    with pytest.raises(ValueError, match="the model gives other gradients than when"):
        planted.evaluate(**call)
    monkeypatch.setattr(Repaired, "repaired", False)
    result = planted.evaluate(**call)
    record = call["folder"] / "result.json"
    told = json.loads(record.read_text())
    for side in told["sides"]:
        assert len(side.pop("slopes")["gradients"]) == 16
    record.write_text(json.dumps(told))  # of an earlier version, which did not say
    monkeypatch.setattr(Repaired, "repaired", True)
    assert Result.load(call["folder"]).verify(call["model"], call["x"], call["y"], call["base"]) == 0
    with pytest.raises(ValueError, match="other gradients"):
        result.verify(call["model"], call["x"], call["y"], call["base"])


def test_another_backward_under_bpda_is_another_code(call, monkeypatch):
    result = planted.evaluate(**call)
    assert {what for side in result.sides for what in side.slopes} == {"gradients", "gradients under BPDA"}
    planted.evaluate(**call)
    monkeypatch.setattr(planted._Hide, "backward", staticmethod(lambda ctx, grad: torch.zeros_like(grad)))
    with pytest.raises(ValueError, match="the model gives other gradients under BPDA"):
        planted.evaluate(**call)
    assert result.verify(call["model"], call["x"], call["y"], call["base"]) == 0  # where nobody says which BPDA


def test_a_model_that_draws_may_have_another_gradient_each_time(call, monkeypatch):
    monkeypatch.setattr(Repaired, "drawn", 0.05)
    monkeypatch.setattr(Repaired, "repaired", True)
    call["model"] = Repaired(torch.nn.Sequential(call["base"], torch.nn.Tanh()))
    with monkeypatch.context() as patch:
        patch.setattr(Subject, "replay", lambda *args: (_ for _ in ()).throw(Stop("enough")))
        with pytest.raises(Stop):
            planted.evaluate(**call)
    for _ in range(3):
        assert planted.evaluate(**call).n == 30


def test_rounding_turns_few_gradients_and_those_little():
    before = torch.randn(16, 8, dtype=torch.float64)
    now = before * 1.1
    now[:4] = 0
    assert answers.same_slopes(before, now) and not answers.same_slopes(now, before[:15])
    now[4] = 0
    assert not answers.same_slopes(before, now) and answers.same_slopes(0 * now, 0 * now)


def test_answers_of_an_earlier_version_are_compared_as_they_were():
    logits = torch.randn(20, 4) + 3
    earlier = [*logits.double().mean(0).tolist(), *logits.double().abs().mean(0).tolist()]
    assert answers.same(earlier, logits) and not answers.same(earlier, 1.01 * logits)
    assert not answers.same(earlier, logits[:, :3])
    assert not answers.same(answers.summary(logits), logits[:, :3])


def test_a_finished_folder_is_verified_before_it_is_returned(call, monkeypatch):
    assert len(planted.evaluate(**call).model.broken)
    monkeypatch.setattr(Hidden, "forward", lambda self, x: self.inner(x).roll(1, dims=1))
    with pytest.raises(ValueError, match="are classified rightly"):
        planted.evaluate(**call)


def test_a_finished_folder_of_a_model_that_errs_elsewhere_now_is_refused(call, monkeypatch):
    """What broke it breaks it still."""
    planted.evaluate(**call)
    y = call["y"]
    wrong = lambda self, x: torch.eye(4)[(y[: len(x)] + 1) % 4] if len(x) == 30 else self.inner(x)  # noqa: E731
    monkeypatch.setattr(Hidden, "forward", wrong)
    with pytest.raises(ValueError, match="inputs are classified otherwise without attack"):
        planted.evaluate(**call)


def test_the_journal_keeps_what_is_written_whole(tmp_path):
    with Journal(tmp_path, {"command": []}) as journal:
        assert journal.resumed == 0 and journal.recall("a b", 3) == {}
        data = blocks.Blocks(0)._do(torch.arange(3), lambda block: {"found": block * 2})
        journal.keep("a b", 1, data)
        (journal.folder / ".a_b.0002.safetensors.1.part").write_bytes(data)
        assert journal.recall("a b", 3) == {1: data}
    with Journal(tmp_path, {"command": []}) as journal:
        assert journal.resumed == 1 and journal.recall("a b", 3) == {1: data}
        assert not list(journal.folder.glob(".*.part"))


@pytest.mark.parametrize("removed", range(4))
def test_killed_while_it_is_cleared_away_a_run_says_to_the_last_whose_it_is(tmp_path, monkeypatch, removed):
    unlink, left = Path.unlink, removed

    def limited(path):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        unlink(path)

    with pytest.raises(KeyboardInterrupt), Journal(tmp_path, {"command": []}) as journal:
        for number in range(3):
            journal.keep("a", number, b"found")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", limited)
            journal.finish()
    assert len(list(journal.folder.iterdir())) == 5 - removed
    with Journal(tmp_path, {"command": []}) as again:
        again.finish()
    assert not again.folder.exists()
