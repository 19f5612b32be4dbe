"""Pictures of a run: each function gives a `Picture`, to be set into a page as SVG, or saved as a file.

In a page text stays text, and colours follow its theme: matplotlib draws in stand-in colours, which are then replaced
by the page's CSS variables. What a page must define: `--model`, `--base`, `--soft` (secondary text), `--line` (rules);
text takes `currentColor`. A file has the colours of a page on white paper.
"""

import io
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forged_fx.extras import need
from forged_fx.files import PICTURE, PICTURES, ends_with, whole

if TYPE_CHECKING:
    from forged_fx.search import Search
    from forged_fx.sweep import Sweep

Paint = Mapping[str, str]  # a stand-in colour -> what to draw with
Draw = Callable[[Any, Paint], None]  # is given a figure
Size = tuple[float, float]  # in inches
Ratio = tuple[float | None, float | None, float | None]  # and its interval

# a stand-in colour -> what it becomes in the page
_THEME = {
    "#010101": "currentColor",
    "#020202": "var(--model)",
    "#030303": "var(--base)",
    "#040404": "var(--soft)",
    "#050505": "var(--line)",
}
INK, MODEL, BASE, SOFT, LINE = _THEME
_PAPER = {INK: "#1b1f24", MODEL: "#b45309", BASE: "#3b6ea8", SOFT: "#59636e", LINE: "#d1d9e0"}

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "forged_fx",  # the same picture gives the same bytes
    "text.parse_math": False,  # a name with two dollars is a name
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE,
    "xtick.color": SOFT,
    "ytick.color": LINE,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
}
_AXES = {"axes.spines.left": True, "ytick.color": SOFT}  # with a scale on the left
LONGEST = 36  # characters of a name
_WIDTH = 4.4  # inches: narrow, so that its text can still be read when a phone shows it at full width


@dataclass(frozen=True)
class Picture:
    """name: begins its ids, so that two pictures in one page do not share any. size: in inches. style: of its own."""

    name: str
    draw: Draw
    size: Size
    style: Mapping[str, Any] = field(default_factory=dict)

    def svg(self) -> str:
        """An <svg> element for a page, as wide as there is room."""
        with need("matplotlib", "report").rc_context({**_STYLE, **self.style}):
            figure = self._figure({colour: colour for colour in _THEME})
            file = io.StringIO()
            figure.savefig(file, format="svg", transparent=True)
        return _embeddable(file.getvalue(), self.name)

    def save(self, path: str | os.PathLike[str]) -> None:
        """A file, whole or not at all, of the format that its suffix names: .svg, .png or .pdf, ValueError for others.
        FileExistsError if a file is there that Matplotlib did not draw."""
        path, style = Path(path), {**_STYLE, **self.style}
        ends_with(path, *PICTURES)
        with need("matplotlib", "report").rc_context({key: _PAPER.get(value, value) for key, value in style.items()}):
            figure = self._figure(_PAPER)
            with whole(path, PICTURE) as part:
                figure.savefig(part, format=path.suffix[1:], facecolor="white", dpi=150)

    def _figure(self, paint: Paint) -> Any:
        from matplotlib.figure import Figure

        figure = Figure(figsize=self.size, layout="constrained")
        self.draw(figure, paint)
        return figure


def accuracy_by_attack(figures: Sequence[tuple[str, int, int | None]], n: int) -> Picture:
    """Bars of (what was attacked with, model's right, base's right or None) of n inputs; the first stands on top."""

    def draw(figure: Any, paint: Paint) -> None:
        axes = figure.add_subplot()
        for i, (_, *counts) in enumerate(figures):
            for count, colour, up in zip(counts, (MODEL, BASE), (-0.2, 0.2), strict=True):
                if count is not None:
                    axes.barh(i + up, 100 * count / n, 0.36, color=paint[colour])
                    axes.text(100 * count / n + 1, i + up, f"{count}", va="center", fontsize=9)
        _rows(axes, paint, [name for name, *_ in figures])
        _percent(axes, f"right, % of {n} inputs")

    return Picture("accuracy", draw, _size(1.6 * len(figures)))


