"""What calibration measured at each site, and the thresholds that follow from it.

A file is safetensors with a JSON header and a format version: arrays and text, never code.
"""

import contextlib
import copy
import difflib
import functools
import json
import math
import numbers
import operator
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch

from forged_fx import checked
from forged_fx.channels import PARTS, ChannelCounts
from forged_fx.files import STATISTICS, STATS_KEY, whole
from forged_fx.histogram import BINS, EDGES, quantile, share_below
from forged_fx.sites import (
    OTHER_CALL,
    OTHER_WEIGHT,
    Ways,
    both_ways,
    call_of,
    has_input,
    is_activation,
    mark_of,
    module_of,
    named_part,
)

FORMAT = 1

Ends = float | None | tuple[float | None, float | None]  # of one site: see forged_fx/kinds.py
Ratio = Ends | Mapping[str, Ends]


Rule = Callable[["SiteStats", "SiteStats", str], Any]  # of two scans' statistics, and the field's name


def _merge(rule: Rule) -> dict[str, Rule]:
    """What a field of `SiteStats` has as its metadata: how two scans' values become one."""
    return {"merge": rule}


def _by(combine: Callable[[Any, Any], Any]) -> dict[str, Rule]:
    """A rule that looks at the two values alone."""
    return _merge(lambda one, other, name: combine(getattr(one, name), getattr(other, name)))


_FIRST, _SUM, _ALL = _by(lambda one, other: one), _by(operator.add), _by(operator.and_)


