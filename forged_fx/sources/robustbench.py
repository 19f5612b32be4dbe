"""RobustBench's models, and its `benchmark`, by its own code.

robustbench 1.1.1 asks for pyautoattack and imports `autoattack`, as the package was called and called before it was on
PyPI; it takes pkg_resources from setuptools, which left it out in version 81; and it pins timm 1.0.9. `package` answers
for the first and says what to do about the second.
"""

import importlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from forged_fx.sources.exported import weights_only

HOW = "pip install robustbench pyautoattack 'setuptools<81'"


def package(name: str = "robustbench") -> ModuleType:
    """The module, after giving it the `autoattack` that it looks for. ImportError says how to get what is missing."""
    try:
        if "autoattack" not in sys.modules and importlib.util.find_spec("autoattack") is None:
            sys.modules.update(_autoattack())
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"this needs robustbench ({error}): {HOW}") from error


def _autoattack() -> dict[str, ModuleType]:
    """pyautoattack under its former name, with its former arguments."""
    new: Any = importlib.import_module("pyautoattack")

    class AutoAttack(new.AutoAttack):
        def __init__(self, model: nn.Module, log_path: str | None = None, verbose: bool = True, **rest: Any) -> None:
            if log_path is not None:
                raise ValueError("pyautoattack writes no log to a path of its own: leave out log_path")
            super().__init__(model, **rest)

        def run_standard_evaluation(self, x: Tensor, y: Tensor, bs: int = 250, **rest: Any) -> Tensor:
            examples, *_ = super().run_standard_evaluation(x, y, batch_size=bs, **rest)
            return examples

    old = ModuleType("autoattack")
    old.__dict__.update(AutoAttack=AutoAttack)
    return {"autoattack": old, "autoattack.state": importlib.import_module("pyautoattack.state")}


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
