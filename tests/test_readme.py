"""Every Python block of the README runs, as written and in order."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from forged_fx.digits import one_thread

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def names():
    """What the README takes as given: a classifier, data to calibrate on, images and their classes.

    All but two of the images are wrong without attack, so that few are left for the attacks to spend time on.
    """
    torch.manual_seed(0)
    model = nn.Sequential()
    model.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())
    model.head = nn.Linear(144, 5)
    model.eval()
    x = torch.rand(8, 1, 8, 8)
    y = model(x).argmax(1)
    y[2:] = (y[2:] + 1) % 5
    return {"model": model, "batches": x.split(4), "x": x, "y": y}


def test_every_python_block_runs_as_written(names, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) >= 4
    with one_thread():
        for block in BLOCKS:
            exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "run" / "result.json").exists()
    assert names["gradient"].shape == names["x"].shape
    assert "worst case" in capsys.readouterr().out


def test_every_file_that_it_names_exists():
    root = Path(__file__).parents[1]
    named = set(re.findall(r"`((?:forged_fx|kernels|benchmarks|tests)/[\w/.]*)`", README))
    assert len(named) > 10
    assert [path for path in named if not (root / path).exists()] == []


def test_every_command_that_it_names_is_a_target():
    targets = set(re.findall(r"^([a-z]+):", (Path(__file__).parents[1] / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)", README)) <= targets
