"""What a GPU would launch, read off the code that Inductor generates without one: on a small network that is known."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_static.py"


def test_a_wide_resnet_pays_for_its_input_alone(tmp_path):
    table = tmp_path / "table.csv"
    command = [sys.executable, SCRIPT, "preact:10-1", "--batch", "8", "--csv", table]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "but for the input   +0,  +0.00%" in done.stdout, done.stderr
    (row,) = csv.DictReader(table.open(newline=""))
    assert row["sites"] == "10" and row["extra_launches"] == "1" == row["input_launches"]
    # the input is read and written once more: 8 x 3 x 32 x 32 of 2 bytes each
    extra = (float(row["mb"]) - float(row["plain_mb"])) * 1e6
    assert extra == pytest.approx(2 * 2 * 8 * 3 * 32 * 32, rel=1e-3)
    assert float(row["left"]) == pytest.approx(0, abs=1e-5), "but for the thresholds, a few bytes each"
    assert float(row["where_mb"]) > float(row["mb"]), "written out as torch.where, it costs more"
