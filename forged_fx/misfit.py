"""What to say of a batch that a model fails on: what it looks like, and what the model may want instead."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from forged_fx.memory import ran_out
from forged_fx.models import dtype_of
from forged_fx.torch_internals import tree_leaves

_OF_FORM = (RuntimeError, AssertionError, ValueError, IndexError)  # what a model raises that is given another shape
_CHANNELS = (1, 3, 4)


def looks(args: tuple, kwargs: dict) -> str:
    """Shape and dtype of the first tensor that the model was given, for a message."""
    x = _first(args, kwargs)
    return "" if x is None else f", of shape {tuple(x.shape)}, {x.dtype}"


def wanted(error: Exception, model: torch.nn.Module, args: tuple, kwargs: dict, batch: Any = None) -> str:
    """What a model that fails may want instead, to stand behind `looks`; "" where the error is of something else.

    batch: what the loader gave, where that is more than the model was given.
    """
    if ran_out(error):
        return ""
    x = _first(args, kwargs)
    if x is None:
        kinds = ", ".join(dict.fromkeys(type(leaf).__name__ for leaf in tree_leaves((args, kwargs)))) or "nothing"
        return f", which holds {kinds} and no tensor: torch.as_tensor(...) makes one"
    dtype, images = dtype_of(model, x.dtype), x.dim() == 4
    hints = {  # the first that holds is said
        ", which is the first item of the batch, and taken for the input: is the order (label, image)?": (
            isinstance(batch, Sequence) and any(isinstance(one, Tensor) and one.dim() > x.dim() for one in batch[1:])
        ),
        ": if these are pixels, pass x.float() / 255": x.dtype == torch.uint8,
        f", and the weights are {dtype}: cast the batches, x.to({dtype}), or the model": (
            x.is_floating_point() and x.dtype != dtype
        ),
        ": is that NHWC? x.permute(0, 3, 1, 2)": images and x.shape[3] in _CHANNELS and x.shape[1] not in _CHANNELS,
        ": is that the size that the model takes (on a terminal, --resize SIDE)?": images,
    }
    return next((hint for hint, holds in hints.items() if holds), "") if isinstance(error, _OF_FORM) else ""


def _first(args: tuple, kwargs: dict) -> Tensor | None:
    return next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
