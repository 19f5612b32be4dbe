"""A copy of the library with lines added, as the docs on extending it say, and a program that runs with it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(folder: Path, program: str, added: Mapping[str, tuple[str, str]]) -> subprocess.CompletedProcess:
    """Run the program in `folder`. added: file of forged_fx -> (text that stands in it once, lines ahead of it)."""
    package = folder / "forged_fx"
    if not package.exists():
        shutil.copytree(ROOT / "forged_fx", package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, (at, lines) in added.items():
        text = (ROOT / "forged_fx" / name).read_text(encoding="utf-8")
        assert text.count(at) == 1, f"{name}: {at!r}"
        (package / name).write_text(text.replace(at, lines + at), encoding="utf-8")
    where = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "-c", program], cwd=folder, env=where, capture_output=True, text=True)
