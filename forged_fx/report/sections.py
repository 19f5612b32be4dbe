"""The page's sections, one below the other; a section without material leaves itself out.

To add one: what it needs in `run.Run` or `run.Choice`, a function, and a row in `SECTIONS`.
"""

import html
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any

import torch

from forged_fx import pictures
from forged_fx.describe import Row
from forged_fx.evaluate.fingerprint import OF_DATA
from forged_fx.evaluate.result import Finding
from forged_fx.lipschitz import SITE_NONZERO, SITE_WHOLE, Figure
from forged_fx.report.findings import paragraphs
from forged_fx.report.markup import image, legend, picture, prose, section, share, table, terms, text
from forged_fx.report.run import Choice, Run
from forged_fx.search import Search
from forged_fx.sweep import Sweep

DRAWN = 60  # sites in a picture


# verdict -> how it is coloured; the words themselves stand there too
TONES = {"gain": "good", "beats the base": "good", "loss": "bad", "masking": "bad"}

TERMS = {
    "worst case": "an input counts as right only if no attack of any row below broke it. This is the figure to quote.",
    "true gradient": "the attack follows the model's own gradient, which is 0 wherever a threshold zeroed the input.",
    "BPDA": "the same attack, but the gradient passes a threshold as if it were not there, or as if it rose gradually "
    "(Athalye, Carlini and Wagner 2018). It finds what a hidden gradient hides, and what a jump is worth.",
    "transfer": "adversarial images made on one of the two models, shown to the other.",
    "masking": "the defence hides its gradient from attacks rather than resisting them. The gain that the true "
    "gradient shows is then not one.",
    "interval, p": "Tango's 95 % interval of a paired difference, and the paired bootstrap's; exact McNemar test.",
}


COUNTS = {
    "worst case": "an input counts as right only if no attack broke it. This is the figure to quote.",
    "Holm p": "exact McNemar test against the base, corrected for the number of configurations compared.",
}
SWEEP_TERMS = COUNTS | {"true gradient": TERMS["true gradient"]}
SEARCH_TERMS = COUNTS | {
    "trial": "a configuration under the search's own short attack. What looks best among many looks better than it is.",
    "finalist": "a configuration judged on inputs that the search has not seen, by all attacks that were asked for.",
}

WORDS: Mapping[type, Mapping[str, str]] = {Run: TERMS, Sweep: SWEEP_TERMS, Search: SEARCH_TERMS}


def _head(title: str, about: str, verdict: str, figures: str, sentence: str) -> str:
    soft = _soft(about) if about else ""
    tone = f'<p class="verdict {TONES.get(verdict, "")}">{html.escape(verdict)}</p>'
    return f"<header><h1>{html.escape(title)}</h1>{soft}{tone}{figures}{_said(sentence)}</header>"


def _verdict(run: Run) -> str:
    result = run.result
    sides = [("model, worst case", result.worst_case, "model"), ("base, worst case", result.base_worst_case, "base")]
    figures = "".join(
        f'<div class="figure {name}"><b>{100 * right:.1f} %</b><span>{html.escape(what)}: '
        f"{round(right * result.n)} of {result.n}</span></div>"
        for what, right, name in sides
        if right is not None
    )
    return _head(run.title, run.about, run.verdict, f'<div class="figures">{figures}</div>', result.sentence)


def _chosen(choice: Choice) -> str:
    return _head(choice.title, choice.found.small_print, choice.verdict, "", choice.found.sentence)


def _figures(run: Run) -> str:
    rows = []
    for name, kind in run.result.figures.items():
        cells = [name, *(share(side.accuracy(kind), run.result.n) for side in run.result.sides)]
        if p := run.result.compared(kind):
            difference, *limits = (100 * s for s in (p.difference, p.low, p.high, p.boot_low, p.boot_high))
            interval, bootstrap = (f"{low:+.1f} to {high:+.1f}" for low, high in (limits[:2], limits[2:]))
            cells += [f"{difference:+.1f} ({interval})", bootstrap, f"{p.p:.2g}"]
        rows.append(cells)
    headings = ["right under", "model", "base", "difference in points (95 % interval)", "bootstrap", "p"]
    return section("What stands", table(headings[: len(rows[0])], rows, first=True))


