"""What a GPU that is not there would launch for small networks, plain and forged: read off the code, in a process of
its own, as what `benchmarks/fake_gpu.py` replaces stays replaced."""

import json
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

PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
import fake_gpu, torch, forged_fx
from torch import nn

known, networks = dict(globals()), []
for code in json.load(sys.stdin):
    exec(code, it := dict(known))
    forged = forged_fx.transform(it["net"], forged_fx.calibrate(it["net"], [it["x"]]))
    networks.append((it, forged))
fake_gpu.install("sm_90")
for it, forged in networks:
    x = it["x"].to(it["dtype"])
    x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    for model, backend in ((it["net"], "inductor"), (forged, "forged")):
        model = model.to(it["dtype"]).to(memory_format=torch.channels_last)
        kernels = fake_gpu.kernels(model, x, backend=backend, options=it["options"])
        print(len(kernels), sum(kernel.bytes for kernel in kernels))
"""


def plain_and_forged(networks: dict[str, str]) -> dict[str, list[tuple[int, int]]]:
    """(launches, bytes) of each. networks: Python code that sets `net`, `x`, `dtype` and Inductor's `options`."""
    merged = f"\noptions = {{**options, **{MERGED}}}\n"
    given = json.dumps([network + merged for network in networks.values()])
    command = [sys.executable, "-c", PROGRAM, str(BENCHMARKS)]
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    both = iter((int(launches), int(size)) for launches, size in map(str.split, done.stdout.splitlines()))
    return {name: [next(both), next(both)] for name in networks}
