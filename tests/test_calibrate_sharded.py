"""Two processes that share a calibration end with the statistics of one, bit for bit."""

import json

import calibrated
import numpy as np
import pytest
import torch
from torchrun import torchrun


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(the folder, what process 0 and process 1 saw, what they printed)"""
    folder = tmp_path_factory.mktemp("calibrated")
    np.savez(folder / "images.npz", x=torch.cat(calibrated.batches()).numpy())
    done = torchrun(calibrated.__file__, folder)
    assert done.returncode == 0, done.stderr
    return folder, *(json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)), done.stdout


def test_every_process_has_the_statistics_of_one(ran):
    folder, first, second, _ = ran
    assert first["plain"] and second["plain"] and first["example"] and second["example"]
    assert (folder / "alone").read_bytes() == (folder / "shared0").read_bytes() == (folder / "shared1").read_bytes()


def test_a_share_may_be_empty_and_all_may_not(ran):
    for seen in ran[1:3]:
        assert seen["one has none"] == 2 and "calibrate got no batch" in seen["none has any"][1]


def test_a_failure_in_one_process_is_raised_in_all(ran):
    for seen, who in zip(ran[1:3], ("process 1 of 2: ", ""), strict=True):
        name, text = seen["one fails"]
        assert name == "ValueError" and text.startswith(f"{who}the input of site '0'")


def test_the_terminal_shares_the_batches_out_and_one_process_prints(ran):
    folder, first, second, printed = ran
    assert first["terminal"] == second["terminal"] == 0
    assert (folder / "terminal").read_bytes() == (folder / "alone").read_bytes()
    assert printed == "terminal: 3 sites from 36 images\n"
    assert not list(folder.glob("*.unfinished*"))


def test_models_that_are_wrapped_for_training(ran):
    for seen in ran[1:3]:
        assert seen["data parallel"] and seen["data parallel, forged"]
        assert seen["sharded"] and seen["forged, then sharded"] and seen["block by block"]
        assert "graph=False" in seen["a block of a graph"][0]
        assert "have 3, 2 batches: give all as many" in seen["of another length"][1]
        assert "fully_shard(forged_fx.transform(model, stats))" in seen["transform"][1]
