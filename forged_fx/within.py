"""The forged models within a model, and their sites by names that tell them apart: an ensemble may hold several."""

from dataclasses import dataclass

import torch

from forged_fx.thresholds import parameters_of
from forged_fx.transform import Forging, forging_of, in_force


@dataclass(frozen=True)
class Within:
    """One site that was forged: of which forged model, and its buffers, the thresholds in force."""

    owner: torch.nn.Module
    record: Forging
    site: str
    buffers: tuple[torch.Tensor, ...]


def forged_within(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module, Forging]]:
    """Every forged model within `model` and its record; ahead of them what its sites' names begin with: the path to it
    where there are several, else nothing."""
    found = [(path, module, record) for path, module in model.named_modules() if (record := forging_of(module))]
    return [(f"{path}." if path and len(found) > 1 else "", module, record) for path, module, record in found]


def sites_within(model: torch.nn.Module) -> dict[str, Within]:
    """Name -> every site that is forged within `model`. The name is the site's; where several forged models are within
    `model`, the path to its own comes ahead of it. ValueError if a layer that held a threshold was replaced."""
    sites = {}
    for prefix, module, record in forged_within(model):
        buffers = in_force(module, record)
        for site in record.reached:
            sites[f"{prefix}{site}"] = Within(module, record, site, buffers[site])
    return sites


def thresholds_within(model: torch.nn.Module) -> dict[int, str]:
    """id of a site's first buffer -> the site's name as above; in a program of torch.export's the buffer's name."""
    named = {name: found.buffers for name, found in sites_within(model).items()} or parameters_of(model)
    return {id(buffers[0]): name for name, buffers in named.items()}
