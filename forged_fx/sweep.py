"""How forging trades natural accuracy for robustness: one model, many ratios and kinds, one pool of examples."""

import functools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from forged_fx import checked, pictures
from forged_fx.bpda import straight_through
from forged_fx.calibrate import calibrate
from forged_fx.configuration import Configuration, written
from forged_fx.describe import describe
from forged_fx.evaluate import blocks as unit
from forged_fx.evaluate import checks, copies, fingerprint, pool
from forged_fx.evaluate.attacks import choose
from forged_fx.evaluate.journal import Journal
from forged_fx.evaluate.pool import Judged
from forged_fx.evaluate.result import Side
from forged_fx.evaluate.statistics import LEVEL, compare, holm
from forged_fx.evaluate.threat import Threat
from forged_fx.evaluate.verdict import VERDICTS
from forged_fx.extras import need
from forged_fx.files import whole
from forged_fx.kinds import KINDS
from forged_fx.models import device_of, unwrapped
from forged_fx.recorded import LIMIT, Recorded, answers, facts, running, versions, within
from forged_fx.rows import Table, share
from forged_fx.stats import Ends, Stats, is_number
from forged_fx.throughput import interleave, relative
from forged_fx.transform import select

EXAMPLES, STATISTICS = "sweep.examples.safetensors", "sweep.stats.safetensors"  # a result may lie beside them
BASE = "base"


@dataclass(frozen=True)
class Point:
    """One kind at one ratio, at every site that is forged by default, beside the base.

    natural, true, worst: how many of n it gets right unattacked, under its true gradient, and in the worst case over
    all rows. low, high: Tango's 95 % interval of its worst case less the base's, in shares of n; p: exact McNemar;
    p_holm: the same for the number of points. zeroed, limited: share of all inputs of sites that forging set to zero
    (beyond what was zero) or limited, by the calibration's histogram; None where that cannot tell. speed: throughput as
    a share of the base's, the median over the rounds, speed_low and speed_high its quartiles; None where not taken.
    verdict, sentence: what `evaluate` says of these outcomes, by the same rules.
    """

    kind: str
    ratio: Ends
    natural: int
    true: int
    worst: int
    low: float
    high: float
    p: float
    p_holm: float
    zeroed: float | None
    limited: float | None
    speed: float | None = None
    speed_low: float | None = None
    speed_high: float | None = None
    verdict: str = "cannot say"
    sentence: str = "the record is of an earlier version, which did not ask; sweep anew, into another folder"

    @classmethod
    def of(cls, record: Any) -> "Point":
        """From JSON; ValueError for anything else. A record of an earlier version has no verdict."""
        asked = {name: getattr(cls, name) for name in ("verdict", "sentence")}
        return checked.build(cls, asked | checked.fit(record, dict[str, Any], "a point"), "a point")

    @property
    def name(self) -> str:
        return f"{self.kind} {written(self.ratio)}"

    @property
    def above(self) -> bool:
        """Whether its worst case is measurably above the base's, of so many points."""
        return self.low > 0 and self.p_holm <= 1 - LEVEL

    @property
    def stands(self) -> bool:
        """Whether that is a gain by the rules of `evaluate` too: after all that it takes, unmasked, without a doubt."""
        return self.above and self.verdict == "gain"


