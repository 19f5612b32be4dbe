"""A copy of the library with lines added, as the docs on extending it say, and a program that runs with it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


Lines = tuple[str, str]  # text that stands in a file once; what comes ahead of it


def run(folder: Path, program: str, added: Mapping[str, Sequence[Lines]]) -> subprocess.CompletedProcess:
    """Run the program in `folder`. added: by file of forged_fx."""
    package = folder / "forged_fx"
    if not package.exists():
        shutil.copytree(ROOT / "forged_fx", package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, several in added.items():
        text = (ROOT / "forged_fx" / name).read_text(encoding="utf-8")
        for at, lines in several:
            assert text.count(at) == 1, f"{name}: {at!r}"
            text = text.replace(at, lines + at)
        (package / name).write_text(text, encoding="utf-8")
    where = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "-c", program], cwd=folder, env=where, capture_output=True, text=True)
