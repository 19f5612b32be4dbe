"""The demo from end to end, made quick; and the page that it writes."""

import contextlib
import html.parser
import io
import re

import pytest
import torch
from torch import nn

from forged_fx import calibrate, demo, describe, pictures, report, transform
from forged_fx.evaluate import Result, evaluate


class Outline(html.parser.HTMLParser):
    """The page's tags in order, and its visible text; fails on one that is not closed."""

    VOID = ("meta",)

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder that a run has written, and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "demo"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        demo.run(folder, n=8, epochs=1, attacks=["apgd-ce"], rounds=2)
    return folder, printed.getvalue()


@pytest.fixture
def folder(ran):
    return ran[0]


def test_it_writes_what_it_says(folder):
    assert {path.name for path in folder.iterdir()} == {
        "report.html",
        "result.json",
        "examples.safetensors",
        "timing.json",
        "stats.safetensors",
        "model.safetensors",
    }
    assert Result.load(folder).n == 8


def test_the_page_needs_no_network_and_runs_nothing(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|//\w|@import", page)
    for tag, attributes in Outline(page).tags:
        assert tag not in ("script", "link", "img", "iframe", "object")
        assert not any(name.startswith("on") or name == "src" for name in attributes)
        assert attributes.get("href", attributes.get("xlink:href", "#")).startswith("#")


def test_the_verdict_stands_first_and_the_worst_case_beside_the_base(folder):
    page, result = (folder / "report.html").read_text(encoding="utf-8"), Result.load(folder)
    head = page[page.index("<body>") : page.index("<table")]
    assert head.index(f">{result.verdict}<") < head.index("model, worst case") < head.index("base, worst case")
    assert f"{100 * result.worst_case:.1f} %" in head


def test_the_page_holds_every_row_every_site_and_both_pictures(folder):
    page, result = (folder / "report.html").read_text(encoding="utf-8"), Result.load(folder)
    outline = Outline(page)
    assert [tag for tag, _ in outline.tags].count("svg") == 2
    rows = [tag for tag, _ in outline.tags].count("tr")
    heads, figures, sites, speeds = 6, 4, 4, 2
    assert rows == heads - 1 + figures + len(result.rows) + sites + speeds
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for used in re.findall(r'(?:url\(#|href="#)([^")]+)', page):
        assert used in ids


def test_what_is_printed_begins_with_the_worst_case(ran):
    folder, printed = ran
    steps, _, results = printed.partition("\n\n")
    assert "[7/7]" in steps
    assert results.startswith(f"{Result.load(folder).verdict}: ")
    assert results.index("in the worst case") < results.index("true gradient") < results.index("eager ")


def test_without_a_compiler_the_demo_says_so_and_goes_on(monkeypatch):
    def broken(*args, **kwargs):
        error = demo.BackendCompilerFailed.__new__(demo.BackendCompilerFailed)
        RuntimeError.__init__(error, "InvalidCxxCompiler: No working C++ compiler found\nmore")
        raise error

    monkeypatch.setattr(torch, "compile", lambda model, **_: broken)
    sentence, modes = demo.check_compiled(nn.Linear(2, 2), torch.rand(1, 2))
    assert sentence.startswith("Not compiled: InvalidCxxCompiler: No working C++ compiler found. ")
    assert modes == ["eager"]


@pytest.mark.parametrize("arguments", [["-n", "0"], ["-n", "201"], ["-n", "many"]])
def test_a_number_of_images_that_cannot_be_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.main(arguments)
    assert stopped.value.code == 2


def test_a_folder_that_cannot_be_written_is_an_error_of_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert demo.main(["--out", str(tmp_path / "file" / "demo")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


class _Odd(nn.Sequential):
    pass


NASTY = "<b onclick=x()>$&amp;$"


@pytest.fixture(scope="module")
def nasty():
    """A run in which every text that comes from outside is one that could break a page."""
    model = _Odd()
    model.add_module("flat", nn.Flatten())
    model.add_module(NASTY, nn.Linear(4, 3))
    model.add_module("out", nn.Linear(3, 3))
    x = torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    stats = calibrate(model.eval(), [x])
    forged = transform(model, stats, ratio=0.5, exclude="out")
    result = evaluate(forged, x=x, y=torch.zeros(6, dtype=torch.int64), eps=0.1, attacks=["apgd-ce"])
    result.notes.append(NASTY)
    result.model.rows[0].note = NASTY
    return report.Run(
        title=NASTY, about=NASTY, result=result, sites=describe(forged), notes=[NASTY], facts={NASTY: NASTY}
    )


def test_names_are_text_and_never_markup(nasty):
    page = report.page(nasty)
    outline = Outline(page)
    assert "b" not in [tag for tag, attributes in outline.tags if "onclick" in attributes]
    assert "<b o" not in page
    shown = "".join(outline.words)
    assert shown.count(NASTY) >= 8  # the title twice, about, row, picture, site, notes, facts


def test_a_run_without_base_speeds_or_sites_makes_a_shorter_page(nasty):
    page = report.page(report.Run(title="bare", result=nasty.result))
    outline = Outline(page)
    assert [tag for tag, _ in outline.tags].count("svg") == 1
    assert "Site by site" not in page and "Cost and agreement" not in page and "base, worst case" not in page


def test_a_picture_is_the_same_bytes_every_time():
    shares = [("a", 0.1, 0.2), ("b", 0.0, 1.0)]
    assert pictures.zeroed_by_site(shares) == pictures.zeroed_by_site(shares)
