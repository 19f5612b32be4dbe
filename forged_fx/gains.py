"""How much a layer can amplify what is left of its input: the spectral norm of its operator, restricted.

A site's call is linear in its data: `x -> W x`, plus a bias. For one input of the model, let P keep the elements that
the forged function leaves in place. `||W P||_2` is what the layer can amplify among them at most; beside it stand
`||W||_2`, of all elements, and `||W P0||_2`, of those that were not 0 before. Nothing is unrolled: the norms are found
by power iteration on the call itself, as it was made, and on its transpose, which is its gradient.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from forged_fx import ops
from forged_fx.modes import as_found, fast_path_off
from forged_fx.sites import CALLS, Key, get, replace
from forged_fx.torch_internals import tree_map
from forged_fx.within import thresholds_within

_FIELDS = ("whole", "nonzero", "kept")
ITERATIONS = 300  # at most
TOLERANCE = 1e-5  # two estimates in a row that are this close, relative, end the iteration


@dataclass
class Gains:
    """Of one site, for each input that runs it: float64 [inputs]; whole is the same for all. each: False where it is
    not known whose rows are whose, and there is one value, [1]."""

    whole: Tensor
    nonzero: Tensor
    kept: Tensor
    each: bool = True


def gains(forged: torch.nn.Module, x: Tensor, seed: int = 0) -> dict[str, Gains]:
    """Site, named as `sites_within` does, -> its gains, for each of the inputs x (n, ...); the sites whose call was
    seen to read the threshold's result as it is."""
    sites = thresholds_within(forged)

    def run(x: Tensor, sites: dict[int, str], backwards: dict[str, list[Tensor]] | None) -> _Watch:
        watch = _Watch(sites, len(x), seed, backwards)
        with as_found(forged), torch.no_grad(), fast_path_off(), watch:
            forged(x.clone())  # a model may write into what it is given
        return watch

    together = run(x, sites, run(x.flip(0), sites, None).prints)
    apart = {buffer: site for buffer, site in sites.items() if site in together.apart}
    alone: list[dict[str, Gains]] = []
    if apart:
        with contextlib.suppress(Exception):  # of a model that takes so many inputs and no others: one value, then
            alone = [run(x[i : i + 1], apart, {}).found for i in range(len(x))]
    for site in apart.values():
        if own := [of_one[site] for of_one in alone if site in of_one]:
            together.found[site] = Gains(*(torch.cat([getattr(values, k) for values in own]) for k in _FIELDS))
    return together.found


class _Watch(TorchFunctionMode):
    """Sees the forged functions' results, and the calls that read them.

    backwards: the prints of a run with the inputs in reverse, which tell whose rows are whose; None: this is that run,
    and nothing is measured.
    """

    def __init__(
        self, sites: dict[int, str], n: int, seed: int, backwards: dict[str, list[Tensor]] | None = None
    ) -> None:
        super().__init__()
        self.sites, self.n, self.backwards = sites, n, backwards
        self.generator = torch.Generator().manual_seed(seed)
        self.pending: dict[int, tuple[str, Tensor, Tensor, Tensor]] = {}
        self.prints: dict[str, list[Tensor]] = {}  # of each call's operand
        self.apart: set[str] = set()  # sites of whose rows it is not known whose they are
        self.found: dict[str, Gains] = {}

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function in ops.THRESHOLD_OPS:
            return self._forged(function, args, kwargs)
        if function in CALLS:
            for _, key, value in CALLS[function].operands(args, kwargs):
                # (where dimension 0 is summed over, no row is an input's)
                if id(value) in self.pending and CALLS[function].channel_of(value, key) + value.dim():
                    with contextlib.suppress(RuntimeError):  # of a call that takes no operand but of its own rows
                        self._measure(function, args, kwargs, key)
        return function(*args, **kwargs)

    def _forged(self, function: Any, args: tuple, kwargs: dict) -> Any:
        op = getattr(function, "default", function)
        if op in ops.DECOMPOSITIONS:  # a producer and its threshold: their chain, which comes here again
            with self:
                return ops.DECOMPOSITIONS[op](*args, **kwargs)
        y = function(*args, **kwargs)
        if (site := self.sites.get(id(args[1]))) is not None:
            row = ops.BY_OPERATOR[function]
            kept = row.backward(torch.ones_like(args[0]), *args[: 1 + row.arguments]) != 0
            nonzero = args[0] != 0
            self.pending[id(y)] = (site, y, kept & nonzero, nonzero)
        return y

    def _measure(self, function: Any, args: tuple, kwargs: dict, key: Key) -> None:
        site, y, kept, nonzero = self.pending.pop(id(get(args, kwargs, key)))
        calls = self.prints.setdefault(site, [])
        calls.append(_print(y))
        if self.backwards is None or not y.numel():
            return
        order = _order(calls[-1], self.backwards.get(site, [])[len(calls) - 1 :][:1], self.n)
        if order is None:
            self.apart.add(site)
        # In float64, so that a bias does not drown what it is subtracted from.
        args, kwargs = tree_map(lambda v: v.double() if isinstance(v, Tensor) else v, (args, kwargs))

        def call(v: Tensor) -> Tensor:
            return function(*(given := replace(args, kwargs, key, v))[0], **given[1])

        if order == COLUMNS:
            as_made, kept, nonzero = call, kept.transpose(0, 1), nonzero.transpose(0, 1)

            def call(v: Tensor) -> Tensor:
                return as_made(v.transpose(0, 1)).transpose(0, 1)

        # Each is found from below, and what a smaller set reaches, a larger one does too.
        on_kept = self._norms(call, kept, order)
        on_nonzero = torch.maximum(self._norms(call, nonzero, order), on_kept)
        whole = torch.maximum(self._whole(call, torch.ones_like(kept)), on_nonzero.max())
        new = Gains(whole.expand(on_kept.shape), on_nonzero, on_kept)
        if site in self.found:  # a module that runs several times
            before = self.found[site]
            new = Gains(*(torch.maximum(getattr(before, k), getattr(new, k)) for k in _FIELDS))
        new.each = site not in self.apart
        self.found[site] = new

    def _whole(self, call: Callable[[Tensor], Tensor], mask: Tensor) -> Tensor:
        """Of one row, as all are alike; unless the other operand has a matrix for each, and the largest is wanted."""
        try:
            return spectral_norms(call, mask[:1], self.generator).max()
        except RuntimeError:
            return spectral_norms(call, mask, self.generator).max()

    def _norms(self, call: Callable[[Tensor], Tensor], mask: Tensor, order: str | None) -> Tensor:
        """For each input of the model: the largest over those rows of the operand that belong to it."""
        rows = spectral_norms(call, mask, self.generator)
        if order is None:
            return rows.max(0, keepdim=True).values
        return rows.view(-1, self.n).amax(0) if order == TURNS else rows.view(self.n, -1).amax(1)