def _pictures(run: Run) -> str:
    figures = []
    for name, kind in run.result.figures.items():
        model, *base = (round(side.accuracy(kind) * run.result.n) for side in run.result.sides)
        figures.append((name, model, base[0] if base else None))
    keys = {"model": "model", **({"base": "base"} if run.result.base else {})}
    bars = pictures.accuracy_by_attack(figures, run.result.n)
    drawn = [picture("Accuracy by attack", legend(keys), bars.svg()), _zeros(run), *_smoothness(run)]
    return f'<section class="pictures">{"".join(drawn)}</section>'


def _caution(run: Run, forging: str | None) -> str:
    """Unless these figures are known to be of the forging that was judged."""
    judged = run.result.model.forging
    if forging and forging == judged:
        return ""
    if forging is None or judged is None:
        says = (
            "These figures may be of another forging than the model judged above: their file, or the result, is of an "
            "earlier version and does not say. Make it anew, and the two are compared."
        )
    else:
        says = (
            f"These figures are of another forging than the model judged above: of {forging or 'none'}; judged was "
            f"{judged or 'a model that is not forged'}."
        )
    return f'<p class="caution">{text(says)}</p>'


def _before_and_after(run: Run, row: Row) -> tuple[float | None, float | None]:
    """Which shares of a site's inputs in calibration are zero without forging, and with it; None: not known."""
    before, after = run.zeros.get(row.site), row.share_zeroed
    return before, None if after is None else max(after, before or 0.0)  # off, what was 0 is 0 all the same


def _zeros(run: Run) -> str:
    """What was measured, if it was; else what calibration tells."""
    forging = run.sparsity.forging if run.sparsity else run.sites.forging
    if run.sparsity:
        title, when, shares = "Share zeroed by site, measured", "as measured", run.sparsity.bars
        keys = {
            "line": "zero already",
            "model": f"zeroed by forging, {100 * run.sparsity.overall.net:.1f} % overall",
            "base": "predicted from calibration",
        }
    else:
        title, when = "Share zeroed by site", "in calibration"
        shares = [
            (row.site or "(root)", before or 0.0, after, None)
            for row in run.sites
            for before, after in [_before_and_after(run, row)]
            if after is not None
        ]
        keys = {"line": "zero already", "model": "zeroed by forging"}
    if not shares:
        return ""
    most = sorted(shares, key=lambda one: one[1] - one[2])[:DRAWN]
    left = f" (the {DRAWN} of {len(shares)} sites of which forging zeroes most)" if len(shares) > DRAWN else ""
    drawn = pictures.zeroed_by_site([one for one in shares if one in most], when)
    return picture(title, legend(keys) + left + _caution(run, forging), drawn.svg())


def _smoothness(run: Run) -> list[str]:
    """How strongly the forged model reacts to small changes beside the base: end to end, and site by site."""
    ends = [row for row in run.lipschitz if not _of_site(row)]
    sites: dict[str, dict[str, pictures.Ratio]] = {}
    for row in run.lipschitz:
        if _of_site(row):
            sites.setdefault(row.where, {})[row.what] = (row.ratio, row.low, row.high)
    both = [(site, gains) for site, gains in sites.items() if len(gains) == 2]
    drawn, caution = [], _caution(run, run.lipschitz.forging)
    if ends:
        rows = [(f"{row.what}:\n{row.where}", [(row.ratio, row.low, row.high)]) for row in ends]
        note = "measured on a few inputs: it bounds nothing elsewhere; left of 1 the forged model reacts less"
        found = pictures.ratios("smoothness", rows, "forged / base: mean, 95 % interval")
        drawn.append(picture("Reaction to small changes", html.escape(note) + caution, found.svg()))
    if both:
        both = sorted(both, key=lambda one: one[1][SITE_NONZERO][0] or 0)[:DRAWN]
        rows = [(site or "(root)", [gains[SITE_WHOLE], gains[SITE_NONZERO]]) for site, gains in both]
        keys = {"model": SITE_WHOLE.removeprefix("gain of "), "base": SITE_NONZERO.removeprefix("gain of ")}
        left = f" (the {DRAWN} of {len(sites)} sites with the least)" if len(sites) > DRAWN else ""
        found = pictures.ratios("gains", rows, "gain: mean, 95 % interval")
        drawn.append(picture("Gain by site", legend(keys) + left + caution, found.svg()))
    return drawn


def _of_site(row: Figure) -> bool:
    return row.what in (SITE_WHOLE, SITE_NONZERO)


