"""Weights from a file: safetensors, or what torch.save wrote, read with weights_only. Nothing else is unpickled."""

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from forged_fx import checked

DEPTH = 3  # of the sets of weights within each other in a checkpoint
BATCHES = "num_batches_tracked"
COUNTER = "n_averaged"  # what torch.optim.swa_utils.AveragedModel holds beside a model


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a file's weights into `model`, all of them. ValueError, in one line, says what does not fit.

    path: of a checkpoint that holds several sets of weights that fit (a model's, and their average over training),
    "FILE:KEY" says which. What a wrapper put ahead of every name (DistributedDataParallel, torch.compile,
    AveragedModel, a training framework) is taken off, with a warning.
    """
    file, sets = _sets(path)
    wanted = model.state_dict(keep_vars=True)
    named = {key: _named_as(weights, wanted) for key, weights in sets.items()}
    fitting = [key for key, (weights, _) in named.items() if not _faults(weights, wanted)]
    if len(fitting) > 1:
        raise ValueError(
            f"{file} holds {len(fitting)} sets of weights that fit {type(model).__name__}: {_some(fitting)}. Say "
            f"which, such as {file}:{checked.visible(fitting[-1])} (of a robust model it is the average that counts)"
        )
    weights, prefix = max(named.values(), key=lambda one: len(one[0].keys() & wanted.keys()))
    if fitting:
        weights, prefix = named[fitting[0]]
    if faults := _faults(weights, wanted):
        raise ValueError(
            f"{file} holds the weights of another model than {type(model).__name__}: {'; '.join(faults)}"
            + _next_step(weights, wanted)
        )
    if prefix:
        warnings.warn(
            f"{file}: all names of its weights begin with {checked.short(prefix)}, which was taken off", stacklevel=2
        )
    model.load_state_dict(weights)


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a file by name. ValueError if it holds anything else, or several sets of which none is chosen, as
    "FILE:KEY"; FileNotFoundError if there is no file."""
    file, sets = _sets(path)
    if len(sets) > 1:
        raise ValueError(f"{file} holds several sets of weights: say which, {file}:KEY with one of {_some(list(sets))}")
    return next(iter(sets.values()))


def _sets(path: str | os.PathLike[str]) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """The file, and what state dicts it holds, by their place in it; the one that is chosen, where one is."""
    file, key = Path(path), ""
    if not file.is_file() and ":" in file.name:
        name, _, key = os.fspath(path).rpartition(":")
        file = Path(name)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {path} with weights")
    try:
        found: Any = _read(file)
    except Exception as error:  # a damaged pickle fails in every way there is
        # torch's own words offer to run what the file holds
        more = isinstance(error, pickle.UnpicklingError)
        reason = "it holds more than tensors" if more else checked.visible(str(error).partition("\n")[0])[:200]
        raise ValueError(
            f"{file} cannot be read as weights alone ({reason}): save model.state_dict() with "
            "safetensors.torch.save_file or torch.save"
        ) from error
    sets = dict(_within(found))
    if not sets:
        raise ValueError(f"{file} holds no state_dict (names and tensors): save model.state_dict()")
    if key and key not in sets:
        raise ValueError(f"{file} holds no weights at {checked.visible(key)!r}: it has {_some(list(sets))}")
    return file, {key: sets[key]} if key else sets


def _within(found: Any, place: str = "", depth: int = DEPTH) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The state dicts within what was read, and where they stand: "model_ema", "state.model"."""
    if not isinstance(found, Mapping) or not found:
        return
    named = {name: value for name, value in found.items() if isinstance(name, str)}
    if all(isinstance(value, Tensor) for value in found.values()):
        if len(named) == len(found):
            yield place, named
    elif depth:
        for name, value in named.items():
            yield from _within(value, f"{place}.{name}".removeprefix("."), depth - 1)


def _named_as(weights: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The weights by the names that are wanted, if what all their names begin with makes the difference; and that."""
    tied: dict[int, list[str]] = {}  # names, by the tensor that they have in common
    for name, value in wanted.items():
        tied.setdefault(id(value), []).append(name)

    def whole(found: dict[str, Tensor]) -> dict[str, Tensor]:
        """With what a file may leave out: safetensors keeps one of a tensor's names, old BatchNorms had no counter."""
        given = [(names, name) for names in tied.values() for name in names if name in found]
        counters = {f"{name.removesuffix('running_mean')}{BATCHES}" for name in found if name.endswith("running_mean")}
        counted = {name: wanted[name] for name in counters & wanted.keys()}
        return counted | {other: found[name] for names, name in given for other in names} | found

    weights = whole(weights)
    prefix, named = "", {name: value for name, value in weights.items() if name != COUNTER or name in wanted}
    while named and named.keys() != wanted.keys():
        first = {name.partition(".")[0] for name in named}
        if len(first) > 1 or not all("." in name for name in named):
            return weights, ""
        prefix += f"{first.pop()}."
        named = whole({name.partition(".")[2]: value for name, value in named.items()})
    return (named, prefix) if named else (weights, "")


def _faults(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """What is not as the model wants it, in words."""
    both = {name: (weights[name], wanted[name]) for name in wanted if name in weights}
    faults = {
        "lacks": [name for name in wanted if name not in weights],
        "has beside": [name for name in weights if name not in wanted],
        "has of another shape": [name for name, (one, other) in both.items() if one.shape != other.shape],
        "has no numbers with fractions for": [
            name for name, (one, other) in both.items() if other.is_floating_point() and not one.is_floating_point()
        ],
    }
    return [f"it {fault} {_some(names)}" for fault, names in faults.items() if names]


def _next_step(weights: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> str:
    """What to do, where it is plain where the weights come from."""
    rest = [name for name in weights if not name.rpartition(".")[2].startswith("forged_")]
    if len(rest) < len(weights) and set(rest) == set(wanted):
        return (
            ". They are a forged model's, with its thresholds, and a plain model would not be it: save the plain "
            "model's, and give the statistics besides (docs/quickstart.md, at Fine-tuning)"
        )
    return ""


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
