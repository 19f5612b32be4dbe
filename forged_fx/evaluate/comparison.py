"""Two results on the same examples, side by side."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forged_fx import checked
from forged_fx.evaluate import copies, statistics, terminal
from forged_fx.evaluate.journal import differences
from forged_fx.evaluate.record import call_of
from forged_fx.evaluate.result import FIGURES, KINDS, Result, Side
from forged_fx.evaluate.statistics import Paired
from forged_fx.evaluate.verdict import ENOUGH, FORBID, MARGIN
from forged_fx.extras import need

WORST = KINDS[-1]
LISTED = 20  # of the examples that flip, in the printed table


@dataclass(frozen=True)
class Flip:
    """An example that one of the two gets right in the worst case; `broken` says which row broke it in the other."""

    index: int
    right_in: str
    broken: str


@dataclass(eq=False, repr=False)
class Comparison:
    """`a` and `b`, results on the same examples under the same threat. `print` shows a table.

    Differences are b minus a, as shares of n. cautions: what may make the difference, beside the models.
    """

    a: Result
    b: Result
    names: tuple[str, str]
    cautions: list[str]

    @property
    def figures(self) -> dict[str, str]:
        """What a figure is called -> the last kind of row that it counts; the worst case first."""
        both = [kind for kind in reversed(KINDS) if kind in self.a.kinds and kind in self.b.kinds]
        return {"worst case": WORST} | {FIGURES[kind]: kind for kind in both if kind in FIGURES}

    def paired(self, under: str = WORST, side: str = "model") -> Paired | None:
        """The models (or the "base"s), under rows of kind `under` and of the kinds before it; None without a base."""
        a, b = getattr(self.a, side), getattr(self.b, side)
        if not (a and b):
            return None
        same = a.identity == b.identity and a.answers == b.answers is not None
        return statistics.compare(b.right(under), a.right(under), same=same, distinct=self.a.distinct & self.b.distinct)

    @property
    def verdict(self) -> str:
        """In the words of `evaluate`: of `b` beside `a`, in the worst case. A difference takes two models, attacked by
        the same rows and from `one_pool`, and nothing that says that attacks on the better one failed; a gain takes all
        of AutoAttack besides; that there is none, nothing that forbids to say so; and as many inputs as `evaluate`
        wants."""
        if self.few:
            return "cannot say"
        a, b = self.a, self.b
        found = {1: "gain", 0: "no measurable gain", -1: "loss"}[self.paired().direction]
        better = a if found == "loss" else b
        otherwise = a.plan != b.plan or not one_pool(a, b) or a.model.identity == b.model.identity
        partly = found == "gain" and not (a.enough and b.enough)
        doubtful = otherwise or partly or better.doubts or better.verdict == "masking"
        forbidden = found == "no measurable gain" and any(name in FORBID for name in self.b.doubts)
        return "cannot say" if forbidden or (found in ("gain", "loss") and doubtful) else found

    @property
    def few(self) -> str:
        """Why there are too few inputs to say anything; "" if there are not."""
        p = self.paired()
        if p.n < ENOUGH:
            return f"with fewer than {ENOUGH} inputs every outcome could be chance"
        if p.direction == 0 and p.high > MARGIN:
            return f"{p.n} inputs leave a gain of more than {100 * MARGIN:.0f} points possible"
        return ""

    @property
    def flips(self) -> list[Flip]:
        """The examples on which the models differ in the worst case."""
        a, b = self.a.model, self.b.model
        found = []
        for index in (a.right() != b.right()).nonzero().flatten().tolist():
            loser, winner = (b, 0) if bool(a.right()[index]) else (a, 1)
            row = loser.rows[int(loser.broken_by[index])]
            found.append(Flip(index, self.names[winner], f"{row.kind}, {row.attack}"))
        return found

    def __str__(self) -> str:
        return terminal.text(self)

    def __rich__(self) -> Any:
        cautions = terminal.plain("\n".join(self.cautions))
        return need("rich.console").Group(
            terminal.plain(_sentence(self), "bold"), _table(self), *_listed(self), cautions
        )

    def __repr__(self) -> str:
        return f"<Comparison: {_sentence(self)}>"


def compare(a: Result | str | os.PathLike[str], b: Result | str | os.PathLike[str]) -> Comparison:
    """Compare two results, or the folders that hold them, example by example.

    ValueError, with every difference, if they are not of the same examples (x and y, by SHA-256) under the same threat:
    their figures then say nothing about each other. What else differs is listed in `Comparison.cautions`.
    """
    for one in (a, b):
        if not isinstance(one, Result):
            checked.path(one, "of what is no Result, compare")
    names = _name(a, "a"), _name(b, "b")
    if names[0] == names[1]:
        names = _name(a, "the result a", str), _name(b, "the result b", str)
    first, second = (one if isinstance(one, Result) else Result.load(one) for one in (a, b))
    different = [
        f"{field}: {old} in {names[0]}, {new} in {names[1]}" for field, old, new in _differences(first, second, True)
    ]
    if different:
        raise ValueError(f"{names[0]} and {names[1]} are not of the same examples and threat: " + "; ".join(different))
    return Comparison(first, second, names, list(_cautions(first, second, names)))


def one_pool(a: Result, b: Result) -> bool:
    """Whether what was found on one network was shown to both models, and both were held against it: the same base,
    which is neither of them, or the one that is the other's base. A model beside itself is held against nothing."""
    if not (a.base and b.base):
        return False
    if b.base.identity == a.model.identity or a.base.identity == b.model.identity:
        return True
    itself = any(one.same or one.base.identity == one.model.identity for one in (a, b))
    return a.base.identity == b.base.identity and not itself


