"""What a GPU that is not there would launch for a small network, plain and forged: read off the code, in a process of
its own, as what `benchmarks/fake_gpu.py` replaces stays replaced."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

# Inductor of torch 2.11 joins nothing with a product of more than two dimensions, a plain model's neither, until its
# loops are merged.
MERGED = {"loop_ordering_after_fusion": False} if torch.__version__ < (2, 12) else {}

CUDA_BUILD = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="this build of PyTorch has no CUDA, and makes no code for a GPU"
)

START = """
import sys
sys.path.insert(0, sys.argv[1])
import fake_gpu, torch, forged_fx
from torch import nn
"""

END = """
forged = forged_fx.transform(net, forged_fx.calibrate(net, [x]))
fake_gpu.install("sm_90")
x = x.to(dtype)
x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
for model, backend in ((net, "inductor"), (forged, "forged")):
    model = model.to(dtype).to(memory_format=torch.channels_last)
    kernels = fake_gpu.kernels(model, x, backend=backend, options=options)
    print(len(kernels), sum(kernel.bytes for kernel in kernels))
"""


def plain_and_forged(network: str) -> list[tuple[int, int]]:
    """(launches, bytes) of each. network: Python code that sets `net`, `x`, `dtype` and Inductor's `options`."""
    merged = f"options = {{**options, **{MERGED}}}\n"
    command = [sys.executable, "-c", START + network + merged + END, str(BENCHMARKS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [(int(launches), int(size)) for launches, size in map(str.split, done.stdout.splitlines())]