@dataclass(eq=False, repr=False)
class Sweep(Recorded):
    """What `sweep` found. `print` shows a table; `save`, `plot`. natural, true, worst: the base's, as in `Point`.

    sites: those that are forged. facts: what was asked, and of which data, by which versions.
    """

    NAME: ClassVar[str] = "sweep"
    BESIDE: ClassVar[tuple[str, ...]] = (EXAMPLES, STATISTICS)
    FACTS: ClassVar[dict[str, Any]] = Recorded.FACTS | {"attacks": list[str], "distinct": int | None}

    n: int
    threat: Threat
    natural: int
    true: int
    worst: int
    sites: list[str]
    points: list[Point]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> Point:
        """Of the points that stand, or where none does of all, the one with the best worst case; of several the one
        that is right unattacked most often."""
        return max(self.points, key=lambda point: (point.stands, point.worst, point.natural))

    @property
    def better(self) -> bool:
        """Whether the best point is shown to be above the base."""
        return self.best.stands

    @property
    def verdict(self) -> str:
        return "above the base" if self.better else "none above the base"

    @property
    def sentence(self) -> str:
        best, least = self.best, min(self.points, key=lambda point: (point.worst, point.natural))
        reach = f"{least.worst} ({least.name}) to {best.worst} ({best.name})"
        if len({point.worst for point in self.points}) == 1:
            reach = f"{best.worst} " + ("at every point" if len(self.points) > 1 else f"({best.name})")
        below = sum(point.high < 0 and point.p_holm <= 1 - LEVEL for point in self.points)
        masking = sum(point.verdict == "masking" for point in self.points)
        distinct = self.facts.get("distinct") or self.n  # an earlier version did not ask
        alone = f" of the {distinct} inputs that are no copies of others" if distinct < self.n else ""
        if self.better:
            shown, then = f"{best.name} is measurably above", "; attacks that know the kind come with forged_fx.search"
        elif best.above:
            shown, then = "none is shown to be above", f"; evaluate's verdict on it is {best.verdict}: {best.sentence}"
        else:
            shown, then = "none is measurably above", ""
        return (
            f"of {len(self.points)} points {shown} the base"
            + (f", {below} measurably below" if below else "")
            + (f", {masking} masking" if masking else "")
            + f": worst case {self.worst} of {self.n} at the base, {reach}, Holm p = {best.p_holm:.2g}{alone}{then}"
        )

    def records(self) -> list[dict[str, Any]]:
        """A row for the base and each point, as the CSV has them."""
        base = {"kind": "none", "ratio": "", "natural": self.natural, "true": self.true, "worst": self.worst}
        common = {"n": self.n, "eps": self.threat.eps, "norm": self.threat.norm}
        rows = [base, *({**asdict(point), "ratio": written(point.ratio)} for point in self.points)]
        return [{name: row.get(name) for name in (f.name for f in fields(Point))} | common for row in rows]

    def check(self) -> None:
        super().check()
        within("points", [len(self.points)], 1, math.inf)
        within("n", [self.n], 1, math.inf)
        rows: list[Sweep | Point] = [self, *self.points]
        for row in rows:
            within("right", (row.natural, row.true, row.worst), 0, self.n)
        for point in self.points:
            if point.kind not in KINDS:
                raise ValueError(f"its kind {checked.short(point.kind)} is none of {', '.join(KINDS)}")
            if point.verdict not in VERDICTS:
                raise ValueError(f"its verdict {checked.short(point.verdict)} is none of {', '.join(VERDICTS)}")
            within("interval", (point.low, point.high), -1, 1)
            within("p, and shares", (point.p, point.p_holm, point.zeroed, point.limited), 0, 1)
            within("speed", (point.speed, point.speed_low, point.speed_high), 0, LIMIT)

    def picture(self) -> pictures.Picture:
        """Accuracies above, shares and throughput below, a column per kind."""
        return pictures.trade_off(self)

    @property
    def small_print(self) -> str:
        return (
            f"{self.threat.norm} ball of radius {self.threat.eps:.6g}; attacks: {', '.join(self.facts['attacks'])}; "
            f"seed {self.facts['seed']}; one pool of examples for all; points and intervals: worst case less the base's"
        )

    def tables(self) -> list[Table]:
        headings = ("", "worst case", "points", "95 % interval", "Holm p", "true gradient", "natural")
        rows = [("base", str(self.worst), *[""] * 3, str(self.true), str(self.natural), *[""] * 4)]
        for p in self.points:
            interval = f"{100 * p.low:+.1f} {100 * p.high:+.1f}"
            points = f"{100 * (p.worst - self.worst) / self.n:+.1f}"
            speed = "" if p.speed is None else f"{p.speed:.2f} [{p.speed_low:.2f} {p.speed_high:.2f}]"
            figures = (str(p.worst), points, interval, f"{p.p_holm:.2g}", str(p.true), str(p.natural))
            rows.append((p.name, *figures, share(p.zeroed), share(p.limited), speed, p.verdict))
        bold = 1 + self.points.index(self.best)
        return [
            Table(f"right, of {self.n} inputs", (*headings, "zeroed", "limited", "throughput", "verdict"), rows, bold)
        ]


