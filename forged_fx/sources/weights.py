"""Weights from a file: safetensors, or what torch.save wrote, read with weights_only. Nothing else is unpickled."""

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from forged_fx import checked

NESTED = ("state_dict", "model_state_dict", "model")  # where training scripts keep the weights in a checkpoint
WRAPPED = "module."  # what DistributedDataParallel puts ahead of every name


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a file's weights into `model`, all of them. ValueError, in one line, says what does not fit."""
    weights = read_weights(path)
    if all(name.startswith(WRAPPED) for name in weights) and not any(n.startswith(WRAPPED) for n in model.state_dict()):
        weights = {name.removeprefix(WRAPPED): value for name, value in weights.items()}
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in weights.items()}
    faults = {
        "lacks": [name for name in wanted if name not in given],
        "has beside": [name for name in given if name not in wanted],
        "has of another shape": [name for name in wanted if name in given and given[name] != wanted[name]],
    }
    if any(faults.values()):
        said = "; ".join(f"it {fault} {_some(names)}" for fault, names in faults.items() if names)
        raise ValueError(f"{path} holds the weights of another model than {type(model).__name__}: {said}")
    model.load_state_dict(weights)


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a file by name. ValueError if it holds anything else; FileNotFoundError if there is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path} with weights")
    try:
        found: Any = _read(Path(path))
    except Exception as error:  # a damaged pickle fails in every way there is
        # torch's own words offer to run what the file holds
        more = isinstance(error, pickle.UnpicklingError)
        reason = "it holds more than tensors" if more else checked.visible(str(error).partition("\n")[0])[:200]
        raise ValueError(
            f"{path} cannot be read as weights alone ({reason}): save model.state_dict() with "
            "safetensors.torch.save_file or torch.save"
        ) from error
    for key in NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not (isinstance(found, Mapping) and found and all(isinstance(value, Tensor) for value in found.values())):
        raise ValueError(f"{path} holds no state_dict (names and tensors): save model.state_dict()")
    return {str(name): value for name, value in found.items()}


def _read(path: Path) -> Any:
    from safetensors.torch import load_file

    size = checked.regular(path)
    if path.suffix != ".safetensors":
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                _check_members(archive, size)
        # What torch says of a pickle that it refuses is searched by expressions that take the square of its length.
        with mock.patch.object(torch.serialization, "re", _SearchesNothing):
            return torch.load(path, map_location="cpu", weights_only=True)
    return load_file(path)


class _SearchesNothing:
    """In place of the module `re`."""

    match = staticmethod(re.match)

    @staticmethod
    def search(pattern: str, string: str) -> None:
        return None


def _check_members(archive: zipfile.ZipFile, size: int) -> None:
    """ValueError for an archive that would unpack to more than it has: torch.save compresses nothing."""
    members = archive.infolist()
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
        raise ValueError("its members are compressed or overlap, and torch.save writes none of that")


def _some(names: list[str]) -> str:
    return checked.visible(", ".join(name[:80] for name in names[:3])) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )
