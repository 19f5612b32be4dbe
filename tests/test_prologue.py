"""A threshold that a matrix product may apply waits for the product, and not for longer."""

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

# On a GPU that is not there. Bottlenecks read their input raw, for the sum at their end, and with a threshold, for a
# 1x1 convolution, which is a matrix product; the last block for a depthwise convolution, which is a library's.
CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import fake_gpu, torch, forged_fx
from torch import nn

class Block(nn.Module):
    def __init__(self, **first):
        super().__init__()
        self.first, self.last = nn.Conv2d(64, 64, **first, bias=False), nn.Conv2d(64, 64, 1, bias=False)
        self.bn = nn.BatchNorm2d(64)

    def forward(self, x):
        return torch.relu(self.last(torch.relu(self.bn(self.first(x)))) + x)

blocks = Block(kernel_size=1), Block(kernel_size=1), Block(kernel_size=3, padding=1, groups=64)
net, x = nn.Sequential(nn.Conv2d(64, 64, 1), nn.ReLU(), *blocks).eval(), torch.rand(8, 64, 32, 32)
forged = forged_fx.transform(net, forged_fx.calibrate(net, [x]))
fake_gpu.install("sm_90")
x = x.half().contiguous(memory_format=torch.channels_last)
for model, backend in ((net, "inductor"), (forged, "forged")):
    model = model.half().to(memory_format=torch.channels_last)
    kernels = fake_gpu.kernels(model, x, backend=backend, options={"max_autotune": True})
    print(len(kernels), sum(kernel.bytes for kernel in kernels))
"""


def test_residual_streams_are_free_where_products_are_generated() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD, str(BENCHMARKS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (launches, size), (forged_launches, forged_size) = (map(int, line.split()) for line in done.stdout.splitlines())
    once = 2 * 8 * 64 * 32 * 32  # bytes of an activation
    assert forged_launches == launches, "the network's input is read by a product, too"
    # one more write, for the depthwise convolution, and one less: plain, the first sum is written ahead of its ReLU too
    assert forged_size - size < 0.1 * once
