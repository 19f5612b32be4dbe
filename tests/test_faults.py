"""Killed, full, unreadable, out of memory, interrupted: what was done is kept, and the error says how to go on."""

import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import sharded
import torch
from generated import same_state, state_of
from planted import Hidden, evaluate, inputs, linear
from torchrun import torchrun

import forged_fx
from forged_fx import Stats, checkpoint
from forged_fx.evaluate import blocks, probes
from forged_fx.evaluate.attacks import ATTACKS
from forged_fx.evaluate.journal import Journal

HERE = Path(__file__).parent


pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture
def batches():
    return list(inputs(24).split(4))


def test_a_scan_killed_at_any_moment_ends_with_the_same_statistics(tmp_path):
    done = subprocess.run(
        [sys.executable, HERE / "killed.py", tmp_path, "8", "calibrate"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    for moment, killed, resumed, _, same in told["once"]:
        assert (killed, resumed, same) == (9, 0, True), f"killed at change {moment} of {told['changes']}"
    scanned = [scanned for *_, scanned, _ in told["once"]]
    assert scanned[0] == told["blocks"] and scanned[-1] == 0 and len(set(scanned)) > 3  # nothing is done twice
    ends, same = told["often"]
    assert set(ends[:-1]) == {9} and ends[-1] == 0 and same


# ---- a scan that stops: what makes it, and what the error then says


def loader(batches, at, error):
    for i, batch in enumerate(batches):
        if i == at:
            raise error
        yield batch


class Fails(torch.nn.Module):
    """A linear classifier that fails on an input with a 1 in its corner."""

    def __init__(self, error):
        super().__init__()
        self.inner, self.error = linear(classes=3), error

    def forward(self, x):
        if (x[:, 0, 0, 0] == 1).any():
            raise self.error
        return self.inner(x)


STOPS = {
    "the loader": OSError("a worker died"),
    "the model": RuntimeError("shapes do not match"),
    "Ctrl-C": KeyboardInterrupt(),
}


@pytest.mark.parametrize("who", STOPS)
def test_a_scan_that_stops_says_what_is_kept_and_goes_on(tmp_path, batches, who):
    model, path = Fails(STOPS[who]), tmp_path / "scan"
    expected = forged_fx.calibrate(model, batches)
    model.train()
    before = state_of(model)
    broken = [b.clone() for b in batches]
    broken[4][0, 0, 0, 0] = 1
    given = loader(batches, 4, STOPS[who]) if who == "the loader" else broken
    with pytest.raises(type(STOPS[who])) as caught:
        forged_fx.calibrate(model, given, checkpoint=path)
    assert caught.value is STOPS[who]
    said = " ".join(caught.value.__notes__)
    assert f"4 batches are kept in {path}: the same call goes on from there" in said
    assert who == "the loader" or who == "Ctrl-C" or "at batch 4 (counted from 0), of shape (" in said
    assert same_state(state_of(model), before)
    assert Stats.load(path).batches == 4
    stats = forged_fx.calibrate(model, batches, checkpoint=path)
    assert stats == expected and Stats.load(path) == expected
    assert torch.equal(stats.example[0][0], batches[0])
    assert forged_fx.calibrate(model, batches, checkpoint=path) == expected  # finished: nothing is scanned again


def test_a_checkpoint_of_something_else_is_refused(tmp_path, batches):
    model, path = linear(classes=3), tmp_path / "scan"
    forged_fx.calibrate(model, batches[:3], checkpoint=path)
    before = path.read_bytes()
    for change, words in (
        ((linear(classes=3, seed=1), batches, {}), "another model"),
        ((model, batches, {"channels": True}), "another channels"),
        ((model, batches[::-1], {}), "other batches"),
        ((torch.nn.Sequential(*model, torch.nn.SiLU()).eval(), batches, {}), "another architecture"),
        ((model, batches[:2], {}), "of 3 batches, and there are 2"),
    ):
        with pytest.raises(FileExistsError, match=words):
            forged_fx.calibrate(*change[:2], checkpoint=path, **change[2])
        assert path.read_bytes() == before
    forged_fx.calibrate(model, batches).save(path)
    with pytest.raises(FileExistsError, match="finished statistics"):
        forged_fx.calibrate(model, batches, checkpoint=path)
    path.write_bytes(before[:-1])
    with pytest.raises(ValueError, match="not a file of calibration statistics"):
        forged_fx.calibrate(model, batches, checkpoint=path)


def test_of_a_sequence_what_was_scanned_is_not_asked_for_again(tmp_path, batches):
    asked = []

    class Made(Sequence):
        def __init__(self, which):
            self.which = which

        def __len__(self):
            return len(self.which)

        def __getitem__(self, i):
            if isinstance(i, slice):
                return Made(self.which[i])
            asked.append(self.which[i])
            return batches[self.which[i]]

    model, path, made = linear(classes=3), tmp_path / "scan", Made(range(len(batches)))
    forged_fx.calibrate(model, made, checkpoint=path, max_batches=3)
    asked.clear()
    stats = forged_fx.calibrate(model, made, checkpoint=path, max_batches=5)
    assert stats == forged_fx.calibrate(model, batches[:5]) and torch.equal(stats.example[0][0], batches[0])
    assert {3, 4} <= set(asked) <= {0, 2, 3, 4}  # the first is the example, the third tells that it is the same scan
    with pytest.raises(FileExistsError, match="other batches"):
        forged_fx.calibrate(model, Made([0, 1, 2, 3, 0, 4]), checkpoint=path)


def test_two_scans_do_not_share_a_checkpoint(tmp_path, batches):
    path, reached, go = tmp_path / "scan", threading.Event(), threading.Event()

    def slowly():
        yield batches[0]
        reached.set()
        go.wait(20)
        yield from batches[1:]

    one = threading.Thread(target=lambda: forged_fx.calibrate(linear(), slowly(), checkpoint=path), daemon=True)
    one.start()
    assert reached.wait(20)
    with pytest.raises(BlockingIOError, match="another process works on"):
        checkpoint.resumed(linear(), batches, path, where="linear+conv", channels=False)
    go.set()
    one.join(20)
    assert Stats.load(path).batches == len(batches)


# ---- memory


class Small(torch.nn.Module):
    """It has no memory for more than `most` inputs at a time."""

    def __init__(self, inner, most, error):
        super().__init__()
        self.inner, self.most, self.error, self.fed = inner, most, error, []

    def forward(self, x):
        self.fed.append(len(x))
        y = self.inner(x)
        if len(x) > self.most:
            raise self.error
        return y


OUT = {
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    "CPU": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    "Python": MemoryError(),
}


@pytest.mark.parametrize("where", OUT)
def test_a_batch_that_memory_does_not_hold_is_scanned_in_halves(batches, where):
    inner, big = linear(classes=3), torch.cat(batches[:2])[:7]
    model = Small(inner, 4, OUT[where])
    with pytest.warns(UserWarning, match=r"batch 1 \(counted from 0\): out of memory.*halves, of 3 and 4"):
        stats = forged_fx.calibrate(model, [batches[0], big, batches[1]])
    expected = forged_fx.calibrate(Small(inner, 9, OUT[where]), [batches[0], big[:3], big[3:], batches[1]])
    assert stats.sites == expected.sites and stats.batches == 3
    with pytest.raises(type(OUT[where])), pytest.warns(UserWarning):  # once
        forged_fx.calibrate(model, [torch.cat(batches)])
    with pytest.raises(type(OUT[where])):  # two inputs of different lengths have no halves
        forged_fx.calibrate(Two(Small(inner, 4, OUT[where])), [{"x": torch.cat(batches), "scale": torch.ones(1)}])


class Scales(torch.nn.Module):
    """Writes into what it is given, and then runs out of memory, once."""

    def __init__(self):
        super().__init__()
        self.fc, self.ran = torch.nn.Linear(4, 2), False

    def forward(self, x):
        x *= 10
        if not self.ran:
            self.ran = True
            raise MemoryError
        return self.fc(x)


def test_a_batch_that_is_run_again_is_as_it_was_given():
    x = torch.randn(6, 4)
    with pytest.warns(UserWarning, match="halves"):
        stats = forged_fx.calibrate(Scales(), [x])
    assert stats.sites["fc"].c_max == float((10 * x).abs().max())


class Two(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, scale):
        return self.inner(x * scale)


def test_an_evaluation_goes_on_at_half_its_batch_size_once(tmp_path):
    base, x = linear(classes=3), inputs(20)
    call = {"x": x, "y": base(x).argmax(1), "attacks": ["apgd-ce"]}
    model = Small(Hidden(base), 10, OUT["GPU"])
    with pytest.warns(UserWarning, match="out of memory at batch_size=20: it goes on at 10"):
        result = evaluate(model, **call, batch_size=20, folder=tmp_path)
    assert result.batch_size == 10 and "stopped by OutOfMemoryError" in (tmp_path / "log.txt").read_text()
    assert torch.equal(result.model.broken_by, evaluate(Hidden(base), **call).model.broken_by)
    model.most = 2
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning):
        evaluate(model, **call, batch_size=20)


# ---- the disk


def write_statistics(path):
    forged_fx.calibrate(linear(), [inputs(4)]).save(path / "stats")


def write_result(path):
    base, x = linear(classes=3), inputs(8)
    evaluate(Hidden(base), x=x, y=base(x).argmax(1), attacks=["apgd-ce"]).save(path, overwrite=True)


def write_checkpoint(path):
    forged_fx.calibrate(linear(), [inputs(4)], checkpoint=path / "scan")


WRITERS = (write_statistics, write_result, write_checkpoint)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.endswith(".lock")}