def sweep(
    model: nn.Module,
    batches: Iterable[Any] | Stats,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    ratios: Sequence[Ends] | Mapping[str, Sequence[Ends]] = (2**-8, 2**-7, 2**-6, 2**-5),
    kinds: Sequence[str] | None = None,
    norm: str = "Linf",
    attacks: str | list[str] | tuple[str, ...] = "standard",
    seed: int = 0,
    batch_size: int = 250,
    rounds: int = 15,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    shard: bool | None = None,
) -> Sweep:
    """Forge `model` at each ratio and kind, and judge all of them and `model` itself under one pool of examples.

    The model is calibrated once and attacked once. Every adversarial example that is found on any of them is shown to
    all, so that the curve compares models and not attacks' luck; its worst case can only be below what `evaluate`
    finds for a point alone.

    Args:
        model: a classifier, x -> logits (n, classes).
        batches: what to calibrate on, as `forged_fx.calibrate` takes it, or its result.
        x, y, eps, norm, attacks, seed, batch_size, progress: as in `forged_fx.evaluate`.
        shard: as there; of processes that share a sweep each calibrates on the batches that it is given, see
            `forged_fx.calibrate`, and process 0 alone takes the times.
        ratios: of every kind, or by kind: {"hard": [2**-7], "clamp": [0.7, 0.5]}.
        kinds: names from `forged_fx.kinds.KINDS`. None: those that `ratios` is by, else "hard".
        rounds: of timing, see `forged_fx/throughput.py`, eager, on the first `batch_size` inputs; 0: none.
        include, exclude: globs over site names, as in `forged_fx.transform`.
        folder: where the run is recorded: killed at any moment, the same call goes on from there. At the end it holds
            sweep.json, sweep.csv, sweep.svg, the statistics, and the adversarial examples of each model. If it holds
            that result already, it is returned.

    Raises:
        TypeError, ValueError: as `evaluate`, `calibrate` and `transform` do; no ratio or kind; the model's code has
            changed since the run in `folder` began.
        FileExistsError: `folder` holds the run of another call. BlockingIOError: another process works on it.
    """
    model = checks.attacked(model, "model", "sweep forges")
    threat, (x, y), plan = checks.threat(eps, norm), checks.inputs(x, y), choose(attacks)
    distinct = copies.others(len(x), copies.warn(x))
    seed, rounds = checked.whole_number(seed, "seed"), checked.whole_number(rounds, "rounds", 0)
    batch_size = checked.whole_number(batch_size, "batch_size", 1)
    grid = _grid(ratios, kinds)
    mean = any(kind == "mean" for kind, _ in grid)
    stats = batches if isinstance(batches, Stats) else calibrate(model, batches, channels=mean, shard=shard)
    sites, _ = select(stats, include, exclude)
    example: tuple[tuple, dict] = (x[:8].to(device_of(model, x.device)),), {}
    forged = {
        f"{kind} {written(ratio)}": Configuration.uniform(sites, kind, ratio).forge(model, stats, example)
        for kind, ratio in grid
    }
    models = {BASE: model, **forged}
    call = {
        "threat": asdict(threat),
        "plan": {kind: list(names) for kind, names in asdict(plan).items()},
        "seed": seed,
        "block": unit.BLOCK,
        "data": fingerprint.of_data(x, y),
        "class": type(model).__name__,
        "models": {name: fingerprint.of_model(one) for name, one in models.items()},
        "rounds": rounds,
        "timed": batch_size if rounds else 0,
        "stats": fingerprint.of_sites({name: stats.sites[name] for name in sites}),
        "versions": versions(),
    }
    with (
        running(Sweep, call, model, seed=seed, folder=folder, progress=progress, shard=shard) as run,
        ExitStack() as stack,
    ):
        if run.finished:
            return run.again(model, x, batch_size)
        if folder is not None:
            run.processes.first(lambda: stats.save(Path(folder) / STATISTICS))
        stack.enter_context(checks.at_peace(models))
        stack.enter_context(run.shown)
        judged = pool.judge(
            models, x, y, threat, plan, bpda=straight_through, blocks=run.blocks, batch_size=batch_size,
            progress=run.shown, distinct=distinct,
        )  # fmt: skip
        sides = {name: one.side for name, one in judged.items()}
        timed = run.processes.first(lambda: json.dumps(_speeds(models, x[:batch_size], rounds)).encode())
        result = Sweep(
            n=len(x),
            threat=threat,
            **_counts(sides[BASE]),
            sites=sites,
            points=_points(grid, forged, judged, stats, json.loads(timed), distinct),
            facts=facts(
                call,
                answers(model, x, batch_size),
                attacks=plan.names,
                distinct=int(distinct.sum()),
                seconds={name: sum(row.seconds for row in side.rows) for name, side in sides.items()},
            ),
        )
        if folder is not None:
            run.processes.first(lambda: _finish(result, sides, Path(folder), run.journal))
    return result


