"""One self-contained HTML page about one run: the verdict first, no network, no script.

`page` sets the sections of `SECTIONS` one below the other; a section without material leaves itself out. To add one,
add what it needs to `Run`, a function and a row. Every text that comes from outside goes through `html.escape`.
"""

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from forged_fx import pictures
from forged_fx.describe import Description
from forged_fx.evaluate import Result
from forged_fx.throughput import Speed


@dataclass(frozen=True)
class Run:
    """What a page can show. Only the result must be there.

    title, about: what was judged, in a line each. sites: what `describe` gave. zeros: for each site, the share of its
    inputs in calibration that is zero without forging, in [0, 1]. speeds: what `throughput.compare` gave. notes:
    further findings, a sentence each. facts: how to get this page again.
    """

    title: str
    result: Result
    about: str = ""
    sites: Description = field(default_factory=Description)
    zeros: Mapping[str, float] = field(default_factory=dict)
    speeds: Sequence[Speed] = ()
    notes: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


# verdict -> how it is coloured; the word itself stands there too
TONES = {"gain": "good", "loss": "bad", "masking": "bad"}

TERMS = {
    "worst case": "an input counts as right only if no attack of any row below broke it. This is the figure to quote.",
    "true gradient": "the attack follows the model's own gradient, which is 0 wherever a threshold zeroed the input.",
    "BPDA": "the same attack, but the gradient passes a threshold as if it were not there (Athalye, Carlini and "
    "Wagner 2018). It finds what a hidden gradient hides.",
    "transfer": "adversarial images made on one of the two models, shown to the other.",
    "masking": "the defence hides its gradient from attacks rather than resisting them. The gain that the true "
    "gradient shows is then not one.",
    "interval, p": "Tango's 95 % interval of a paired difference, and the paired bootstrap's; exact McNemar test.",
}


def page(run: Run) -> str:
    """The page, as text. ImportError: `pip install forged_fx[report]`."""
    body = "\n".join(filter(None, (section(run) for section in SECTIONS)))
    return _PAGE.format(title=html.escape(run.title), style=_STYLE, body=body)


def _verdict(run: Run) -> str:
    result = run.result
    about = f'<p class="soft">{html.escape(run.about)}</p>' if run.about else ""
    verdict = f'<p class="verdict {TONES.get(result.verdict, "")}">{html.escape(result.verdict)}</p>'
    sides = [("model, worst case", result.worst_case, "model"), ("base, worst case", result.base_worst_case, "base")]
    figures = "".join(
        f'<div class="figure {name}"><b>{100 * share:.1f} %</b><span>{html.escape(what)}: '
        f"{round(share * result.n)} of {result.n}</span></div>"
        for what, share, name in sides
        if share is not None
    )
    sentence = _text(result.sentence[:1].upper() + result.sentence[1:])
    return (
        f"<header><h1>{html.escape(run.title)}</h1>{about}{verdict}"
        f'<div class="figures">{figures}</div><p>{sentence}.</p></header>'
    )


def _figures(run: Run) -> str:
    rows = []
    for name, kind in run.result.figures.items():
        cells = [name, *(_share(side.accuracy(kind), run.result.n) for side in run.result.sides)]
        if p := run.result.compared(kind):
            difference, *limits = (100 * s for s in (p.difference, p.low, p.high, p.boot_low, p.boot_high))
            interval, bootstrap = (f"{low:+.1f} to {high:+.1f}" for low, high in (limits[:2], limits[2:]))
            cells += [f"{difference:+.1f} ({interval})", bootstrap, f"{p.p:.2g}"]
        rows.append(cells)
    headings = ["right under", "model", "base", "difference in points (95 % interval)", "bootstrap", "p"]
    return _section("What stands", _table(headings[: len(rows[0])], rows, first=True))