def _last(folder: str | os.PathLike[str]) -> str:
    return Path(folder).resolve().name


def _name(one: Result | str | os.PathLike[str], otherwise: str, of_folder: Callable[[Any], str] = _last) -> str:
    return otherwise if isinstance(one, Result) else of_folder(one)


def _differences(a: Result, b: Result, decisive: bool) -> Iterator[tuple[str, str, str]]:
    for field, old, new in differences(call_of(a), call_of(b)):
        if (field.partition(".")[0] in ("data", "threat")) is decisive:
            yield field, old, new


def _cautions(a: Result, b: Result, names: tuple[str, str]) -> Iterator[str]:
    """What a reader has to know beside the figures."""
    yield from filter(None, [copies.said(a.n, sorted({*a.copies, *b.copies}))])
    if a.plan != b.plan:
        yield (
            f"Attacked by different rows ({names[0]}: {', '.join(a.attacks)}; {names[1]}: {', '.join(b.attacks)}): "
            "whoever was attacked less looks better."
        )
    if bool(a.base) != bool(b.base):
        more = names[0 if a.base else 1]
        yield f"{more} alone has faced a base's examples, too: whoever was attacked less looks better."
    if not one_pool(a, b):
        yield (
            "They have not faced one pool of examples, and were not held against one network: for a gain or a loss "
            "judge both beside the same base, evaluate(..., base=...), or one beside the other."
        )
    for result, name in zip((a, b), names, strict=True):
        if not result.enough:
            yield f"{name} has not faced all of AutoAttack, which a gain takes: attacks='standard'."
        if result.doubts:
            yield f"Attacks on {name} may have failed: {', '.join(result.doubts)} (docs/findings.md says what to do)."
        if result.verdict in ("masking", "cannot say"):
            yield f"{name} by itself is judged {result.verdict}: {result.sentence}"
    if a.model.identity == b.model.identity:
        yield "Both are of the same model, by its state and class: what differs is the attacks' chance, or the code."
    if a.base and b.base and a.base.identity == b.base.identity:
        flips = int((a.base.right() != b.base.right()).sum())
        yield (
            f"The base is the same in both. Its worst case differs on {flips} examples: so much comes of the attacks' "
            "chance, and of the examples that the other side lends."
        )
    for field, old, new in _differences(a, b, False):
        if field.partition(".")[0] in ("seed", "block", "bpda", "versions"):
            yield f"{field}: {old} in {names[0]}, {new} in {names[1]}"


def _sentence(c: Comparison) -> str:
    p = c.paired()
    seems = {1: "above it", 0: "not measurably different from it", -1: "below it"}[p.direction]
    words = {
        "gain": "measurably above it",
        "no measurable gain": "not measurably different from it",
        "loss": "measurably below it",
        "cannot say": f"{seems}, " + (c.few or "which may be the attacks' doing and not the model's: see below"),
    }[c.verdict]
    return (
        f"in the worst case {c.names[1]} is right on {int(c.b.model.right().sum())} of {c.a.n} inputs, {c.names[0]} on "
        f"{int(c.a.model.right().sum())}: {words}"
    )


def _table(c: Comparison) -> Any:
    table = need("rich.table").Table(title=f"right, of {c.a.n} inputs", title_justify="left")
    headings = ("", *c.names, "points", "95 % interval", "McNemar p", f"{c.names[0]} alone", f"{c.names[1]} alone")
    for heading in headings:
        table.add_column(terminal.plain(heading), justify="left" if not heading else "right")
    for side in ("model", "base"):
        for name, kind in c.figures.items():
            p = c.paired(kind, side)
            if p is None:
                continue
            sides: list[Side] = [getattr(result, side) for result in (c.a, c.b)]
            shares = [terminal.share(one.accuracy(kind), c.a.n) for one in sides]
            difference = (f"{100 * p.difference:+.2f}", f"{100 * p.low:+.2f} {100 * p.high:+.2f}", f"{p.p:.2g}")
            cells = (f"{side}: {name}", *shares, *difference, str(p.base_only), str(p.model_only))
            table.add_row(*map(terminal.plain, cells), style="bold" if (side, kind) == ("model", WORST) else "")
        table.add_section()
    return table


def _listed(c: Comparison) -> list[Any]:
    flips = c.flips
    if not flips:
        return []
    table = need("rich.table").Table(title=f"{len(flips)} inputs that only one gets right", title_justify="left")
    for heading in ("input", "right in", "broken in the other by"):
        table.add_column(heading)
    for flip in flips[:LISTED]:
        table.add_row(*map(terminal.plain, (str(flip.index), flip.right_in, flip.broken)))
    return [table, *([f"and {len(flips) - LISTED} more: .flips"] if len(flips) > LISTED else [])]
