"""A few of the inputs that attacks broke, with what they were: for a page to show, without the data at hand."""

from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from forged_fx.evaluate.result import Side

SHOWN = 12  # images: what a reader looks through, and some megabytes for ImageNet's


@dataclass(eq=False)
class Gallery:
    """index: of inputs that the model gets right and an attack broke, (k,) int64, ascending. x: these inputs, (k, ...)
    float32; y: their classes, (k,) int64; predicted: what the model takes their adversarial examples for, (k,) int64.
    """

    index: Tensor
    x: Tensor
    y: Tensor
    predicted: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """As a file has them."""
        return {f"gallery.{name}": value.contiguous() for name, value in vars(self).items()}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], model: "Side") -> "Gallery | None":
        """From a file's tensors; None where the file has no gallery. ValueError where it is not of this side."""
        if "gallery.index" not in tensors:
            return None
        found = cls(*(tensors[f"gallery.{name}"] for name in cls.__annotations__))
        k = len(found.index)
        sound = (
            k <= SHOWN
            and all(t.shape == (k,) and t.dtype == torch.int64 for t in (found.index, found.y, found.predicted))
            and bool((found.index.diff() > 0).all())
            and bool(torch.isin(found.index, (model.broken_by > 0).nonzero().flatten()).all())
            and found.x.shape == (k, *model.examples.shape[1:])
            and found.x.dtype == torch.float32
        )
        if not sound:
            raise ValueError("its gallery shows other inputs than those that were broken")
        return found


def choose(model: "Side") -> Tensor:
    """Which inputs to show, (k,) int64, ascending: of each row that broke some the first, then of each the second."""
    rows = ((model.broken_by == i).nonzero().flatten().tolist() for i in range(1, len(model.rows)))
    in_turn = [index for index in chain.from_iterable(zip_longest(*rows)) if index is not None]
    return torch.tensor(sorted(in_turn[:SHOWN]), dtype=torch.int64)
