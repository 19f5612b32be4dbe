"""The kinds of forging: what stands ahead of a site, and how its parameters follow from statistics and a ratio.

    hard        0 where |x| < t, else x                     one_sided   0 where x < t, else x
    soft        sign(x) max(|x| - t, 0)                     shifted     max(x - t, 0)
    clamp       |x| limited to a limit                      band        0 below t and limited above
    mean        a channel's mean where |x - mean| is at most a width, else x (MeanSparse)

A kind is a row of `KINDS`. Its function is a row of `FUNCTIONS` in forged_fx/ops.py, specified by kernels/reference.py.
docs/extending.md says how to add one.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from forged_fx import ops
from forged_fx.histogram import quantile
from forged_fx.stats import SiteStats, Stats, is_number, parse_statistic

Value = float | np.ndarray  # of a buffer: a float32 number, or one for each channel

MEAN_STD = "mean_std"


@dataclass(frozen=True)
class End:
    """One end of what a kind changes, which a ratio moves.

    ratio: what it is called. buffer: its buffer's name, after `forged_`. off: where it is the identity. says: what it
    does, for a message.
    """

    ratio: str
    buffer: str
    off: float
    says: str

    def check(self, ratio: Any, statistic: str, what: str) -> float:
        """The ratio as a number; None is off. Raises ValueError for one of no use."""
        if ratio is None:
            return self.off
        number = is_number(ratio) and not math.isnan(ratio)
        if self.off == 0:
            # c_max is the largest value; the others leave some beyond
            most, bounds = (1, "[0, 1]") if statistic == "max" else (math.inf, "[0, inf)")
            if not number or not 0 <= ratio <= most or math.isinf(ratio):
                raise ValueError(f"{what} must be a number in {bounds}, {self.says}; got {ratio!r}")
        elif not number or not ratio > 0:
            raise ValueError(
                f"{what} must be a number above 0, {self.says}; None leaves a site as it is; got {ratio!r}"
            )
        return float(ratio)


LOW = End("low", "threshold", 0.0, "inputs below that share of the statistic become 0")
HIGH = End("high", "limit", math.inf, "inputs are limited to that share of the statistic")
WIDTH = End("width", "width", 0.0, "inputs within that many standard deviations of their channel's mean become it")


@dataclass(frozen=True)
class Kind:
    """A row.

    function: which of `ops.FUNCTIONS`. ends: what the ratio moves; a pair of ratios for two of them. default: the ratio
    where none is given; None: one has to be given. statistic: what it needs, "max" standing for what can be read off a
    histogram of |x| too. signed: it looks at x, not at |x|.
    """

    name: str
    function: str
    ends: tuple[End, ...]
    says: str
    default: float | None = None
    statistic: str = "max"
    signed: bool = False

    @property
    def op(self) -> Callable:
        return ops.FUNCTIONS[self.function].op

    @property
    def buffers(self) -> tuple[str, ...]:
        """The names of a site's buffers, after `forged_`, in the order in which the operator takes them."""
        ends = tuple(end.buffer for end in self.ends)
        return ("mean", *ends) if self.statistic == MEAN_STD else ends

    def rest(self, site: SiteStats) -> tuple[int, ...]:
        """What the operator takes besides x and buffers."""
        return (site.channel,) if self.statistic == MEAN_STD else ()

    def check(self, ratio: Any, statistic: str, what: str) -> tuple[float, ...]:
        """A ratio as one number for each end. Raises ValueError for one of no use."""
        if ratio is None:
            ratio = (None,) * len(self.ends)
        elif len(self.ends) == 1:
            ratio = (ratio,)
        elif not isinstance(ratio, tuple | list) or len(ratio) != len(self.ends):
            pair = ", ".join(end.ratio for end in self.ends)
            raise ValueError(f"{what} must be a pair ({pair}) for kind {self.name!r}; got {ratio!r}")
        names = [what] if len(self.ends) == 1 else [f"{what}, its {end.ratio} end," for end in self.ends]
        found = [end.check(r, statistic, name) for end, r, name in zip(self.ends, ratio, names, strict=True)]
        if self.ends == (LOW, HIGH) and found[0] > found[1]:
            raise ValueError(f"{what}: the low end {found[0]!r} lies above the high end {found[1]!r}")
        return tuple(found)

    def values(self, site: SiteStats, ratios: tuple[float, ...], statistic: str) -> tuple[Value, ...]:
        """What the buffers hold, each rounded once to float32."""
        if self.statistic == MEAN_STD:
            mean, std = site.channel_mean_std()
            return np.asarray(mean, np.float32), np.asarray(ratios[0] * std, np.float32)
        size, ends = site.statistic(statistic), zip(self.ends, ratios, strict=True)
        return tuple(float(np.float32(r * size)) if math.isfinite(r) else end.off for end, r in ends)

    def off(self, site: SiteStats) -> tuple[Value, ...]:
        """Where it is the identity, bit for bit."""
        if self.statistic == MEAN_STD:
            return (np.zeros(site.channels, np.float32),) * 2
        return tuple(end.off for end in self.ends)

    def tried(self, site: SiteStats) -> tuple[Value, ...]:
        """What changes about half of what is not 0, for an audit: it would see it, and the signal would get through."""
        if self.statistic == MEAN_STD:
            return self.values(site, (0.5,), "max")
        return tuple(float(np.float32(quantile(q, 0, site.histogram))) for q in (0.5, 0.75)[: len(self.ends)])

    def share_zeroed(self, site: SiteStats, values: tuple[Value, ...]) -> float | None:
        """The share of the inputs seen in calibration that would have become 0 or were 0 already, in [0, 1].

        None where a histogram of |x| cannot tell.
        """
        if self.statistic == MEAN_STD:
            return None
        low: Any = dict(zip(self.ends, values, strict=True)).get(LOW, 0.0)
        if self.signed and low > 0 and not site.lowest >= 0:
            return None
        return site.share_zeroed(low)

    def net_zeroed(self, site: SiteStats, values: tuple[Value, ...]) -> float | None:
        """The same without those that were 0 already: what forging zeroed, as `sparsity` measures it."""
        zeroed = self.share_zeroed(site, values)
        return None if zeroed is None else max(zeroed - site.share_zero, 0.0)

    def share_limited(self, site: SiteStats, values: tuple[Value, ...]) -> float | None:
        """The share of the inputs seen in calibration that would have been limited; None where there is no limit."""
        limit: Any = dict(zip(self.buffers, values, strict=True)).get(HIGH.buffer)
        return None if limit is None else site.share_above(limit)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("hard", "threshold", (LOW,), "small values become 0 (section 3 of arXiv 2406.19622)", 2**-6),
        Kind("one_sided", "one_sided", (LOW,), "values below the threshold become 0", 2**-6, signed=True),
        Kind("shifted", "shifted", (LOW,), "a ReLU shifted by the threshold", 2**-6, signed=True),
        Kind("soft", "soft", (LOW,), "shrunk towards 0 by the threshold: 1-Lipschitz (Donoho 1995)", 2**-6),
        Kind("clamp", "clamp", (HIGH,), "large values are limited: 1-Lipschitz"),
        Kind("band", "band", (LOW, HIGH), "small values become 0, large ones are limited"),
        Kind("mean", "mean", (WIDTH,), "values near their channel's mean become it (arXiv 2406.05927)", None, MEAN_STD),
    )
}


