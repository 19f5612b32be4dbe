"""Processes that share a call: a slow one is waited for, and it is said for which; one that never comes is an error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from forged_fx.calibrate import _agree
from forged_fx.evaluate.blocks import Blocks
from forged_fx.evaluate.journal import agree
from forged_fx.processes import Processes, attempt, result


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("late.py"), tmp_path_factory.mktemp("late")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_slow_process_is_waited_for_beyond_all_patience_and_named(told):
    assert told["slow"]["found"] == [told["evaluated"]] * 2
    said, other = told["slow"]["said"]
    assert "evaluate, model gradients: process 0 has waited 0.25 s for process 1\n" in said
    assert "process 0 has waited 2 s for process 1\n" in said and other == ""
    assert told["slow_batches"]["found"] == [told["calibrated"]] * 2
    assert "calibrate: process 0 has waited 2 s for process 1\n" in told["slow_batches"]["said"][0]


def test_a_late_process_is_waited_for_by_the_others_whichever_it_is(told):
    assert told["late"]["found"] == [told["calibrated"]] * 2
    assert told["late"]["said"][0] == ""
    assert told["late"]["said"][1].startswith("calibrate: process 1 has waited 0.25 s for process 0\n")


def test_a_process_that_does_not_come_is_named_and_the_same_call_can_be_made_again(told):
    ((kind, text), again), found = told["absent"]["found"]
    assert kind == "RuntimeError" and "process 1 did not within 1 s; shard=False keeps it to one process" in text
    assert again == found == told["evaluated"]


def test_a_process_that_ends_in_a_scan_is_an_error_and_nothing_is_scanned_twice(told):
    (kind, text), nothing = told["gone"]["found"]
    assert nothing is None and kind == "ConnectionError"
    assert text.startswith("another process of this call of calibrate has ended or cannot be reached")
    first, second = told["go_on"]["found"]
    assert first == [told["calibrated"], 0] and second == [told["calibrated"], 1]


class Two(Processes):
    """This process, and another one that answers what `other` makes of its answer."""

    def __init__(self, other):
        super().__init__(0, 2)
        self.other = other

    def gather(self, data, what=""):
        return [data, self.other(data)]


def test_answers_to_different_work_are_not_taken_for_each_other():
    blocks = Blocks(0, Two(lambda data: data.replace(b"one", b"two")))
    with pytest.raises(RuntimeError, match=r'at different work: \[\["one", 0\]\], and \[\["two", 0\]\]'):
        list(blocks.run("one", torch.arange(3), lambda block: {}, None))


def test_processes_that_make_different_calls_are_told_so():
    for there in ({"folder": "none"}, {"models": {"b": 1, "a": 2}}):
        call = {"models": {"a": 2, "b": 1}}
        other = json.dumps({**call, "folder": "given"} | there).encode()
        with pytest.raises(ValueError, match=r"folder is none in process 1|the order of models is b, a in process 1"):
            agree(Two(lambda data, other=other: other), call, {}, folder="given")
    agree(Two(lambda data: data), call, {}, folder="given")


def test_a_scan_is_of_one_model():
    def made(activation, runs=0):
        torch.manual_seed(0)
        new = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), activation)
        new.register_buffer("sparse", torch.eye(3).to_sparse())
        new.register_buffer("conjugate", torch.ones(2, dtype=torch.complex64).conj())
        new.register_buffer("cache", torch.ones(runs), persistent=False)  # of a process's own runs
        return new

    model, trained, trained_here = made(nn.ReLU()), made(nn.ReLU(), 1), made(nn.ReLU(), 2)
    with torch.no_grad():
        trained[0].bias += 1
    trained_here[1].running_mean += 1
    told = []
    others = {
        "layers of the model": (made(nn.SiLU()), {}),
        "parameters of the model": (trained, {}),
        "buffers of the model": (trained_here, {}),
        "channels": (model, {"channels": True}),
    }
    for name, (another, asked) in others.items():
        told.clear()
        _agree(Two(lambda data: told.append(data) or data), model, [], where="linear+conv", channels=False)
        with pytest.raises(ValueError, match=rf"different calls: {name} is [^;]*$") as raised:
            _agree(Two(lambda _: told[0]), another, [], **{"where": "linear+conv", "channels": False} | asked)
        assert ("broadcast(buffer, 0)" in str(raised.value)) is (name == "buffers of the model")


@pytest.mark.parametrize(
    "error", [UnicodeDecodeError("utf-8", b"x", 0, 1, "no"), ExceptionGroup("two", [ValueError()])]
)
def test_an_error_that_is_made_of_more_than_a_text_says_where_it_was_raised(error):
    def fail():
        raise error

    _, answer = attempt(fail)
    with pytest.raises(RuntimeError, match=f"process 1: {type(error).__name__}: "):
        result(answer, "process 1")


@pytest.mark.parametrize("kind", [TypeError, ValueError, FileExistsError])
def test_an_error_of_another_process_is_of_the_same_kind(kind):
    def fail():
        raise kind("no")

    with pytest.raises(kind, match=r"^process 1: no$"):
        result(attempt(fail)[1], "process 1")
