"""One self-contained HTML page about one run of `evaluate`, `sweep` or `search`: the verdict first, no network, no
script but its own.

    run.py        what a page can show, and the folder that it is read from
    sections.py   the page's sections, a table with a row each
    findings.py   what docs/findings.md says about each finding
    markup.py     tables, figures, prose: all text escaped
    page.py       the frame; page.css its looks, page.js the sorting of tables

`page(load(FOLDER))` gives the page as text; `forged-fx report FOLDER` writes it.
"""

from forged_fx.report.page import page
from forged_fx.report.run import Choice, Run, load

__all__ = ["Choice", "Run", "load", "page"]
