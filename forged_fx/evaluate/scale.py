"""Whether a forged model is given inputs of the size that it was calibrated on: pixels in [0, 1], or in [0, 255]."""

import warnings
from collections.abc import Container
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

APART = 4  # times larger or smaller: no more than other inputs of one scale make of it


class _First(TorchFunctionMode):
    """Looks at what enters the first forged site that runs.

    operators: those of forged functions. sizes: id of a site's buffer -> the site's c_max.
    """

    def __init__(self, operators: Container[Any], sizes: dict[int, float]) -> None:
        super().__init__()
        self.operators, self.sizes = operators, sizes
        self.seen: tuple[float, float] | None = None  # largest magnitude, c_max

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if self.seen is None and func in self.operators and id(args[1]) in self.sizes and args[0].numel():
            self.seen = float(args[0].abs().max()), self.sizes[id(args[1])]
        return func(*args, **(kwargs or {}))


def of(model: nn.Module, x: Tensor, batch_size: int) -> tuple[float, float] | None:
    """The largest magnitude at the first forged site on these inputs, and the one that calibration saw there; None
    where no site of forged_fx.transform's is seen to run (compiled ones are not). x: (n, ...), fed in such batches."""
    # late: evaluate serves models of any make
    from forged_fx.ops import BY_OPERATOR
    from forged_fx.thresholds import parameters_of
    from forged_fx.transform import forging_of

    sizes = {
        id(buffer): record.stats.sites[site].c_max
        for module in model.modules()
        if (record := forging_of(module))
        for site, buffers in parameters_of(module).items()
        for buffer in buffers
    }
    if not sizes:
        return None
    seen = []
    for part in x.split(batch_size):
        with _First(BY_OPERATOR, sizes) as first:
            model(part.clone())
        seen += [first.seen] if first.seen else []
    return max(seen, default=None)


def times_apart(seen: tuple[float, float]) -> float | None:
    """How often the larger of the two sizes holds the smaller; None where that is 0."""
    small, large = sorted(seen)
    return large / small if small > 0 else None


def warn(seen: tuple[float, float] | None, what: str, stacklevel: int) -> None:
    """Warn where the two of `of` are too far apart for inputs of one scale. what: the call that shows figures."""
    if seen is not None and (times_apart(seen) or 0) > APART:
        warnings.warn(
            f"{what}: the first forged site is given values of up to {seen[0]:.4g} here, and calibration saw "
            f"{seen[1]:.4g} there at most. Are these inputs scaled as those of calibration were (to [0, 1], "
            "normalised)? If not, the figures are not of what was calibrated",
            stacklevel=stacklevel,
        )
