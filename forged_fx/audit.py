"""Proof, not hope: after a transform, run one batch through the model and the result, and compare.

At ratio 0 a threshold is the identity, so the two must agree bit for bit; and each site that the model's own run passes
through must have run its threshold exactly as often. With thresholds that change much, the result must be, bit for bit,
what the model gives when the operands of its sites are exchanged as it runs: then nothing but these is changed.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from forged_fx import misfit
from forged_fx.checked import in_a_line
from forged_fx.models import copies
from forged_fx.modes import eval_mode, fast_path_off, kept_buffers, same_bits, uncompiled
from forged_fx.observe import Observer, Sighting
from forged_fx.ops import THRESHOLD_OPS
from forged_fx.randomness import kept_randomness, seed
from forged_fx.sites import is_activation
from forged_fx.thresholds import thresholds_of
from forged_fx.torch_internals import TorchDispatchMode, tree_leaves, tree_map

_SEED = 0x5EED0F0A0D17


class AuditFailed(RuntimeError):
    """The result, its thresholds at 0, is not the model."""


class _CountThresholds(TorchDispatchMode):
    """Counts the thresholds that run, by the buffer that they read. (A function mode would change which path attention
    takes, and so see thresholds run that do not run without it.)"""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[int] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function in THRESHOLD_OPS:
            self.seen[id(args[1])] += 1
        return function(*args, **(kwargs or {}))


def audit(
    model: torch.nn.Module,
    forged: torch.nn.Module,
    wanted: list[str],
    args: tuple,
    kwargs: dict,
    agree: Callable[[Any, Any], bool] | None = None,
) -> tuple[list[str], set[str]]:
    """Compare `forged`, its thresholds at 0, with `model` on one input, in eval mode.

    Returns the wanted sites whose threshold did not run exactly as often as the site runs in `model`, and all sites
    that `model` ran, wanted or not. Raises AuditFailed where the outputs do not agree, by default where they differ in
    a bit, once the operands in memory with gaps were copied as a threshold copies them (`densely`). Randomness is
    repeated, and the random generators' state restored.
    """
    runs: Counter[str] = Counter()

    def see(seen: Sighting) -> Tensor | None:
        runs.update([seen.name])
        as_forged = seen.name in wanted and not seen.in_place  # (to which the threshold's result is written back)
        return densely(seen.operand.value) if as_forged else None

    observer = Observer(model, see, any(map(is_activation, wanted)))
    thresholds = thresholds_of(forged)
    as_used, on_slow_path = _CountThresholds(), _CountThresholds()

    def run() -> Any:
        with kept_buffers(forged):
            try:
                return _repeatably(forged, args, kwargs)
            except Exception as error:  # the model took this input: a graph that does not is another program
                if not isinstance(forged, fx.GraphModule):
                    raise
                raise AuditFailed(f"audit: the graph does not take the input, {in_a_line(error)}") from error

    with _auditing(model, forged):
        with kept_buffers(model), uncompiled(model):
            try:
                expected = _repeatably(observer.run, args, kwargs)
            except Exception as error:
                hint = misfit.wanted(error, model, args, kwargs)
                error.add_note(f"the audit ran the model on a batch{misfit.looks(args, kwargs)}{hint}")
                if _is_calibrations(kwargs, forged):
                    error.add_note("that is calibration's first: if the model takes others now, example=((x,), {})")
                raise
        with on_slow_path, fast_path_off():
            found = [run()]
        if isinstance(forged, fx.GraphModule):  # runs in another way when nothing watches it, see in_place.py
            with fast_path_off():
                found.append(run())
        if any(isinstance(module, torch.nn.MultiheadAttention) for module in forged.modules()):
            with as_used:
                run()
        else:
            as_used = on_slow_path
        agreed = all((agree or same)(expected, one) for one in found)
        repeats = agreed or _repeats(model, args, kwargs)
    if not repeats:
        raise AuditFailed(
            "audit: the model gives another output when it runs again from the same seed (by the time, the system's "
            "random numbers or what it counts), so that nothing can be compared with it: have it draw from a generator "
            "that torch.manual_seed sets, or hold what it counts for the time of transform"
        )
    if not agreed:
        raise AuditFailed("audit: with every threshold at 0 the result differs from the model")
    counts = {site: {c.seen[id(thresholds[site])] for c in (on_slow_path, as_used)} for site in wanted}
    return [site for site in wanted if counts[site] != {runs[site]}], set(runs)


def audit_at_work(
    model: torch.nn.Module, forged: torch.nn.Module, changes: dict[str, Callable], args: tuple, kwargs: dict
) -> None:
    """Compare `forged`, its thresholds at work, with `model` on one input, in eval mode. A graph is given another one
    of its kind, if the model takes that: what it holds of an earlier run shows.

    changes: site -> what becomes of its input. Raises AuditFailed where `model` gives another output when the inputs of
    its sites, and nothing else, are changed so as it runs.
    """

    def see(seen: Sighting) -> Tensor | None:
        if seen.name not in changes:
            return None
        changed = changes[seen.name](seen.operand.value)
        if not seen.in_place:
            return changed
        seen.operand.value.copy_(changed)  # whoever reads it later finds the activation's result there
        return None

    observer = Observer(model, see, any(map(is_activation, changes)))
    with _auditing(model, forged):
        with kept_buffers(model), uncompiled(model):
            given, expected = _first_taken(observer.run, args, kwargs, isinstance(forged, fx.GraphModule))
        with kept_buffers(forged), fast_path_off():
            found = _repeatably(forged, *given)
    if not same(expected, found):
        raise AuditFailed(
            "audit: with thresholds ahead of these sites, and nothing else changed, the model gives another result: "
            "what reads a site's input besides (a hook, a function of TorchScript's) is given the thresholded one"
        )


def _is_calibrations(kwargs: dict, forged: torch.nn.Module) -> bool:
    """Whether a batch is the one that calibration kept, by its keyword arguments, and none that the caller gave."""
    record: Any = forged.forging
    return record.stats.example is not None and kwargs is record.stats.example[1]


def same_on_fast_path(model: torch.nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether the model gives the same, within rounding, with and without the fast path of attention."""
    found = []
    for context in (contextlib.nullcontext(), fast_path_off()):
        with _auditing(model, model), kept_buffers(model), uncompiled(model), context:
            found.append(_repeatably(model, args, kwargs))
    return alike(*found)


