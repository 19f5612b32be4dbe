"""RobustBench's models, by its own loading code.

robustbench 1.1.1 asks for pyautoattack and imports it as `autoattack`, the name it had before it was on PyPI; it takes
pkg_resources from setuptools, which left it out in version 81; and it pins timm 1.0.9. `package` answers for the first
and says what to do about the second.
"""

import importlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from torch import nn

from forged_fx.sources.exported import weights_only

HOW = "pip install robustbench 'setuptools<81'"


def package(name: str = "robustbench") -> ModuleType:
    """The module, with pyautoattack under the name that it looks for. ImportError says how to get it."""
    try:
        if importlib.util.find_spec("autoattack") is None:
            for part in ("", ".state"):
                sys.modules.setdefault(f"autoattack{part}", importlib.import_module(f"pyautoattack{part}"))
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"this needs robustbench ({error}): {HOW}") from error


def architectures() -> dict[tuple[str, str], dict[str, dict]]:
    """(data set, norm) -> name -> RobustBench's entry; its "model" makes the network, untrained."""
    table = package("robustbench.model_zoo").model_dicts
    return {(data.value, norm.value): known for data, by_norm in table.items() for norm, known in by_norm.items()}


def load(data: str, norm: str, name: str, weights: Path | None = None) -> nn.Module:
    """The trained model. weights: a checkpoint as RobustBench names them; None: it is fetched into its usual folder."""
    function = package("robustbench.utils").load_model
    if weights is None:
        with weights_only():
            return function(model_name=name, dataset=data, threat_model=norm)
    with tempfile.TemporaryDirectory() as folder, weights_only():
        there = Path(folder) / data / norm / f"{name}.pt"
        there.parent.mkdir(parents=True)
        os.symlink(weights.resolve(), there)
        return function(model_name=name, model_dir=folder, dataset=data, threat_model=norm)
