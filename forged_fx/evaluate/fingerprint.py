"""SHA-256 of tensors and files, to tell which model and which data a figure belongs to."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from forged_fx.models import is_sharded
from forged_fx.stats import SiteStats


def of_tensors(named: Iterable[tuple[str, Any]]) -> str:
    """Names, dtypes, shapes and bytes, in the order given; what is no tensor counts by its `repr`."""
    digest = hashlib.sha256()
    for name, value in named:
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            dense = value.detach() if value.layout is torch.strided else value.detach().to_dense()
            flat = dense.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
            flat = flat.as_strided(flat.shape, (1,))  # one element alone may have any stride, and `view` asks for 1
            digest.update(flat.view(torch.uint8).numpy().data)
        else:
            digest.update(f"{name} {value!r}\n".encode())
    return digest.hexdigest()


OF_DATA = ("x_sha256", "y_sha256")  # what records call the fingerprints of inputs and classes


def of_data(x: Tensor, y: Tensor) -> dict[str, str]:
    """Of inputs and classes, by the names in `OF_DATA`."""
    return dict(zip(OF_DATA, (of_tensors([("x", x)]), of_tensors([("y", y)])), strict=True))


def of_model(model: nn.Module) -> str:
    """Of everything in `state_dict()`, of the buffers that are not in it, of the forging, and of programs.

    Other code is not in it: two models of one state may differ in what they do.
    """
    from forged_fx.transform import forging_of  # late: evaluate serves models of any make

    state, forging = model.state_dict(), of_forging(model)
    more: list[tuple[str, Any]] = [("forging", forging)] if forging else []
    more += [(f"unsaved {name}", value) for name, value in model.named_buffers() if name not in state]
    more += [  # what torch.export wrote: its kinds of forging are in its code
        (f"program {name}", module.code)
        for name, module in model.named_modules()
        if isinstance(module, fx.GraphModule) and not forging_of(module)
    ]
    return of_tensors([*sorted(state.items()), *sorted(more, key=lambda one: one[0])])


def of_architecture(model: nn.Module) -> str:
    """Of its modules' names and classes: models of one state may have other layers."""
    return of_tensors((name, f"{type(m).__module__}.{type(m).__qualname__}") for name, m in model.named_modules())


def of_parts(model: nn.Module) -> dict[str, str]:
    """Of what makes two processes' models one: layers, parameters, and the buffers that are saved (others may be what a
    process's own runs left). Of a sharded model each has a part."""
    layers = {"layers": of_architecture(model)}
    if is_sharded(model):
        return layers
    saved = model.state_dict().keys()
    tensors = {
        "parameters": model.named_parameters(),
        "buffers": ((name, value) for name, value in model.named_buffers() if name in saved),
    }
    return layers | {
        part: of_tensors((name, value) for name, value in named if not is_lazy(value))
        for part, named in tensors.items()
    }


def of_forging(model: nn.Module) -> str:
    """Kinds and sites in words, and a sum over both and the thresholds: "soft at 0, 5 (sum 1f2e3d4c5b6a)".

    "" for a model that `forged_fx.transform` has not made. Whatever the forged model is wrapped in, it is the same.
    Kinds share the names of their buffers, so that a `state_dict()` does not tell a hard threshold from a soft one.
    """
    from forged_fx.configuration import listed  # late, as above
    from forged_fx.transform import forging_of, in_force

    sites: dict[str, list[str]] = {}  # by kind
    held: list[tuple[str, Tensor]] = []
    for module in model.modules():
        if record := forging_of(module):
            parameters = in_force(module, record)
            for site in record.reached:
                kind = record.choice[site]
                sites.setdefault(kind.name, []).append(site)
                how = f"{site} {kind.name} {kind.rest(record.stats.sites[site])}"
                held += [(how, buffer) for buffer in parameters[site]]
    if not sites:
        return ""
    words = "; ".join(f"{kind} at {listed(found)}" for kind, found in sites.items())
    return f"{words} (sum {of_tensors(held)[:12]})"


def of_sites(sites: Mapping[str, SiteStats]) -> str:
    """Of what was seen at these sites, every value of it: the `repr` of a long array leaves its middle out."""
    named: list[tuple[str, Any]] = []
    for name, site in sites.items():
        seen = {field.name: getattr(site, field.name) for field in fields(site)}
        if site.channel_counts is not None:  # as they are, however they were merged
            mean, std = site.channel_mean_std()
            seen["channel_counts"] = site.channel_counts.count
            seen |= {"mean": mean, "std": std}
        for key, value in seen.items():
            named.append((f"{name} {key}", torch.tensor(value) if isinstance(value, np.ndarray) else value))
    return of_tensors(named)


def of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
