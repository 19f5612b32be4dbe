"""Thresholds as buffers of the module that runs the site: float32 scalars beside the weights that they guard."""

from typing import Any

import torch

from forged_fx.sites import call_of, module_of, operand_of


class HoldsThresholds(torch.nn.Module):
    """A module with thresholds among its buffers, for its own sites and its submodules'.

    They stay float32 under `.half()` and its like, as the comparison is made in float32. A checkpoint of the plain
    model loads, with `strict=True` too: thresholds that it does not name keep their values.
    """

    threshold_buffers: dict[str, str]  # site name -> the buffer's name, relative to this module

    def _apply(self, fn: Any, recurse: bool = True) -> "HoldsThresholds":
        before = {name: self.get_buffer(name) for name in self.threshold_buffers.values()}
        super()._apply(fn, recurse)
        for name, value in before.items():
            after = self.get_buffer(name)
            if after.dtype != value.dtype:
                owner, _, leaf = name.rpartition(".")
                self.get_submodule(owner)._buffers[leaf] = value.to(after.device)
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        leaves = {name.rpartition(".")[2] for name in self.threshold_buffers.values()}
        for name, value in self.state_dict().items():  # a module with two names has its threshold under both
            if name.rpartition(".")[2] in leaves:
                state_dict.setdefault(prefix + name, value)
        super()._load_from_state_dict(state_dict, prefix, *args)


def buffer_name(site: str) -> str:
    """The threshold's name beside its module's own parameters: `forged_threshold`, `forged_threshold_1`, ..."""
    k, operand = call_of(site), operand_of(site)
    return "forged_threshold" + (f"_{k}" if k else "") + (f"_input{operand}" if operand else "")


def register(owner: torch.nn.Module, site: str, root: torch.nn.Module) -> str:
    """Give the module that runs the site a threshold of 0, on its own device; returns its qualified name."""
    owner.register_buffer(buffer_name(site), zero_beside(owner, root))
    return f"{module_of(site)}.{buffer_name(site)}".removeprefix(".")


def zero_beside(owner: torch.nn.Module, root: torch.nn.Module) -> torch.Tensor:
    """A threshold of 0 on the device of the module that runs the site."""
    near = next((t for t in [*owner.parameters(), *owner.buffers(), *root.parameters()]), None)
    return torch.zeros((), dtype=torch.float32, device=None if near is None else near.device)


def thresholds_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """site name -> its threshold, for every site forged within `model`."""
    return {
        site: module.get_buffer(name)
        for module in model.modules()
        if isinstance(module, HoldsThresholds)
        for site, name in module.threshold_buffers.items()
    }
