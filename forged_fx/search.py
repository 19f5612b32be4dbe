"""A search for the configuration with the best worst case: kinds, sites, and a ratio for each.

    1. a sweep under a cheap attack: every kind and ratio at all sites, at the first one, at the others
    2. moves, one site at a time, from the best of these, as long as the cheap attack finds less
    3. confirmation of the finalists on inputs that the search has not seen, by `evaluate` with all that it has

The cheap attack ranks and proves nothing: a search takes what looks best among many, so what it finds looks better than
it is. That is why the figure that counts comes from other inputs, and is corrected for the number of finalists.
"""

import math
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from forged_fx import checked, pictures, search_moves, trials
from forged_fx.configuration import Configuration
from forged_fx.evaluate import blocks as unit
from forged_fx.evaluate import checks, copies, evaluate, fingerprint
from forged_fx.evaluate.attacks import choose
from forged_fx.evaluate.result import Result
from forged_fx.evaluate.statistics import LEVEL, holm
from forged_fx.evaluate.threat import Threat
from forged_fx.models import device_of
from forged_fx.recorded import LIMIT, Recorded, answers, facts, running, versions, within
from forged_fx.rows import Table
from forged_fx.stats import Stats, given_stats, is_number
from forged_fx.transform import select
from forged_fx.trials import Spent, Trial, Trials, loses_too_much

KINDS = ("hard", "soft", "clamp", "band")
LISTED = 10  # trials in the printed table
STARTS = 3  # configurations from which moves begin, and at most so many finalists


@dataclass(frozen=True)
class Finalist:
    """A configuration on the inputs kept for confirmation. natural, worst: how many of them it gets right unattacked
    and in the worst case over everything; base_natural, base_worst: the base under the same. low, high: Tango's
    interval of the difference, in shares; p: exact McNemar; p_holm: corrected for the number of finalists. verdict: of
    `evaluate`. stands: it is a measurable gain after all of that, within the bound on natural accuracy; reason: why
    not, or ""."""

    configuration: Configuration
    natural: int
    worst: int
    base_natural: int
    base_worst: int
    low: float
    high: float
    p: float
    p_holm: float
    verdict: str
    stands: bool
    reason: str
    folder: str | None


