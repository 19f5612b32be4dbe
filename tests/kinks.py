"""Values, thresholds and layouts at which an implementation of the threshold could go wrong."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# Representable in every dtype and not, below the smallest float16, above the largest, and the two ends.
THRESHOLDS = (0.0, -0.0, -1.0, 2.0**-149, 1e-10, 0.1, 0.5, 1.0, 65519.0, 1e6, math.inf, math.nan)


def values(t: float, dtype: torch.dtype) -> Tensor:
    """1-d: t and its floating-point neighbours, zeros, denormals, the extremes and NaN, with either sign.

    More of each than a vector register holds, and an odd number of all.
    """
    near = torch.tensor(t, dtype=dtype)
    up, down = (torch.nextafter(near, torch.tensor(end, dtype=dtype)) for end in (math.inf, -math.inf))
    info = torch.finfo(dtype)
    some = [near.item(), up.item(), down.item(), 0.0, _smallest(dtype), info.smallest_normal / 2]
    some += [info.smallest_normal, 0.3, 1.0, info.max, math.inf, math.nan]
    return torch.tensor([sign * value for value in some for sign in (1.0, -1.0)] * 37 + [0.3], dtype=dtype)


def _smallest(dtype: torch.dtype) -> float:
    return torch.nextafter(torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)).item()


def _gaps(v: Tensor) -> Tensor:
    wide = torch.full((v.numel(), 2), 7.0, dtype=v.dtype)
    wide[:, 0] = v
    return wide[:, 0]


def _channels_last(v: Tensor) -> Tensor:
    return v[:840].reshape(2, 7, 4, 15).contiguous(memory_format=torch.channels_last)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "flat": lambda v: v,
    "scalar": lambda v: v[0],
    "empty": lambda v: v[:0].reshape(3, 0, 2),
    "contiguous": lambda v: v[:840].reshape(3, 7, 40),
    "channels_last": _channels_last,
    "transposed": lambda v: v[:840].reshape(24, 35).mT,
    "permuted": lambda v: v[:840].reshape(2, 3, 4, 35).permute(2, 0, 3, 1),
    "one_channel": lambda v: v[:840].reshape(24, 1, 35, 1).as_strided((24, 1, 35, 1), (35, 7, 1, 3)),
    "misaligned": lambda v: v[1:],
    "gaps": _gaps,
    "sliced": lambda v: v[:840].reshape(20, 42)[3:17, 5:40],
    "sliced_channels_last": lambda v: _channels_last(v)[:, 2:5, 1:],
    "expanded": lambda v: v[:100, None].expand(100, 9),
    "expanded_in_front": lambda v: v[:100].expand(3, 100),
}


def same(a: Tensor, b: Tensor) -> bool:
    """The same shape, dtype, strides and bits; of a NaN only that it is one."""
    if (a.shape, a.dtype, a.stride()) != (b.shape, b.dtype, b.stride()):
        return False
    a, b = a.flatten(), b.flatten()
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(_bits(a[~nan]), _bits(b[~nan]))


def _bits(values: Tensor) -> Tensor:
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
