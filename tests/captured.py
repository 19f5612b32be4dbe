"""What tests of captured graphs share."""

import torch


def x_of(seed=1):
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))


def is_whole(forged):
    return isinstance(forged, torch.fx.GraphModule)


class AsItIs(torch.autograd.Function):
    """Hands on what it is given: nothing happens in its forward that a graph could show."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return 0.1 * grad
