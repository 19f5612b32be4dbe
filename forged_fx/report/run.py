"""What a page can show, and the folder that it is read from.

A run's folder holds the result (see `forged_fx.evaluate.record`), and beside it what else is known:

sites.json        what `describe` says of the forged model, and what was zero in calibration
speeds.json       what `throughput.compare` measured
sparsity.json     what `sparsity` measured: the rows' own `save` writes it
lipschitz.json    what `lipschitz` measured
sweep/sweep.json, search/search.json    a sweep's or a search's folder; of a search's finalist, the one that it lies in

A folder of `sweep` or `search` holds the record of that, and no result.
"""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

from forged_fx import checked
from forged_fx.describe import Description, Row
from forged_fx.evaluate import Result
from forged_fx.evaluate.journal import UNFINISHED
from forged_fx.evaluate.record import RECORD
from forged_fx.files import FIGURES, whole
from forged_fx.lipschitz import Lipschitz
from forged_fx.recorded import Recorded
from forged_fx.search import Search
from forged_fx.sparsity import Sparsity
from forged_fx.stats import Stats
from forged_fx.sweep import Sweep
from forged_fx.throughput import Speed

SITES, SPEEDS, SPARSITY, LIPSCHITZ = "sites.json", "speeds.json", "sparsity.json", "lipschitz.json"
MAY_BE_INFINITE = {"base", "forged", "ratio"}  # of lipschitz.json; such a figure is written as text
Measured = TypeVar("Measured", Sparsity, Lipschitz)


@dataclass(frozen=True)
class Run:
    """What a page can show. Only the result must be there.

    title, about: what was judged, in a line each. sites: what `describe` gave. zeros: for each site, the share of its
    inputs in calibration that is zero without forging, in [0, 1]. speeds: what `throughput.compare` gave. timed: of
    which forging, see `fingerprint.of_forging`. sparsity, lipschitz, sweep, search: what the calls of these names gave.
    notes: further findings, a sentence each. facts: how to get this page again. classes: their names, by number.
    """

    title: str
    result: Result
    about: str = ""
    sites: Description = field(default_factory=Description)
    zeros: Mapping[str, float] = field(default_factory=dict)
    speeds: Sequence[Speed] = ()
    timed: str | None = None
    sparsity: Sparsity = field(default_factory=Sparsity)
    lipschitz: Lipschitz = field(default_factory=Lipschitz)
    sweep: Sweep | None = None
    search: Search | None = None
    notes: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    classes: Sequence[str] = ()

    @property
    def verdict(self) -> str:
        return self.result.verdict

    @classmethod
    def load(cls, folder: str | os.PathLike[str], title: str = "", classes: Sequence[str] = ()) -> "Run":
        """The run in a folder. ValueError names a file that is damaged; FileNotFoundError: there is no result."""
        folder = Path(folder)
        result = Result.load(folder)
        sites, zeros = _sites(folder / SITES) if (folder / SITES).exists() else (Description(), {})
        speeds, timed = _speeds(folder / SPEEDS) if (folder / SPEEDS).exists() else ([], None)
        sides = f"model: {result.model.description}" + (f"; base: {result.base.description}" if result.base else "")
        return cls(
            _title(title, folder),
            result,
            sides,
            sites,
            zeros,
            speeds=speeds,
            timed=timed,
            sparsity=_measured(folder / SPARSITY, Sparsity()),
            lipschitz=_measured(folder / LIPSCHITZ, Lipschitz()),
            sweep=Sweep.load(folder / "sweep") if _there(folder / "sweep", Sweep) else None,
            search=_search(folder),
            facts=facts(result),
            classes=classes,
        )


@dataclass(frozen=True)
class Choice:
    """What a page can show of a sweep or a search by itself. facts: how to get it again."""

    title: str
    found: Sweep | Search
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        return self.found.verdict

    @classmethod
    def load(cls, folder: str | os.PathLike[str], kind: type[Sweep | Search], title: str = "") -> "Choice":
        """The sweep or search in a folder. ValueError names a file that is damaged."""
        found = kind.load(folder)
        call = found.facts["call"]
        try:
            versions = checked.fit(call.get("versions", {}), dict[str, str], "facts.call.versions")
            command = checked.fit(found.facts.get("command", []), list[str], "facts.command")
        except ValueError as error:
            raise ValueError(f"{Path(folder) / kind.NAME}.json holds no {kind.NAME}: {error}") from error
        return cls(_title(title, Path(folder)), found, {"command": _command(command)} | versions)


