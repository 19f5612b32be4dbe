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

_NAMES = ("whole", "nonzero", "kept")
ITERATIONS = 300  # at most
TOLERANCE = 1e-5  # two estimates in a row that are this close, relative, end the iteration


@dataclass
class Gains:
    """Of one site, for each input: float64 [inputs]; whole is the same for all."""

    whole: Tensor
    nonzero: Tensor
    kept: Tensor


def gains(forged: torch.nn.Module, x: Tensor, seed: int = 0) -> dict[str, Gains]:
    """Site, named as `sites_within` does, -> its gains, for each of the inputs x (n, ...); the sites whose call was
    seen to read the threshold's result as it is."""
    sites, n = thresholds_within(forged), len(x)

    def watch(part: Tensor, sites: dict[int, str], rows: dict[str, list[int]] | None) -> _Watch:
        seen = _Watch(sites, len(part), seed, rows)
        with as_found(forged), torch.no_grad(), fast_path_off(), seen:
            forged(part.clone())  # a model may write into what it is given
        return seen

    rows = watch(x[:1], sites, None).rows
    together = watch(x, sites, rows)
    apart = {buffer: site for buffer, site in sites.items() if site in together.apart}
    alone = [watch(x[i : i + 1], apart, rows).found for i in range(n)] if apart else []
    found: dict[str, Gains] = {}
    for site in rows:
        if site not in together.apart:
            found |= {site: together.found[site]} if site in together.found else {}
        elif all(site in of_one for of_one in alone):
            found[site] = Gains(*(torch.cat([getattr(of_one[site], k) for of_one in alone]) for k in _NAMES))
    return found


class _Watch(TorchFunctionMode):
    """Sees the forged functions' results, and the calls that read them.

    rows: how many rows each call's operand has if the model is given one input, None: to find that out and measure
    nothing. apart: the sites of which another number came with n inputs than n times that, as where attention puts
    dimension 0 behind the next, so that it is not known whose row is whose.
    """

    def __init__(self, sites: dict[int, str], n: int, seed: int, rows: dict[str, list[int]] | None) -> None:
        super().__init__()
        self.sites, self.n, self.of_one = sites, n, rows
        self.generator = torch.Generator().manual_seed(seed)
        self.pending: dict[int, tuple[str, Tensor, Tensor, Tensor]] = {}
        self.rows: dict[str, list[int]] = {}
        self.apart: set[str] = set()
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
        rows = self.rows.setdefault(site, [])
        rows.append(len(y))
        if self.of_one is None:
            return
        if self.n > 1 and len(y) != self.n * sum(self.of_one.get(site, [])[len(rows) - 1 : len(rows)]):
            self.apart.add(site)
        if site in self.apart:
            return
        # In float64, so that a bias does not drown what it is subtracted from.
        args, kwargs = tree_map(lambda v: v.double() if isinstance(v, Tensor) else v, (args, kwargs))

        def call(v: Tensor) -> Tensor:
            return function(*(given := replace(args, kwargs, key, v))[0], **given[1])

        # Each is found from below, and what a smaller set reaches, a larger one does too.
        on_kept = self._norms(call, kept)
        on_nonzero = torch.maximum(self._norms(call, nonzero), on_kept)
        whole = torch.maximum(self._whole(call, torch.ones_like(y, dtype=torch.bool)), on_nonzero.max())
        new = Gains(whole.expand(on_kept.shape), on_nonzero, on_kept)
        if site in self.found:  # a module that runs several times
            before = self.found[site]
            new = Gains(*(torch.maximum(getattr(before, k), getattr(new, k)) for k in _NAMES))
        self.found[site] = new

    def _whole(self, call: Callable[[Tensor], Tensor], mask: Tensor) -> Tensor:
        """Of one row, as all are alike; unless the other operand has a matrix for each, and the largest is wanted."""
        try:
            return spectral_norms(call, mask[:1], self.generator).max()
        except RuntimeError:
            return spectral_norms(call, mask, self.generator).max()

    def _norms(self, call: Callable[[Tensor], Tensor], mask: Tensor) -> Tensor:
        """For each input of the model: the largest over those rows of the operand that belong to it."""
        return spectral_norms(call, mask, self.generator).view(self.n, -1).amax(1)


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