@dataclass(eq=False, repr=False)
class Search(Recorded):
    """What `search` found. `print` shows tables; `save`, `plot`, `forge`.

    base: the model itself under the cheap attack, an empty configuration. trials: all others, in order; what loses too
    much natural accuracy was not attacked, and has no figures of that: None, in the CSV nothing. finalists: the
    best worst case first. near, seen, kept: inputs on which trials were scored, inputs of the search in all, and those
    kept for confirmation. facts: what was asked, and of which data, by which versions.
    """

    NAME: ClassVar[str] = "search"
    FACTS: ClassVar[dict[str, Any]] = Recorded.FACTS | {"attacks": str | list[str], "stopped": str}

    threat: Threat
    near: int
    seen: int
    kept: int
    base: Trial
    trials: list[Trial]
    finalists: list[Finalist]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> Finalist | None:
        """The finalist that stands with the best worst case; None: nothing beats the base."""
        standing = [finalist for finalist in self.finalists if finalist.stands]
        return max(standing, key=lambda finalist: (finalist.worst, finalist.natural), default=None)

    @property
    def sentence(self) -> str:
        tried = f"{len(self.trials)} configurations tried"
        if not self.finalists and not self.trials:
            return f"nothing is known: {tried}, as {self.facts['stopped']}"
        if not self.finalists:
            return f"nothing beats the base: {tried}, and none looked better even to the search's own attack"
        if self.best is None:
            closest = max(self.finalists, key=lambda finalist: finalist.worst)
            return (
                f"nothing beats the base: {tried}, the {len(self.finalists)} that looked best judged on {self.kept} "
                f"other inputs; the least bad, {closest.configuration}, is right on {closest.worst} in the worst case, "
                f"the base on {closest.base_worst} ({closest.reason})"
            )
        best = self.best
        return (
            f"{best.configuration} beats the base: in the worst case it is right on {best.worst} of {self.kept} inputs "
            f"that the search has not seen, the base on {best.base_worst} (95 % interval {100 * best.low:+.1f} to "
            f"{100 * best.high:+.1f} points, Holm p = {best.p_holm:.2g}); natural {best.base_natural} to "
            f"{best.natural}; {tried}"
        )

    def forge(self, model: nn.Module, stats: Stats, example: tuple[tuple, dict] | None = None) -> nn.Module:
        """`model` with the best configuration. example: as in `forged_fx.transform`. ValueError if nothing beats the
        base, or the model or the statistics are not those of the search: what it found is of these."""
        if self.best is None:
            raise ValueError(self.sentence)
        call = self.facts["call"]
        sites = checked.fit(call.get("sites"), list[str], "facts.call.sites")
        for name, value in _made_from(model, stats, sites).items():
            if value != call.get(name):
                raise ValueError(
                    f"other {name} than the search had ({value[:12]}..., there {str(call.get(name))[:12]}...): forge "
                    "what it found from the same model and statistics, or search anew"
                )
        return self.best.configuration.forge(model, stats, example)

    def records(self) -> list[dict[str, Any]]:
        """A row for the base and each trial, as the CSV has them; what was confirmed has those figures too."""
        found = {finalist.configuration: finalist for finalist in self.finalists}
        rows = []
        for trial in (self.base, *self.trials):
            row = {f.name: getattr(trial, f.name) for f in fields(Trial)} | {"configuration": str(trial.configuration)}
            finalist = found.get(trial.configuration)
            names = ("natural", "worst", "base_natural", "base_worst", "low", "high", "p", "p_holm", "stands", "reason")
            rows.append(row | {f"confirmed_{name}": getattr(finalist, name, None) for name in names})
        return rows

    def check(self) -> None:
        super().check()
        within("near, seen and kept", (self.near, self.seen, self.kept), 1, math.inf)
        for trial in (self.base, *self.trials):
            within("standing", [trial.standing], 0, self.near)
            within("margin", [trial.margin], -1, 1)
            within("natural", [trial.natural], 0, self.seen)
            within("seconds", [trial.seconds], 0, LIMIT)
        for f in self.finalists:
            within("right", (f.natural, f.worst, f.base_natural, f.base_worst), 0, self.kept)
            within("interval", (f.low, f.high), -1, 1)
            within("p", (f.p, f.p_holm), 0, 1)

    def picture(self) -> pictures.Picture:
        """Each trial's natural accuracy and how many inputs stand."""
        return pictures.trials(self)

    @property
    def verdict(self) -> str:
        return "nothing beats the base" if self.best is None else "beats the base"

    @property
    def small_print(self) -> str:
        return (
            f"{self.threat.norm} ball of radius {self.threat.eps:.6g}, seed {self.facts['seed']}; scored on the "
            f"{self.near} inputs nearest to the boundary of {self.seen}, "
            + (f"confirmed on {self.kept} others" if self.finalists else f"{self.kept} others kept, and not needed")
            + f" (attacks: {self.facts['attacks']}); {self.facts['stopped']}"
        )

    def tables(self) -> list[Table]:
        return [*([self._judged()] if self.finalists else []), self._tried()]

    def _judged(self) -> Table:
        headings = "configuration", "worst case", "base", "points", "95 % interval", "p", "Holm p", "natural", "base"
        rows = []
        for f in self.finalists:
            points = f"{100 * (f.worst - f.base_worst) / self.kept:+.1f}"
            interval = f"{100 * f.low:+.1f} {100 * f.high:+.1f}"
            counts = (str(f.worst), str(f.base_worst), points, interval, f"{f.p:.2g}", f"{f.p_holm:.2g}")
            rows.append((str(f.configuration), *counts, str(f.natural), str(f.base_natural), f.reason or "stands"))
        return Table(f"finalists, of {self.kept} inputs kept for them", (*headings, "outcome"), rows)

    def _tried(self) -> Table:
        title = f"the best of {len(self.trials)} trials, by the search's own attack (this proves nothing)"
        rows = []
        for trial in (self.base, *ranked(self.trials)[:LISTED]):
            name = str(trial.configuration) if trial.configuration.places else "base"
            natural = f"{trial.natural}" + ("" if trial.fit else " (too few)")
            found = ("", "") if trial.margin is None else (str(trial.standing), f"{trial.margin:+.3f}")
            rows.append((name, *found, natural))
        headings = "configuration", f"standing, of {self.near}", "margin", f"natural, of {self.seen}"
        return Table(title, headings, rows)