@dataclass
class SiteStats:
    """What was seen at one site.

    c_max: the largest |x| that entered, as a float32 value; lowest: the smallest x. zeros and histogram count a sample
    of `sampled` elements (see `forged_fx.histogram`), c_max and lowest look at all `elements`. A dimension of `shape`
    that varied is -1; an input whose number of dimensions varied has the shape None.

    Each field says how it is merged. Files hold every field; one that is added has a default, which stands for what
    older files do not say, and is a number, text or a tuple of such (arrays have places of their own: _ARRAYS).
    """

    kind: str = field(metadata=_FIRST)
    shape: tuple[int, ...] | None = field(metadata=_by(lambda one, other: merge_shapes(one, other)))
    weight_shape: tuple[int, ...] = field(metadata=_FIRST)
    # the parameter that it meets, by name; None: something derived from parameters
    weight: str | None = field(metadata=_FIRST)
    key: tuple[int | str, ...] = field(metadata=_FIRST)  # where the operand sits among the call's arguments
    # its module makes this call only, on its own first argument: the threshold can go ahead of the module
    layer: bool = field(metadata=_ALL)
    once: bool = field(default=True, metadata=_ALL)  # its module ran at most once in a forward pass
    # it is an activation that leaves its result in its input; None: not known
    in_place: bool | None = field(default=None, metadata=_by(lambda one, other: one or other))
    # how many calls of the table its module made in one forward pass, at most
    module_calls: int = field(default=0, metadata=_by(max))
    # why it is no site by default; None: it is one
    left_out: str | None = field(
        default=None, metadata=_merge(lambda one, other, _: one._unlike(other) or one.left_out or other.left_out)
    )
    calls: int = field(default=0, metadata=_SUM)
    c_max: float = field(default=0.0, metadata=_by(max))
    lowest: float = field(default=math.inf, metadata=_by(min))  # -inf: not known
    elements: int = field(default=0, metadata=_SUM)
    sampled: int = field(default=0, metadata=_SUM)
    zeros: int = field(default=0, metadata=_SUM)
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64), metadata=_SUM)
    channel: int = field(default=-1, metadata=_FIRST)  # which dimension holds the channels, from behind
    # None: not measured
    channel_counts: ChannelCounts | None = field(
        default=None, metadata=_merge(lambda one, other, _: one._merged_channels(other))
    )

    def share_zeroed(self, threshold: float) -> float:
        """The share of the inputs seen in calibration with |x| < threshold, zeros included, in [0, 1]."""
        return share_below(threshold, self.zeros if threshold > 0 else 0, self.histogram)

    @property
    def share_zero(self) -> float:
        """The share of the inputs seen in calibration that were zero already, in [0, 1]."""
        return self.zeros / max(self.sampled, 1)

    @property
    def channels(self) -> int | None:
        """How many channels were measured one by one; None: none were."""
        return None if self.channel_counts is None else self.channel_counts.size

    def share_above(self, limit: float) -> float:
        """The share of the inputs seen in calibration with |x| > limit, in [0, 1]."""
        return 0.0 if limit >= self.c_max else 1 - share_below(limit, self.zeros, self.histogram)

    def statistic(self, name: str) -> float:
        """What a ratio is a share of: "max", the largest |x|, or "quantile(q)", of |x|, read off the histogram.

        The quantile is exact under merge, and within an eighth of a power of two of the sample's; at most c_max.
        """
        q = parse_statistic(name)
        return self.c_max if q is None else min(quantile(q, self.zeros, self.histogram), self.c_max)

    def channel_mean_std(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each channel; float64. See `ChannelCounts.mean_std`."""
        return self.channel_counts.mean_std()

    def merge(self, other: "SiteStats") -> "SiteStats":
        """The statistics of both scans together."""
        return SiteStats(**{name: rule(self, other, name) for name, rule in _rules()})

    def _unlike(self, other: "SiteStats") -> str | None:
        """Why the two cannot have one threshold: a branch that depends on the data may make another call of it."""
        if (self.kind, self.key) != (other.kind, other.key):
            return OTHER_CALL
        return OTHER_WEIGHT if self.weight != other.weight else None

    def _merged_channels(self, other: "SiteStats") -> ChannelCounts | None:
        """None if one of the two saw elements and did not measure their channels, or how many there are varies."""
        if not (self.elements and other.elements):
            return (self if self.elements else other).channel_counts
        mine, theirs = self.channel_counts, other.channel_counts
        return mine.merge(theirs) if mine and theirs and mine.size == theirs.size else None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SiteStats):
            return NotImplemented
        mine, theirs = dict(vars(self)), dict(vars(other))
        same_counts = np.array_equal(mine.pop("histogram"), theirs.pop("histogram"))
        return same_counts and mine == theirs


@functools.cache
def _rules() -> list[tuple[str, Rule]]:
    return [(f.name, f.metadata["merge"]) for f in fields(SiteStats)]


def merge_shapes(a: tuple[int, ...] | None, b: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """A shape that fits both: -1 where a dimension differs, None where the number of dimensions does."""
    if a is None or b is None or len(a) != len(b):
        return None
    return tuple(x if x == y else -1 for x, y in zip(a, b, strict=True))


class Stats:
    """The statistics of every site of one model, in the order in which the sites first ran.

    sites: site name -> SiteStats. modules: for each module that runs a site, the shapes of its own parameters; this is
    how the statistics know their model. example: the first batch as (args, kwargs), kept in memory only; `transform`
    audits its result with it. contexts: modules that make calls under autocast, another grad mode or checkpointing.
    given: the parameters of the model's forward that the batches passed; at_times: those that only some did.

    What follows was seen in one batch or another, of whichever module, and says of sites what they are: not_layers,
    modules that do more with their input than one call. calls: a module's name and a mark (# or @) -> how many such
    calls it made in one forward pass, at most. no_sites: names that a call had in which no data met weights. ways: a
    call's name -> the places in the code where it was made, each with the parameters, or parts of them, that it met.
    weights: the model's parameters, by name, and what tells whether they have changed since.
    """

    def __init__(
        self,
        sites: dict[str, SiteStats] | None = None,
        modules: dict[str, dict[str, tuple[int, ...]]] | None = None,
        batches: int = 0,
        contexts: set[str] | None = None,
        given: set[str] | None = None,
        example: tuple[tuple, dict] | None = None,
        *,
        at_times: set[str] | None = None,
        not_layers: set[str] | None = None,
        calls: dict[str, int] | None = None,
        no_sites: set[str] | None = None,
        ways: dict[str, Ways] | None = None,
        weights: dict[str, str] | None = None,
    ) -> None:
        self.sites = sites or {}
        self.modules = modules or {}
        self.batches = batches
        self.contexts = contexts or set()
        self.given = given or set()
        self.example = example
        self.at_times = at_times or set()
        self.not_layers = not_layers or set()
        self.calls = calls or {}
        self.no_sites = no_sites or set()
        self.ways = ways or {}
        self.weights = weights or {}
        for name, site in self.sites.items():
            site.layer &= module_of(name) not in self.not_layers
            site.module_calls = max(site.module_calls, self.calls.get(module_of(name) + mark_of(name), 0))
            if name in self.no_sites:
                site.left_out = OTHER_CALL
            elif len({tuple(w for w, _ in map(named_part, met)) for _, *met in self.ways.get(name, ()) if met}) > 1:
                site.left_out = site.left_out or OTHER_WEIGHT

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"example": None}  # a checkpoint of a forged model is no place for its users' data

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({"weights": {}} | state)  # (an older version's has none)

    def __deepcopy__(self, memo: dict) -> "Stats":
        twin = memo[id(self)] = copy.copy(self)  # (without the example)
        vars(twin).update(copy.deepcopy(vars(twin), memo), example=self.example)
        return twin

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Stats):
            return NotImplemented
        return self.__getstate__() == other.__getstate__()

    def __repr__(self) -> str:
        left_out = sum(site.left_out is not None for site in self.sites.values())
        return f"Stats({len(self.sites) - left_out} sites, {left_out} left out, {self.batches} batches)"

    def merge(self, other: "Stats") -> "Stats":
        """The statistics of both scans together: exactly those of one scan over all their batches.

        Raises ValueError where the two were taken from different models, as far as modules of one name tell. A site
        that only one scan reached (a branch that depends on the data) is kept; so are those of a model that shares no
        name with this one, and `transform` then says which are missing.
        """
        if not isinstance(other, Stats):
            raise TypeError(f"merge takes the Stats of another scan of this model, not {type(other).__name__}")
        for name in self.modules:
            if name in other.modules and self.modules[name] != other.modules[name]:
                raise ValueError(
                    f"cannot merge statistics of different models: the parameters of {name or 'the root module'!r} are "
                    f"{self.modules[name]} here and {other.modules[name]} there"
                )
        sites = {name: copy.copy(site) for name, site in self.sites.items()}
        for name, site in other.sites.items():
            sites[name] = sites[name].merge(site) if name in sites else copy.copy(site)
        differently = self.given ^ other.given if self.batches and other.batches else set()
        return Stats(
            sites,
            {**self.modules, **other.modules},
            self.batches + other.batches,
            self.contexts | other.contexts,
            self.given | other.given,
            self.example or other.example,
            at_times=self.at_times | other.at_times | differently,
            not_layers=self.not_layers | other.not_layers,
            calls=_merged(max, self.calls, other.calls),
            no_sites=self.no_sites | other.no_sites,
            ways=_merged(both_ways, self.ways, other.ways),
            weights=_merged(lambda one, two: one if one == two else "", self.weights, other.weights),
        )

    def fits(self, model: torch.nn.Module) -> bool:
        """Whether the statistics could have been taken from `model`."""
        return not self._differences(dict(model.named_modules()))

    def _differences(self, there: dict[str, torch.nn.Module]) -> list[tuple[str, dict]]:
        return [(n, s) for n, s in self.modules.items() if n not in there or parameter_shapes(there[n]) != s]

    def check_model(self, model: torch.nn.Module) -> None:
        """Raise ValueError, with the difference spelled out, unless these are the statistics of `model`."""
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"statistics are of an nn.Module, not of {type(model).__name__}")
        there = dict(model.named_modules())
        differences = []
        for name, shapes in self._differences(there):
            if name in there:
                found = parameter_shapes(there[name])
                differences.append(f"{name or 'the root module'!r} has parameters {found}, not {shapes}")
            else:
                close = difflib.get_close_matches(name, there, n=1)
                differences.append(f"{name!r} is missing" + (f" (it has {close[0]!r})" if close else ""))
        if differences:
            more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
            raise ValueError(
                f"these statistics belong to another model than this {type(model).__name__}: "
                + "; ".join(differences[:5])
                + more
                + ". Run forged_fx.calibrate on this model."
            )

    def thresholds(self, ratio: float | Mapping[str, float], sites: list[str] | None = None) -> dict[str, float]:
        """Site name -> threshold `c_th = c_r * c_max` (float32 values), for `sites`, or all layers not left out.

        ratio: c_r in [0, 1], or a mapping from site name or glob to it. An exact name wins, then the first glob that
        matches; every site must be covered and every key must match something, else ValueError.
        The rule is section 3 of arXiv 2406.19622.
        """
        found = self.ratios(ratio, sites)
        return {name: float(np.float32(r * self.sites[name].c_max)) for name, r in found.items()}  # rounded once

    def ratios(self, ratio: float | Mapping[str, float], sites: list[str] | None = None) -> dict[str, float]:
        """Site name -> ratio: what `thresholds` multiplies c_max by."""
        names = [n for n, s in self.sites.items() if s.left_out is None and not is_activation(n)]
        names = names if sites is None else checked.several(sites, "sites", "names of sites")
        for name in names:
            if name not in self.sites:
                match_sites([name], list(self.sites), "sites")
                raise ValueError(f"sites: {name!r} is a glob, and names belong there; without sites= all are taken")
        for pattern, value in ratio.items() if isinstance(ratio, Mapping) else [(None, ratio)]:
            if not is_number(value) or not math.isfinite(value) or not 0 <= value <= 1:
                what = "ratio" if pattern is None else f"ratio for {pattern!r}"
                raise ValueError(
                    f"{what} must be a number in [0, 1], inputs below that share of c_max become 0; got {value!r}"
                )
        return {name: float(value) for name, value in self.per_site(ratio, names, "ratio").items()}

    def per_site(self, given: Any, names: list[str], what: str) -> dict[str, Any]:
        """Site name -> what is given for it: the same for all, or a mapping from site name or glob to it.

        An exact name wins, then the first glob that matches. Every one of `names` must be covered, and every key match
        some site, else ValueError.
        """
        if not isinstance(given, Mapping):
            return dict.fromkeys(names, given)
        for pattern in given:
            match_sites([pattern], list(self.sites), what)
        found = {}
        for name in names:
            pattern = next((p for p in (name, *given) if p in given and means(p, name)), None)
            if pattern is None:
                raise ValueError(f"no {what} for site {name!r}: add a glob such as '*' for all other sites")
            found[name] = given[pattern]
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all. FileExistsError if a file there holds none."""
        checked.path(path, "Stats.save")
        self.write(Path(path))

    def write(self, path: Path, **more: Any) -> None:
        """The same, with more in its header, as JSON; `load` passes over it."""
        from safetensors.numpy import save_file

        rows = list(self.sites.values())
        arrays = {
            "c_max": np.array([row.c_max for row in rows], np.float32),
            "lowest": np.array([row.lowest for row in rows], np.float32),
            "counts": np.array([[getattr(r, key) for key in _COUNTS] for r in rows], np.int64).reshape(
                -1, len(_COUNTS)
            ),
            "histogram": np.array([row.histogram for row in rows], np.int64).reshape(-1, BINS),
        }
        header: dict[str, Any] = {
            "format": FORMAT,
            "batches": self.batches,
            **{key: sorted(getattr(self, key)) for key in _SETS},
            **{key: getattr(self, key) for key in _BY_NAME},
            "modules": self.modules,
            "channel_counts": {},
            "sites": {name: {key: getattr(site, key) for key in _TEXT_FIELDS} for name, site in self.sites.items()},
        }
        for i, row in enumerate(rows):
            if (counts := row.channel_counts) is not None:
                arrays[f"channels.{i}"] = np.stack([counts.sums, counts.squares])
                header["channel_counts"][str(i)] = counts.count
        with whole(path, STATISTICS) as part:
            save_file(arrays, part, metadata={STATS_KEY: json.dumps(header | more)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Stats":
        """Read what `save` wrote. Raises ValueError, naming the file and the fault, for anything else."""
        from safetensors import SafetensorError

        checked.path(path, "Stats.load")
        try:
            return cls._read(Path(path))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"there are no calibration statistics at {os.fspath(path)}: write them with "
                "forged_fx.calibrate(model, batches).save(path), or forged-fx calibrate --out"
            ) from None
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, OverflowError, OSError) as error:
            fault = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{os.fspath(path)} is not a file of calibration statistics ({fault}): write one with "
                "forged_fx.calibrate(model, batches).save(path)"
            ) from error

    @classmethod
    def _read(cls, path: Path) -> "Stats":
        """`load`, raising whatever a damaged or hostile file makes fail."""
        from safetensors import safe_open

        checked.regular(path)
        with safe_open(path, framework="np") as file:
            header = checked.parse((file.metadata() or {}).get(STATS_KEY) or _none_in(file))
            if header["format"] != FORMAT:
                raise ValueError(f"its format is {checked.short(header['format'])}, and this version reads {FORMAT}")
            header = _LATER | header
            n = len(header["sites"])
            c_max = _array(file, "c_max", (n,), "F32")
            counts = _array(file, "counts", (n, len(_COUNTS)), "I64")
            bins = _array(file, "histogram", (n, BINS), "I64")
            known = "lowest" in file.keys()
            lowest = _array(file, "lowest", (n,), "F32") if known else np.full(n, -np.inf, np.float32)
            of_channels = checked.fit(header["channel_counts"], dict[str, int], "channel_counts")
            channels = {i: _channel_counts(file, i, count) for i, count in of_channels.items()}
        if not np.isfinite(c_max).all() or any((a < 0).any() for a in (c_max, counts, bins)):
            raise ValueError("a maximum or a count is negative or not finite")
        seen = counts[:, _COUNTS.index("elements")] > 0
        if not (lowest[seen] <= c_max[seen]).all():
            raise ValueError("a minimum lies above its maximum, or is not a number")
        if max(counts.max(initial=0), bins.max(initial=0)) >= _MOST:
            raise ValueError(f"a count is {_MOST} or larger")
        sites = {}
        for i, (name, text) in enumerate(header["sites"].items()):
            where = f"site {checked.short(name)}"
            values = {
                key: checked.fit(text[key], _HINTS[key], f"{where}: {key}")
                for key in _TEXT_FIELDS
                if key in text or key in _ALWAYS
            }
            values |= {key: int(counts[i, k]) for k, key in enumerate(_COUNTS)}
            sites[name] = SiteStats(
                **values,
                c_max=float(c_max[i]),
                lowest=float(lowest[i]),
                histogram=bins[i],
                channel_counts=channels.get(str(i)),
            )
        modules = checked.fit(header["modules"], dict[str, dict[str, tuple[int, ...]]], "modules")
        for name, site in sites.items():
            _check_site(name, site, modules)
        sets: dict[str, Any] = {key: set(checked.fit(header[key], list[str], key)) for key in _SETS}
        batches = checked.fit(header["batches"], int, "batches")
        by_name: dict[str, Any] = {key: checked.fit(header[key], hint, key) for key, hint in _BY_NAME.items()}
        return cls(sites, modules, batches, **by_name, **sets)


