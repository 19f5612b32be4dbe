"""How fast a forged model runs beside the plain one, timed so that the ratio means something.

A machine's speed drifts by more than a threshold costs. So all variants run in turn, in one process, and a ratio is
taken within each round; what is reported is its median over the rounds and its quartiles.
"""

import functools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from forged_fx.modes import as_found
from forged_fx.progress import track

LEAST = 0.05  # seconds that one timing takes at least: far above the clock's grain and a context switch

Way = Callable[[nn.Module], Callable[[Tensor], Tensor]]
Key = tuple[str, str]  # (mode, "plain" or "forged")

# mode -> how the plain model is run, how the forged one is
MODES: dict[str, tuple[Way, Way]] = {
    "eager": (lambda model: model, lambda forged: forged),
    "compiled": (torch.compile, functools.partial(torch.compile, backend="forged")),
}


@dataclass(frozen=True)
class Speed:
    """Plain and forged in one mode.

    plain, forged: seconds of a forward pass in the fastest round. ratio: the forged model's throughput as a share of
    the plain one's in the same round (1: it is free, 0.9: a tenth slower), the median over the rounds; low and high:
    its quartiles. So the ratio of the two times is close to `ratio`, and on a busy machine not quite it.
    """

    mode: str
    plain: float
    forged: float
    ratio: float
    low: float
    high: float


def compare(
    model: nn.Module, forged: nn.Module, x: Tensor, *, rounds: int = 15, modes: Iterable[str] = tuple(MODES)
) -> list[Speed]:
    """Time both models on the batch `x`, in each of `modes`, in eval mode and without gradients.

    Compiles what has to be compiled first and leaves that out of the figures. Raises ValueError for less than one
    round, KeyError for an unknown mode, and what torch.compile raises where it cannot compile (no C++ compiler).
    """
    variants: dict[Key, Callable[[], object]] = {}
    modes = tuple(modes)
    for mode in modes:
        for name, way, module in zip(("plain", "forged"), MODES[mode], (model, forged), strict=True):
            variants[mode, name] = functools.partial(way(module), x)
    with torch.no_grad(), as_found(model, forged):
        seconds = interleave(variants, rounds, lambda: torch.cuda.synchronize() if x.is_cuda else None)
    speeds = []
    for mode in modes:
        plain, ours = seconds[mode, "plain"], seconds[mode, "forged"]
        speeds.append(Speed(mode, float(plain.min()), float(ours.min()), *relative(plain, ours)))
    return speeds


def text(speeds: Iterable[Speed]) -> str:
    """A table."""
    lines = [f"{'fastest':8}  {'plain, ms':>9}  {'forged, ms':>10}  throughput forged / plain: median, quartiles"]
    lines += [
        f"{s.mode:8}  {1e3 * s.plain:9.3f}  {1e3 * s.forged:10.3f}  {s.ratio:.3f} [{s.low:.3f}, {s.high:.3f}]"
        for s in speeds
    ]
    return "\n".join(lines)


def interleave(
    variants: Mapping[Key, Callable[[], object]],
    rounds: int,
    wait: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Key, np.ndarray]:
    """Seconds per call of each variant, one figure per round: arrays of shape (rounds,).

    wait: returns when the device has finished what was asked of it. clock: `time.process_time` leaves out the time in
    which other processes had the CPU; it adds up the threads'.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: at least 1")
    calls = {}
    for key, call in variants.items():
        for _ in range(3):  # compile, and fill caches
            call()
        calls[key] = max(1, round(LEAST / max(_time(call, 1, wait, clock), 1e-6)))
    seconds = {key: np.empty(rounds) for key in variants}
    order = list(variants)
    for i in track(range(rounds), "timing"):
        for key in order:
            seconds[key][i] = _time(variants[key], calls[key], wait, clock)
        order.reverse()  # what runs after what is not always the same
    return seconds


def _time(call: Callable[[], object], times: int, wait: Callable[[], object], clock: Callable[[], float]) -> float:
    wait()
    began = clock()
    for _ in range(times):
        call()
    wait()
    return (clock() - began) / times


def relative(base: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """(median, lower quartile, upper quartile) of the throughput of `other` as a share of the base's, of one round.

    base, other: seconds per call in each round, as `interleave` returns them.
    """
    median, low, high = np.quantile(base / other, (0.5, 0.25, 0.75))
    return float(median), float(low), float(high)
