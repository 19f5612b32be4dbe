"""Whether a model's weights are those that its statistics were taken with. What enters a layer depends on them."""

import hashlib
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.parameter import is_lazy

_SAMPLED = 1024  # elements of each weight: training moves nearly all of them


def of_weights(model: nn.Module) -> dict[str, str]:
    """By parameter name, its dtype and a digest of some of its elements. Of sharded ones and the like nothing is said.

    In another dtype a weight is the same to rounding, which a digest cannot tell: then nothing is said, either.
    """
    named = model.named_parameters(remove_duplicate=False)
    return {name: _digest(value) for name, value in named if _is_plain(value)}


def changed(model: nn.Module, before: Mapping[str, str]) -> list[str]:
    """The names of parameters that are of the same dtype, and not what they were."""
    now = of_weights(model) if before else {}
    common = [name for name in now if name in before]
    return [name for name in common if now[name] != before[name] and _dtype(now[name]) == _dtype(before[name])]


def _dtype(said: str) -> str:
    return said.partition(" ")[0]


def weights_have_changed(names: list[str]) -> str:
    """What to say of these."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (
        f"weights have changed since calibration ({names[0]!r}{more}), and with them what enters the layers behind: "
        "calibrate again"
    )


def _is_plain(value: torch.Tensor) -> bool:
    kind = type(value) in (nn.Parameter, torch.Tensor)
    return kind and not is_lazy(value) and not value.is_meta and value.layout == torch.strided


def _digest(value: torch.Tensor) -> str:
    value, step = value.detach(), max(1, value.numel() // _SAMPLED)
    if value.is_contiguous():  # the same elements, ten times as fast
        some = value.view(-1)[::step].clone(memory_format=torch.contiguous_format).view(-1)
    else:
        some = value[torch.unravel_index(torch.arange(0, value.numel(), step, device=value.device), value.shape)]
    bits = some.view(torch.uint8).cpu().numpy()
    return f"{str(value.dtype).removeprefix('torch.')} {hashlib.sha256(bits.data).hexdigest()[:16]}"