def zeroed_by_site(shares: Sequence[tuple[str, float, float, float | None]], when: str) -> Picture:
    """Bars of (site, share that is zero already, share zero after forging, what was predicted of that or None), shares
    in [0, 1]. when: "in calibration", or whenever else that was seen."""

    def draw(figure: Any, paint: Paint) -> None:
        axes = figure.add_subplot()
        for i, (_, before, after, predicted) in enumerate(shares):
            axes.barh(i, 100 * before, 0.6, color=paint[LINE])
            axes.barh(i, 100 * (after - before), 0.6, left=100 * before, color=paint[MODEL])
            end = 100 * max(after, predicted or 0.0) + 1
            axes.text(end, i, f"{100 * (after - before):+.1f}", va="center", fontsize=9)
            if predicted is not None:
                axes.plot([100 * predicted] * 2, [i - 0.42, i + 0.42], color=paint[BASE], linewidth=1.5)
        _rows(axes, paint, [shortened(site) for site, *_ in shares])
        _percent(axes, f"zero, % of inputs {when}")

    return Picture("zeroed", draw, _size(len(shares)))


def ratios(name: str, rows: Sequence[tuple[str, Sequence[Ratio]]], label: str) -> Picture:
    """Of each row (its label, one or two ratios of forged to base), with their intervals, beside a line at 1. One that
    is infinite points out of the picture."""

    def draw(figure: Any, paint: Paint) -> None:
        axes = figure.add_subplot()
        axes.axvline(1, color=paint[SOFT], linewidth=1)
        for i, (_, marks) in enumerate(rows):
            ups = (-0.16, 0.16) if len(marks) > 1 else (0,)
            for (ratio, low, high), colour, up in zip(marks, (MODEL, BASE), ups, strict=False):
                if low is not None and high is not None:
                    axes.plot([low, high], [i + up, i + up], color=paint[colour], linewidth=2)
                if ratio == math.inf:
                    edge = {"transform": axes.get_yaxis_transform(), "clip_on": False}
                    axes.plot(1, i + up, ">", color=paint[colour], markersize=4, **edge)
                elif ratio is not None:
                    axes.plot(ratio, i + up, "o", color=paint[colour], markersize=4)
        ends = [end for _, marks in rows for mark in marks for end in mark if end and math.isfinite(end)] + [0.95, 1.05]
        zero = any(end == 0 for _, marks in rows for mark in marks for end in mark)
        if max(ends) > 8 * min(ends):
            if zero:
                axes.set_xscale("symlog", linthresh=min(ends))
            else:
                axes.set_xscale("log")
            axes.minorticks_off()
        axes.set_xlim(-0.05 * min(ends) if zero else min(ends) * 0.95, max(ends) * 1.05)
        axes.xaxis.set_major_formatter("{x:g}")  # not as a power, which is a formula
        _rows(axes, paint, ["\n".join(map(shortened, row.split("\n"))) for row, _ in rows])
        axes.set_xlabel(label)

    return Picture(name, draw, _size(0.75 * sum(row.count("\n") + 1 for row, _ in rows)))


# field of a sweep's point -> its label, marker and line
_ACCURACIES = (("worst", "worst case", "o-"), ("true", "true gradient alone", "v:"), ("natural", "no attack", "s--"))
_SHARES = (("zeroed", "set to zero", "o-"), ("limited", "limited", "s--"), ("speed", "throughput, of the base's", "v:"))


