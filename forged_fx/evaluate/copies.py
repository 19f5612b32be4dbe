"""Which inputs are copies of others. Statistics take each input for one of its own, so they are of the rest alone."""

import warnings

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d

NEAR = 1 / 512  # the most by which an element of a copy differs: half a grey level
PARTS = 16  # of an input: where their means differ by more, no copy has to be looked for


def first_of(x: Tensor) -> Tensor:
    """(n,) int64, of each input the first that it is a copy of; itself, if of none."""
    flat = x.detach().cpu().flatten(1)
    means = adaptive_avg_pool1d(flat[None], PARTS)[0]
    own = torch.arange(len(flat))
    first = own.clone()
    for k in range(1, len(flat)):
        near = ((means[:k] - means[k]).abs() <= NEAR + 1e-6).all(1) & (first[:k] == own[:k])
        (found,) = near.nonzero(as_tuple=True)
        found = found[((flat[found] - flat[k]).abs() <= NEAR).all(1)]
        if len(found):
            first[k] = found[0]
    return first


def among(x: Tensor) -> list[int]:
    """Which inputs are copies of one before them."""
    return (first_of(x) != torch.arange(len(x))).nonzero().flatten().tolist()


def others(n: int, among: list[int]) -> Tensor:
    """(n,) bool: all inputs but these."""
    kept = torch.ones(n, dtype=torch.bool)
    kept[among] = False
    return kept


def said(n: int, among: list[int]) -> str:
    """What to say of n inputs, these of which are copies; "" if none is."""
    if not among:
        return ""
    return (
        f"{len(among)} of {n} inputs are copies of others: differences, intervals and p-values are of the other "
        f"{n - len(among)} alone"
    )


def warn(x: Tensor, stacklevel: int = 3) -> list[int]:
    """`among`, and a warning if there are any, by default in the name of who called the caller."""
    found = among(x)
    if found:
        warnings.warn(said(len(x), found), stacklevel=stacklevel)
    return found