@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_leaves_the_old_files_and_no_part(tmp_path, write):
    """The limit is the system's own: a write fails in the middle of a file."""
    write(tmp_path)
    for file in tmp_path.glob("scan"):
        file.unlink()
    before, limits = contents(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(Exception, match=r"(?i)too large|i/o error") as caught:
            write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "was not written; what stood there before stands" in " ".join(caught.value.__notes__)
    assert contents(tmp_path) == before
    write(tmp_path)


def test_a_disk_that_fills_up_stops_an_evaluation_with_a_word_and_it_goes_on(tmp_path, monkeypatch):
    """Nor can the log be written to then."""
    base, x = linear(classes=3), inputs(20)
    call = {"x": x, "y": base(x).argmax(1), "attacks": ["apgd-ce"], "folder": tmp_path}
    keep, limits = Journal.keep, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        keep(*args)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="too large") as caught:
        patch.setattr(Journal, "keep", full)
        try:
            evaluate(Hidden(base), **call)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = " ".join(caught.value.__notes__)
    assert "0000.safetensors was not written" in said and f"what is done is kept in {tmp_path}" in said
    assert evaluate(Hidden(base), **call).n == 20  # in the same process, which holds nothing


@pytest.mark.parametrize("write", WRITERS)
def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, write):
    as_root = os.geteuid() == 0
    tmp_path.chmod(0o500)
    if as_root:
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError) as caught:
            write(tmp_path)
    finally:
        if as_root:
            os.seteuid(0)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises((FileNotFoundError, NotADirectoryError)) as caught:
        forged_fx.calibrate(linear(), [inputs(4)]).save(tmp_path / "none" / "stats")
    assert "none" in str(caught.value)


