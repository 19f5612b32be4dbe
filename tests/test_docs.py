"""Every block of the docs runs as written, page by page and in order; every command in them is one that exists.

A block that cannot run here stands below a line `<!-- not run: why -->`.
"""

import re
import shlex
from pathlib import Path

import planted
import pytest
import torch
import typer
from torch import nn

import forged_fx
from forged_fx import trials
from forged_fx.cli.main import COMMANDS, app
from forged_fx.digits import one_thread
from forged_fx.evaluate.attacks import ATTACKS
from forged_fx.kinds import KINDS
from forged_fx.producers import MODULES
from forged_fx.sites import CALLS
from forged_fx.sources import MODELS

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
BLOCK = re.compile(r"(<!-- not run: .+? -->\n)?^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
BLOCKS = {name: [code for skipped, code in BLOCK.findall(page) if not skipped] for name, page in PAGES.items()}
TEXTS = [text.replace("\\\n", " ") for text in (*PAGES.values(), (ROOT / "README.md").read_text(encoding="utf-8"))]
LINES = [line for text in TEXTS for line in re.findall(r"^\$ (.*?)(?:\s+#.*)?$", text, flags=re.MULTILINE)]
OURS = [line for line in LINES if re.search(r"\bforged-fx |-m forged_fx ", line)]


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What pages take as given. Tables that a page adds rows to are put back."""
    monkeypatch.chdir(tmp_path)
    for table in (ATTACKS, CALLS, KINDS, MODELS, MODULES):
        for key, value in list(table.items()):
            monkeypatch.setitem(table, key, value)
    before = [(table, set(table)) for table in (ATTACKS, CALLS, KINDS, MODELS, MODULES)]
    torch.manual_seed(0)
    model = nn.Sequential()
    model.conv1, model.relu, model.flatten, model.head = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    model.eval().requires_grad_(False)
    x = torch.rand(8, 1, 8, 8)
    y = model(x).argmax(1)
    y[2:] = (y[2:] + 1) % 5  # two are right, so that attacks have little to do
    stats = forged_fx.calibrate(model, x.split(4))
    given = {"model": model, "batches": x.split(4), "x": x, "y": y, "stats": stats, "torch": torch}
    yield {**given, "forged_fx": forged_fx, "forged": forged_fx.transform(model, stats), "__name__": "page"}
    for table, keys in before:
        for key in set(table) - keys:
            del table[key]


@pytest.mark.parametrize("page", [name for name, blocks in BLOCKS.items() if blocks])
def test_every_block_runs(page, names, capsys, monkeypatch):
    if page in ("search.md", "sweep.md"):  # minutes of attacks
        planted.hurry(monkeypatch, queries=20, steps=8)
        monkeypatch.setattr(trials, "STEPS", 2)
    with one_thread():
        for block in BLOCKS[page]:
            exec(compile(block, page, "exec"), names)


def test_pages_that_should_have_blocks_have_them():
    assert {"quickstart.md", "how-it-works.md", "recipes.md", "extending.md", "cluster.md"} <= {
        name for name, blocks in BLOCKS.items() if blocks
    }


@pytest.mark.parametrize("line", OURS)
def test_every_command_is_understood(line):
    words = shlex.split(line)
    command, *arguments = words[words.index("forged_fx" if "-m" in words else "forged-fx") + 1 :]
    assert command in COMMANDS
    typer.main.get_command(app).commands[command].make_context(command, arguments)  # an option that is not there raises


def test_every_link_between_pages_leads_somewhere():
    for name, page in PAGES.items():
        for target in re.findall(r"\]\(([\w./-]+\.(?:md|svg|csv))\)", page):
            assert (ROOT / "docs" / target).exists(), f"{name}: {target}"


def test_every_file_that_the_pages_name_exists():
    for name, page in PAGES.items():
        for path in re.findall(r"`((?:forged_fx|kernels|benchmarks|tests)/[\w/]+\.\w+)`", page):
            assert (ROOT / path).exists(), f"{name}: {path}"
