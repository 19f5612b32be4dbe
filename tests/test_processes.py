"""Processes that share a call: a slow one is waited for, and it is said for which; one that never comes is an error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


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
    assert "evaluate, base 0 natural none: process 0 has waited 0.25 s for process 1\n" in said
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