def test_a_file_truncated_at_any_byte_is_refused_or_done_anew(tmp_path):
    write_statistics(tmp_path)
    data = (tmp_path / "stats").read_bytes()
    for size in {*range(0, 200), *range(200, len(data), 501), len(data) - 1}:
        (tmp_path / "stats").write_bytes(data[:size])
        with pytest.raises(ValueError, match="is not a file of calibration statistics"):
            Stats.load(tmp_path / "stats")


# ---- an evaluation that is stopped


def test_ctrl_c_keeps_what_is_done_and_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    base, x = linear(classes=3), inputs(20)
    monkeypatch.setattr(blocks, "BLOCK", 5)
    call = {"x": x, "y": base(x).argmax(1), "attacks": ["apgd-ce"], "eps": 0.05}
    model, do, done = Hidden(base).train(), blocks.Blocks._do, []

    def interrupted(self, block, work):
        done.append(1)
        if len(done) == 7:
            raise KeyboardInterrupt
        return do(self, block, work)

    before = state_of(model)
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="train mode"):
        patch.setattr(blocks.Blocks, "_do", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            evaluate(model, **call, folder=tmp_path)
    assert f"kept in {tmp_path}: the same call goes on" in " ".join(caught.value.__notes__)
    assert same_state(state_of(model), before)
    model.eval()
    result = evaluate(model, **call, folder=tmp_path)
    assert str(result.rows).replace("seconds", "") and torch.equal(
        result.model.broken_by, evaluate(model, **call).model.broken_by
    )


def test_a_killed_process_of_several_ends_the_job_with_a_word_and_it_goes_on(tmp_path, monkeypatch):
    killed = torchrun(sharded.__file__, tmp_path, "kill", forks=False)
    # it learns of it by the connection, or by torchrun's SIGTERM, whichever comes first
    assert killed.returncode != 0 and "kept in" in killed.stderr and "the same call goes on" in killed.stderr
    folder = tmp_path / "shared"
    kept = len(list((folder / "unfinished").glob("*.safetensors")))
    assert kept > 10 and not (folder / "result.json").exists() and "stopped by" in (folder / "log.txt").read_text()

    for module, name in ((blocks, "BLOCK"), (probes, "STEPS"), (probes, "RADII")):  # the case sets them
        monkeypatch.setattr(module, name, getattr(module, name))
    for name in ("step", "again"):
        monkeypatch.setitem(ATTACKS, name, None)
    model, base, call = sharded.case()
    done, do = [], blocks.Blocks._do
    monkeypatch.setattr(blocks.Blocks, "_do", lambda *args: done.append(1) or do(*args))
    resumed = sharded.digest(forged_fx.evaluate(model, base, folder=folder, **call))
    again, done[:] = len(done), []
    assert resumed == sharded.digest(forged_fx.evaluate(model, base, **call))
    assert again + 10 < len(done)