def _pictures(run: Run) -> str:
    figures = []
    for name, kind in run.result.figures.items():
        model, *base = (round(side.accuracy(kind) * run.result.n) for side in run.result.sides)
        figures.append((name, model, base[0] if base else None))
    legend = '<span class="key model"></span>model' + '<span class="key base"></span>base' * bool(run.result.base)
    drawn = [_picture("Accuracy by attack", legend, pictures.accuracy_by_attack(figures, run.result.n))]
    shares = [(row.site, run.zeros.get(row.site, 0.0), row.share_zeroed) for row in run.sites if row.left_out is None]
    if shares:
        legend = '<span class="key line"></span>zero already<span class="key model"></span>zeroed by forging'
        drawn.append(_picture("Share zeroed by site", legend, pictures.zeroed_by_site(shares)))
    return f'<section class="pictures">{"".join(drawn)}</section>'


def _findings(run: Run) -> str:
    findings = run.result.findings
    raised = [f for f in findings if f.raised]
    quiet = ", ".join(f.name for f in findings if not f.raised and f.value is not None)
    headings = ["raised", "value", "bound", "a number of", "forbids a gain"]
    rows = [[f.name, f"{f.value:.4g}", f"{f.bound:.4g}", f.unit, "yes" if f.masking else "no"] for f in raised]
    note = f"Checked, and not raised: {html.escape(quiet)}." if quiet else "No check was made."
    return _section(
        "Signs that attacks failed", (_table(headings, rows) if rows else "") + f'<p class="soft">{note}</p>'
    )


def _rows(run: Run) -> str:
    headings = ["kind", "attack", "attacked", "broken", "standing", "rejected", "seconds", "note"]
    tables = []
    for side in run.result.sides:
        rows = [
            [r.kind, r.attack, r.attacked, r.broken, r.standing, r.rejected, f"{r.seconds:.1f}", r.note]
            for r in side.listed
        ]
        tables.append(f"<h3>{html.escape(side.name)}</h3>{_table(headings, rows)}")
    note = "Each row attacks only what the rows above it left standing."
    return _section("Row by row", f'<p class="soft">{note}</p>{"".join(tables)}')


def _sites(run: Run) -> str:
    if not run.sites:
        return ""
    headings = ["site", "kind", "input seen", "largest |x|", "threshold", "zero already", "zero forged", "left out"]
    rows = []
    for row in run.sites:
        shape = "varies" if row.shape is None else " × ".join("*" if size < 0 else str(size) for size in row.shape)
        forged = row.left_out is None
        shares = (run.zeros.get(row.site), row.share_zeroed)
        threshold = f"{row.threshold:.4g}" if forged else ""
        cells = ["" if share is None else f"{100 * share:.1f} %" for share in shares]
        rows.append([row.site or "(root)", row.kind, shape, f"{row.c_max:.4g}", threshold, *cells, row.left_out or ""])
    if not any(row[-1] for row in rows):
        headings, rows = headings[:-1], [row[:-1] for row in rows]
    notes = "; ".join(run.sites.notes)
    return _section(
        "Site by site", f'<p class="soft">Captured as {html.escape(notes)}. *: any size.</p>' + _table(headings, rows)
    )


def _speed(run: Run) -> str:
    if not (run.speeds or run.notes):
        return ""
    headings = ["", "plain, fastest ms", "forged, fastest ms", "throughput forged / plain, median", "quartiles"]
    rows = [
        [s.mode, f"{1e3 * s.plain:.3f}", f"{1e3 * s.forged:.3f}", f"{s.ratio:.3f}", f"{s.low:.3f} to {s.high:.3f}"]
        for s in run.speeds
    ]
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in run.notes)
    return _section("Cost and agreement", (_table(headings, rows) if rows else "") + notes)


def _terms(run: Run) -> str:
    rows = "".join(f"<dt>{html.escape(term)}</dt><dd>{html.escape(what)}</dd>" for term, what in TERMS.items())
    return _section("What the words mean", f"<dl>{rows}</dl>")


def _facts(run: Run) -> str:
    result = run.result
    facts = {
        "attacker": f"{result.threat.norm} ball of radius {result.threat.eps:g} around inputs in [0, 1]",
        "attacks": ", ".join(result.attacks),
        "seed, batch": f"{result.seed}, {result.batch_size}",
        **run.facts,
        **result.versions,
        **{f"note {i}": note for i, note in enumerate(result.notes, start=1)},
    }
    rows = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items())
    return _section("How to get this again", f"<dl>{rows}</dl>")


