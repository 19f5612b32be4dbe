"""The demo from end to end, made quick; and the page that it writes."""

import contextlib
import io
import re
import shutil

import pytest
import torch
from page import Outline
from torch import nn

from forged_fx import demo, pictures, torch_internals
from forged_fx.evaluate import Result
from forged_fx.files import DEMO


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
        "sites.json",
        "speeds.json",
        "sparsity.json",
        "lipschitz.json",
    }
    assert Result.load(folder).n == 8


def test_somebodys_weights_are_not_written_over(folder, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="is no file of the demo's weights"):
        demo.run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    DEMO.check(folder / "model.safetensors")  # its own are


THEIRS = {
    "report.html": b"<html>mine</html>",
    "result.json": b"{}",
    "timing.json": b"{}",
    "examples.safetensors": b"mine",
    "stats.safetensors": b"mine",
    "sites.json": b'{"sites": [1]}',
}


@pytest.mark.parametrize("name", THEIRS)
def test_somebodys_files_are_not_written_over(tmp_path, name):
    (tmp_path / name).write_bytes(THEIRS[name])
    with pytest.raises(FileExistsError):
        demo.run(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {name: THEIRS[name]}


def test_the_page_of_somebodys_run_does_not_make_the_run_a_demos(folder, tmp_path):
    """A result, and beside it the page that `forged-fx report` writes."""
    for name in ("result.json", "examples.safetensors", "timing.json", "report.html"):
        shutil.copy(folder / name, tmp_path)
    with pytest.raises(FileExistsError, match="holds a result"):
        demo.run(tmp_path)


def test_the_page_needs_no_network(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|//\w|@import", page)
    for tag, attributes in Outline(page).tags:
        assert tag not in ("link", "iframe", "object")
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", attributes.get("xlink:href", "#")).startswith("#")


def test_the_verdict_stands_first_and_the_worst_case_beside_the_base(folder):
    page, result = (folder / "report.html").read_text(encoding="utf-8"), Result.load(folder)
    head = page[page.index("<body>") : page.index("<table")]
    assert head.index(f">{result.verdict}<") < head.index("model, worst case") < head.index("base, worst case")
    assert f"{100 * result.worst_case:.1f} %" in head


def test_the_page_holds_every_row_every_site_and_all_pictures(folder):
    page, result = (folder / "report.html").read_text(encoding="utf-8"), Result.load(folder)
    outline = Outline(page)
    assert [tag for tag, _ in outline.tags].count("svg") == 4
    rows = [tag for tag, _ in outline.tags].count("tr")
    heads, figures, sites, speeds, spent, reactions = 8, 4, 4, 2, 2 + 4 + 4, 10 + 2 * 4
    listed = sum(len(side.listed) for side in result.sides)  # (those that a gradient leaves out for one reason are one)
    assert rows == heads + figures + listed + sites + speeds + spent + reactions
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for used in re.findall(r'(?:url\(#|href="#)([^")]+)', page):
        assert used in ids


def test_what_is_printed_begins_with_the_worst_case(ran):
    folder, printed = ran
    steps, _, results = printed.partition("\n\n")
    assert "[8/8]" in steps
    assert results.startswith(f"{Result.load(folder).verdict}: ")
    assert results.index("in the worst case") < results.index("true gradient") < results.index("eager ")


def test_without_a_compiler_the_demo_says_so_and_goes_on(monkeypatch):
    def broken(*args, **kwargs):
        error = (kind := torch_internals.compiler_error()).__new__(kind)
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


def test_a_picture_is_the_same_bytes_every_time():
    shares = [("a", 0.1, 0.2, None), ("b", 0.0, 1.0, 0.9)]
    assert pictures.zeroed_by_site(shares, "words").svg() == pictures.zeroed_by_site(shares, "words").svg()