def known(name: str) -> Kind:
    """The kind of that name. Raises ValueError for a name that is none."""
    if name not in KINDS:
        close = difflib.get_close_matches(str(name), KINDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(KINDS)}"
        raise ValueError(f"there is no kind {name!r}; {hint}")
    return KINDS[name]


class _Own:
    def __repr__(self) -> str:
        return "each kind's own"


OWN: Any = _Own()  # the ratio where none is given


@dataclass
class Choice:
    """Which kind each site has, and what their ratios are shares of."""

    kinds: dict[str, str]  # site name -> kind
    statistic: str = "max"

    def __getitem__(self, site: str) -> Kind:
        return KINDS[self.kinds[site]]

    def of(self, sites: list[str]) -> "Choice":
        return Choice({site: self.kinds[site] for site in sites}, self.statistic)

    def off(self, stats: Stats) -> dict[str, tuple[Value, ...]]:
        """Site name -> what its buffers hold where it is the identity."""
        return {site: self[site].off(stats.sites[site]) for site in self.kinds}

    def tried(self, stats: Stats) -> dict[str, tuple[Value, ...]]:
        """Site name -> what its buffers hold for an audit: values that change much of the site's input."""
        return {site: self[site].tried(stats.sites[site]) for site in self.kinds}

    def values(self, stats: Stats, ratio: Any) -> dict[str, tuple[Value, ...]]:
        """Site name -> what its buffers hold, for the given ratio (see `forged_fx.transform`)."""
        sites = list(self.kinds)
        given = dict.fromkeys(sites, OWN) if ratio is OWN else stats.per_site(ratio, sites, "ratio")
        found = {}
        for site in sites:
            kind, value = self[site], given[site]
            what = f"ratio for {site!r}" if isinstance(ratio, Mapping) else "ratio"
            if value is OWN:
                value = kind.default
                if value is None:
                    ends = " and ".join(end.says for end in kind.ends)
                    raise ValueError(f"kind {kind.name!r} needs a ratio ({ends}): pass ratio=")
            row, ratios = stats.sites[site], kind.check(value, self.statistic, what)
            values = found[site] = kind.values(row, ratios, self.statistic)
            if dict(zip(kind.ends, values, strict=False)).get(HIGH) == 0 < row.c_max:
                raise ValueError(
                    f"{self.statistic} of {site!r} is 0: limited to a share of it, no input would be left; take a "
                    "higher quantile, or the ratio None for such a site"
                )
        return found


def choose(stats: Stats, kind: str | Mapping[str, str], sites: list[str], statistic: str | None = None) -> Choice:
    """The kind of each site. Raises ValueError for a name that is none, or where a statistic is missing."""
    if not isinstance(kind, str | Mapping):
        raise TypeError(f"kind={kind!r}: a name ({', '.join(KINDS)}), or a mapping from site name or glob to one")
    kinds = stats.per_site(kind, sites, "kind")
    for name in {kind} if isinstance(kind, str) else set(kind.values()):
        known(name)
    per_channel = [site for site in sites if KINDS[kinds[site]].statistic == MEAN_STD]
    if missing := [site for site in per_channel if stats.sites[site].channel_counts is None]:
        raise ValueError(
            f"kind 'mean' needs the mean and standard deviation of each channel, which these statistics lack at "
            f"{missing[0]!r}: take them with forged_fx.calibrate(model, batches, channels=True), or "
            "`forged-fx calibrate ... --channels`; where how many channels there are varies, leave the site out "
            "(exclude=)"
        )
    if statistic not in (None, MEAN_STD):
        if sites and len(per_channel) == len(sites):
            raise ValueError(f"statistic={statistic!r}: kind 'mean' takes {MEAN_STD!r} and no other")
        parse_statistic(statistic)
    elif statistic == MEAN_STD and len(per_channel) < len(sites):
        raise ValueError(f"statistic={statistic!r} is for kind 'mean'; the others take 'max' or 'quantile(q)'")
    return Choice(kinds, "max" if statistic in (None, MEAN_STD) else statistic)
