"""A configuration: which kind of forging stands at which site, at which ratio. `sweep` and `search` compare them."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import nn

from forged_fx import checked
from forged_fx.stats import Ends, Stats
from forged_fx.transform import transform

Place = tuple[str, str, Ends]  # site, kind, ratio
LISTED = 3  # sites that are named one by one


@dataclass(frozen=True)
class Configuration:
    """places: (site, kind, ratio) of each forged site, in the order in which the sites run. Printed, one line."""

    places: tuple[Place, ...] = ()

    @classmethod
    def uniform(cls, sites: Iterable[str], kind: str, ratio: Ends) -> "Configuration":
        """The same at every one of these sites."""
        return cls(tuple((site, kind, ratio) for site in sites))

    @classmethod
    def of(cls, record: Any) -> "Configuration":
        """From what `record` wrote; ValueError for anything else."""
        try:
            return cls(
                tuple(
                    (checked.fit(site, str, "a site"), checked.fit(kind, str, "a kind"), ratio_of(ratio))
                    for site, kind, ratio in record
                )
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{checked.short(record)} is no configuration: {error}") from None

    def record(self) -> list[list[Any]]:
        """As JSON has it."""
        return [[site, kind, list(ratio) if isinstance(ratio, tuple) else ratio] for site, kind, ratio in self.places]

    def at(self, site: str) -> tuple[str, Ends] | None:
        """Kind and ratio at a site; None where it is not forged."""
        return next(((kind, ratio) for name, kind, ratio in self.places if name == site), None)

    def forge(self, model: nn.Module, stats: Stats, example: tuple[tuple, dict] | None = None) -> nn.Module:
        """`transform` with this configuration. Raises as it does; ValueError for an empty configuration."""
        if not self.places:
            raise ValueError("an empty configuration forges nothing: that is the model itself")
        return transform(
            model,
            stats,
            ratio={site: ratio for site, _, ratio in self.places},
            kind={site: kind for site, kind, _ in self.places},
            include=[site for site, _, _ in self.places],
            example=example,
        )

    def __str__(self) -> str:
        return "; ".join(self._groups()) or "nothing forged"

    def _groups(self) -> Iterator[str]:
        def how(place: Place) -> str:
            return f"{place[1]} {written(place[2])}"

        for text, places in groupby(sorted(self.places, key=how), how):
            found = {place[0] for place in places}
            sites = [site for site, _, _ in self.places if site in found]
            yield f"{text} at {listed(sites)}"


def listed(sites: Sequence[str]) -> str:
    """The sites by name, or, where they are many, how many from which to which."""
    names = [site or "(root)" for site in sites]
    return ", ".join(names) if len(names) <= LISTED else f"{len(names)} sites, {names[0]} to {names[-1]}"


def written(ratio: Ends) -> str:
    """A ratio as people write it: 1/64, 0.7, 1/64 to 0.7. Two that differ are written differently."""
    if isinstance(ratio, tuple):
        return " to ".join(map(written, ratio))
    if ratio is None:
        return "off"
    if 0 < ratio < 0.25 and math.frexp(ratio)[0] == 0.5:
        return f"1/{round(1 / ratio)}"
    short = f"{ratio:g}"
    return short if float(short) == float(ratio) else repr(float(ratio))


def ratio_of(value: Any) -> Ends:
    """A ratio from JSON: a finite number, null, or a pair of them."""
    pair = isinstance(value, list | tuple) and len(value) == 2
    for end in value if pair else [value]:
        if end is not None and not (type(end) in (int, float) and abs(end) < math.inf):
            raise ValueError(f"{checked.short(value)} is no ratio")
    return tuple(value) if pair else value
