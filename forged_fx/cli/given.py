"""What the arguments name: the model, its images, its forged copy."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import forged_fx
from forged_fx.cli import options
from forged_fx.cli.output import note
from forged_fx.models import device_of
from forged_fx.processes import place
from forged_fx.sources import DATA, Batches, Images, Model, load_data, load_model


def model(name: str, weights: str | None, normalize: str | None, device: str | None) -> Model:
    """The model that the arguments name, on its device."""
    found = load_model(name, weights, normalize, _device(device))
    if found.normalize is not None and normalize is None:
        mean, std = (",".join(f"{value:g}" for value in part) for part in found.normalize)
        note(f"inputs are normalised as {name} says: --normalize {mean}/{std}")
    return found


def _device(name: str | None) -> torch.device:
    """The one that is named; else a GPU, of torchrun's processes each its own; else the CPU."""
    if name is None:
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).partition(chr(10))[0]}") from error


def images(name: str, split: str | None, resize: str | None, usual: str, limit: int | None = None) -> Images:
    """The images that the arguments name. usual: the split that the command is for, where the data has splits.

    limit: how many of them the command takes; where there are fewer, a note says how many.
    """
    source = DATA.get(name.partition(":")[0])
    found = load_data(name, split or (usual if source is not None and source.splits else None), resize)
    if limit is not None and limit > len(found):
        note(f"{name} has {len(found)} images, fewer than the {limit} asked for: all are taken")
    return found


def same_source(name: str, other: str) -> bool:
    """Whether two names are of the same images, whatever way leads there."""
    paths = [text.partition(":")[2] for text in (name, other)]
    return name == other or (all(map(os.path.exists, paths)) and os.path.samefile(*paths))


def same_images(name: str, split: str | None) -> bool:
    """Whether what is calibrated on, where nothing else is named, are these very images."""
    source = DATA.get(name.partition(":")[0])
    return source is not None and (not source.splits or split == "train")


def share(batches: Batches) -> Batches:
    """Of processes that torchrun started every n-th batch is this one's; else all are."""
    rank, size = place()
    return batches[rank::size]


def seen(name: str, resize: str | None, batch: int, limit: int | None) -> Batches:
    """What to calibrate on: the training images, or this process's share of them."""
    return share(images(name, None, resize, "train", limit).batches(batch, limit))


def forged(
    plain: Model,
    stats: Path,
    ratio: str | None,
    kind: str,
    where: str,
    statistic: str | None,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    example: torch.Tensor | None,
    graph: bool = True,
) -> nn.Module:
    """The forged copy of the model's module. example: images, for an audit."""
    how = {} if ratio is None else {"ratio": options.ratio(ratio)}
    return forged_fx.transform(
        plain.module,
        str(stats),
        **how,
        kind=options.kind(kind),
        where=where.split(",") if "," in where else where,
        statistic=statistic,
        include=include or None,
        exclude=exclude or None,
        example=None if example is None else arguments(plain, example),
        graph=graph,
    )


def arguments(plain: Model, x: torch.Tensor) -> tuple[tuple, dict]:
    """Images as the (args, kwargs) of the model's module."""
    batch = plain.inputs(x.to(device_of(plain.module)))
    return ((), batch) if isinstance(batch, dict) else ((batch,), {})
