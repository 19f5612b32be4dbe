"""The kernels that benchmarks look at, each with shapes of a real model. To add one, add a row to `cases`."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from forged_fx import fused_ops
from forged_fx.kernels import fused, norm, reference, threshold

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BN = ("mean", "var", "weight", "bias")


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
        "threshold": _threshold("threshold", image),
        "threshold, backward": _threshold("threshold_backward", image, "grad"),
        "batch norm, relu": _elementwise(image, *BN, activation="relu"),
        "batch norm, relu; contiguous": _elementwise(image, *BN, activation="relu", last=False),
        "batch norm, relu; 7x7 contiguous": _elementwise(last_stage, *BN, activation="relu", last=False),
        "batch norm, residual, relu; kept": _elementwise(image, *BN, "residual", activation="relu", keep="value"),
        "residual, batch norm, relu; kept": _elementwise(
            image, *BN, "residual", activation="relu", add_first=True, keep="sum"
        ),
        **{name: _elementwise(tokens, activation=name) for name in fused.ACTIVATIONS[1:]},
        "residual; kept": _elementwise(tokens, "residual", keep="value"),
        "layer norm 768": _norm(tokens, "weight", "bias"),
        "residual, layer norm 768; kept": _norm(tokens, "residual", "weight", "bias", keep="sum"),
        "residual, layer norm 384; kept": _norm((batch, length, 384), "residual", "weight", "bias", keep="sum"),
        "residual, rms norm 4096; kept": _norm((batch, length // 3, 4096), "residual", "weight", rms=True, keep="sum"),
    }


def _threshold(name: str, shape: tuple[int, ...], *more: str) -> Case:
    launch, chain = getattr(threshold, f"launch_{name}"), getattr(torch.ops.forged_fx, name).default
    return Case(threshold, launch, getattr(reference, name), chain, _tensors(shape, *more), most=8)


def _elementwise(shape: tuple[int, ...], *more: str, last: bool = True, **fixed: Any) -> Case:
    return _fused(fused, "elementwise_threshold", fixed, _tensors(shape, *more, channels=shape[1], last=last))


def _norm(shape: tuple[int, ...], *more: str, **fixed: Any) -> Case:
    return _fused(norm, "norm_threshold", {**fixed, "shape": [shape[-1]]}, _tensors(shape, *more, channels=shape[-1]))


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
        layout = torch.channels_last if last and len(shape) == 4 else torch.contiguous_format
        found = {"x": torch.empty(shape, dtype=dtype, device=device, memory_format=layout)}
        found["t"] = torch.empty((), device=device)
        for name in more:
            whole = name in ("residual", "grad")
            found[name] = torch.empty_like(found["x"]) if whole else torch.empty(channels, dtype=dtype, device=device)
        return found

    return make
