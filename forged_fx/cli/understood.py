"""What the arguments say, held against the library's own tables before anything is loaded.

What cannot be known before is left to the library: whether a file is there, whether a glob matches a site.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import typer

from forged_fx.cli import options
from forged_fx.evaluate import attacks, checks
from forged_fx.kinds import MEAN_STD, Kind, known
from forged_fx.sources import data, models
from forged_fx.sources.classifier import normalization
from forged_fx.stats import parse_statistic

Arguments = Mapping[str, Any]


def _values(given: Any) -> list[Any]:
    """What is given for all sites or kinds, or for each."""
    return list(given.values()) if isinstance(given, dict) else [given]


def _threat(given: Arguments) -> None:
    # where evaluate is given no norm, the model's list may say which: no eps is too large then
    norm = given.get("norm", "L2" if "attacks" in given else "Linf")
    checks.threat(options.number(given.get("eps", "0.5"), "eps"), norm)


def _forging(given: Arguments) -> None:
    kinds = [known(name) for name in _values(options.kind(given["kind"]))]
    statistic = given.get("statistic", "max")
    if statistic != MEAN_STD:
        parse_statistic(statistic)
    if "ratio" in given:
        _fit(_values(options.ratio(given["ratio"])), kinds, statistic)


def _grid(given: Arguments) -> None:
    ratios = options.ratios(given["ratios"])
    by_kind = ratios if isinstance(ratios, dict) else dict.fromkeys(options.names(given.get("kinds", "hard")), ratios)
    for name, theirs in by_kind.items():
        _fit(theirs, [known(name)], "max")


def _fit(ratios: Iterable[Any], kinds: list[Kind], statistic: str) -> None:
    """ValueError for a ratio of use to none of these kinds: which of them a site has, statistics say."""
    for ratio in ratios:
        wrong = []
        for kind in kinds:
            try:
                kind.check(ratio, statistic, "ratio")
            except ValueError as error:
                wrong.append(error)
        if len(wrong) == len(kinds):
            raise wrong[0]


# argument -> what reads it, and those beside it that it depends on; ValueError or typer.BadParameter where it cannot
READERS: dict[str, Callable[[Arguments], Any]] = {
    "model": lambda given: models.asked(given["model"]),
    "base": lambda given: models.asked(given["base"]),
    "data": lambda given: data.asked(given["data"], given.get("split"), given.get("resize")),
    "calibrate": lambda given: data.asked(given["calibrate"], None, given.get("resize")),
    "normalize": lambda given: normalization(given["normalize"]),
    "base_normalize": lambda given: normalization(given["base_normalize"]),
    "kind": _forging,
    "kinds": lambda given: [known(name) for name in options.names(given["kinds"])],
    "ratios": _grid,
    "eps": _threat,
    "norm": _threat,
    "attacks": lambda given: attacks.choose(options.attacks(given["attacks"])),
    "max_natural_loss": lambda given: options.number(given["max_natural_loss"], "max-natural-loss"),
}


def check(arguments: Arguments) -> None:
    """typer.BadParameter for the first argument that says nothing."""
    given = {name: value for name, value in arguments.items() if value is not None}
    for name in READERS:
        if name in given:
            try:
                READERS[name](given)
            except ValueError as error:
                raise typer.BadParameter(str(error)) from error
