"""Two processes that share a sweep or a search end with the result of one, bit for bit, though one was killed."""

import json
import sys

import killed
import pytest
import searched
from torchrun import torchrun

from forged_fx.digits import one_thread
from forged_fx.evaluate import blocks, probes
from forged_fx.evaluate.attacks import ATTACKS

NEVER_ALIKE = ("log.txt", "timing.json", "lock")
EPOCH = {"SOURCE_DATE_EPOCH": "0"}  # what matplotlib dates pictures with


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(the folder, what process 0 and process 1 saw, the job in which process 1 was killed, how many blocks it kept)"""
    folder = tmp_path_factory.mktemp("searched")
    first = torchrun(searched.__file__, folder, "kill", forks=False, **EPOCH)
    kept = len(list((folder / "search" / "unfinished").glob("*.safetensors")))
    second = torchrun(searched.__file__, folder, **EPOCH)
    assert second.returncode == 0, second.stderr
    return folder, *(json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)), first, kept


@pytest.fixture(scope="module")
def alone(ran):
    """(the folder of one process, its sweep, its search)"""
    with one_thread(), pytest.MonkeyPatch.context() as patch:
        for module, name in ((blocks, "BLOCK"), (probes, "STEPS"), (probes, "RADII"), (blocks, "time")):
            patch.setattr(module, name, getattr(module, name))  # the case sets them
        for name in ("step", "again"):
            patch.setitem(ATTACKS, name, None)
        patch.setenv(*EPOCH.popitem())
        patch.setattr(sys, "argv", ["searched"])
        searched.clock()
        folder = ran[0] / "alone"
        swept = killed.sweep(folder / "sweep", **searched.SWEEP)
        return folder, swept, killed.search(folder / "search", **searched.SEARCH)


def files(folder):
    found = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {str(name): path.read_bytes() for name, path in found.items() if path.name not in NEVER_ALIKE}


@pytest.mark.parametrize("name", ["sweep", "search"])
def test_the_folder_is_that_of_one_process(ran, alone, name):
    shared, expected = files(ran[0] / name), files(alone[0] / name)
    assert shared.keys() == expected.keys() and f"{name}.svg" in expected
    assert [file for file in expected if shared[file] != expected[file]] == []


def test_every_process_has_the_result_of_one(ran, alone):
    _, swept, found = alone
    assert found.finalists and len(swept.points) == 1
    for seen in ran[1:3]:
        assert seen["swept"] == repr(swept) and seen["found"] == str(found)


def test_a_killed_process_ends_the_job_with_words_and_what_was_done_is_kept(ran):
    folder, *seen, job, kept = ran
    assert job.returncode != 0 and "the same call goes on from there" in job.stderr
    assert kept > 4  # of the search
    assert all(one["sweep's blocks"] == 0 for one in seen)  # it was finished
    assert "stopped by" in (folder / "search" / "log.txt").read_text()


def test_a_budget_of_time_ends_all_processes_alike_whatever_their_clocks(ran):
    first, second = (seen["in time"] for seen in ran[1:3])
    assert first == second and [seconds for _, seconds in first] == [4.0, 8.0]  # one each


def test_one_process_takes_the_times(ran):
    assert ran[1]["speeds"] == ran[2]["speeds"] and all(ran[1]["speeds"])
