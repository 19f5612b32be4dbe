"""What is shipped, and what `import forged_fx` costs. The installed wheel itself is tried by .ci/smoke."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import forged_fx

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The names in a wheel and in a source archive, built from a copy; and the wheel."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    skipped = shutil.ignore_patterns(".*", "demo", "build", "dist", "*.egg-info", "__pycache__", "tests", "benchmarks")
    shutil.copytree(ROOT, source, symlinks=True, ignore=skipped)
    code = (
        "from setuptools import build_meta as build\n"
        f"print(build.build_wheel({str(folder)!r}), build.build_sdist({str(folder)!r}), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheel, archive = (folder / name for name in done.stdout.splitlines()[-2:])
    with zipfile.ZipFile(wheel) as file, tarfile.open(archive) as sources:
        return set(file.namelist()), {name.partition("/")[2] for name in sources.getnames()}, wheel


def package_files():
    """Every file of the package as a user gets it, links followed."""
    kinds = ("*.py", "*.css", "*.js", "*.md", "py.typed")
    here = ROOT / "forged_fx"
    found = [path for kind in kinds for folder in (here, here / "kernels") for path in folder.rglob(kind)]
    return {path.relative_to(ROOT).as_posix() for path in found if "__pycache__" not in path.parts}


def test_the_wheel_holds_the_whole_package_and_nothing_else(built):
    wheel = built[0]
    assert {name for name in wheel if ".dist-info/" not in name} == package_files()
    assert "forged_fx/kernels/threshold.py" in wheel and "forged_fx/report/findings.md" in wheel
    assert "forged_fx/py.typed" in wheel


def test_a_wheel_can_be_built_from_the_source_archive(built):
    assert package_files() | {"pyproject.toml", "README.md"} <= built[1]


def test_the_wheel_brings_the_terminal_and_the_backend(built):
    with zipfile.ZipFile(built[2]) as file:
        (name,) = (name for name in file.namelist() if name.endswith("entry_points.txt"))
        said = file.read(name).decode()
    assert "forged-fx = forged_fx.__main__:main" in said and "forged = forged_fx.backend:forged" in said


def test_installing_it_bare_brings_torch_numpy_and_safetensors_only():
    names = {requirement.partition(">")[0] for requirement in PROJECT["project"]["dependencies"]}
    assert names == {"torch", "numpy", "safetensors"}


def test_the_import_costs_next_to_nothing_and_brings_nothing_else():
    code = (
        "import sys, time, torch\n"
        "before, began = set(sys.modules), time.process_time()\n"
        "import forged_fx\n"
        "print(time.process_time() - began)\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    seconds, brought = done.stdout.splitlines()
    assert float(seconds) < 0.05, done.stderr
    assert brought == "forged_fx"


def test_type_checkers_see_every_public_name():
    text = (ROOT / "forged_fx" / "__init__.py").read_text()
    seen = {name: module for module, names in re.findall(r"^    from forged_fx\.(\w+) import (.+)$", text, re.MULTILINE)
            for name in re.findall(r"(\w+) as \1", names)}  # fmt: skip
    assert seen == forged_fx._PUBLIC


def test_the_typed_client_uses_every_public_name():
    """mypy checks it, in `make lint`."""
    text = (ROOT / "tests" / "typed_client.py").read_text()
    assert {*re.findall(r"forged_fx\.(\w+)\(", text), "Stats"} >= {*forged_fx._PUBLIC}
