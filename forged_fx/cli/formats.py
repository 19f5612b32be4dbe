"""Files that a forged model can be written to: a table with a row per ending of the name."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

import forged_fx
from forged_fx.evaluate.fingerprint import of_forging
from forged_fx.extras import need
from forged_fx.files import FORGED_KEY, PROGRAM, WEIGHTS, FileKind, whole
from forged_fx.sources.classifier import Classifier

Batch: TypeAlias = Tensor | dict[str, Tensor]


def _program(forged: nn.Module, batch: Batch) -> torch.export.ExportedProgram:
    """Of one tensor, to logits: a reader knows neither a library's names for its inputs nor its classes of results."""
    free = torch.export.Dim("batch")
    if isinstance(batch, dict):
        ((keyword, batch),) = batch.items()
        forged = Classifier(forged, keyword=keyword)
    return torch.export.export(forged, (batch,), dynamic_shapes=({0: free},), strict=False)


@dataclass(frozen=True)
class Format:
    """What writes the file, and what kind of file that is."""

    write: Callable[[nn.Module, Batch, Path], None]
    kind: FileKind


def _pt2(forged: nn.Module, batch: Batch, out: Path) -> None:
    file = io.BytesIO()  # to a path it writes only where the name ends in .pt2
    with torch.no_grad():
        torch.export.save(_program(forged, batch), file)
    with whole(out, PROGRAM) as part:
        part.write_bytes(file.getbuffer())


def _onnx(forged: nn.Module, batch: Batch, out: Path) -> None:
    need("onnxscript", "export")
    with whole(out, PROGRAM) as part, torch.no_grad():
        program = _program(forged, batch).run_decompositions(forged_fx.decompositions())
        onnx = torch.onnx.export(program, verbose=False)
        onnx.model.metadata_props[FORGED_KEY] = of_forging(forged)
        onnx.save(part)


def _safetensors(forged: nn.Module, batch: Batch, out: Path) -> None:
    with whole(out, WEIGHTS) as part:
        save_model(forged, str(part), metadata={FORGED_KEY: of_forging(forged)})


# the end of the file's name -> its format
FORMATS = {
    ".pt2": Format(_pt2, PROGRAM),
    ".onnx": Format(_onnx, PROGRAM),
    ".safetensors": Format(_safetensors, WEIGHTS),
}