def _sweep(run: Run) -> str:
    return _beside(run, "The sweep", run.sweep) if run.sweep else ""


def _search(run: Run) -> str:
    return _beside(run, "The search", run.search) if run.search else ""


def _beside(run: Run, title: str, found: Sweep | Search) -> str:
    """What a sweep or search found, and whether it was of what is judged above."""
    result, call = run.result, found.facts["call"]
    models = call["models"].values() if isinstance(call.get("models"), dict) else [call.get("model")]
    data = call["data"] if isinstance(call.get("data"), dict) else {}
    others = {
        "models": not any(side.fingerprint in models for side in result.sides),
        "radius or norm": found.threat != result.threat,
        # a search's are a part
        "inputs": isinstance(found, Sweep) and any(data.get(name) != result.data[name] for name in OF_DATA),
    }
    says = ", ".join(name for name, other in others.items() if other)
    caution = f'<p class="caution">Of other {says} than the result above.</p>' if says else ""
    return section(title, caution + _said(found.sentence) + _soft(found.small_print) + _drawn(found))


def _soft(line: str) -> str:
    return f'<p class="soft">{html.escape(line)}</p>'


def _tried(choice: Choice) -> str:
    tables = choice.found.tables()
    shown = (section(_capital(one.title), table(one.headings, one.rows, sortable=True)) for one in tables)
    return _drawn(choice.found) + "".join(shown)


def _said(sentence: str) -> str:
    return f"<p>{text(_capital(sentence))}.</p>"


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _drawn(found: Sweep | Search) -> str:
    drawn = found.picture()
    width = f"width: {96 * drawn.size[0]:.0f}px"  # as it was drawn; where a page has less room it is scrolled
    return f'<div class="wide"><div style="{width}">{drawn.svg()}</div></div>'


def _gallery(run: Run) -> str:
    shown = run.result.gallery
    if shown is None or not len(shown.index):
        return ""
    if shown.x.dim() != 4 or shown.x.shape[1] not in (1, 3):
        return ""  # no images
    model = run.result.model
    adversarial = model.examples[torch.isin(model.broken, shown.index)]
    figures = []
    for i, index in enumerate(shown.index.tolist()):
        change = adversarial[i] - shown.x[i]
        largest = float(change.abs().max())
        row = model.rows[int(model.broken_by[index])]
        was, now = (_class(run, int(classes[i])) for classes in (shown.y, shown.predicted))
        three = (
            image(shown.x[i], f"input {index} as it is, class {was}"),
            image(adversarial[i], f"input {index} attacked, taken for {now}"),
            image(0.5 + change / (2 * largest or 1), f"the difference of the two, {0.5 / (largest or 1):.3g} times"),
        )
        says = f"<b>{html.escape(was)} → {html.escape(now)}</b> input {index}, by {html.escape(row.attack)}"
        kind = html.escape(row.kind)
        figures.append(
            f'<figure><div class="three">{"".join(three)}</div><figcaption>{says} ({kind}); at most '
            f"{largest:.3g} a pixel</figcaption></figure>"
        )
    note = "As it is; attacked; the difference of the two, enlarged to the full range around grey."
    return section("What broke the model", f'{_soft(note)}<div class="gallery">{"".join(figures)}</div>')


def _class(run: Run, number: int) -> str:
    return run.classes[number] if 0 <= number < len(run.classes) else str(number)


def _findings(run: Run) -> str:
    findings = run.result.findings
    raised = "".join(_finding(f) for f in findings if f.raised)
    quiet = [f for f in findings if not f.raised]
    if not findings:
        return section("Signs that attacks failed", _soft("No check was made."))
    rest = "".join(_finding(f) for f in quiet)
    none = "" if raised else _soft("None.")
    folded = f"<details><summary>{len(quiet)} checks that raise nothing</summary>{rest}</details>" if quiet else ""
    return section("Signs that attacks failed", none + raised + folded)


def _finding(finding: Finding) -> str:
    """A check: its figure and its bound, and what docs/findings.md says about it."""
    figure = finding.note or f"{finding.value:.4g} {finding.unit}, of at most {finding.bound:.4g}"
    minor = "" if finding.raised and finding.masking else " minor"
    said = prose(paragraphs().get(finding.name, ""))
    return f'<div class="finding{minor}"><h3>{html.escape(finding.name)}</h3><p>{html.escape(figure)}</p>{said}</div>'


