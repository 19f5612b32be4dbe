"""Is the forged model smoother? Measured three ways, beside the model that it was made from. Nothing is certified."""

import math
import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from forged_fx import checked
from forged_fx.bpda import callers_gradient_off, straight_through
from forged_fx.evaluate import checks, fingerprint, scale
from forged_fx.evaluate.gradients import Context
from forged_fx.gains import Gains, gains
from forged_fx.modes import as_found, fast_path_off, of_ordinary_tensors
from forged_fx.progress import track
from forged_fx.randomness import kept_randomness
from forged_fx.randomness import seed as seed_all
from forged_fx.rows import Rows, text
from forged_fx.stats import is_number
from forged_fx.thresholds import parameters_of
from forged_fx.within import thresholds_within

EXACT = 64  # outputs: up to so many, the Jacobian is made row by row; beyond, its norms are estimated
PROBES = 32  # random vectors of the Frobenius norm's estimate
POWER = 100  # iterations of the spectral norm's
RADII = (1.0, 0.1, 0.01)  # shares of eps
RESAMPLES = 2000
FEW = 10  # below as many inputs the bootstrap of a skewed mean is much too sure of itself: no interval is given

SITE_WHOLE, SITE_NONZERO = "gain of what is kept / of all", "gain of what is kept / of what was not 0"
SPECTRAL, FROBENIUS = "Jacobian, spectral norm", "Jacobian, Frobenius norm"
STEP, LARGEST = "largest step, of each input", "largest step, of all inputs"


@dataclass(frozen=True)
class Figure:
    """One figure, of n inputs.

    base, forged: its mean over the inputs (its maximum in `LARGEST`). ratio: the mean over the inputs of forged / base,
    infinite if base is 0 at any of them; an input at which both are 0 has none and does not count, and where no input
    counts it is None. low, high: a 95 % interval of that (bootstrap over inputs), None where it is a single number, or
    not finite.
    """

    what: str
    where: str
    base: float
    forged: float
    ratio: float | None
    low: float | None
    high: float | None
    n: int

    @property
    def shown(self) -> str:
        """The ratio as text."""
        return "none" if self.ratio is None else f"{self.ratio:.4f}"

    def cells(self) -> list[str]:
        """As a table shows it: what, where, base, forged, ratio, interval, n."""
        interval = "" if self.low is None or self.high is None else f"{self.low:.4f} to {self.high:.4f}"
        values = (f"{self.base:.4g}", f"{self.forged:.4g}", self.shown, interval, str(self.n))
        return [self.what, self.where or "(root)", *values]