def search(
    model: nn.Module,
    stats: Stats | str | os.PathLike[str],
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: str = "Linf",
    kinds: Sequence[str] = KINDS,
    max_natural_loss: float = 0.01,
    budget: int = 200,
    seconds: float | None = None,
    confirm: float | tuple[Tensor, Tensor] = 0.5,
    finalists: int = STARTS,
    attacks: str | list[str] | tuple[str, ...] = "adaptive",
    seed: int = 0,
    batch_size: int = 250,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    shard: bool | None = None,
) -> Search:
    """Look for kinds, sites and ratios that make `model` more robust in the worst case, and confirm what is found.

    A configuration is scored on the inputs on which the base's outcome is closest to turning, by what a short APGD
    leaves standing: with its true gradient, under BPDA, the straight-through one and a smooth surrogate's, and shown
    the base's adversarial examples. The best are confirmed on other inputs by `evaluate`, which also attacks each
    finalist along the gradients of its own kind: the base's, as if nothing had been forged, and smooth surrogates at
    several temperatures, from random points and from the base's adversarial examples, with more steps and restarts
    until the figure stops moving.

    Args:
        model: a classifier, x -> logits (n, classes).
        stats: what `calibrate(model, ...)` returned, or the path it was saved to.
        x, y, eps, norm, batch_size, progress, shard: as in `forged_fx.evaluate`. Processes that share a search try as
            many configurations at once as they are.
        kinds: which kinds may be used, of `search_moves.LADDERS`. "mean" needs statistics by channel.
        max_natural_loss: how much natural accuracy may be lost, a share of all inputs: in the search, and again in the
            confirmation.
        budget: how many configurations are tried, at most.
        seconds: how long trying may take, at most, in seconds of computing, of all processes together; those of a run
            that was killed count. The confirmation is not in it.
        confirm: which share of the inputs is kept for confirmation, drawn within each class; or other inputs and their
            classes.
        finalists: how many are confirmed, at most.
        attacks: of the confirmation, as in `evaluate`; "adaptive" is what a reported gain should have faced, at least.
        seed: of everything that is drawn.
        include, exclude: globs over site names, as in `forged_fx.transform`.
        folder: where the run is recorded: killed at any moment, the same call goes on from there and ends with the same
            result. At the end it holds search.json, search.csv, search.svg, and a folder for each finalist, as
            `evaluate` writes it. If it holds that result already, it is returned.

    Raises:
        TypeError, ValueError: as `evaluate` and `transform` do; an argument of no use; the model's code has changed
            since the run in `folder` began.
        FileExistsError: `folder` holds the run of another call. BlockingIOError: another process works on it.
    """
    model = checks.attacked(model, "model", "search forges")
    stats = given_stats(stats, "search")
    seed, batch_size = checked.whole_number(seed, "seed"), checked.whole_number(batch_size, "batch_size", 1)
    budget, finalists = checked.whole_number(budget, "budget"), checked.whole_number(finalists, "finalists")
    if seconds is not None and not is_number(seconds):
        raise TypeError(f"seconds={seconds!r}: a number, or None for no limit")
    if seconds is not None and not 0 <= seconds < math.inf:
        raise ValueError(f"seconds={seconds!r}: 0 or more, or None for no limit")
    threat, (x, y) = checks.threat(eps, norm), checks.inputs(x, y)
    copies.warn(x)
    choose(attacks)
    kinds = checked.several(kinds, "kinds", "names")
    if unknown := [kind for kind in kinds if kind not in search_moves.LADDERS]:
        raise ValueError(f"search does not know kind {unknown[0]!r}; choose from {', '.join(search_moves.LADDERS)}")
    if not kinds or budget < 1 or finalists < 1:
        raise ValueError(f"kinds={kinds}, budget={budget}, finalists={finalists}: at least one of each")
    if not is_number(max_natural_loss) or not 0 <= max_natural_loss <= 1:
        raise ValueError(f"max_natural_loss={max_natural_loss!r}: a share of all inputs, in [0, 1]")
    (x, y), (kept_x, kept_y) = split(x, y, confirm, seed)
    sites, _ = select(stats, include, exclude)
    data = {"x": x, "y": y, "confirm_x": kept_x, "confirm_y": kept_y}
    call = {
        "threat": asdict(threat),
        "kinds": kinds,
        "sites": sites,
        "max_natural_loss": float(max_natural_loss),
        "budget": budget,
        "seconds": None if seconds is None else float(seconds),
        "finalists": finalists,
        "attacks": attacks if isinstance(attacks, str) else list(attacks),
        "seed": seed,
        "constants": {
            "block": unit.BLOCK,
            "near": trials.NEAR,
            "steps": trials.STEPS,
            "smooth": trials.SMOOTH,
            "starts": STARTS,
        },
        "class": type(model).__name__,
        **_made_from(model, stats, sites),
        "data": {name: fingerprint.of_tensors([(name, value)]) for name, value in data.items()},
        "versions": versions(),
    }
    folder = None if folder is None else Path(folder)
    with running(Search, call, model, seed=seed, folder=folder, progress=progress, shard=shard) as run:
        if run.finished:
            return run.again(model, x, batch_size)
        with checks.at_peace({"model": model}), run.shown:
            few = kept_x[:8].to(device_of(model, x.device))
            checks.logits(checks.ask(model, few, "model"), few, kept_y, "model")  # now, and not when the search is done
            tried = Trials(
                model,
                stats,
                x,
                y,
                threat,
                max_natural_loss=max_natural_loss,
                budget=budget,
                seconds=seconds,
                blocks=run.blocks,
                batch_size=batch_size,
                progress=run.shown,
            )
            logits = answers(model, x, batch_size)
            ends, stopped = walk(tried, sites, kinds, random.Random(seed))
        results = []
        for number, trial in enumerate(ends[:finalists], start=1):
            forged = trial.configuration.forge(model, stats, tried.example)
            where = None if folder is None else folder / f"finalist-{number}"
            judged = evaluate(
                forged,
                model,
                x=kept_x,
                y=kept_y,
                eps=eps,
                norm=norm,
                attacks=attacks,
                seed=seed,
                batch_size=batch_size,
                folder=where,
                progress=progress,
                shard=shard,
            )
            results.append((trial.configuration, where, judged))
        result = Search(
            threat=threat,
            near=len(tried.near),
            seen=len(x),
            kept=len(kept_x),
            base=tried.base,
            trials=list(tried.made.values()),
            finalists=_confirmed(results, max_natural_loss),
            facts=facts(call, logits, attacks=call["attacks"], stopped=stopped),
        )
        if folder is not None:
            run.processes.first(lambda: result.finish(folder, run.journal))
    return result


