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
        [sys.executable, "benchmarks/host.py", "vit_small", "--rounds", "5"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    heads, row = (line.split() for line in done.stdout.splitlines())
    assert heads[:6] == ["network", "plain", "graph", "unfused", "fused", "calls"] and row[0] == "vit_small"
    _, graph, unfused, fused = map(float, row[1:5])
    assert row[5] == "36", "12 norms ahead of attention, 12 behind, 12 GELUs"
    assert 0 < graph < min(unfused, fused)  # (the fastest of each)


def test_it_sees_where_no_kernel_would_be_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import host

    small = host.timm("vit_small_patch16_224", img_size=32, embed_dim=16, num_heads=2, depth=1)
    monkeypatch.setitem(host.NETS, "vit_small", (small, 32))
    monkeypatch.setattr(host, "take_a_gpus_way", host.Anything)
    monkeypatch.setattr(sys, "argv", ["host.py", "vit_small", "--rounds", "1"])
    with pytest.raises(SystemExit, match="vit_small, unfused: 0 launches"):
        host.main()