def _print(y: Tensor) -> Tensor:
    """What tells the rows of an operand apart, and within them the places of dimension 1: (rows, places). Sums with
    weights drawn at random: plain ones would be the same of one-hot rows."""
    inner = y.float().flatten(2) if y.dim() > 2 else y.float()[:, None]
    return inner @ torch.rand(inner.shape[2], generator=torch.Generator().manual_seed(0)).to(inner.device)


# How the inputs lie in an operand: the rows of one behind those of another; a row of each in turn, as where attention
# flattens what has the tokens first; or along dimension 1.
BLOCKS, TURNS, COLUMNS = "blocks", "turns", "columns"


def _order(here: Tensor, backwards: list[Tensor], n: int) -> str | None:
    """The order that the inputs' own reversal reverses; None if none is, or only some inputs run the call.

    backwards: the operand's print in the run with the inputs in reverse, if that made the call.
    """
    rows, places = here.shape
    if n == 1:
        return BLOCKS
    found = {}
    for there in backwards:
        if there.shape == here.shape and rows % n == 0:
            found[BLOCKS] = there.view(n, -1, places).flip(0).view(rows, places)
            found[TURNS] = there.view(-1, n, places).flip(1).view(rows, places)
        if there.shape == here.shape and places == n:
            found[COLUMNS] = there.flip(1)
    alike = {}
    for order, there in found.items():
        told = (here != 0) | (there != 0)  # what is 0 everywhere tells nothing
        same = torch.isclose(here, there, rtol=1e-3)[told]
        alike[order] = float(same.float().mean()) if len(same) else 1.0
    best = max(alike, key=alike.__getitem__, default=None)
    return best if best is not None and alike[best] > 0.95 else None  # (rounding may take a value over a threshold)


def spectral_norms(call: Callable[[Tensor], Tensor], mask: Tensor, generator: torch.Generator) -> Tensor:
    """`||W P||_2` for each row of a batch: P keeps where the mask is True, W is `call` without its bias.

    mask: bool (rows, ...), the shape of the call's operand; the rows must not depend on each other. Power iteration, so
    each value is from below. Returns float64 (rows,).
    """

    def unit(v: Tensor) -> Tensor:
        norm = v.flatten(1).norm(dim=1).clamp_min(torch.finfo(v.dtype).tiny)
        return v / norm.view(-1, *[1] * (v.dim() - 1))

    with torch.enable_grad():
        bias = call(torch.zeros_like(mask, dtype=torch.float64)).detach()
        start = torch.randn(mask.shape, generator=generator, dtype=torch.float64).to(mask.device)
        v, last = unit(start * mask), torch.zeros(len(mask), dtype=torch.float64, device=mask.device)
        for _ in range(ITERATIONS):
            v.requires_grad_()
            squares = (call(v) - bias).flatten(1).square().sum(1)
            now = squares.detach().sqrt()
            (gradient,) = torch.autograd.grad(squares.sum() / 2, v)
            v = unit(gradient.detach() * mask)
            if ((now - last).abs() <= TOLERANCE * now).all():
                break
            last = now
    return now
