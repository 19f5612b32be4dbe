"""Pictures of a run, as SVG to be set into a page, and as files.

In a page text stays text, and colours follow its theme: matplotlib draws in stand-in colours, which are then replaced
by the page's CSS variables. What a page must define: `--model`, `--base`, `--soft` (secondary text), `--line` (rules);
text takes `currentColor`. A file has the colours of a page on white paper.
"""

import io
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forged_fx.files import whole

if TYPE_CHECKING:
    from forged_fx.search import Search
    from forged_fx.sweep import Sweep

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
_WIDTH = 4.4  # inches: narrow, so that its text can still be read when a phone shows it at full width


def accuracy_by_attack(figures: Sequence[tuple[str, int, int | None]], n: int) -> str:
    """Bars of (what was attacked with, model's right, base's right or None) of n inputs; the first stands on top."""

    def draw(axes: Any) -> None:
        for i, (_, *counts) in enumerate(figures):
            for count, colour, up in zip(counts, (MODEL, BASE), (-0.2, 0.2), strict=True):
                if count is not None:
                    axes.barh(i + up, 100 * count / n, 0.36, color=colour)
                    axes.text(100 * count / n + 1, i + up, f"{count}", va="center", fontsize=9)
        axes.set_yticks(range(len(figures)), [name for name, *_ in figures])
        _percent(axes, f"right, % of {n} inputs")

    return _svg("accuracy", draw, rows=1.6 * len(figures))


def zeroed_by_site(shares: Sequence[tuple[str, float, float]]) -> str:
    """Bars of (site, share that is zero already, share zero after forging), shares in [0, 1]."""

    def draw(axes: Any) -> None:
        for i, (_, before, after) in enumerate(shares):
            axes.barh(i, 100 * before, 0.6, color=LINE)
            axes.barh(i, 100 * (after - before), 0.6, left=100 * before, color=MODEL)
            axes.text(100 * after + 1, i, f"+{100 * (after - before):.1f}", va="center", fontsize=9)
        axes.set_yticks(range(len(shares)), [site for site, *_ in shares])
        _percent(axes, "zero, % of the site's inputs in calibration")

    return _svg("zeroed", draw, rows=len(shares))


# field of a sweep's point -> its label, marker and line
_ACCURACIES = (("worst", "worst case", "o-"), ("true", "true gradient alone", "v:"), ("natural", "no attack", "s--"))
_SHARES = (("zeroed", "set to zero", "o-"), ("limited", "limited", "s--"), ("speed", "throughput, of the base's", "v:"))


def trade_off(sweep: "Sweep", path: str | os.PathLike[str]) -> None:
    """A column per kind: accuracies above, with the base's as lines; shares changed and throughput below."""
    kinds = list(dict.fromkeys(point.kind for point in sweep.points))

    def draw(figure: Any) -> None:
        axes = figure.subplots(2, len(kinds), sharex="col", sharey="row", squeeze=False, height_ratios=(3, 2))
        percent = 100 / sweep.n
        for (above, below), kind in zip(axes.T, kinds, strict=True):
            points = [point for point in sweep.points if point.kind == kind]
            at = range(len(points))
            for name, label, style in _ACCURACIES:
                counts = [percent * getattr(point, name) for point in points]
                above.plot(at, counts, style, color=_PAPER[MODEL], markersize=4, label=label)
                above.axhline(percent * getattr(sweep, name), linestyle=style[1:], color=_PAPER[BASE], linewidth=1)
            ends = [[percent * sweep.worst + 100 * getattr(point, end) for point in points] for end in ("low", "high")]
            above.fill_between(at, *ends, color=_PAPER[MODEL], alpha=0.12, linewidth=0)
            above.set_title(kind)
            for name, label, style in _SHARES:
                shares = [getattr(point, name) for point in points]
                if any(shares) and None not in shares:
                    below.plot(at, [100 * s for s in shares], style, color=_PAPER[SOFT], markersize=4, label=label)
            below.set_xticks(at, [point.name.partition(" ")[2] for point in points])
            below.set_xlabel("ratio")
        axes[0, 0].set_ylabel(f"right, % of {sweep.n} inputs\n(base: blue)")
        axes[1, 0].set_ylabel("%")
        for row in axes:
            row[0].set_ylim(bottom=0)
            row[-1].legend(frameon=False, fontsize=8, loc="best")

    _file(path, draw, (2.0 + 2.6 * len(kinds), 5.2))


