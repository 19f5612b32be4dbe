"""Two processes end with the result of one, bit for bit."""

import json
import sys

import pytest
import sharded
from torchrun import torchrun

import forged_fx
from forged_fx.digits import one_thread
from forged_fx.evaluate import blocks, probes
from forged_fx.evaluate.attacks import ATTACKS
from forged_fx.processes import attempt, result


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(the folder, what process 0 and process 1 saw, what they printed)"""
    folder = tmp_path_factory.mktemp("sharded")
    done = torchrun(sharded.__file__, folder)
    assert done.returncode == 0, done.stderr
    return folder, *(json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)), done


@pytest.fixture(scope="module")
def alone(ran):
    with one_thread(), pytest.MonkeyPatch.context() as patch:
        for module, name in ((blocks, "BLOCK"), (probes, "STEPS"), (probes, "RADII")):  # the case sets them
            patch.setattr(module, name, getattr(module, name))
        for name in ("step", "again"):
            patch.setitem(ATTACKS, name, None)
        patch.setattr(sys, "argv", [sharded.__file__, str(ran[0])])
        model, base, call = sharded.case()
        return forged_fx.evaluate(model, base, **call, folder=ran[0] / "alone")


def test_every_process_has_the_result_of_one(ran, alone):
    _, first, second, _ = ran
    expected = json.loads(json.dumps(sharded.digest(alone)))
    assert first["result"] == second["result"] == expected
    assert second["alone"] == expected  # shard=False
    assert first["data parallel"] == second["data parallel"] == expected


def test_the_folder_is_that_of_one_process(ran, alone):
    folder = ran[0]
    assert {path.name for path in (folder / "shared").iterdir()} == {path.name for path in (folder / "alone").iterdir()}
    for name in ("result.json", "examples.safetensors"):
        for other in ("shared", "failed"):
            assert (folder / other / name).read_bytes() == (folder / "alone" / name).read_bytes()
    assert json.loads((folder / "shared" / "timing.json").read_text())["machine"]["processes"] == 2


def test_they_share_the_work(ran):
    first, second = ran[1]["blocks"], ran[2]["blocks"]
    assert first >= second > 0.6 * first  # a row's last block may have no companion


def test_only_process_0_prints_and_process_groups_are_left_as_found(ran):
    _, first, second, done = ran
    assert done.stdout == ""
    assert not first["initialised"] and not second["initialised"]
    assert first["still initialised"] and second["still initialised"]


def test_different_calls_are_refused_everywhere(ran):
    for seen in ran[1:3]:
        name, text = seen["other seed"]
        assert name == "ValueError" and "seed is 1 in process 1, 0 in process 0" in text


def test_a_failure_in_one_process_is_raised_in_all_and_what_was_done_is_kept(ran):
    folder, first, second, _ = ran
    assert second["failed"] == ["MemoryError", "no memory left"]
    name, text = first["failed"]
    assert name == "MemoryError" and text.startswith("process 1 of 2, ") and text.endswith(": no memory left")
    log = (folder / "failed" / "log.txt").read_text()
    assert "stopped by MemoryError: process 1 of 2" in log and "blocks are finished" in log
    assert "is damaged" not in log  # what failed is not kept
    assert first["resumed"] == second["resumed"] == first["result"] == first["finished"] == second["finished"]
    assert first["done"] < first["blocks"]


def test_models_that_processes_run_together_are_refused_with_the_next_step(ran):
    for seen in ran[1:3]:
        assert seen["gathered"] == seen["data parallel"]
        name, text = seen["within"]
        assert name == "ValueError" and "within the base is DistributedDataParallel" in text and ".module" in text
        name, text = seen["sharded"]
        assert name == "ValueError" and "the model is sharded" in text and "full_state_dict=True" in text


def test_errors_travel_as_text():
    assert result(attempt(lambda: b"x")[1], "process 1") == b"x"
    for error, kind, words in (
        (ValueError("odd"), ValueError, "process 1: odd"),
        (type("Own", (Exception,), {})("odd"), RuntimeError, "process 1: Own: odd"),
    ):

        def act(error=error):
            raise error

        raised, answer = attempt(act)
        assert raised is error
        with pytest.raises(kind, match=words):
            result(answer, "process 1")
