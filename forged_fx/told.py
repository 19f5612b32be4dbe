"""What calibration tells of a module's own calls, which are known by their number: by it a shift of the numbers shows.

A call that is left out on some path would give all that follow the thresholds of others.
"""

from typing import NamedTuple

import torch

from forged_fx.sites import call_of, mark_of, module_of
from forged_fx.stats import Stats


class Met(NamedTuple):
    """A call in calibration: its kind ("" where it may be any), the parameters that it was given, by their names in the
    module, and those, if any, that it must not be given in their place (None: any other of the module's)."""

    kind: str
    weights: tuple[str, ...]
    not_these: frozenset[str] | None


class Told:
    """What calibration tells of each call of the modules that are forged call by call."""

    def __init__(self, model: torch.nn.Module, stats: Stats) -> None:
        self.sites = stats.sites
        self.parameters = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
        known = {site: (row.kind, row.weight) for site, row in stats.sites.items() if row.weight}  # all in old files
        known |= {call: ways[0] for call, ways in stats.met.items() if len(ways) == 1}
        self.ways: dict[tuple[str, str], dict[str, tuple[str, ...]]] = {}
        for call, way in known.items():
            self.ways.setdefault((module_of(call), mark_of(call)), {})[call] = way

    def of(self, name: str, module: torch.nn.Module, mark: str, forged: list[str]) -> dict[int, Met]:
        """forged: the module's sites that are to have a threshold."""
        own = [(id(p), n) for n, p in module.named_parameters(remove_duplicate=False)]
        seen = {}
        for call, (kind, *weights) in self.ways.get((name, mark), {}).items():
            meant = {self.parameters.get(weight) for weight in weights}
            here = tuple(n for key, n in own if key in meant)
            if here or not (weights or call in self.sites):  # what a site meets tells, and of others that it is none
                seen[call] = kind, here
        # A call that is to have no threshold may be another one, if it is none of those that are to have one.
        theirs = frozenset(weight for site in forged if site in seen for weight in seen[site][1])
        return {
            call_of(call): Met("", here, theirs) if call in self.sites and call not in forged else Met(kind, here, None)
            for call, (kind, here) in seen.items()
        }
