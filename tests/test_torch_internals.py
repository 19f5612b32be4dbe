"""What of PyTorch is used that PyTorch does not promise: a new release says here, by name, what it moved."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint

import forged_fx
from forged_fx.torch_internals import CHECKPOINT, NAMES

ROOT = Path(forged_fx.__file__).parents[1]
CODE = [path for folder in ("forged_fx", "kernels") for path in sorted((ROOT / folder).rglob("*.py"))]


def private(path: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in path.split("."))


def used(source: str) -> set[str]:
    """The private names of torch, dotted, that code imports or reaches from `torch`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("torch.")}
        elif isinstance(node, ast.Attribute) and (text := ast.unparse(node)).startswith("torch."):
            found.add(text)
    found = {path for path in found if private(path) and path.replace(".", "").replace("_", "").isalnum()}
    return {path for path in found if not any(other.startswith(f"{path}.") for other in found)}


def resolve(path: str) -> object:
    parts = path.split(".")
    for k in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:k]))
        except ModuleNotFoundError:
            continue
        for part in parts[k:]:
            value = getattr(value, part)
        return value
    raise ModuleNotFoundError(path)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_there(name):
    assert resolve(name) is not None, f"torch {torch.__version__} moved {name}, which {NAMES[name]}"


def test_every_private_name_in_the_code_is_listed_and_stands_in_one_module():
    found = {path.name: names for path in CODE if (names := used(path.read_text()))}
    assert found == {"torch_internals.py": set(NAMES)}
    assert used("from torch._x import y\nimport torch._z\ntorch.a._b.c(torch.d)") == {
        "torch._x.y",
        "torch._z",
        "torch.a._b.c",
    }


def test_the_frame_of_a_checkpoint_holds_its_generator():
    assert "gen" in CHECKPOINT.co_varnames and CHECKPOINT.co_filename == torch.utils.checkpoint.__file__


def test_a_missing_name_is_noticed():
    with pytest.raises(AttributeError):
        resolve("torch._C._no_such_name")


@pytest.mark.parametrize("part", ["calibrate", "backend"])
def test_a_torch_that_is_too_old_is_named_with_the_next_step(part):
    code = f"import torch; torch.__version__ = '2.10.1+cpu'; import forged_fx.{part}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.splitlines()[-1] == (
        "ImportError: forged_fx needs PyTorch 2.11 or newer, and this is 2.10.1+cpu: pip install --upgrade torch"
    )
