"""An oracle for coverage and for the forward: calibration and forging at the level of ATen, below the Python API.

It shares no code and no mechanism with the library, which watches Python functions and modules. A dispatch mode sees
each kernel of a convolution or matrix product, with one operand that depends on the input and one made from parameters
alone, whoever called it. Its sites have no names: they are the list of such kernels in the order in which they run.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten

# kernel -> positions of its two operands, and whether the first is always the data
PRODUCTS = {
    aten.convolution.default: (0, 1, True),
    aten.linear.default: (0, 1, True),
    aten.mm.default: (0, 1, False),
    aten.bmm.default: (0, 1, False),
    aten.mv.default: (0, 1, False),
    aten.addmm.default: (1, 2, False),
    aten.addmv.default: (1, 2, False),
    aten.baddbmm.default: (1, 2, False),
    aten._grouped_mm.default: (0, 1, False),
}
CONSTANT, PARAMETER, DATA = range(3)


class DispatchOracle(TorchDispatchMode):
    """Runs a model; `maxima` is then the largest |x| at each site, in execution order.

    ratio: if given, with the `maxima` of an earlier run, each site's operand is thresholded at ratio * maximum.
    """

    def __init__(self, ratio: float | None = None, maxima: list[float] | None = None) -> None:
        super().__init__()
        self.ratio, self.known = ratio, maxima
        self.maxima: list[float] = []
        self.recurrent = 0
        self.made_from = WeakTensorKeyDictionary()

    def run(self, model: torch.nn.Module, args: tuple, kwargs: dict) -> Any:
        for module in model.modules():
            for value in [*module._buffers.values(), *vars(module).values()]:
                if isinstance(value, Tensor):
                    self.made_from[value] = PARAMETER if value.requires_grad else CONSTANT
        for parameter in model.parameters():
            self.made_from[parameter] = PARAMETER
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self.made_from[leaf] = DATA
        with self:
            return model(*args, **kwargs)

    def _of(self, value: Any) -> int:
        if isinstance(value, torch.nn.Parameter):
            return PARAMETER
        return self.made_from.get(value, DATA) if isinstance(value, Tensor) else CONSTANT

    def __torch_dispatch__(self, kernel: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        origin = max((self._of(leaf) for leaf in tree_leaves((args, kwargs))), default=CONSTANT)
        if kernel in PRODUCTS:
            args = self._product(args, *PRODUCTS[kernel])
        self.recurrent += "rnn" in kernel.name() or "lstm" in kernel.name()
        result = kernel(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.made_from[leaf] = max(origin, self._of(leaf) if leaf in self.made_from else CONSTANT)
                if kernel._schema.is_mutable and leaf._base is not None:
                    self.made_from[leaf._base] = max(origin, self._of(leaf._base))
        return result

    def _product(self, args: tuple, a: int, b: int, layer: bool) -> tuple:
        left, right = self._of(args[a]), self._of(args[b])
        if {left, right} != {DATA, PARAMETER} or (layer and left != DATA):
            return args
        at = a if left == DATA else b
        x = args[at]
        self.maxima.append(x.abs().max().item() if x.numel() else 0.0)
        if self.ratio is None:
            return args
        cut = torch.where(x.abs() < torch.tensor(self.ratio * self.known[len(self.maxima) - 1]), 0, x)
        kept = torch.empty_like(x).copy_(cut)  # in x's own layout: another one can round differently further on
        return (*args[:at], kept, *args[at + 1 :])