def load(folder: str | os.PathLike[str], title: str = "", classes: Sequence[str] = ()) -> Run | Choice:
    """What a folder holds: a run of `evaluate`, else a sweep or a search. Raises as `Run.load` does."""
    folder = Path(folder)
    if (folder / RECORD).exists():
        return Run.load(folder, title, classes)
    for kind in (Sweep, Search):
        if _there(folder, kind):
            return Choice.load(folder, kind, title)
    then = (
        "its run is unfinished: the call that began it goes on with it"
        if (folder / UNFINISHED).exists()
        else "name the folder that evaluate, sweep, search or demo was given"
    )
    raise FileNotFoundError(f"{folder} holds no {RECORD}, {Sweep.NAME}.json or {Search.NAME}.json; {then}")


def facts(result: Result) -> dict[str, str]:
    """How a result came about: the exact command, and on what."""
    return {"command": _command(result.command), **{key: str(value) for key, value in result.machine.items()}}


def _command(argv: Sequence[str]) -> str:
    """A command line that can be given again."""
    program, *arguments = argv or [""]
    name = "python -m forged_fx" if Path(program).name == "__main__.py" else shlex.quote(Path(program).name)
    return " ".join([name, *map(shlex.quote, arguments)]).strip()


def _title(title: str, folder: Path) -> str:
    return title or f"forged_fx: {folder.resolve().name}"


def save_sites(folder: str | os.PathLike[str], sites: Description, stats: Stats) -> None:
    """Write sites.json."""
    rows = [{**asdict(row), "cost": None if row.cost is None else str(row.cost)} for row in sites]
    zeros = {name: site.share_zero for name, site in stats.sites.items()}
    _write(Path(folder) / SITES, {"forging": sites.forging, "notes": sites.notes, "sites": rows, "zeros": zeros})


def save_speeds(folder: str | os.PathLike[str], speeds: Sequence[Speed], forging: str | None) -> None:
    """Write speeds.json. forging: which was timed, see `fingerprint.of_forging`."""
    _write(Path(folder) / SPEEDS, {"forging": forging, "speeds": [asdict(speed) for speed in speeds]})


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path, FIGURES) as part:
        part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _sites(path: Path) -> tuple[Description, dict[str, float]]:
    found = _read(path)
    sites = Description()
    try:
        sites.forging = _forging(found)
        sites.notes = checked.fit(found["notes"], list[str], "notes")
        for i, row in enumerate(checked.fit(found["sites"], list[dict[str, Any]], "sites")):
            later = {"net_zeroed": None, "ratio": None}  # a run of an earlier version does not have these
            row = later | {key: value for key, value in row.items() if key != "cost"}
            sites.append(checked.build(Row, row, f"sites[{i}]", cost=None))
        zeros = checked.fit(found["zeros"], dict[str, float], "zeros")
        shares = [share for row in sites for share in (row.share_zeroed, row.net_zeroed)]
        if any(not 0 <= (share or 0) <= 1 for share in (*zeros.values(), *shares)):
            raise ValueError("a share that is not in [0, 1]")
        return sites, zeros
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no sites ({error}): delete it, or evaluate anew") from error


def _speeds(path: Path) -> tuple[list[Speed], str | None]:
    found = _read(path)
    try:
        rows = checked.fit(found["speeds"], list[dict[str, Any]], "speeds")
        return [checked.build(Speed, row, f"speeds[{i}]") for i, row in enumerate(rows)], _forging(found)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no speeds ({error}): delete it, or run forged-fx bench anew") from error


def _measured(path: Path, rows: Measured) -> Measured:
    """The rows in the file, if there is one."""
    if not path.exists():
        return rows
    found, what = _read(path), path.stem
    try:
        rows.forging = _forging(found)
        for i, row in enumerate(checked.fit(found["rows"], list[dict[str, Any]], "rows")):
            if not all(isfinite(value) for value in row.values() if isinstance(value, float)):
                raise ValueError("a figure that is not finite")
            said = {key: float(row[key]) for key in MAY_BE_INFINITE & row.keys() if row[key] in ("inf", "nan")}
            rows.append(checked.build(rows.row, row | said, f"rows[{i}]"))
        return rows
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} holds no {what} ({error}): delete it, or run forged-fx {what} anew") from error


def _forging(record: Mapping[str, Any]) -> str | None:
    """Of which forging the figures are; None where an earlier version wrote them, which did not say."""
    return checked.fit(record.get("forging"), str | None, "forging")


def _there(folder: Path, kind: type[Recorded]) -> bool:
    return (folder / f"{kind.NAME}.json").exists()


def _search(folder: Path) -> Search | None:
    """The search in the folder, or that of which the folder is a finalist's."""
    if _there(folder / "search", Search):
        return Search.load(folder / "search")
    above = folder.resolve().parent
    found = Search.load(above) if _there(above, Search) else None
    return found if found and folder.resolve().name in [one.folder for one in found.finalists] else None


def _read(path: Path) -> dict[str, Any]:
    try:
        return checked.fit(checked.parse(checked.read(path)), dict[str, Any], path.name)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it") from error
