"""The forged models within a model, and their sites by names that tell them apart: an ensemble may hold several."""

import warnings
from dataclasses import dataclass

import torch

from forged_fx.thresholds import parameters_of
from forged_fx.transform import Forging, forging_of, in_force

SCALE = 4  # times larger or smaller: also the bound of evaluate's finding "calibrated on another scale"


@dataclass(frozen=True)
class Within:
    """One site that was forged: of which forged model, and its buffers, the thresholds in force."""

    owner: torch.nn.Module
    record: Forging
    site: str
    buffers: tuple[torch.Tensor, ...]


def sites_within(model: torch.nn.Module) -> dict[str, Within]:
    """Name -> every site that is forged within `model`. The name is the site's; where several forged models are within
    `model`, the path to its own comes ahead of it. ValueError if a layer that held a threshold was replaced."""
    found = [(path, module, record) for path, module in model.named_modules() if (record := forging_of(module))]
    sites = {}
    for path, module, record in found:
        buffers = in_force(module, record)
        for site in record.reached:
            name = site if len(found) == 1 else ".".join(filter(None, (path, site)))
            sites[name] = Within(module, record, site, buffers[site])
    return sites


def thresholds_within(model: torch.nn.Module) -> dict[int, str]:
    """id of a site's first buffer -> the site's name as above; in a program of torch.export's the buffer's name."""
    named = {name: found.buffers for name, found in sites_within(model).items()} or parameters_of(model)
    return {id(buffers[0]): name for name, buffers in named.items()}


def warn_of_scale(seen: tuple[float, float] | None, what: str) -> None:
    """Warn where the largest magnitude at the first forged site that runs, and the one that calibration saw there, are
    too far apart for inputs of one scale (pixels in [0, 255], and in [0, 1]). what: the call that shows figures."""
    if seen is None:
        return
    small, large = sorted(seen)
    if small > 0 and large / small > SCALE:
        warnings.warn(
            f"{what}: the first forged site is given values of up to {seen[0]:.4g} here, and calibration saw "
            f"{seen[1]:.4g} there at most. Are these inputs scaled as those of calibration were (to [0, 1], "
            "normalised)? If not, the figures are not of what was calibrated",
            stacklevel=3,
        )