def _made_from(model: nn.Module, stats: Stats, sites: Iterable[str]) -> dict[str, str]:
    """Fingerprints of what a configuration forges."""
    seen = fingerprint.of_sites({name: stats.sites[name] for name in sites if name in stats.sites})
    return {"model": fingerprint.of_model(model), "stats": seen}


def walk(tried: Trials, sites: Sequence[str], kinds: Sequence[str], chance: random.Random) -> tuple[list[Trial], str]:
    """Where the moves end that look better than the base, the best first; and why they ended.

    They begin at the `STARTS` best of `search_moves.starts` and the base. The walks take turns, a site at a time, so
    that a budget that runs out ends all of them and not the last.
    """
    here: list[Trial] = []

    def ascend(k: int) -> Iterator[None]:
        """Coordinate ascent: at each site, in an order drawn anew each time round, whatever scores better is taken."""
        before = None
        while here[k] is not before:
            before = here[k]
            for site in chance.sample(sites, len(sites)):
                for trial in tried.try_out(search_moves.at(here[k].configuration, site, sites, kinds)):
                    here[k] = max(here[k], trial, key=lambda trial: trial.score)
                yield

    try:
        for _ in tried.try_out(search_moves.starts(sites, kinds)):
            pass
        here += ranked((tried.base, *tried.made.values()))[:STARTS]
        ascents = [ascend(k) for k in range(len(here))]
        while ascents:
            ascents = [ascent for ascent in ascents if next(ascent, ascents) is not ascents]
        stopped = "no move helps"
    except Spent as spent:
        stopped = str(spent)
    here = here or ranked(tried.made.values())[:STARTS]
    better = {trial.configuration: trial for trial in here if trial.score[:2] > tried.base.score[:2]}
    return ranked(better.values()), stopped