def _first_taken(run: Callable, args: tuple, kwargs: dict, another: bool) -> tuple[tuple[tuple, dict], Any]:
    """The input of a run, and its result: `another` of the kind, or where that is an error, this one."""
    if another:
        with contextlib.suppress(Exception):
            other = tree_map(_other, (args, kwargs))
            return other, _repeatably(run, *other)
    return (args, kwargs), _repeatably(run, args, kwargs)


def _other(value: Any) -> Any:
    """Numbers of the same magnitude elsewhere."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or not value.dim():
        return value
    return value.flip(-1) * 0.75 if value.is_floating_point() else value.flip(-1)


@contextlib.contextmanager
def _auditing(model: torch.nn.Module, forged: torch.nn.Module) -> Iterator[None]:
    with torch.no_grad(), kept_randomness(), eval_mode(model), eval_mode(forged):
        yield


def _repeats(model: torch.nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether the model gives the same once more."""
    runs = []
    for _ in range(2):
        with kept_buffers(model):
            runs.append(_repeatably(model, args, kwargs))
    return same(*runs)


def densely(x: Tensor) -> Tensor | None:
    """A copy of x in the layout that a threshold gives it; None where that is x's own.

    A slice of a wider tensor has gaps in memory, and a threshold closes them: the product behind it may then round
    otherwise, in the last bit, though it is given the same numbers.
    """
    if x.layout != torch.strided or torch.ops.aten.is_non_overlapping_and_dense(x):
        return None
    return torch.empty_like(x).copy_(x)


def _repeatably(run: Callable, args: tuple, kwargs: dict) -> Any:
    """A run from a fixed seed, on copies of the input. (From one that no forward sets itself: whether it does, and the
    graph does not, would not show.)"""
    seed(_SEED)
    args, kwargs = copies((args, kwargs))
    return run(*args, **kwargs)


def same(a: Any, b: Any) -> bool:
    """Bit-for-bit equality of nested outputs, in containers of the same classes."""
    return _throughout(same_bits, a, b)


def alike(a: Any, b: Any) -> bool:
    """Equality of nested outputs within rounding: up to the root of the dtype's epsilon, as a share of the largest."""
    return _throughout(_alike_leaf, a, b)


def _throughout(holds: Callable[[Any, Any], bool], a: Any, b: Any) -> bool:
    """Whether it holds of all tensors in two outputs, which are in containers of classes that are called the same: a
    forward may make a class of its own in each run."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and holds(a, b)
    if type(a).__qualname__ != type(b).__qualname__:
        return False
    inside, other = _inside(a), _inside(b)
    return [*inside] == [*other] and all(_throughout(holds, inside[key], other[key]) for key in inside)


def _inside(value: Any) -> dict[Any, Any]:
    """What a container holds, and where."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple | list):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    leaves = tree_leaves(value)
    return {} if len(leaves) == 1 and leaves[0] is value else dict(enumerate(leaves))


def _alike_leaf(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return same_bits(a, b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    finite = a[a.isfinite()].double()
    rounding = torch.finfo(a.dtype).eps ** 0.5 * float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(a.double(), b.double(), rtol=0.0, atol=rounding, equal_nan=True)
