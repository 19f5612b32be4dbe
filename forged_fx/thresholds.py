"""Thresholds as buffers of the module that runs the site: float32, beside the weights that they guard.

A kind of forging (forged_fx/kinds.py) has one or two for each site: scalars, or an element per channel.
"""

import itertools
import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from forged_fx import torch_internals
from forged_fx.kinds import Kind, Value
from forged_fx.ops import THRESHOLD_OPS
from forged_fx.sites import call_of, is_activation, module_of, operand_of
from forged_fx.stats import SiteStats

PREFIX = "forged_"  # of every buffer's name


class HoldsThresholds(torch.nn.Module):
    """A module with thresholds among its buffers, for its own sites and its submodules'.

    They stay float32 under `.half()` and its like, as the comparison is made in float32; and so does what the model
    computes with besides parameters and buffers. A checkpoint of the plain model, or of a part of it, loads, with
    `strict=True` too: thresholds that it does not name keep their values, `to_empty` and the meta device
    notwithstanding.
    """

    threshold_buffers: dict[str, tuple[str, ...]]  # site name -> its buffers' names, relative to this module
    constants: tuple[str, ...] = ()  # of buffers that are none of the model's: no cast reaches them there

    def _apply(self, fn: Any, recurse: bool = True) -> "HoldsThresholds":
        leaves = self._leaves()  # (the modules that hold them may have been wrapped since, and have other names)
        found = [(module, leaf) for module in self.modules() for leaf in leaves.intersection(module._buffers.keys())]
        found += ((self.get_submodule(owner), leaf) for owner, _, leaf in (c.rpartition(".") for c in self.constants))
        held = [(module, leaf, valued(module._buffers[leaf])) for module, leaf in found]
        super()._apply(fn, recurse)
        for module, leaf, value in held:
            after = module._buffers[leaf]
            if after is not value:
                module._buffers[leaf] = moved(value, after.device)
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        leaves = self._leaves()
        for name, value in self.state_dict(keep_vars=True).items():  # a module with two names has it under both
            if name.rpartition(".")[2] in leaves:
                _keep(state_dict, prefix + name, value)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _leaves(self) -> set[str]:
        return {name.rpartition(".")[2] for names in self.threshold_buffers.values() for name in names}


def keep_thresholds(module: torch.nn.Module, state_dict: dict, prefix: str, *_: Any) -> None:
    """A hook on loading a module's state dict: thresholds that it does not name keep their values, and those of a
    checkpoint in half precision become float32 again, whether they are copied or assigned."""
    for name, buffer in module._buffers.items():
        if name.startswith(PREFIX) and buffer is not None:
            _keep(state_dict, prefix + name, buffer)


def _keep(state_dict: dict, name: str, buffer: Tensor) -> None:
    given = state_dict.setdefault(name, valued(buffer).detach())
    state_dict[name] = given.to(torch.float32) if isinstance(given, Tensor) else given


def moved(value: Tensor, device: torch.device | None) -> Tensor:
    """A threshold's buffer on another device. On the meta device, where it has no value, it keeps the one that had."""
    new = value.to(device)
    if new.is_meta and not value.is_meta:
        new = new.as_subclass(_OnMeta)
        new.forged_value = value
    return new


class _OnMeta(Tensor):
    """A threshold on the meta device. The layer that it lies beside is an ordinary module, and may be cast or given
    memory by itself: what that makes of the threshold has its value."""

    forged_value: Tensor

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        with torch_internals.as_plain_tensors():
            result = function(*args, **(kwargs or {}))
            if getattr(function, "__name__", "") in _MOVES and isinstance(args[0], cls):
                return moved(args[0].forged_value, result.device)
        return result

    def __deepcopy__(self, memo: dict) -> Tensor:
        return memo.setdefault(id(self), moved(self.forged_value.clone(), self.device))

    def __reduce_ex__(self, _: Any) -> Any:
        return moved, (self.forged_value, self.device)


_MOVES = ("to", "empty_like", "half", "bfloat16", "float", "double", "cuda")


def valued(buffer: Tensor) -> Tensor:
    """The buffer; of one on the meta device, that which has its value."""
    return getattr(buffer, "forged_value", buffer)


def numbers(buffers: Iterable[Tensor]) -> tuple[Any, ...]:
    """A site's buffers off their device: a float each, or an array with an element per channel."""
    return tuple(buffer.numpy(force=True) if buffer.dim() else float(buffer) for buffer in buffers)


