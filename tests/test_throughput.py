"""Timing plain against forged, and the benchmark that prints it."""

import argparse
import csv
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from forged_fx.throughput import Speed, compare, interleave, text

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import models
import throughput


def test_the_benchmark_prints_a_row_per_mode_and_appends_it_to_its_file(tmp_path, capsys):
    file = tmp_path / "throughput.csv"
    arguments = ["digits", "--runs", "2", "--batch", "4", "--threads", "1", "--csv", str(file)]
    threads = torch.get_num_threads()
    assert throughput.main(arguments) == 0
    assert throughput.main([*arguments, "--modes", "eager", "--dtype", "bfloat16"]) == 0
    assert torch.get_num_threads() == threads
    rows = list(csv.DictReader(file.open()))
    assert [(row["mode"], row["dtype"]) for row in rows] == [
        ("eager", "float32"),
        ("compiled", "float32"),
        ("eager", "bfloat16"),
    ]
    for row in rows:
        assert (row["model"], row["sites"], row["batch"], row["threads"]) == ("digits", "4", "4", "1")
        assert 0 < float(row["low"]) <= float(row["ratio"]) <= float(row["high"])
        assert all(row[key] for key in ("torch", "triton", "device", "date"))
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("digits") for line in printed) == 3


UNKNOWN = {
    "resnet18": "begins with one of",
    "timm:resnet_18": "timm has no model 'resnet_18', but timm:resnet18",
    "torchvision:resnet51": "but torchvision:resnet",
    "preact:28": "DEPTH-WIDTH",
    "preact:27-4": "6n [+] 4 layers",
    "zoo:nothing": "FORGED_FX_ASSETS",
    "digits:x": "digits has no model 'x'",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_model_that_is_not_known_is_an_error_ahead_of_all_work(name, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("FORGED_FX_ASSETS", raising=False)
    with pytest.raises(SystemExit, match="2"):
        throughput.main(["digits", name, "--csv", str(tmp_path / "none.csv")])
    out, err = capsys.readouterr()
    assert not out and re.search(UNKNOWN[name], err.splitlines()[-1])
    assert not (tmp_path / "none.csv").exists()


def test_a_model_that_is_known_is_its_name(assets):
    for name in ("timm:resnet18", "timm:resnet18.a1_in1k", "torchvision:resnet18", "preact:10-1", "digits"):
        assert models.model_name(name) == name
    assert models.model_name("zoo:mnist_lenet5_std") == "zoo:mnist_lenet5_std"
    with pytest.raises(argparse.ArgumentTypeError, match="zoo has no model 'mnist_lenet', but zoo:mnist_lenet5_std"):
        models.model_name("zoo:mnist_lenet")


def test_a_pre_activation_wide_resnet_has_its_29_sites_and_its_size():
    model, shape = models.load("preact:28-4")
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == 29
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(5.85e6, rel=0.01)
    assert model(torch.rand(2, *shape)).shape == (2, 10)


def test_variants_run_in_turn_and_a_slow_one_shows():
    ran = []
    sleeps = {("eager", "plain"): 0.06, ("eager", "forged"): 0.12}

    def variant(key):
        return lambda: (ran.append(key), time.sleep(sleeps[key]))

    seconds = interleave({key: variant(key) for key in sleeps}, rounds=2)
    plain, forged = sleeps
    assert ran[-4:] == [plain, forged, forged, plain]
    assert seconds[plain].shape == (2,)
    assert (seconds[plain] >= 0.06).all() and (seconds[forged] >= 0.12).all()
    with pytest.raises(ValueError, match="at least 1"):
        interleave({}, rounds=0)


def test_models_are_timed_in_eval_mode_and_left_as_they_were():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    mean, x = model[1].running_mean.clone(), torch.randn(5, 4)
    speeds = compare(model, model, x, rounds=1, modes=(mode for mode in ["eager"]))
    assert [speed.mode for speed in speeds] == ["eager"]
    assert model[1].training and torch.equal(model[1].running_mean, mean)


def test_the_table_holds_milliseconds():
    assert "12.000" in text([Speed("eager", 0.012, 0.013, 0.92, 0.9, 0.94)])


def test_the_clock_stops_when_the_device_has_finished():
    """What is asked of it is queued, and takes its time when it is waited for."""
    now, queued = 0.0, 0

    def call():
        nonlocal queued
        queued += 1

    def wait():
        nonlocal now, queued
        now, queued = now + queued, 0

    seconds = interleave({("eager", "plain"): call}, 3, wait, lambda: now)
    assert (seconds["eager", "plain"] == 1).all()
