"""benchmarks/host.py: forged models take a GPU's way, and the rows say how often."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("timm")

ROOT = Path(__file__).parents[1]


def test_its_rows() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/host.py", "vit_small", "--rounds", "2"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    heads, row = (line.split() for line in done.stdout.splitlines())
    assert heads[:5] == ["network", "plain", "fused", "unfused", "calls"] and row[0] == "vit_small"
    plain, fused, unfused = map(float, row[1:4])
    assert 0 < plain < fused and plain < unfused and row[4] == "36", "12 norms ahead of attention, 12 behind, 12 GELUs"
