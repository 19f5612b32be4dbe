"""The page about a run: what it holds, what it lets happen, and what a browser makes of it."""

import base64
import hashlib
import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from page import Outline
from torch import nn

from forged_fx import calibrate, describe, report, transform
from forged_fx.digits import one_thread
from forged_fx.evaluate import Result, evaluate
from forged_fx.evaluate.findings import CHECKS
from forged_fx.report import markup
from forged_fx.report.findings import paragraphs
from forged_fx.report.run import facts, save_sites, save_speeds
from forged_fx.throughput import Speed

NASTY = "<b onclick=x()>$&amp;$</script>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run whose names could break a page, with all that a page can show."""
    folder = tmp_path_factory.mktemp("run")
    model = nn.Sequential()
    torch.manual_seed(0)
    model.add_module("flat", nn.Flatten())
    for name in (NASTY, "layer10", "layer2"):
        model.add_module(name, nn.Linear(12, 12))
    model.add_module("out", nn.Linear(12, 3))
    x = torch.rand(6, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    with one_thread():
        stats = calibrate(model.eval(), [x])
        forged = transform(model, stats, ratio=0.4, exclude="out")
        y = forged(x).argmax(1)
        result = evaluate(forged, model, x=x, y=y, eps=0.5, attacks=["apgd-ce"])
    result.notes.append(NASTY)
    result.model.rows[1].note = NASTY
    result.save(folder)
    save_sites(folder, describe(forged), stats)
    save_speeds(folder, [Speed("eager", 1e-3, 2e-3, 0.5, 0.4, 0.6)])
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


def test_every_text_from_outside_is_escaped(page):
    assert "<b o" not in page and page.count("</script>") == 1
    assert (
        "".join(Outline(page).words).count(NASTY) >= 6
    )  # the title twice, a class, a row, the picture, a site, a note


def test_the_page_has_its_sections_the_verdict_first(page, folder):
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "What stands", "Accuracy by attack", "Share zeroed by site", "What broke the model",
        "Signs that attacks failed", "Row by row", "Site by site", "Cost", "What the words mean",
        "How to get this again",
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


def test_a_bare_result_makes_a_shorter_page(folder, tmp_path):
    for name in ("result.json", "examples.safetensors"):
        shutil.copy(folder / name, tmp_path)
    bare = report.page(report.Run.load(tmp_path))
    assert "Site by site" not in bare and "A forward pass" not in bare and "What broke the model" in bare


@pytest.mark.parametrize("name", ["sites.json", "speeds.json"])
@pytest.mark.parametrize("content", ["", "[]", "{}", '{"sites": [{}], "notes": [], "zeros": {}, "speeds": [1]}'])
def test_a_damaged_part_is_named(folder, tmp_path, name, content):
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}.*(delete it)"):
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


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_browser_shows_it_and_sorts_it(page, tmp_path):
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    column = "[...document.querySelectorAll('table.sortable tbody tr')].map(r => r.cells[{}].textContent)"
    with Browser(tmp_path / "profile") as browser:
        browser.open(tmp_path / "page.html")
        assert browser.run("document.title") == NASTY
        assert browser.run(column.format(0)) == [NASTY, "layer10", "layer2", "out"]
        click = "document.querySelectorAll('table.sortable th button')[{}].click()"
        browser.run(click.format(0))
        assert browser.run(column.format(0)) == [NASTY, "layer2", "layer10", "out"]
        browser.run(click.format(0))
        assert browser.run(column.format(0)) == ["out", "layer10", "layer2", NASTY]
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
