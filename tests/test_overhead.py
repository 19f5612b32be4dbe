"""`benchmarks/overhead.py` says which aims are missed, and where the time goes."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import overhead
from where_time_goes import differences


def test_what_is_missed_is_said_and_where_the_time_goes(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    command = [sys.executable, overhead.__file__, "digits", "--batch", "8", "--dtype", "float32"]
    command += ["--what", "calibration", "--rounds", "3", "--csv", rows]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # To calibrate a network of 0.3 ms a batch takes several times as long as to run it.
    assert "(aim 0.909, MISSED)" in done.stdout.splitlines()[-1]
    assert "    Python and the rest " in done.stdout
    with rows.open(newline="") as file:
        ratios = {row["variant"]: float(row["ratio"]) for row in csv.DictReader(file)}
    assert ratios["calibrate"] < ratios["watching alone"] < ratios["plain"] == 1


def test_a_folder_is_no_file_of_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        overhead.options(["digits", "--csv", str(tmp_path)])
    assert f"{tmp_path} is a folder: name the file" in capsys.readouterr().err


def test_the_operator_that_one_run_has_more_of_leads() -> None:
    x = torch.rand(300, 300)
    rows = differences(lambda: x + 1, lambda: (x + 1).matmul(x).matmul(x))
    whole, first = rows[:2]
    assert whole[0] == "all" and whole[1] < whole[2]
    assert first[0] == "aten::mm" and first[1] == 0 < first[2]
    assert all(plain < other for _, plain, other in rows)
