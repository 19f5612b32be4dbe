"""The page about a run: what it holds, what it lets happen, and what a browser makes of it."""

import base64
import hashlib
import io
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from page import Outline
from torch import nn

from forged_fx import calibrate, describe, lipschitz, pictures, report, sparsity, transform
from forged_fx.configuration import Configuration
from forged_fx.digits import one_thread
from forged_fx.evaluate import Result, evaluate
from forged_fx.evaluate.findings import CHECKS
from forged_fx.files import PAGE
from forged_fx.report import markup
from forged_fx.report.findings import paragraphs
from forged_fx.report.run import facts, save_sites, save_speeds
from forged_fx.search import Finalist, Search
from forged_fx.sweep import Point, Sweep, sweep
from forged_fx.throughput import Speed
from forged_fx.trials import Trial

NASTY = "<b onclick=x()>$&amp;$</script>"
# names of sites: what would run if it were markup, and what the page's own pictures are made with
MARKUP = (
    "<script>ran=1</script>",
    "<img src=x onerror=ran=1>",
    """'"><svg onload=ran=1>""",
    ' id="a" url(#b) #010101 font-family: d; xmlns="c"',
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run whose names could break a page, with all that a page can show."""
    folder = tmp_path_factory.mktemp("search") / "finalist-1"
    folder.mkdir()
    model = nn.Sequential()
    torch.manual_seed(0)
    model.add_module("flat", nn.Flatten())
    for name in (NASTY, *MARKUP, "layer10", "layer2"):
        model.add_module(name, nn.Linear(12, 12))
    model.add_module("out", nn.Linear(12, 3))
    for layer in model[1:]:
        nn.init.orthogonal_(layer.weight)
        nn.init.zeros_(layer.bias)
    x = torch.rand(6, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    with one_thread():
        stats = calibrate(model.eval(), [x])
        forged = transform(model, stats, ratio=0.2, exclude="out")
        y = forged(x).argmax(1)
        result = evaluate(forged, model, x=x, y=y, eps=0.5, attacks=["apgd-ce"])
        sparsity(forged, [x]).save(folder / "sparsity.json")
        lipschitz(model, forged, x, eps=0.5, steps=1).save(folder / "lipschitz.json")
    result.notes.append(NASTY)
    result.model.rows[1].note = NASTY
    result.save(folder)
    save_sites(folder, describe(forged), stats)
    save_speeds(folder, [Speed("eager", 1e-3, 2e-3, 0.5, 0.4, 0.6)], describe(forged).forging)
    call = {"models": {"base": result.base.fingerprint}, "model": result.base.fingerprint, "data": result.data}
    facts, counts = {"call": call, "seed": 0, "attacks": ["quick"], "stopped": "the budget is spent"}, (5, 4, 3)
    points = [Point(kind, 0.5, *counts, -0.5, 0.4, 1.0, 1.0, 0.2, 0.1, 0.9, 0.8, 1.0) for kind in ("hard", "clamp")]
    Sweep(6, result.threat, *counts, ["out"], points, facts).save(folder / "sweep")
    trials = [Trial(Configuration(places), 3, 0.1, 5, True, 0.0) for places in ((), (("out", "hard", 0.5),))]
    finalist = Finalist(trials[1].configuration, 3, 2, 3, 2, -0.5, 0.5, 1.0, 1.0, NASTY, False, NASTY, folder.name)
    found = Search(result.threat, 4, 6, 3, trials[0], trials[1:], [finalist], facts)
    for where in (folder / "search", folder.parent):  # beside it; and of a search, whose finalist it is
        found.save(where)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return report.page(report.Run.load(folder, NASTY, classes=[NASTY, "a", "b"]))


def test_the_one_script_is_its_own_and_nothing_else_is_loaded(page):
    (policy,) = (a["content"] for t, a in Outline(page).tags if a.get("http-equiv") == "Content-Security-Policy")
    (script,) = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}'" in policy
    assert not re.search(r"https?://|//\w+\.|@import", re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL))
    for tag, attributes in Outline(page).tags:
        assert tag not in ("link", "iframe", "object", "base", "form")
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")


def test_pictures_do_not_share_ids(page):
    ids = [attributes["id"] for _, attributes in Outline(page).tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 0 and page.count("<svg") == 6


def test_every_text_from_outside_is_escaped(page):
    assert "<b o" not in page and page.count("</script>") == 1
    words = Outline(page).words
    # the title twice, two pictures, a row, a site, two gains, a search's sentence, a note
    assert "".join(words).count(NASTY) >= 10
    for name in MARKUP:
        assert sum(word in (name, pictures.shortened(name)) for word in words) >= 5  # two pictures, a site, two gains


def test_the_page_has_its_sections_the_verdict_first(page, folder):
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "What stands", "Accuracy by attack", "Share zeroed by site, measured", "Reaction to small changes",
        "Gain by site", "What broke the model", "Signs that attacks failed", "Row by row", "Site by site",
        "Small changes", "The sweep", "The search", "Cost", "What the words mean", "How to get this again",
    ]  # fmt: skip
    assert page.index(f">{Result.load(folder).verdict}<") < page.index("<h2>")


def test_every_finding_comes_with_its_paragraph(page):
    assert list(paragraphs()) == [check.name for check in CHECKS]
    words = "".join(Outline(page).words)
    for check in CHECKS:
        first = re.sub(r"<[^>]+>", "", markup.prose(paragraphs()[check.name]))
        assert first.split(".")[0].replace("&lt;", "<") in words, check.name


def test_the_gallery_shows_what_was_and_what_is_seen(page, folder):
    shown = Result.load(folder).gallery
    images = [attributes for tag, attributes in Outline(page).tags if tag == "img"]
    assert len(images) == 3 * len(shown.index) > 0
    assert images[1]["alt"].startswith(f"input {int(shown.index[0])} attacked, taken for ")
    png = base64.b64decode(images[0]["src"].partition(",")[2])
    from PIL import Image  # comes with matplotlib

    with Image.open(io.BytesIO(png)) as picture:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    assert torch.equal(pixels, (shown.x[0] * 255).round().byte())


def test_the_command_is_one_that_can_be_given_again(folder):
    result = Result.load(folder)
    result.command = ["/opt/lib/forged_fx/__main__.py", "evaluate", "a b", "--ratio", "2**-6"]
    assert facts(result)["command"] == "python -m forged_fx evaluate 'a b' --ratio '2**-6'"
    result.command = ["/usr/bin/forged-fx", "evaluate"]
    assert facts(result)["command"] == "forged-fx evaluate"


PARTS = {  # file -> how many times the page shows figures of it
    "sites.json": 1,
    "speeds.json": 1,
    "sparsity.json": 1,
    "lipschitz.json": 3,
}


@pytest.mark.parametrize("name", PARTS)
def test_figures_of_another_forging_come_with_a_caution(folder, page, tmp_path, name):
    assert 'class="caution"' not in page  # all of one
    other = tmp_path / "run"
    shutil.copytree(folder, other)
    record = json.loads((other / name).read_text())
    for forging, words in (
        ("soft at <i> (sum 0)", "of soft at &lt;i&gt; (sum 0); judged was hard at"),
        (None, "may be"),
    ):
        (other / name).write_text(json.dumps(record | {"forging": forging}))
        mixed = report.page(report.Run.load(other))
        assert mixed.count('class="caution"') == mixed.count(words) == PARTS[name]
    del record["forging"]  # as earlier versions wrote it
    (other / name).write_text(json.dumps(record))
    assert report.page(report.Run.load(other)).count("may be of another forging") == PARTS[name]


def test_a_sweep_of_the_same_inputs_comes_without_a_caution(tmp_path):
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval(), torch.rand(8, 3, 2, 2), torch.arange(8) % 3
    stats, call = calibrate(model, [x]), {"eps": 0.1, "attacks": ["apgd-ce"]}
    evaluate(transform(model, stats, ratio=0.2), model, x=x, y=y, **call, folder=tmp_path)
    for given, cautions in ((x, 0), (x.flip(0), 1)):
        sweep(model, stats, given, y, ratios=[0.2], rounds=0, **call, folder=tmp_path / "sweep")
        assert report.page(report.load(tmp_path)).count("Of other inputs than") == cautions
        shutil.rmtree(tmp_path / "sweep")


def test_a_sweep_or_search_of_something_else_comes_with_a_caution(folder, page, tmp_path):
    assert page.count("Linf ball of radius 0.5; attacks: quick") == 1  # under which conditions it was
    shutil.copytree(folder, other := tmp_path / "run")
    for name, changes, words in (
        ("sweep", {"models": {"base": "x"}}, "Of other models than"),
        ("sweep", {"models": [], "model": 1}, "Of other models than"),
        ("sweep", {"data": {}}, "Of other inputs than"),
        ("search", {"models": None, "model": "x"}, "Of other models than"),
    ):
        path = other / name / f"{name}.json"
        record = json.loads((folder / name / f"{name}.json").read_text())
        changed = record | {"facts": record["facts"] | {"call": record["facts"]["call"] | changes}}
        path.write_text(json.dumps(changed))
        shown = report.page(report.Run.load(other))
        assert shown.count('<p class="caution">' + words) == shown.count('class="caution"') == 1
        path.write_text(json.dumps(record | {"threat": record["threat"] | {"eps": 0.1}}))
        assert "Of other radius or norm than" in report.page(report.Run.load(other))
        path.write_text(json.dumps(record))


def test_a_result_that_does_not_say_of_which_forging_it_is_makes_each_figure_doubtful(folder, tmp_path):
    other = tmp_path / "run"
    shutil.copytree(folder, other)
    record = json.loads((other / "result.json").read_text())
    for side in record["sides"]:
        del side["forging"]  # as earlier versions wrote it
    (other / "result.json").write_text(json.dumps(record))
    assert report.page(report.Run.load(other)).count("may be of another forging") == sum(PARTS.values())
    for side in record["sides"]:
        side["forging"] = ""
    (other / "result.json").write_text(json.dumps(record))
    assert "judged was a model that is not forged" in report.page(report.Run.load(other))


def test_a_bare_result_makes_a_shorter_page(folder, tmp_path):
    for name in ("result.json", "examples.safetensors"):
        shutil.copy(folder / name, tmp_path)
    bare = report.page(report.Run.load(tmp_path))
    assert "Site by site" not in bare and "A forward pass" not in bare and "What broke the model" in bare
    assert bare.count("<svg") == 1


def test_shares_come_from_calibration_where_none_were_measured(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "sparsity.json").unlink()
    page = report.page(report.Run.load(tmp_path / "run"))
    assert "<h2>Share zeroed by site</h2>" in page and "inputs in calibration" in page


def test_what_was_zero_is_zero_behind_a_threshold_that_is_off(folder, tmp_path):
    """In a run of an earlier version too, whose sites lack what was added since."""
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "sparsity.json").unlink()
    sites = json.loads((folder / "sites.json").read_text())
    sites["zeros"] = dict.fromkeys(sites["zeros"], 0.375)
    for row in sites["sites"]:
        row["share_zeroed"] = row["share_zeroed"] and 0.0
        del row["net_zeroed"], row["ratio"]
    (tmp_path / "run" / "sites.json").write_text(json.dumps(sites))
    page = report.page(report.Run.load(tmp_path / "run"))
    rows = [row for row in re.findall("<tr.*?</tr>", page, re.DOTALL) if "37.5&nbsp;%" in row]
    assert len(rows) == len(sites["sites"])
    assert sum(row.count("37.5&nbsp;%") == 2 for row in rows) == len(rows) - 1  # one is left out


def test_a_finalists_page_shows_its_search(folder, tmp_path):
    whole = tmp_path / "search"
    shutil.copytree(folder.parent, whole)
    shutil.rmtree(whole / "finalist-1" / "search")
    assert report.Run.load(whole / "finalist-1").search is not None
    (whole / "finalist-1").rename(whole / "other")
    assert report.Run.load(whole / "other").search is None


@pytest.fixture(scope="module")
def tried(folder):
    """The pages of a search and of a sweep by themselves."""
    return {
        kind: report.page(report.load(where, NASTY))
        for kind, where in ((Search, folder.parent), (Sweep, folder / "sweep"))
    }


def test_a_search_has_a_page_that_says_what_was_tried_and_what_came_of_it(tried):
    page = tried[Search]
    assert page.index(">nothing beats the base<") < page.index("<h2>")
    words = Outline(page).words
    assert words.count("hard 0.5 at out") == 2 and words.count("base") >= 2  # of the finalists, and of the trials
    assert "each has a page of its own, by forged-fx report: finalist-1" in words
    assert page.count("<svg") == 1 and words.count(NASTY) >= 2  # the title twice, and the finalist's reason


def test_a_sweep_has_a_page_with_a_row_for_each_point(tried):
    page = tried[Sweep]
    assert page.index(">none above the base<") < page.index("<h2>")
    words = Outline(page).words
    assert {"hard 0.5", "clamp 0.5", "Right, of 6 inputs"} <= set(words) and page.count("<svg") == 1


def test_a_search_whose_best_stands_says_so(folder, tmp_path):
    found = Search.load(folder.parent)
    found.finalists[0] = replace(found.finalists[0], stands=True, worst=3)
    found.save(tmp_path)
    page = report.page(report.load(tmp_path))
    assert 'class="verdict good">beats the base<' in page


@pytest.mark.parametrize("facts", [{"command": 1}, {"call": {"versions": [1]}}])
def test_facts_that_are_none_are_refused(folder, tmp_path, facts):
    found = Sweep.load(folder / "sweep")
    found.facts |= facts
    found.save(tmp_path)
    with pytest.raises(ValueError, match=r"sweep.json holds no sweep: facts\."):
        report.load(tmp_path)


def test_a_run_is_a_run_whatever_lies_above_or_beside_it(folder):
    assert isinstance(report.load(folder), report.Run)


def test_where_nothing_is_found_the_next_step_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no result.json, sweep.json or search.json; name the folder"):
        report.load(tmp_path)
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(FileNotFoundError, match="its run is unfinished"):
        report.load(tmp_path)


BROKEN = '{"sites": [{}], "notes": [], "zeros": {}, "speeds": [1], "rows": [{"site": 1}]}'


@pytest.mark.parametrize("name", ["sites.json", "speeds.json", "sparsity.json", "lipschitz.json"])
@pytest.mark.parametrize("content", ["", "[]", "{}", BROKEN])
def test_a_damaged_part_is_named(folder, tmp_path, name, content):
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}.*(delete it)"):
        report.Run.load(tmp_path / "run")


@pytest.mark.parametrize("name", ["sweep", "search"])
def test_a_damaged_sweep_or_search_is_named(folder, tmp_path, name):
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / name / f"{name}.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{name}.json holds no {name}"):
        report.Run.load(tmp_path / "run")


@pytest.mark.parametrize("name", ["sparsity.json", "lipschitz.json"])
def test_a_figure_that_is_none_is_refused(folder, tmp_path, name):
    shutil.copytree(folder, tmp_path / "run")
    measured = json.loads((folder / name).read_text())
    key = "before" if name == "sparsity.json" else "ratio"
    measured["rows"][0][key] = float("nan")
    (tmp_path / "run" / name).write_text(json.dumps(measured))
    with pytest.raises(ValueError, match=name):
        report.Run.load(tmp_path / "run")


def test_a_share_that_is_none_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    sites = json.loads((folder / "sites.json").read_text())
    sites["zeros"]["layer2"] = 7
    (tmp_path / "run" / "sites.json").write_text(json.dumps(sites))
    with pytest.raises(ValueError, match=r"not in \[0, 1\]"):
        report.Run.load(tmp_path / "run")


def test_prose():
    assert markup.prose("a `x < *y*` *b\nc* [d](e.md)\n\nf") == (
        "<p>a <code>x &lt; *y*</code> <em>b\nc</em> d</p><p>f</p>"
    )
    assert markup.prose("<script>") == "<p>&lt;script&gt;</p>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def test_a_browser_shows_it_and_sorts_it(page, browser, tmp_path):
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    sites = "[...document.querySelectorAll('table.sortable')][0]"
    column = f"[...{sites}.tBodies[0].rows].map(r => r.cells[{{}}].textContent)"
    browser.open(tmp_path / "page.html")
    assert browser.run("document.title") == NASTY
    names = (NASTY, *MARKUP, "layer10", "layer2", "out")
    assert browser.run(column.format(0)) == list(names)

    def order():
        found = browser.run(column.format(0))
        assert sorted(found) == sorted(names)
        return [name for name in found if name[0].isalpha()]

    click = f"{sites}.querySelectorAll('th button')[{{}}].click()"
    browser.run(click.format(0))
    assert order() == ["layer2", "layer10", "out"]
    browser.run(click.format(0))
    assert order() == ["out", "layer10", "layer2"]
    browser.run(click.format(4))  # the threshold, of which one site has none
    *figures, last = browser.run(column.format(4))
    assert list(map(float, figures)) == sorted(map(float, figures)) and last == ""
    paper = {}
    for width, dark in ((1100, False), (1100, True), (380, False)):
        browser.look(width, dark)
        paper[width, dark] = browser.run("getComputedStyle(document.body).backgroundColor")
        assert browser.run("document.documentElement.scrollWidth") <= width  # wide tables scroll by themselves
        assert len(browser.screenshot()) > 10_000
    assert paper[1100, False] != paper[1100, True]
    browser.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=alert(1)>')")
    refused = [error for error in browser.errors if "Content Security Policy" in error]
    assert refused and refused == browser.errors  # of what was just put in, and of nothing before


def test_a_browser_shows_pages_of_what_was_tried(tried, browser, tmp_path):
    before = len(browser.errors)
    for page in tried.values():
        (tmp_path / "page.html").write_text(page, encoding="utf-8")
        browser.open(tmp_path / "page.html")
        assert browser.run("document.title") == NASTY
        assert browser.run("document.querySelectorAll('table.sortable tbody tr').length") >= 3
        for width in (1100, 380):
            browser.look(width, dark=False)
            assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.errors[before:] == []


def test_names_that_are_markup_are_shown_and_do_nothing(page, browser, tmp_path):
    """Not only because the policy forbids it: here the page has none."""
    bare, count = re.subn("<meta http-equiv[^>]*>", "", page)
    assert count == 1
    (tmp_path / "page.html").write_text(bare, encoding="utf-8")
    browser.open(tmp_path / "page.html")
    assert browser.run("document.querySelectorAll('script').length") == 1
    assert browser.run("document.querySelectorAll('img[src=x], svg[onload], b[onclick], [onerror]').length") == 0
    assert browser.run("typeof ran") == "undefined"
    for what in ("td", "svg text"):
        shown = browser.run(f"[...document.querySelectorAll('{what}')].map(e => e.textContent)")
        assert {pictures.shortened(name) if what != "td" else name for name in (NASTY, *MARKUP)} <= set(shown)
    # and it would have run
    browser.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=ran=1>')")
    assert browser.run("new Promise(done => setTimeout(() => done(typeof ran), 50))") == "number"


def test_a_page_is_written_over_a_page_and_over_nothing_else(page, tmp_path):
    old, script = tmp_path / "page.html", tmp_path / "analysis.py"
    old.write_text(page)
    PAGE.check(old)
    old.write_text(page.replace('<meta name="generator" content="forged_fx">', ""))  # as older versions wrote them
    PAGE.check(old)
    script.write_text("import forged_fx")
    with pytest.raises(FileExistsError, match="is no report of forged_fx"):
        PAGE.check(script)
