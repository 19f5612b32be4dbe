"""What a threshold can be fused with: a row per module or function that may stand ahead of it (`forged_fx/fuse.py`)."""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forged_fx.graph_calls import AUGMENTED
from forged_fx.models import is_as_its_class

Arguments = dict[str, Any]  # of a fused operator


@dataclass(frozen=True)
class Producer:
    """A row. role: its place in the chain, see `ROLES`. arguments: what a fused operator takes in its place, from the
    module, or from the function's other arguments; None where it has to run by itself now. dims: how many dimensions
    its input may have, where it is particular about that."""

    role: str
    arguments: Callable[..., Arguments | None]
    dims: tuple[int, ...] = ()


def _held(module: nn.Module, *names: str) -> list:
    """These attributes, as Python would find them, and without asking nn.Module: that takes longer, and is done in each
    call."""
    own = vars(module)
    parameters, buffers = own["_parameters"], own["_buffers"]
    return [
        own[name] if name in own else parameters[name] if name in parameters else buffers[name] if name in buffers
        else getattr(module, name)
        for name in names
    ]  # fmt: skip


def _batch_norm(m: Any) -> Arguments | None:
    mean, var, weight, bias, eps, training = _held(
        m, "running_mean", "running_var", "weight", "bias", "eps", "training"
    )
    if training or mean is None or var is None or isinstance(eps, Tensor):
        return None
    return {"mean": mean, "var": var, "weight": weight, "bias": bias, "eps": eps}


def _layer_norm_module(m: Any) -> Arguments | None:
    return _layer_norm(*_held(m, "normalized_shape", "weight", "bias", "eps"))


def _batch_norm_act(m: Any) -> Arguments | None:
    """timm's BatchNorm with an activation behind it, which is a module within it."""
    affine, activation = _batch_norm(m), row_of(m.act)
    usual = type(m.drop) is nn.Identity and activation is not None and activation.role in ("activation", "pass")
    if affine is None or not usual or not is_as_its_class(m.act) or not is_as_its_class(m.drop):
        return None
    more = activation.arguments(m.act)
    return None if more is None else affine | more


