"""Pictures of a run, as SVG to be set into a page: text stays text, and colours follow the page's theme.

Matplotlib draws in stand-in colours, which are then replaced by the page's CSS variables. What a page must define:
`--model`, `--base`, `--soft` (secondary text), `--line` (rules); text takes `currentColor`.
"""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

# a stand-in colour -> what it becomes in the page
_THEME = {
    "#010101": "currentColor",
    "#020202": "var(--model)",
    "#030303": "var(--base)",
    "#040404": "var(--soft)",
    "#050505": "var(--line)",
}
INK, MODEL, BASE, SOFT, LINE = _THEME

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
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install forged_fx[report]") from error

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 0.7 + 0.32 * rows), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    return _embeddable(file.getvalue(), name)


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
