"""Kernels in Triton's interpreter: a second copy of kernels/, for Triton decides that when it decorates a kernel."""

import functools
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

FOLDER = Path(__file__).parents[1] / "kernels"


@functools.cache
def kernels(name: str) -> ModuleType:
    """kernels/{name}.py, interpreted. The modules that other code imports stay as they are."""
    package = sys.modules.setdefault("interpreted_kernels", ModuleType("interpreted_kernels"))
    package.__path__ = [str(FOLDER)]
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        return importlib.import_module(f"interpreted_kernels.{name}")


@pytest.fixture(autouse=True)
def arithmetic_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.8's interpreter truncates float32 to bfloat16, loses bfloat16's denormals and rounds an fma twice."""
    from triton.runtime import interpreter

    def convert(data: np.ndarray, source: object, target: object, rounding: object) -> np.ndarray:
        assert {str(source), str(target)} == {"bf16", "fp32"}
        if str(target) == "fp32":
            return (data.astype(np.uint32) << 16).view(np.float32)
        values = torch.from_numpy(np.ascontiguousarray(data, np.float32)).bfloat16()
        return values.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)

    def fma(self: object, a: Any, b: Any, c: Any) -> Any:
        exact = a.data.astype(np.float64) * b.data.astype(np.float64) + c.data.astype(np.float64)
        return interpreter.TensorHandle(exact.astype(c.data.dtype), c.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fma)
