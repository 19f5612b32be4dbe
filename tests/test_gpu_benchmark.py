"""benchmarks/gpu.py, rehearsed without a GPU: every step runs, on tiny shapes, the kernels interpreted."""

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu
import kernel_cases

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_none(capsys: pytest.CaptureFixture) -> None:
    assert gpu.main([]) == 0
    assert "no GPU" in capsys.readouterr().out


def test_rehearsal(tmp_path: Path) -> None:
    command = "benchmarks/gpu.py --device cpu --dtype float16 --runs 1 --models digits nonsense --budget 60 --only kept"
    command = [*command.split(), "--modes", "eager", "eager, unfused", "max-autotune", "--csv", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "a rehearsal on the CPU: the times mean nothing" in done.stdout
    kernels, models = (list(csv.DictReader((tmp_path / f"gpu_{name}.csv").open())) for name in ("kernels", "models"))
    assert len(kernels) == 6 and {row["verdict"] for row in kernels} == {"ok"}
    left_out = {(row["model"], row["mode"]): row["left_out"] for row in models}
    assert left_out["digits", "eager"] == left_out["digits", "eager, unfused"] == ""
    assert "model's name begins with" in left_out["nonsense", "eager"]
    assert left_out["digits", "max-autotune"] == "no time left in --budget 60.0"
    assert [row["fused"] for row in models if row["model"] == "digits"] == ["2", "0", "0"]


def test_a_wrong_kernel_is_found() -> None:
    case = kernel_cases.cases(1, side=4)["batch norm, relu"]
    given = gpu.filled(case, torch.float32, "cpu")
    right = replace(case, launch=case.reference)
    assert gpu.check(right, given) == (0, 0, 0.0, "ok")

    def off(error: float) -> kernel_cases.Case:
        return replace(case, launch=lambda **given: (case.reference(**given)[0] * (1 + error), None))

    assert gpu.check(off(1e-7), given)[3] == "ok"
    assert gpu.check(off(1e-5), given)[3] == "WRONG"
    one_sided = replace(case, launch=lambda **given: (case.reference(**{**given, "t": torch.tensor(0.41)})[0], None))
    assert gpu.check(one_sided, given)[3] == "WRONG"