SECTIONS: tuple[Callable[[Run], str], ...] = (
    _verdict,
    _figures,
    _pictures,
    _findings,
    _rows,
    _sites,
    _speed,
    _terms,
    _facts,
)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>"


def _picture(title: str, legend: str, svg: str) -> str:
    return f"<figure><h2>{html.escape(title)}</h2><figcaption>{legend}</figcaption>{svg}</figure>"


def _table(headings: Sequence[str], rows: Iterable[Sequence[object]], first: bool = False) -> str:
    """A table. Columns of figures are set flush right, the first, which names the row, never. first: the first row is
    the one to read."""
    rows = [[str(cell) for cell in row] for row in rows]
    figures = [i > 0 and all(not row[i] or row[i][0] in "+-0123456789" for row in rows) for i in range(len(headings))]

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = [_wrap(cell) + (" n" if figure else "") for figure, cell in zip(figures, cells, strict=True)]
        return "".join(f'<{tag} class="{k}">{_text(c)}</{tag}>' for k, c in zip(kinds, cells, strict=True))

    body = "".join(f'<tr class="{"first" * (first and not i)}">{line(row, "td")}</tr>' for i, row in enumerate(rows))
    return f'<div class="wide"><table><thead><tr>{line(headings, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def _share(share: float, n: int) -> str:
    return f"{100 * share:.1f} % ({round(share * n)})"


def _wrap(cell: str) -> str:
    """How a cell's text may break, where the page is narrow: a word or two never, a sentence not into a column."""
    return "short" if len(cell) < 15 else "long" if len(cell) > 32 else ""


def _text(text: str) -> str:
    """Escaped, and with each percent sign kept beside its number."""
    return html.escape(text).replace(" %", "&nbsp;%")


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #59636e; --line: #d1d9e0; --card: #f6f8fa;
  --model: #b45309; --base: #3b6ea8; --good: #1a7f37; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --paper: #14171a; --soft: #9aa4ae; --line: #3a424a;
  --card: #1d2226; --model: #e8964a; --base: #6aa3dd; --good: #4ac26b; --bad: #ff7b72; } }
@media print { :root { --ink: #000; --paper: #fff; } section { break-inside: avoid; } }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.15rem; margin: 0; } h2 { font-size: 1.05rem; margin: 0 0 .5rem; }
h3 { font-size: .9rem; margin: 1.25rem 0 0; }
section { margin-top: 2.25rem; } p { margin: .5rem 0; max-width: 46rem; }
.soft, figcaption, th, dt { color: var(--soft); }
.verdict { font-size: 2.1rem; font-weight: 700; line-height: 1.15; margin: 1.25rem 0 1rem; }
.verdict.good { color: var(--good); } .verdict.bad { color: var(--bad); }
.figures { display: flex; flex-wrap: wrap; gap: .75rem; margin-bottom: 1rem; }
.figure { flex: 1 1 11rem; max-width: 18rem; padding: .6rem .9rem; background: var(--card); border-radius: .4rem;
  border-left: .3rem solid; }
.figure.model { border-color: var(--model); } .figure.base { border-color: var(--base); }
.figure b { display: block; font-size: 1.7rem; line-height: 1.2; } .figure span { color: var(--soft); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 500; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
td.n, td.short { white-space: nowrap; } td.long { min-width: 14rem; } td:last-child, th:last-child { padding-right: 0; }
tr.first td { font-weight: 700; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 2rem; }
figure { margin: 0; } svg { width: 100%; height: auto; } figcaption { font-size: .9rem; }
.key { display: inline-block; width: .7rem; height: .7rem; margin-right: .4rem; }
.key ~ .key { margin-left: 1rem; } .key.model { background: var(--model); } .key.base { background: var(--base); }
.key.line { background: var(--line); }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .3rem 1rem; margin: 0;
  font-size: .9rem; }
dd { margin: 0; overflow-wrap: anywhere; }
"""
