"""Questions that a forward asks by functions of another file."""

from torch import Tensor, is_tensor


def doubled_if_tensor(x, mask):
    return x * 2 if isinstance(mask, Tensor) else x


def clamped_if_tensor(x):
    return x.clamp(0, 1) if is_tensor(x) else x