def _grid(ratios: Sequence[Ends] | Mapping[str, Sequence[Ends]], kinds: Sequence[str] | None) -> list[tuple[str, Ends]]:
    """(kind, ratio) of each point."""
    if kinds is None:
        kinds = list(ratios) if isinstance(ratios, Mapping) else ["hard"]
    kinds = checked.several(kinds, "kinds", "names")
    by_kind = ratios if isinstance(ratios, Mapping) else dict.fromkeys(kinds, ratios)
    if missing := [kind for kind in kinds if kind not in by_kind]:
        raise ValueError(f"ratios has none for kind {missing[0]!r}")
    grid = [(kind, _ratio(ratio)) for kind in kinds for ratio in checked.several(by_kind[kind], "ratios", "numbers")]
    if by_site := [ratio for _, ratio in grid if isinstance(ratio, Mapping)]:
        raise TypeError(
            f"ratios: {by_site[0]!r} is no ratio. A point has one ratio, at every site that is forged: choose sites "
            "with include= or exclude=; by kind write ratios={'hard': [2**-7], 'clamp': [0.7]}. A ratio for each site: "
            "forged_fx.evaluate, of what transform(..., ratio=...) returned, or forged_fx.search"
        )
    if not grid or len(set(grid)) < len(grid):
        raise ValueError(f"kinds={kinds}, ratios={ratios}: at least one point, and none twice")
    if beside := [kind for kind in by_kind if kind not in kinds]:
        raise ValueError(f"ratios has some for kind {beside[0]!r}, which is not among kinds={kinds}: name it there too")
    return grid


def _ratio(given: Any) -> Any:
    """A ratio with numbers as Python has them; TypeError for what is none. (A dict is named by the caller.)"""
    if isinstance(given, list | tuple):
        return tuple(map(_ratio, given))
    if is_number(given):
        return float(given)
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(f"ratios: {checked.short(given)} is no number, such as 2**-6; nor None, nor a pair of them")
    return given


def _finish(result: Sweep, sides: Mapping[str, Side], folder: Path, journal: Journal) -> None:
    """The result takes the unfinished run's place, with the examples of each model."""
    tensors: dict[str, Tensor] = {}
    for name, side in sides.items():
        tensors |= {f"{name}.broken_by": side.broken_by, f"{name}.x": side.examples.contiguous()}
    with whole(folder / EXAMPLES) as path:
        need("safetensors.torch").save_file(tensors, path)
    result.finish(folder, journal)


def _counts(side: Side) -> dict[str, int]:
    kinds = {"natural": "natural", "true": "true gradient", "worst": "further"}
    return {name: int(side.right(kind).sum()) for name, kind in kinds.items()}


def _points(
    grid: Sequence[tuple[str, Ends]],
    forged: Mapping[str, nn.Module],
    judged: Mapping[str, Judged],
    stats: Stats,
    speeds: Mapping[str, tuple[float, float, float]],
    distinct: Tensor,
) -> list[Point]:
    base = judged[BASE].side.right()
    paired = [compare(judged[n].side.right(), base, same=judged[n].same, distinct=distinct) for n in forged]
    adjusted = holm([p.p for p in paired])
    points = []
    for (kind, ratio), (name, module), p, p_holm in zip(grid, forged.items(), paired, adjusted, strict=True):
        shares, speed = shares_changed(module, stats), speeds.get(name, (None, None, None))
        found, interval = judged[name], (p.low, p.high, p.p, p_holm)
        figures: tuple[Any, ...] = (*_counts(found.side).values(), *interval, *shares, *speed)
        points.append(Point(kind, ratio, *figures, verdict=found.verdict, sentence=found.sentence))
    return points


def shares_changed(forged: nn.Module, stats: Stats) -> tuple[float | None, float | None]:
    """Of all elements that entered the forged sites in calibration, the shares that forging sets to zero (beyond those
    that are zero) and limits; None where a site's histogram cannot tell."""
    zeroed, limited, elements = [], [], 0
    for row in describe(forged):
        if row.left_out is None:
            site = stats.sites[row.site]
            elements += site.elements
            zeroed.append(None if row.net_zeroed is None else site.elements * row.net_zeroed)
            limited.append(site.elements * (row.share_limited or 0.0))
    return (None if None in zeroed else sum(zeroed) / max(elements, 1)), sum(limited) / max(elements, 1)


def _speeds(models: Mapping[str, nn.Module], x: Tensor, rounds: int) -> dict[str, tuple[float, float, float]]:
    """Of each model but the base: throughput as a share of the base's, its median and quartiles. Of none without
    rounds."""
    if not rounds:
        return {}
    device = device_of(models[BASE], x.device)
    batch = x.clone().to(device)  # a model may write into it
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    calls = {("eager", name): functools.partial(unwrapped(one), batch) for name, one in models.items()}
    seconds = interleave(calls, rounds, wait)
    return {name: relative(seconds["eager", BASE], seconds["eager", name]) for name in models if name != BASE}