def _rows(run: Run) -> str:
    headings = ["kind", "attack", "attacked", "broken", "standing", "rejected", "seconds", "note"]
    tables = []
    for side in run.result.sides:
        rows = [
            [r.kind, r.attack, r.attacked, r.broken, r.standing, r.rejected, f"{r.seconds:.1f}", r.note]
            for r in side.listed
        ]
        tables.append(f"<h3>{html.escape(side.name)}</h3>{table(headings, rows)}")
    note = "Each row attacks only what the rows above it left standing."
    return section("Row by row", _soft(note) + "".join(tables))


def _sites(run: Run) -> str:
    if not run.sites:
        return ""
    headings = ["site", "kind", "input seen", "largest |x|", "threshold", "zero already", "zero forged", "left out"]
    rows = []
    for row in run.sites:
        shape = "varies" if row.shape is None else " × ".join("*" if size < 0 else str(size) for size in row.shape)
        cells = ["" if share is None else f"{100 * share:.1f} %" for share in _before_and_after(run, row)]
        rows.append([row.site or "(root)", row.kind, shape, f"{row.c_max:.4g}", row.ends(), *cells, row.left_out or ""])
    if not any(row[-1] for row in rows):
        headings, rows = headings[:-1], [row[:-1] for row in rows]
    notes = "; ".join(run.sites.notes)
    return section(
        "Site by site",
        _caution(run, run.sites.forging)
        + _soft(f"Captured as {notes}. *: any size. A click on a heading sorts.")
        + table(headings, rows, sortable=True),
    )


def _reactions(run: Run) -> str:
    """The figures of `lipschitz`."""
    headings = ["", "", "base", "forged", "forged / base", "95 % interval", "inputs"]
    ends, sites = ([row.cells() for row in run.lipschitz if _of_site(row) is so] for so in (False, True))
    if not ends and not sites:
        return ""
    note = "Measured on these inputs; none of it bounds what happens elsewhere."
    folded = table(headings, sites, sortable=True)
    more = f"<details><summary>{len(sites)} gains by site</summary>{folded}</details>" if sites else ""
    caution = _caution(run, run.lipschitz.forging)
    return section("Small changes", f"{caution}{_soft(note)}{table(headings, ends)}{more}")


def _cost(run: Run) -> str:
    result = run.result
    spent = [
        (f"{side.name}: {kind}", sum(row.seconds for row in rows))
        for side in result.sides
        for kind, rows in groupby(side.rows, lambda row: row.kind)
    ]
    spent.append(("findings", result.probe_seconds))
    parts = [(what, f"{seconds:.1f}") for what, seconds in [("in all", sum(s for _, s in spent)), *spent]]
    content = "<h3>The evaluation</h3>" + table(["", "seconds"], parts, first=True)
    if run.speeds:
        headings = ["", "plain, fastest ms", "forged, fastest ms", "throughput forged / plain, median", "quartiles"]
        rows = [
            [s.mode, f"{1e3 * s.plain:.3f}", f"{1e3 * s.forged:.3f}", f"{s.ratio:.3f}", f"{s.low:.3f} to {s.high:.3f}"]
            for s in run.speeds
        ]
        content = f"<h3>A forward pass</h3>{_caution(run, run.timed)}{table(headings, rows)}{content}"
    return section("Cost", "".join(f"<p>{html.escape(note)}</p>" for note in run.notes) + content)


def _terms(run: Run | Choice) -> str:
    kind = Run if isinstance(run, Run) else type(run.found)
    return section("What the words mean", terms(WORDS[kind].items()))


def _again(choice: Choice) -> str:
    found = choice.found
    more = {"seed, threads": ", ".join(str(found.facts.get(name, "")) for name in ("seed", "threads"))}
    if isinstance(found, Search) and (folders := [f.folder for f in found.finalists if f.folder]):
        more["the finalists"] = f"each has a page of its own, by forged-fx report: {', '.join(folders)}"
    return section("How to get this again", terms({**choice.facts, **more}.items()))


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
    return section("How to get this again", terms(facts.items()))


SECTIONS: Mapping[type, tuple[Callable[[Any], str], ...]] = {
    Run: (
        _verdict,
        _figures,
        _pictures,
        _gallery,
        _findings,
        _rows,
        _sites,
        _reactions,
        _sweep,
        _search,
        _cost,
        _terms,
        _facts,
    ),
    Choice: (_chosen, _tried, _terms, _again),
}
