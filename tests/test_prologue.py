"""A threshold that a matrix product may apply waits for the product, and not for longer."""

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

# Bottlenecks, as Inductor would run them on a GPU that is not there: each reads its input raw, for the sum at its end,
# and with a threshold, for its first convolution, which is a matrix product.
CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import fake_gpu, torch, forged_fx
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = (nn.Conv2d(64, 64, 1, bias=False) for _ in range(2))
        self.bn = nn.BatchNorm2d(64)

    def forward(self, x):
        return torch.relu(self.last(torch.relu(self.bn(self.first(x)))) + x)

net, x = nn.Sequential(nn.Conv2d(64, 64, 1), nn.ReLU(), *(Block() for _ in range(3))).eval(), torch.rand(8, 64, 32, 32)
forged = forged_fx.transform(net, forged_fx.calibrate(net, [x]))
fake_gpu.install("sm_90")
x = x.half().contiguous(memory_format=torch.channels_last)
for tune in (True, False):
    found = []
    for model, backend in ((net, "inductor"), (forged, "forged")):
        model = model.half().to(memory_format=torch.channels_last)
        kernels = fake_gpu.kernels(model, x, backend=backend, options={"max_autotune": tune})
        found += [len(kernels), sum(kernel.bytes for kernel in kernels)]
    print(*found)
"""


def test_residual_streams_are_free_where_products_are_generated() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD, str(BENCHMARKS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tuned, default = ([int(value) for value in line.split()] for line in done.stdout.split("\n")[:2])
    once = 2 * 8 * 64 * 32 * 32  # bytes of an activation
    launches, size, forged_launches, forged_size = tuned
    assert forged_launches - launches <= 1 and forged_size - size < 2.1 * once, "for the network's input alone"
    launches, size, forged_launches, forged_size = default
    assert forged_launches - launches == 1, "joined with their producers, as ever"
    assert 4.9 * once < forged_size - size < 5.1 * once, "each of the three streams is written twice"
