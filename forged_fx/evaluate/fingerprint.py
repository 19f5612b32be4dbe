"""SHA-256 of tensors and files, to tell which model and which data a figure belongs to."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def of_tensors(named: Iterable[tuple[str, Any]]) -> str:
    """Names, dtypes, shapes and bytes, in the order given; what is no tensor counts by its `repr`."""
    digest = hashlib.sha256()
    for name, value in named:
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            flat = flat.as_strided(flat.shape, (1,))  # one element alone may have any stride, and `view` asks for 1
            digest.update(flat.view(torch.uint8).numpy().data)
        else:
            digest.update(f"{name} {value!r}\n".encode())
    return digest.hexdigest()


def of_model(model: nn.Module) -> str:
    """Of everything in `state_dict()`. The code is not in it: two models of one state may differ in what they do."""
    return of_tensors(sorted(model.state_dict().items()))


def of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
