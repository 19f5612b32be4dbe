"""The kernels that benchmarks look at, each with shapes of a real model. To add one, add a row to `cases`."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from forged_fx import fused_ops, ops
from forged_fx.kernels import fused, kinds, norm, reference, threshold

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BN = ("mean", "var", "weight", "bias")

# Instructions per element of a forged function, at most. The others compute or compare more than the threshold does,
# and where there are channels, an element's own is found by division.
MOST = {**dict.fromkeys(ops.FUNCTIONS, 16), "threshold": 8, "mean": 24}


@dataclass(frozen=True)
class Case:
    """make: (dtype, device) -> the tensors by name, not filled. launch, reference, chain: the kernel, what defines it,
    and the same by PyTorch's own operators, as functions of the tensors. most: instructions per element, a limit."""

    module: ModuleType
    launch: Callable[..., Any]
    reference: Callable[..., Any]
    chain: Callable[..., Any]
    make: Callable[[torch.dtype, str], dict[str, Tensor]]
    most: int | None = None


def cases(batch: int = 32, side: int = 56, length: int = 197) -> dict[str, Case]:
    """By name. The shapes are those of a ResNet's first and last stage, a ViT and a language model."""
    image, last_stage, tokens = (batch, 64, side, side), (batch, 512, 7, 7), (batch, length, 768)
    return {
        **{f.name: _forged(f, image) for f in ops.FUNCTIONS.values()},
        **{f"{f.name}, backward": _forged(f, image, backward=True) for f in ops.FUNCTIONS.values()},
        "mean; 7x7 contiguous": _forged(ops.FUNCTIONS["mean"], last_stage, last=False),
        "batch norm, relu": _elementwise(image, *BN, activation="relu"),
        "batch norm, relu; contiguous": _elementwise(image, *BN, activation="relu", last=False),
        "batch norm, relu; 7x7 contiguous": _elementwise(last_stage, *BN, activation="relu", last=False),
        "batch norm, residual, relu; kept": _elementwise(image, *BN, "residual", activation="relu", keep="value"),
        "residual, batch norm, relu; kept": _elementwise(
            image, *BN, "residual", activation="relu", add_first=True, keep="sum"
        ),
        **{name: _elementwise(tokens, activation=name) for name in fused.ACTIVATIONS[1:]},
        "batch norm, relu, soft": _elementwise(image, *BN, activation="relu", function="soft"),
        "batch norm, relu, band": _elementwise(image, *BN, "limit", activation="relu", function="band"),
        "residual; kept": _elementwise(tokens, "residual", keep="value"),
        "layer norm 768": _norm(tokens, "weight", "bias"),
        "layer norm over 96 channels": _norm((batch, 96, side, side), "weight", "bias", channels_first=True),
        "layer norm 768, clamp": _norm(tokens, "weight", "bias", function="clamp"),
        "residual, layer norm 768; kept": _norm(tokens, "residual", "weight", "bias", keep="sum"),
        "residual, layer norm 384; kept": _norm((batch, length, 384), "residual", "weight", "bias", keep="sum"),
        "residual, rms norm 4096; kept": _norm((batch, length // 3, 4096), "residual", "weight", rms=True, keep="sum"),
    }


def _forged(f: ops.Function, shape: tuple[int, ...], backward: bool = False, last: bool = True) -> Case:
    channels, channel = ((shape[1],), (1,)) if f.channels else ((), ())

    def make(dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        whole = {name: _whole(shape, dtype, device, last) for name in ("grad",) * backward + ("x",)}
        return whole | {name: torch.empty(channels, device=device) for name in f.parameters}

    def in_order(function: Callable) -> Callable:
        return lambda **given: function(*given.values(), *channel)

    module = threshold if f.name == "threshold" else kinds
    specified = getattr(reference, f"{f.name}_backward" if backward else f.name)
    functions = ops.launchers(f)[backward], specified, f.backward if backward else f.op
    return Case(module, *map(in_order, functions), make, most=MOST[f.name])


def _elementwise(shape: tuple[int, ...], *more: str, last: bool = True, **fixed: Any) -> Case:
    return _fused(fused, "elementwise_threshold", fixed, _tensors(shape, *more, channels=shape[1], last=last))


def _norm(shape: tuple[int, ...], *more: str, **fixed: Any) -> Case:
    over = shape[1 if fixed.get("channels_first") else -1]
    return _fused(norm, "norm_threshold", {**fixed, "shape": [over]}, _tensors(shape, *more, channels=over))


def _fused(module: ModuleType, name: str, fixed: dict[str, Any], make: Callable) -> Case:
    def with_fixed(function: Callable) -> Callable:
        return lambda **given: function(**given, **fixed)

    functions = getattr(module, f"launch_{name}"), getattr(reference, name), getattr(fused_ops, name)
    return Case(module, *map(with_fixed, functions), make)


def _tensors(
    shape: tuple[int, ...], *more: str, channels: int | None = None, last: bool = True
) -> Callable[[torch.dtype, str], dict[str, Tensor]]:
    """x, t, and whole tensors and parameters by name. last: channels_last."""

    def make(dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        found = {"x": _whole(shape, dtype, device, last), "t": torch.empty((), device=device)}
        for name in more:
            if name == "residual":
                found[name] = torch.empty_like(found["x"])
            elif name == "limit":
                found[name] = torch.empty((), device=device)
            else:
                found[name] = torch.empty(channels, dtype=dtype, device=device)
        return found

    return make


def _whole(shape: tuple[int, ...], dtype: torch.dtype, device: str, last: bool = True) -> Tensor:
    layout = torch.channels_last if last and len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=device, memory_format=layout)
