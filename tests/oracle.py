"""Calibration and forging by forward pre-hooks: what the library must agree with, sharing no code with it.

It knows modules only, so it serves models whose sites are all `nn.Linear` and `nn.Conv*d` modules that run once.
"""

import contextlib

import torch
from torch import nn

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}


@torch.no_grad()
def maxima(model, batches):
    """Layer name -> the largest |x| that entered it."""
    found = {}

    def record(name):
        def hook(_, args):
            found[name] = max(found.get(name, 0.0), args[0].abs().max().item())

        return hook

    handles = [module.register_forward_pre_hook(record(name)) for name, module in layers(model).items()]
    for x in batches:
        model(x)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def shares_below(model, batches, thresholds):
    """Layer name -> the share of its inputs with |x| < its threshold."""
    below, total = dict.fromkeys(thresholds, 0), dict.fromkeys(thresholds, 0)

    def count(name):
        def hook(_, args):
            below[name] += (args[0].abs() < thresholds[name]).sum().item()
            total[name] += args[0].numel()

        return hook

    handles = [layers(model)[name].register_forward_pre_hook(count(name)) for name in thresholds]
    for x in batches:
        model(x)
    for handle in handles:
        handle.remove()
    return {name: below[name] / total[name] for name in thresholds}


@contextlib.contextmanager
def forged(model, thresholds, straight_through=False):
    """Within, every layer's input is thresholded, in plain torch."""

    def cut(t):
        def hook(_, args):
            x = args[0]
            kept = torch.where(x.abs() < t, torch.zeros_like(x), x)
            return (x + (kept - x).detach() if straight_through else kept, *args[1:])

        return hook

    handles = [layers(model)[name].register_forward_pre_hook(cut(t)) for name, t in thresholds.items()]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