def trials(search: "Search", path: str | os.PathLike[str]) -> None:
    """Every trial that was fit to be attacked, by natural accuracy and by what stood; finalists are marked."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        finalists = {finalist.configuration: finalist for finalist in search.finalists}
        kinds = sorted({kind for trial in search.trials for _, kind, _ in trial.configuration.places})
        for kind, marker in zip(kinds, "os^Dv<>", strict=False):
            some = [
                t for t in search.trials if t.fit and t.configuration.places and t.configuration.places[0][1] == kind
            ]
            at = [[getattr(t, name) for t in some] for name in ("natural", "standing")]
            axes.scatter(*at, marker=marker, s=18, color=_PAPER[SOFT], alpha=0.5, linewidth=0, label=kind)
        for trial in search.trials:
            if finalist := finalists.get(trial.configuration):
                colour, word = (MODEL, "stands") if finalist.stands else (INK, "does not stand")
                axes.scatter(trial.natural, trial.standing, s=60, facecolors="none", edgecolors=_PAPER[colour],
                             label=f"finalist, {word}")  # fmt: skip
        axes.scatter(search.base.natural, search.base.standing, marker="*", s=90, color=_PAPER[BASE], label="base")
        axes.set_xlabel(f"right without attack, of {search.seen}")
        axes.set_ylabel(f"standing after a short attack, of the {search.near}\nnearest to the boundary")
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # each label once
        axes.legend(handles.values(), handles, frameon=False, fontsize=8)

    _file(path, draw, (6.4, 4.4))


def _file(path: str | os.PathLike[str], draw: Callable[[Any], None], size: tuple[float, float]) -> None:
    """A file, whole or not at all, of the format that its suffix names: .svg, .png or .pdf. size: in inches."""
    path, style = Path(path), {key: _PAPER.get(value, value) for key, value in _STYLE.items()}
    with _matplotlib().rc_context(style | {"axes.spines.left": True}):
        figure = _figure(size)
        draw(figure)
        with whole(path) as part:
            figure.savefig(part, format=path.suffix[1:] or "svg", facecolor="white", dpi=150)


def _percent(axes: Any, label: str) -> None:
    axes.set_xlim(0, 108)  # room for the figure beside a full bar
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel(label)
    axes.tick_params(left=False)
    axes.invert_yaxis()
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)


def _svg(name: str, draw: Callable[[Any], None], rows: float) -> str:
    """An <svg> element. name: begins its ids, so that two pictures in one page do not share any."""
    with _matplotlib().rc_context(_STYLE):
        figure = _figure((_WIDTH, 0.7 + 0.32 * rows))
        draw(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    return _embeddable(file.getvalue(), name)


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install forged_fx[report]") from error
    return matplotlib


def _figure(size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _embeddable(svg: str, name: str) -> str:
    """What of an SVG file belongs into a page: no prologue, metadata, size or fonts of its own, no namespaces."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"([^>]*?) (?:width|height)="[^"]*"', r"\1\2", svg, count=1)
    svg = re.sub(r"<style.*?</style>|font-family: [^;\"]*;", "", svg, flags=re.DOTALL)
    svg = re.sub(r'((?: id="|url\(#|href="#))', rf"\1{name}-", svg)
    for colour, themed in _THEME.items():
        svg = svg.replace(colour, themed)
    return svg.replace("<svg", '<svg role="img"', 1)