def ranked(some: Iterable[Trial]) -> list[Trial]:
    """The best first."""
    return sorted(some, key=lambda trial: trial.score, reverse=True)


def split(x: Tensor, y: Tensor, confirm: float | tuple[Tensor, Tensor], seed: int) -> tuple[tuple, tuple]:
    """(the search's x and y, the confirmation's)

    A share is drawn within each class, so that both sides are alike however x is sorted. Copies of an input stay on
    the same side.
    """
    if isinstance(confirm, tuple | list) and len(confirm) == 2:
        kept_x, kept_y = checks.inputs(*confirm)
        copies.warn(kept_x, stacklevel=4)  # `search` is between
        if kept_x.shape[1:] != x.shape[1:]:
            raise ValueError(f"confirm has inputs of shape {tuple(kept_x.shape[1:])}, and x {tuple(x.shape[1:])}")
        if seen := int((copies.first_of(torch.cat([x.cpu(), kept_x.cpu()]))[len(x) :] < len(x)).sum()):
            raise ValueError(
                f"confirm has {seen} inputs that are in x too, where the search sees them: give others, or a share of x"
            )
        return (x, y), (kept_x, kept_y)
    share = confirm if is_number(confirm) and 0 < confirm < 1 else 0
    first = copies.first_of(x)
    order = sorted(set(first.tolist()))  # of copies one
    random.Random(seed).shuffle(order)
    order.sort(key=y.tolist().__getitem__)
    drawn = {k for i, k in enumerate(order) if int((i + 1) * share + 0.5) > int(i * share + 0.5)}
    kept = torch.tensor([k in drawn for k in first.tolist()])
    if kept.all() or not kept.any():
        raise ValueError(
            f"confirm={checked.short(confirm)}: a share between 0 and 1 that leaves inputs on both sides, or (x, y)"
        )
    return (x[~kept], y[~kept]), (x[kept], y[kept])


def _confirmed(results: Sequence[tuple[Configuration, Path | None, Result]], max_natural_loss: float) -> list[Finalist]:
    """The finalists with what `evaluate` found, the best worst case first."""
    found = []
    compared = [result.compared() for _, _, result in results]
    adjusted = holm([paired.p for paired in compared])
    for (configuration, folder, result), paired, p_holm in zip(results, compared, adjusted, strict=True):
        counts = {
            prefix + name: int(side.right(kind).sum())
            for prefix, side in (("", result.model), ("base_", result.base))
            for name, kind in (("natural", "natural"), ("worst", result.kinds[-1]))
        }
        lost = counts["base_natural"] - counts["natural"]
        reasons = {
            f"evaluate: {result.verdict}": result.verdict != "gain",
            "not all of AutoAttack can be run here, attacks='relentless' runs all else": (
                result.verdict == "cannot say" and bool(result.model.undefined)
            ),
            f"p = {p_holm:.2g} for {len(results)} finalists": result.verdict == "gain" and p_holm > 1 - LEVEL,
            f"loses {100 * lost / result.n:.1f} points of natural accuracy": loses_too_much(
                lost, result.n, max_natural_loss
            ),
        }
        reason = "; ".join(text for text, holds in reasons.items() if holds)
        finalist = Finalist(
            configuration,
            **counts,
            low=paired.low,
            high=paired.high,
            p=paired.p,
            p_holm=p_holm,
            verdict=result.verdict,
            stands=not reason,
            reason=reason,
            folder=folder.name if folder else None,
        )
        found.append(finalist)
    return sorted(found, key=lambda finalist: (-finalist.worst, -finalist.natural))
