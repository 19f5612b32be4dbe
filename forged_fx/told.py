"""What calibration tells of a module's own calls, which are known by their number: by it a shift of the numbers shows.

A call that is left out on some path would give all that follow the thresholds of others.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from forged_fx.places import innermost, is_of_changed_code
from forged_fx.sites import (
    ANY_PART,
    call_name,
    call_of,
    check_weight,
    mark_of,
    module_of,
    named_part,
    other_place,
    parameter_of,
)
from forged_fx.stats import Stats


@dataclass
class Told:
    """Of the calls of one module, of one mark. places: call index -> where it was made. weights: call index -> the
    parameters that it was given, by their names in the module; parts: each with the part of it. forged: the calls that
    have a threshold; sites: those that calibration lists, with a threshold or without. within: the parameters, by their
    names in the module, that calls of the modules within it were given."""

    module: str = ""
    mark: str = "#"
    places: dict[int, set[str]] = field(default_factory=dict)
    weights: dict[int, set[str]] = field(default_factory=dict)
    parts: dict[int, set[tuple[str, str]]] = field(default_factory=dict)
    forged: set[int] = field(default_factory=set)
    sites: set[int] = field(default_factory=set)
    within: set[str] = field(default_factory=set)

    def __setstate__(self, state: dict) -> None:
        vars(self).update({"parts": {}, "within": set()} | state)  # (an older version's has none)

    def check(self, k: int, place: str, owner: torch.nn.Module, given: list[tuple[torch.Tensor, str]]) -> None:
        """RuntimeError where a call is not the one that had this number in calibration.

        It is not where another call, which has a threshold, was made in this place; nor where it has a threshold, or
        takes a parameter of the module's, and stands elsewhere in the code. (The way there may be another one: with or
        without a checkpoint.) Nor where it meets the part of a parameter that another call met, and not its own.

        given: the parameters that it takes, each with the part of it.
        """
        own = self.places.get(k, set())
        if self.places and place not in own:
            theirs = set[str]().union(*(self.places.get(one, ()) for one in self.forged))
            product = k not in self.sites and any(value is p for value, _ in given for p in owner.parameters())
            elsewhere = innermost(place) not in map(innermost, own) and (k in self.forged or product)
            known = set[str]().union(*self.places.values())
            if (place in theirs or elsewhere) and not is_of_changed_code(place, known):
                raise other_place(self.module, k)
        if given and k in self.forged and k in self.weights:
            check_weight(call_name(self.module, k, self.mark), owner, self.weights[k], [value for value, _ in given])
        if given and k in self.forged and len(self.parts.get(k, ())) == 1:
            ((name, part),) = self.parts[k]
            theirs = {one for j in self.sites for n, one in self.parts.get(j, ()) if n == name} - {part}
            if part != ANY_PART and any(one in theirs and value is parameter_of(owner, name) for value, one in given):
                raise other_place(self.module, k, "on another part of a parameter")


class Teller:
    """What there is to tell of each module of a model."""

    def __init__(self, stats: Stats, model: torch.nn.Module) -> None:
        self.stats = stats
        self.parameters = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
        self.calls: dict[tuple[str, str], list[str]] = {}
        for call in stats.sites.keys() | stats.ways.keys():
            self.calls.setdefault((module_of(call), mark_of(call)), []).append(call)
        # by module, the ids of the parameters that its calls were given, a part of one or all of it
        self.met: dict[str, set[int | None]] = {}
        for (module, _), calls in self.calls.items():
            self.met.setdefault(module, set()).update(*map(self._met, calls))

    def of(self, name: str, mark: str, module: torch.nn.Module, forged: Iterable[str]) -> Told:
        """forged: the module's sites that are to have a threshold."""
        own = [(id(p), n) for n, p in module.named_parameters(remove_duplicate=False)]
        told = Told(name, mark, forged=set(map(call_of, forged)))
        for call in self.calls.get((name, mark), ()):
            k, row, ways = call_of(call), self.stats.sites.get(call), self.stats.ways.get(call, ())
            if row is not None:
                told.sites.add(k)
            if ways:
                told.places[k] = {place for place, *_ in ways}
            if here := {n for key, n in own if key in self._met(call)}:
                told.weights[k] = here
            parts = {named_part(weight) for _, *weights in ways for weight in weights}
            told.parts[k] = {
                (n, part) for weight, part in parts for key, n in own if key == self.parameters.get(weight)
            }
        inside = f"{name}." if name else ""
        met = set[int | None]().union(*(ids for m, ids in self.met.items() if m != name and m.startswith(inside)))
        told.within = {n for key, n in own if key in met}
        return told

    def _met(self, call: str) -> set[int | None]:
        row, ways = self.stats.sites.get(call), self.stats.ways.get(call, ())
        names = {named_part(weight)[0] for _, *weights in ways for weight in weights}
        return {self.parameters.get(name) for name in names | ({row.weight} if row and row.weight else set())}
