"""What the fused kernels become on an A100, H100 and B200, read off the machine code."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import kernels_static
import torch
from launches import CUDA_BUILD

from forged_fx.kernels import fused

# One of each kind, on one architecture each; `python benchmarks/kernels_static.py` has them all.
SOME = [
    ("batch norm, relu", torch.float16, 80),
    ("batch norm, relu", torch.float16, 90),
    ("batch norm, relu", torch.float16, 100),
    ("batch norm, residual, relu; kept", torch.bfloat16, 90),
    ("batch norm, relu; contiguous", torch.float32, 80),
    ("batch norm, relu; 7x7 contiguous", torch.float16, 100),
    ("batch norm, relu, band", torch.bfloat16, 100),
    ("gelu", torch.float32, 100),
    ("residual, layer norm 768; kept", torch.float16, 80),
    ("residual, layer norm 768; kept", torch.bfloat16, 100),
    ("layer norm 768, clamp", torch.float16, 90),
    ("residual, rms norm 4096; kept", torch.float32, 90),
]

# Instructions where they may be more than 90: Triton 3.6, which torch 2.11 comes with, goes through shared memory.
MOST = {"batch norm, relu; 7x7 contiguous": 97} if torch.__version__ < (2, 12) else {}


@pytest.mark.parametrize(("name", "dtype", "arch"), SOME, ids=str)
def test_machine_code(name: str, dtype: torch.dtype, arch: int) -> None:
    row = kernels_static.ours(name, dtype, arch)
    assert row.spills == 0 and row.store_bits == row.load_bits == 128
    assert row.limits == "0 spills, 128 bits" and not row.missed
    assert row.instructions <= MOST.get(name, 90) and row.least_bytes < row.bytes < 5 * row.least_bytes


def test_the_limits_can_be_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 49 elements, as 7x7 images have, leave no room for 128 bits in a tile of several rows."""

    def rows_of_49(y: torch.Tensor, channel: int) -> tuple:
        return 32 * 512, 49, 512, {"CHANNEL": "row", "INNER": 1, "CHANNELS": 1}

    monkeypatch.setattr(fused, "as_matrix", rows_of_49)
    row = kernels_static.ours("batch norm, relu; 7x7 contiguous", torch.float16, 90)
    assert row.store_bits == 16 and row.missed == "128 bits"


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--arch", "90", "--dtype", "float16", "--no-inductor", "--csv", str(tmp_path / "rows.csv")]
    assert kernels_static.main([*arguments, "--only", "threshold"]) == 0
    printed = capsys.readouterr().out
    assert "threshold, backward" in printed and "asserted limits missed in 0" in printed
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 3
    assert kernels_static.main([*arguments, "--only", "softmax"]) == 2


@CUDA_BUILD
def test_inductor_is_beside_ours(tmp_path: Path) -> None:
    """In a process of its own, which is made to believe that it has a GPU."""
    script = Path(__file__).parents[1] / "benchmarks" / "kernels_static.py"
    arguments = ["--arch", "90", "--dtype", "float16", "--only", "residual; kept", "--csv", str(tmp_path / "rows.csv")]
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {row["by"]: row for row in csv.DictReader((tmp_path / "rows.csv").open())}
    assert {row["store_bits"] for row in rows.values()} == {"128"}
    assert float(rows["Inductor"]["instructions"]) == pytest.approx(float(rows["forged_fx"]["instructions"]), rel=0.5)
