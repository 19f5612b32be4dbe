"""Where a search begins, and where it may go from there: a ratio up or down, another kind, or off, at one site."""

from collections.abc import Iterator, Sequence
from typing import Any

from forged_fx.configuration import Configuration
from forged_fx.stats import Ends

Ladder = tuple[float, ...]

LOW: Ladder = (2**-8, 2**-7, 2**-6, 2**-5, 2**-4)  # section 2 of arXiv 2406.19622 has the first four
HIGH: Ladder = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
WIDTH: Ladder = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)

# kind -> the ladder of each of its ends, mild to harsh or back; a kind that is not here is not searched
LADDERS: dict[str, tuple[Ladder, ...]] = {
    "hard": (LOW,),
    "one_sided": (LOW,),
    "shifted": (LOW,),
    "soft": (LOW,),
    "clamp": (HIGH,),
    "band": (LOW, HIGH),
    "mean": (WIDTH,),
}


def starts(sites: Sequence[str], kinds: Sequence[str]) -> Iterator[Configuration]:
    """Each kind with one end, at each of its ratios: at all sites, at the first, and at those between first and last.

    The first is apart because its input is the model's own: what is done there is done to the pixels. Kinds with two
    ends are reached by moves.
    """
    scopes = dict.fromkeys((tuple(sites), tuple(sites[:1]), tuple(sites[1:-1]) or tuple(sites[1:])))
    for kind in kinds:
        if len(LADDERS[kind]) == 1:
            for scope in scopes:
                if scope:
                    yield from (Configuration.uniform(scope, kind, ratio) for ratio in LADDERS[kind][0])


def at(configuration: Configuration, site: str, sites: Sequence[str], kinds: Sequence[str]) -> Iterator[Configuration]:
    """The configurations that differ from this one at `site` alone, by one step. sites: all, as they run."""
    now = configuration.at(site)
    places = {place[0]: place for place in configuration.places}
    options = _steps(*now) if now else []
    options += [(kind, _converted(kind, now)) for kind in kinds if now is None or kind != now[0]]
    if now:
        yield Configuration(tuple(places[name] for name in sites if name in places and name != site))
    for kind, ratio in options:
        changed = places | {site: (site, kind, ratio)}
        yield Configuration(tuple(changed[name] for name in sites if name in changed))


def _steps(kind: str, ratio: Ends) -> list[tuple[str, Ends]]:
    """The same kind with one of its ends a rung up or down."""
    ends, found = _ends(ratio), []
    for i, (ladder, end) in enumerate(zip(LADDERS[kind], ends, strict=True)):
        rung = ladder.index(end)
        for other in (rung - 1, rung + 1):
            if 0 <= other < len(ladder):
                found.append((kind, _ratio((*ends[:i], ladder[other], *ends[i + 1 :]))))
    return found


def _converted(kind: str, now: tuple[str, Ends] | None) -> Ends:
    """The ratio of another kind: what it has in common with the one that stands there, and else the middle."""
    known = dict(zip(LADDERS[now[0]], _ends(now[1]), strict=True)) if now else {}
    return _ratio(tuple(known.get(ladder, ladder[len(ladder) // 2]) for ladder in LADDERS[kind]))


def _ends(ratio: Any) -> tuple[float, ...]:
    return ratio if isinstance(ratio, tuple) else (ratio,)


def _ratio(ends: tuple[float, ...]) -> Ends:
    low, *high = ends
    return (low, high[0]) if high else low