class Lipschitz(Rows[Figure]):
    """The figures: of the sites, of the Jacobians, of steps. not_seen: sites whose layer could not be measured."""

    row = Figure

    def __init__(self) -> None:
        super().__init__()
        self.not_seen: list[str] = []

    def more(self) -> dict[str, Any]:
        return super().more() | {"not_seen": self.not_seen}

    def __str__(self) -> str:
        shown = text(["", "", "base", "forged", "ratio", "95 %", "inputs"], [row.cells() for row in self])
        seen = f"\nnot measured: {', '.join(self.not_seen)}" if self.not_seen else ""
        return f"{shown}{seen}\nMeasured on these inputs; none of it bounds what happens elsewhere."

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Every ratio with its interval; what lies left of 1 is smaller in the forged model."""
        from forged_fx import pictures

        names = [r.what.replace("of what is kept / of", "over that of") for r in self]  # as wide as the margin
        names = [f"{name}\n{r.where or '(root)'}" for name, r in zip(names, self, strict=True)]
        rows = [(name, [(r.ratio, r.low, r.high)]) for name, r in zip(names, self, strict=True)]
        pictures.ratios("lipschitz", rows, "forged / base").save(path)


@of_ordinary_tensors
def lipschitz(
    model: torch.nn.Module,
    forged: torch.nn.Module,
    x: Tensor,
    *,
    eps: float = 8 / 255,
    steps: int = 20,
    batch_size: int = 32,
    seed: int = 0,
) -> Lipschitz:
    """Measure how strongly model and forged model react to small changes, at the inputs x.

    At each site: how much its layer can amplify the elements that forging keeps, over what it can amplify at all, and
    over those elements that were not 0 before (see `forged_fx.gains`). End to end: the norms of the Jacobian at each
    input, of the forged model with its true gradient and with the straight-through one; up to 64 outputs exactly, else
    by power iteration, and Hutchinson's estimate (1989) for the Frobenius norm. And the largest |f(x + d) - f(x)| / |d|
    found (both norms L2), which sees the jumps that no derivative sees: d climbs by `steps` sign steps within Linf
    balls of eps, eps / 10 and eps / 100, along the gradients of both models, straight-through too, and each d is tried
    on both; what is found in a ball counts in those around it. Where all of x lies in [0, 1], so does x + d.

    Neither model is changed; both run in eval mode, on their device. Rows of a batch must not depend on each other.
    Called within `forged_fx.straight_through`, it finds what it finds outside.

    Args:
        model: the plain model. forged: what `transform` made of it.
        x: inputs (n, ...), floating point.
        eps: of the largest step, Linf. steps: gradients per climb. batch_size: inputs at a time. seed: of the start.

    Raises:
        TypeError, ValueError: the second model is not forged, or was made from another one; x has no row, or is no
            floating point; an argument of no use.

    A warning says so where x is scaled otherwise than the inputs of calibration, as far as its size tells.
    """
    for one, who in ((model, "plain model"), (forged, "forged model")):
        checks.module(one, who, "lipschitz takes")
    if not is_number(eps) or not 0 < eps < float("inf"):
        raise ValueError(f"eps={eps!r} must be a positive number, such as 8 / 255")
    eps, steps, seed = float(eps), checked.whole_number(steps, "steps", 0), checked.whole_number(seed, "seed")
    batch_size = checked.whole_number(batch_size, "batch_size", 1)
    if not parameters_of(forged):
        raise ValueError(f"this {type(forged).__name__} is not forged: pass the plain model first, then the forged one")
    if parameters_of(model):
        raise ValueError(f"the first {type(model).__name__} is forged, too: pass the plain model first")
    if not isinstance(x, Tensor) or not x.is_floating_point() or not len(x):
        raise ValueError("x must be a floating-point tensor (n, ...) of at least one input")
    checks.finite(x)
    boxed = 0 <= x.min() and x.max() <= 1
    sites: dict[str, list[Gains]] = {}
    found: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}  # what, where -> (base, forged) of each batch
    with as_found(model, forged), fast_path_off(), callers_gradient_off(), kept_randomness():
        with torch.no_grad():
            for part in x.split(batch_size):
                for one, who in ((model, "plain model"), (forged, "forged model")):
                    checks.output(checks.ask(one, part, who), who)
            scale.warn(scale.of(forged, x, batch_size), "lipschitz", 4)
        _check_pair(model, forged)
        seed_all(seed)
        for i, part in enumerate(track(list(x.split(batch_size)), "measuring")):
            for site, values in gains(forged, part, seed).items():
                sites.setdefault(site, []).append(values)
            base = jacobian_norms(model, part, seed)
            for name, context in (("true gradient", nullcontext), ("straight-through", straight_through)):
                norms = jacobian_norms(forged, part, seed, context)
                for what, one, other in zip((SPECTRAL, FROBENIUS), base, norms, strict=True):
                    found.setdefault((what, name), []).append((one, other))
            by_ball: dict[float, tuple[Tensor, Tensor]] = {}
            for share in sorted(RADII):
                here = largest_steps(model, forged, part, share * eps, steps, seed + i, boxed)
                within = next(reversed(by_ball.values()), here)  # a smaller ball is a part of this one
                by_ball[share] = torch.maximum(here[0], within[0]), torch.maximum(here[1], within[1])
            for share in RADII:
                found.setdefault((STEP, f"within {share * eps:.2g}"), []).append(by_ball[share])
    result = Lipschitz()
    result.forging = fingerprint.of_forging(forged)
    for what, below in ((SITE_WHOLE, "whole"), (SITE_NONZERO, "nonzero")):
        for site, seen in sites.items():
            whole, kept = (torch.cat([getattr(values, key) for values in seen]) for key in (below, "kept"))
            if not all(values.each for values in seen):  # one value of several inputs: one of all, then
                whole, kept = whole.max()[None], kept.max()[None]
            result.append(_figure(what, site, whole, kept))
    largest: list[Figure] = []
    for (what, where), pairs in sorted(found.items(), key=lambda item: (SPECTRAL, FROBENIUS, STEP).index(item[0][0])):
        one, other = (torch.cat(values) for values in zip(*pairs, strict=True))
        result.append(_figure(what, where, one, other))
        if what == STEP:
            largest.append(replace(_figure(LARGEST, where, one.max()[None], other.max()[None]), n=len(one)))
    result.extend(largest)
    result.not_seen = [site for site in thresholds_within(forged).values() if site not in sites]
    return result


def _check_pair(model: torch.nn.Module, forged: torch.nn.Module) -> None:
    """ValueError unless the two have the same parameters, of which a wrapper may have changed the names."""

    def prints(values: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
        return {name: fingerprint.of_tensors([("", value)]) for name, value in values}

    here, there = (prints(one.named_parameters()) for one in (model, forged))
    if sorted(here.values()) != sorted(there.values()):
        apart = [name for name in here if name in there and here[name] != there[name]]
        what = f"{apart[0]!r} is not the same" if apart else f"{len(here)} parameters, and the forged one {len(there)}"
        raise ValueError(
            f"the forged model was not made from this plain one ({what}): pass the model that transform was given, in "
            "the dtype and with the weights that the forged one has"
        )
    statistics = ("running_mean", "running_var")  # (other buffers a forward may change: counters, say)
    here, there = (prints(b for b in one.named_buffers() if b[0].endswith(statistics)) for one in (model, forged))
    if apart := [name for name in here if name in there and here[name] != there[name]]:
        raise ValueError(
            f"the buffer {apart[0]!r} is not the same in the two, as where one of them ran in train mode since: pass "
            "the model that transform was given, as it was then"
        )


def jacobian_norms(
    model: torch.nn.Module, x: Tensor, seed: int, context: Context = nullcontext
) -> tuple[Tensor, Tensor]:
    """The spectral and the Frobenius norm of d f(x) / d x at each input; float64 (n,) each."""
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # attention's other kernels have no second derivative
        with context():
            y = model(leaf.clone()).flatten(1)  # a model may write into what it is given
        if not y.requires_grad:
            return (torch.zeros(len(x), dtype=torch.float64),) * 2
        return _exact_norms(y, leaf) if y.shape[1] <= EXACT else _estimated_norms(y, leaf, seed)


def _exact_norms(y: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
    rows = [torch.autograd.grad(y[:, k].sum(), leaf, retain_graph=True)[0] for k in range(y.shape[1])]
    jacobian = torch.stack(rows, 1).flatten(2).double().cpu()
    gram = jacobian @ jacobian.mT
    return torch.linalg.eigvalsh(gram)[:, -1].clamp_min(0).sqrt(), gram.diagonal(dim1=1, dim2=2).sum(1).sqrt()


def _estimated_norms(y: Tensor, leaf: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """By products with J and its transpose alone. J v is the derivative of u -> J^T u, which is linear, along v."""
    generator = torch.Generator().manual_seed(seed)

    def random() -> Tensor:
        return torch.randn(y.shape, generator=generator).to(y)

    squares = [torch.autograd.grad(y, leaf, random(), retain_graph=True)[0] for _ in range(PROBES)]
    frobenius = torch.stack([g.flatten(1).double().square().sum(1) for g in squares]).mean(0).sqrt()
    u = torch.nn.functional.normalize(random()).requires_grad_()
    for _ in range(POWER):
        (transposed,) = torch.autograd.grad(y, leaf, u, create_graph=True)
        (forward,) = torch.autograd.grad(transposed, u, transposed.detach(), retain_graph=True)
        u = torch.nn.functional.normalize(forward.detach()).requires_grad_()
    (transposed,) = torch.autograd.grad(y, leaf, u)
    return transposed.flatten(1).double().norm(dim=1).detach().cpu(), frobenius.cpu()


def largest_steps(
    model: torch.nn.Module, forged: torch.nn.Module, x: Tensor, radius: float, steps: int, seed: int, boxed: bool
) -> tuple[Tensor, Tensor]:
    """The largest |f(x + d) - f(x)| / |d| found within the Linf ball, for each input, of either model; float64 (n,)."""
    searches = ((model, nullcontext), (forged, nullcontext), (forged, straight_through))
    tried = [d for f, context in searches for d in _climb(f, x, radius, steps, seed, boxed, context)]
    return tuple(torch.stack([_stretch(f, x, d) for d in tried]).amax(0).double().cpu() for f in (model, forged))


def _climb(
    model: torch.nn.Module, x: Tensor, radius: float, steps: int, seed: int, boxed: bool, context: Context
) -> list[Tensor]:
    """Where it starts, and of each input the best d on the way up |f(x + d) - f(x)|."""
    generator = torch.Generator().manual_seed(seed)

    def inside(d: Tensor) -> Tensor:
        d = d.clamp(-radius, radius)
        return (x + d).clamp(0, 1) - x if boxed else d

    d = start = best = inside(radius * torch.randn(x.shape, generator=generator).sign().to(x))
    top = _stretch(model, x, d)
    with torch.no_grad():
        there = model(x.clone())
    for _ in range(steps):
        leaf = d.clone().requires_grad_()
        with torch.enable_grad():
            with context():
                y = model(x + leaf)
            if not y.requires_grad:
                break
            (gradient,) = torch.autograd.grad((y - there).square().sum(), leaf)
        d = inside(d + radius / 4 * gradient.sign())
        now = _stretch(model, x, d)
        best = torch.where((now > top).view(-1, *[1] * (x.dim() - 1)), d, best)
        top = torch.maximum(now, top)
    return [start, best]


@torch.no_grad()
def _stretch(model: torch.nn.Module, x: Tensor, d: Tensor) -> Tensor:
    moved = (x + d) - x  # what rounding has left of it
    length = moved.flatten(1).double().norm(dim=1)
    change = (model(x + d) - model(x.clone())).flatten(1).double().norm(dim=1)
    return torch.where(length > 0, change / length, 0)


def _figure(what: str, where: str, base: Tensor, forged: Tensor) -> Figure:
    base, forged = base.cpu(), forged.cpu()
    usable = (base != 0) | (forged != 0)
    if not usable.any():
        return Figure(what, where, 0.0, 0.0, None, None, None, 0)
    base, forged = base[usable], forged[usable]
    ratios = (forged / base).numpy()
    ratio = float(ratios.mean())
    low, high = interval(ratios) if math.isfinite(ratio) and len(ratios) >= FEW else (None, None)
    return Figure(what, where, float(base.mean()), float(forged.mean()), ratio, low, high, len(ratios))


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a mean (Efron 1979), from a fixed seed."""
    values = np.asarray(values)
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return float(low), float(high)