def trade_off(sweep: "Sweep") -> Picture:
    """A column per kind: accuracies above, with the base's as lines; shares changed and throughput below."""
    kinds = list(dict.fromkeys(point.kind for point in sweep.points))

    def draw(figure: Any, paint: Paint) -> None:
        axes = figure.subplots(2, len(kinds), sharex="col", sharey="row", squeeze=False, height_ratios=(3, 2))
        percent = 100 / sweep.n
        for (above, below), kind in zip(axes.T, kinds, strict=True):
            points = [point for point in sweep.points if point.kind == kind]
            at = range(len(points))
            for name, label, style in _ACCURACIES:
                counts = [percent * getattr(point, name) for point in points]
                above.plot(at, counts, style, color=paint[MODEL], markersize=4, label=label)
                above.axhline(percent * getattr(sweep, name), linestyle=style[1:], color=paint[BASE], linewidth=1)
            ends = [[percent * sweep.worst + 100 * getattr(point, end) for point in points] for end in ("low", "high")]
            above.fill_between(at, *ends, color=paint[MODEL], alpha=0.12, linewidth=0)
            above.set_title(kind)
            for name, label, style in _SHARES:
                shares = [getattr(point, name) for point in points]
                if any(shares) and None not in shares:
                    below.plot(at, [100 * s for s in shares], style, color=paint[SOFT], markersize=4, label=label)
            below.set_xticks(at, [point.name.partition(" ")[2] for point in points])
            below.set_xlabel("ratio")
        axes[0, 0].set_ylabel(f"right, % of {sweep.n} inputs\n(base: blue)")
        axes[1, 0].set_ylabel("%")
        for row in axes:
            row[0].set_ylim(bottom=0)
            if row[-1].get_legend_handles_labels()[0]:
                row[-1].legend(frameon=False, fontsize=8, loc="best")

    return Picture("sweep", draw, (2.0 + 2.6 * len(kinds), 5.2), _AXES)


def trials(search: "Search") -> Picture:
    """Every trial that was fit to be attacked, by natural accuracy and by what stood; finalists are marked."""

    def draw(figure: Any, paint: Paint) -> None:
        axes = figure.add_subplot()
        finalists = {finalist.configuration: finalist for finalist in search.finalists}
        kinds = sorted({kind for trial in search.trials for _, kind, _ in trial.configuration.places})
        for kind, marker in zip(kinds, "os^Dv<>", strict=False):
            some = [
                t for t in search.trials if t.fit and t.configuration.places and t.configuration.places[0][1] == kind
            ]
            at = [[getattr(t, name) for t in some] for name in ("natural", "standing")]
            axes.scatter(*at, marker=marker, s=18, color=paint[SOFT], alpha=0.5, linewidth=0, label=kind)
        for trial in search.trials:
            if finalist := finalists.get(trial.configuration):
                colour, word = (MODEL, "stands") if finalist.stands else (INK, "does not stand")
                axes.scatter(trial.natural, trial.standing, s=60, facecolors="none", edgecolors=paint[colour],
                             label=f"finalist, {word}")  # fmt: skip
        axes.scatter(search.base.natural, search.base.standing, marker="*", s=90, color=paint[BASE], label="base")
        axes.set_xlabel(f"right without attack, of {search.seen}")
        axes.set_ylabel(f"standing after a short attack, of the {search.near}\nnearest to the boundary")
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # each label once
        axes.legend(handles.values(), handles, frameon=False, fontsize=8)

    return Picture("search", draw, (6.4, 4.4), _AXES)


def _size(rows: float) -> Size:
    """Of a page's picture with so many lines of text."""
    return _WIDTH, 0.7 + 0.32 * rows


def shortened(name: str) -> str:
    """A site's name as it is written beside a bar, which needs the room: of a long one the end, which tells most."""
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"


def _rows(axes: Any, paint: Paint, names: Sequence[str]) -> None:
    size = 10 if max(len(line) for name in names for line in name.split("\n")) <= 20 else 8
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.tick_params(left=False)
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    axes.grid(axis="x", color=paint[LINE], linewidth=0.6)
    axes.set_axisbelow(True)


def _percent(axes: Any, label: str) -> None:
    axes.set_xlim(0, 108)  # room for the figure beside a full bar
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel(label)


def _embeddable(svg: str, name: str) -> str:
    """What of an SVG file belongs into a page: no prologue, metadata, size or fonts of its own, no namespaces."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<[^>]*>", lambda tag: _themed(tag[0], name), svg)  # its text is a name, and left alone
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"([^>]*?) (?:width|height)="[^"]*"', r"\1\2", svg, count=1)
    return svg.replace("<svg", '<svg role="img"', 1)


def _themed(tag: str, name: str) -> str:
    tag = re.sub(r' xmlns(:\w+)?="[^"]*"|font-family: [^;"]*;', "", tag)
    tag = re.sub(r'( id="|url\(#|href="#)', rf"\1{name}-", tag)
    for colour, themed in _THEME.items():
        tag = tag.replace(colour, themed)
    return tag
