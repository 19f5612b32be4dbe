"""A threshold that a matrix product may apply waits for the product, and not for longer."""

from launches import CUDA_BUILD, plain_and_forged

# On a GPU that is not there. Bottlenecks read their input raw, for the sum at their end, and with a threshold, for a
# 1x1 convolution, which is a matrix product; the last block for a depthwise convolution, which is a library's.
NETWORK = """
class Block(nn.Module):
    def __init__(self, **first):
        super().__init__()
        self.first, self.last = nn.Conv2d(64, 64, **first, bias=False), nn.Conv2d(64, 64, 1, bias=False)
        self.bn = nn.BatchNorm2d(64)

    def forward(self, x):
        return torch.relu(self.last(torch.relu(self.bn(self.first(x)))) + x)

blocks = Block(kernel_size=1), Block(kernel_size=1), Block(kernel_size=3, padding=1, groups=64)
net, x = nn.Sequential(nn.Conv2d(64, 64, 1), nn.ReLU(), *blocks).eval(), torch.rand(8, 64, 32, 32)
dtype, options = torch.float16, {"max_autotune": True}
"""


@CUDA_BUILD
def test_residual_streams_are_free_where_products_are_generated() -> None:
    (launches, size), (forged_launches, forged_size) = plain_and_forged(NETWORK)
    once = 2 * 8 * 64 * 32 * 32  # bytes of an activation
    assert forged_launches == launches, "the network's input is read by a product, too"
    # one more write, for the depthwise convolution, and one less: plain, the first sum is written ahead of its ReLU too
    assert forged_size - size < 0.1 * once