def _merged(combine: Callable, one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Two scans' values by name; combined where both have one."""
    return {**one, **other} | {key: combine(one[key], other[key]) for key in one if key in other}


def given_stats(stats: Any, who: str) -> Stats:
    """What a call was given for statistics, read where it is a file's path. who: the call, for the TypeError."""
    if isinstance(stats, Stats):
        return stats
    if not isinstance(stats, str | os.PathLike):
        raise TypeError(
            f"{who} takes statistics that forged_fx.calibrate returned, or their file's path, not "
            f"{type(stats).__name__}"
        )
    return Stats.load(stats)


def _none_in(file: Any) -> Any:
    names = sorted(file.keys())
    more = ", ..." if len(names) > 3 else ""
    held = f"tensors such as a model's weights ({checked.short(', '.join(names[:3]))}{more})" if names else "nothing"
    raise ValueError(f"it holds {held} and no statistics")


# A site in a file: arrays with an element, or a row, for each of them; its other fields as JSON, whatever there are.
_ARRAYS = ("c_max", "lowest", "histogram", "channel_counts")
_COUNTS = ("calls", "elements", "sampled", "zeros")
_TEXT_FIELDS = tuple(f.name for f in fields(SiteStats) if f.name not in _ARRAYS + _COUNTS)
# what the files of every version say of a site; of what they do not, a field's default holds
_ALWAYS = ("kind", "shape", "weight_shape", "weight", "key", "layer", "once", "module_calls", "left_out")
_BY_NAME = {"calls": dict[str, int], "ways": dict[str, Ways], "weights": dict[str, str]}
_SETS = ("contexts", "given", "at_times", "not_layers", "no_sites")  # of `Stats`, in a file's header
# what the headers of the first files did not have
_LATER: dict[str, Any] = {"at_times": [], "not_layers": [], "no_sites": [], "channel_counts": {}}
_LATER |= {key: {} for key in _BY_NAME}
_HINTS = get_type_hints(SiteStats)
if _unsaid := [f.name for f in fields(SiteStats) if "merge" not in f.metadata]:
    raise TypeError(f"SiteStats.{_unsaid[0]} does not say how two scans' are merged: give it a rule, metadata=_SUM say")
_MOST_DIMENSIONS = 64  # that a tensor has
_MOST = 2**50  # of anything counted: sums of it fit into 64 bits


def _channel_counts(file: Any, i: str, count: int) -> ChannelCounts:
    """Those of the i-th site in a file. Raises ValueError for sums that cannot be."""
    key = f"channels.{i}"
    shape = tuple(file.get_slice(key).get_shape())
    sums, squares = _array(file, key, (2, PARTS, shape[-1]), "F64")
    if not (np.isfinite(sums).all() and np.isfinite(squares).all()) or not 0 < count < _MOST:
        raise ValueError(f"{key}: a sum is not finite, or it counts {count} elements")
    return ChannelCounts(count, sums, squares)


def _array(file: Any, key: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An array of a file, looked at before it is read."""
    found = file.get_slice(key)
    if (tuple(found.get_shape()), found.get_dtype()) != (shape, dtype):
        raise ValueError(
            f"{key} is an array of shape {tuple(found.get_shape())} and dtype {found.get_dtype()}, where {shape} and "
            f"{dtype} belong"
        )
    return file.get_tensor(key)


def _check_site(name: str, site: SiteStats, modules: Mapping[str, Any]) -> None:
    """ValueError for what calibration cannot have seen."""
    where = f"site {checked.short(name)}"
    if site.zeros + int(site.histogram.sum()) != site.sampled or site.sampled > site.elements:
        raise ValueError(f"{where}: its counts do not agree")
    if site.histogram.any() and EDGES[np.flatnonzero(site.histogram)[-1]] > site.c_max:
        raise ValueError(f"{where}: its histogram counts values above its maximum, {site.c_max:g}")
    if site.left_out is not None:
        return
    if not has_input(site.kind, site.key):
        raise ValueError(f"{where}: no call of kind {checked.short(site.kind)} has an input {checked.short(site.key)}")
    if not -_MOST_DIMENSIONS <= site.channel < 0:
        raise ValueError(f"{where}: its channels lie along dimension {site.channel}")
    if module_of(name) not in modules or call_of(name) >= site.module_calls:
        raise ValueError(f"{where}: its module is not listed, or makes fewer calls")


def parameter_shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a module's own parameters, not its children's."""
    return {name: tuple(value.shape) for name, value in module.named_parameters(recurse=False)}


def parse_statistic(name: Any) -> float | None:
    """The q of "quantile(q)", None for "max". Raises ValueError for anything else."""
    found = re.fullmatch(r"quantile\(([0-9.eE+-]+)\)", name) if isinstance(name, str) else None
    with contextlib.suppress(ValueError):
        if found and 0 <= (q := float(found[1])) <= 1:
            return q
    if name == "max":
        return None
    raise ValueError(f"statistic={name!r}: it is 'max', or 'quantile(q)' with q in [0, 1], such as 'quantile(0.999)'")


def is_number(value: Any) -> bool:
    """Whether it is a real number, one of numpy's included; a truth value is none, nor is a tensor."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)


def match_sites(patterns: list[str], names: list[str], what: str) -> list[str]:
    """The names that any pattern matches, in their order. A pattern without a match is an error, not a no-op."""
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{what}: {checked.short(pattern)} is no name of a site, nor a glob, which are text")
        if not any(means(pattern, name) for name in names):
            close = difflib.get_close_matches(pattern, names, n=3)
            some = ", ".join(map(repr, close or names[:5]))
            more = ", ..." if len(names) > 5 else ""
            hint = f"did you mean {some}?" if close else f"the sites are {some}{more}"
            raise ValueError(f"{what}: {pattern!r} matches no site; {hint}")
    return [name for name in names if any(means(pattern, name) for pattern in patterns)]


def means(pattern: str, name: str) -> bool:
    """Whether a site's name, or a glob over them, means the site of this name."""
    return pattern == name or fnmatchcase(name, pattern)