def _layer_norm(shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Arguments | None:
    return None if isinstance(eps, Tensor) else {"shape": tuple(shape), "weight": weight, "bias": bias, "eps": eps}


def _channels_first(m: Any) -> Arguments | None:
    """A LayerNorm2d, which permutes its input, and permutes it back."""
    arguments = None if getattr(m, "_fast_norm", False) else _layer_norm_module(m)
    return None if arguments is None else {**arguments, "channels_first": True}


def _rms_norm(shape: Any, weight: Any = None, eps: float | None = None) -> Arguments | None:
    return None if isinstance(eps, Tensor) else {"shape": tuple(shape), "weight": weight, "eps": eps, "rms": True}


def _gelu(approximate: str = "none") -> Arguments:
    return {"activation": "gelu_tanh" if approximate == "tanh" else "gelu"}


def _activation(name: str) -> Producer:
    return Producer("activation", lambda *_, **__: {"activation": name})


def _random(share: str) -> Producer:
    """The identity, but in train mode, for a share of its input."""
    return Producer("pass", lambda m: None if m.training and getattr(m, share) else {})


_LAYER_NORM = Producer("norm", _layer_norm_module)
_ADD = Producer("add", lambda residual: {"residual": residual})  # or a bias, where that is a parameter
_SCALE = Producer("scale", lambda weight: {"weight": weight})

# By the full name of the class, so that no library is imported for it. A class derived from one of them is another one.
MODULES: dict[str, Producer] = {
    "torch.nn.modules.batchnorm.BatchNorm1d": Producer("affine", _batch_norm, (2, 3)),
    "torch.nn.modules.batchnorm.BatchNorm2d": Producer("affine", _batch_norm, (4,)),
    "torch.nn.modules.batchnorm.BatchNorm3d": Producer("affine", _batch_norm, (5,)),
    "torch.nn.modules.normalization.LayerNorm": _LAYER_NORM,
    "timm.layers.norm.LayerNorm": Producer("norm", lambda m: None if m._fast_norm else _LAYER_NORM.arguments(m)),
    "timm.layers.norm_act.BatchNormAct2d": Producer("affine, activation", _batch_norm_act, (4,)),
    "timm.layers.norm.LayerNorm2d": Producer("norm", _channels_first, (4,)),
    "torchvision.models.convnext.LayerNorm2d": Producer("norm", _channels_first, (4,)),
    "torch.nn.modules.normalization.RMSNorm": Producer(
        "norm", lambda m: _rms_norm(m.normalized_shape, m.weight, m.eps)
    ),
    "torch.nn.modules.activation.ReLU": _activation("relu"),
    "torch.nn.modules.activation.ReLU6": _activation("relu6"),
    "torch.nn.modules.activation.GELU": Producer("activation", lambda m: _gelu(m.approximate)),
    "timm.layers.activations.GELU": _activation("gelu"),
    "timm.layers.activations.GELUTanh": _activation("gelu_tanh"),
    "torch.nn.modules.activation.SiLU": _activation("silu"),
    "torch.nn.modules.activation.Hardswish": _activation("hardswish"),
    "torch.nn.modules.linear.Identity": Producer("pass", lambda m: {}),
    "torch.nn.modules.dropout.Dropout": _random("p"),
    "timm.layers.drop.DropPath": _random("drop_prob"),
    "torchvision.ops.stochastic_depth.StochasticDepth": _random("p"),
}

# By a name that the graph can hold. A method is listed as the function that `torch.Tensor` holds.
FUNCTIONS: dict[str, tuple[Callable, Producer]] = {
    "operator.add": (operator.add, _ADD),
    "augmented.add": (AUGMENTED["iadd"], _ADD),
    "torch.add": (torch.add, _ADD),
    "Tensor.add": (Tensor.add, _ADD),
    "Tensor.add_": (Tensor.add_, _ADD),
    "operator.mul": (operator.mul, _SCALE),
    "augmented.mul": (AUGMENTED["imul"], _SCALE),
    "torch.mul": (torch.mul, _SCALE),
    "Tensor.mul": (Tensor.mul, _SCALE),
    "F.layer_norm": (F.layer_norm, Producer("norm", _layer_norm)),
    "F.rms_norm": (F.rms_norm, Producer("norm", _rms_norm)),
    "F.relu": (F.relu, _activation("relu")),
    "torch.relu": (torch.relu, _activation("relu")),
    "torch.relu_": (torch.relu_, _activation("relu")),
    "Tensor.relu": (Tensor.relu, _activation("relu")),
    "Tensor.relu_": (Tensor.relu_, _activation("relu")),
    "F.relu6": (F.relu6, _activation("relu6")),
    "F.gelu": (F.gelu, Producer("activation", _gelu)),
    "F.silu": (F.silu, _activation("silu")),
    "F.hardswish": (F.hardswish, _activation("hardswish")),
}
NAMES = {function: name for name, (function, _) in FUNCTIONS.items()}

# From the threshold upwards, the roles of the steps that one operator computes; each may be missing, "first" is an
# addition ahead of the affine map or norm. And for each role, those behind it that it cannot be combined with.
ROLES = {
    "activation": set(),
    "add": set(),
    "scale": set(),
    "affine": {"scale"},  # it has a scale itself
    "affine, activation": {"activation", "add", "scale", "affine"},
    "norm": {"activation", "add", "scale", "affine", "affine, activation"},  # a kernel of its own
    "first": {"add"},  # there is one residual
}
MAPS = ("scale", "affine", "affine, activation")  # the roles that have one parameter per channel


def row_of(module: nn.Module) -> Producer | None:
    return MODULES.get(name_of(type(module)))  # type: ignore[arg-type]


@functools.cache
def name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