def buffer_name(site: str, buffer: str) -> str:
    """A buffer's name beside its module's own parameters: `forged_threshold`, `forged_threshold_1`, ..."""
    k, operand = call_of(site), operand_of(site)
    activation = "_activation" if is_activation(site) else ""
    return f"{PREFIX}{buffer}{activation}" + (f"_{k}" if k else "") + (f"_input{operand}" if operand else "")


def register(owner: torch.nn.Module, site: str, kind: Kind, stats: SiteStats, root: torch.nn.Module) -> tuple[str, ...]:
    """Give the module that runs the site its buffers, on its own device, the identity still; returns their names."""
    names = tuple(buffer_name(site, buffer) for buffer in kind.buffers)
    for name, value in zip(names, tensors_beside(owner, root, kind.off(stats)), strict=True):
        owner.register_buffer(name, value)
    if not any(hook.hook is keep_thresholds for hook in owner._load_state_dict_pre_hooks.values()):
        owner.register_load_state_dict_pre_hook(keep_thresholds)
    return names


def qualified(site: str, names: Iterable[str]) -> tuple[str, ...]:
    """The buffers' names relative to the root."""
    return tuple(f"{module_of(site)}.{name}".removeprefix(".") for name in names)


def tensors_beside(owner: torch.nn.Module, root: torch.nn.Module, values: Iterable[Value]) -> tuple[Tensor, ...]:
    """Values as float32 tensors on the device of the module that runs the site."""
    near = near_to(owner, root)
    device = None if near is None else near.device
    made = torch.device("cpu") if near is not None and near.is_meta else device
    return tuple(moved(torch.tensor(value, dtype=torch.float32, device=made), device) for value in values)


def near_to(owner: torch.nn.Module, root: torch.nn.Module) -> Tensor | None:
    """A tensor of a module's; of the model's, where it has none itself; None where there are none."""
    return next(itertools.chain(owner.parameters(), owner.buffers(), root.parameters()), None)


def parameters_of(model: torch.nn.Module) -> dict[str, tuple[Tensor, ...]]:
    """site name -> its buffers, for every site forged within `model`, but for those that went with a layer that was
    replaced. In a program of torch.export's, which does not say what its sites are called, buffer's name -> the
    buffer."""
    found: dict[str, tuple[Tensor, ...]] = {}
    for module in model.modules():
        if isinstance(module, HoldsThresholds):
            for site, names in module.threshold_buffers.items():
                try:  # a wrapper (torch.compile's, checkpoint_wrapper) passes on what it wraps has
                    found[site] = tuple(operator.attrgetter(name)(module) for name in names)
                except AttributeError:
                    continue
    return found or _of_programs(model)


def lost(buffers: dict[str, tuple[Tensor, ...]], sites: Iterable[str]) -> str | None:
    """What to say where one of these sites is no longer among `parameters_of` a model; None where all are."""
    gone = next((site for site in sites if site not in buffers), None)
    if gone is None:
        return None
    return (
        f"site {gone!r} has lost its threshold: the layer that held it was replaced after the model was forged, "
        "and the new one is not forged. Replace it in the plain model, and forge that"
    )


def _of_programs(model: torch.nn.Module) -> dict[str, tuple[Tensor, ...]]:
    graphs = [module.graph for module in model.modules() if isinstance(module, fx.GraphModule)]
    if not any(node.target in THRESHOLD_OPS for graph in graphs for node in graph.nodes):
        return {}
    buffers = model.named_buffers()
    return {name: (buffer,) for name, buffer in buffers if name.rpartition(".")[2].startswith(PREFIX)}


def not_forged(model: torch.nn.Module, what: str) -> str:
    """What to say of a model without the record that `transform` keeps. what: the call's name."""
    kind = type(model).__name__
    if parameters_of(model):
        return (
            f"this {kind} has thresholds, and no record of its forging, which programs do not keep: {what} takes the "
            "forged model that it was exported from"
        )
    return (
        f"this {kind} is not forged: {what} takes what forged_fx.transform returned (and no plain model that is "
        "compiled with statistics among the options)"
    )


def thresholds_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """site name -> the first of its buffers, for every site forged within `model`."""
    return {site: parameters[0] for site, parameters in parameters_of(model).items()}
