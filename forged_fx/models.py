"""What is asked of models of any make: a copy, what others wrapped them in, where they are, what hooks they have."""

import copy
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.utils import parametrize

from forged_fx import torch_internals

CPU = torch.device("cpu")

# Where a module has what it holds; of an ordinary module's copy, each is its own.
HELD = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")


def copies(inputs: Any) -> Any:
    """The same with copies of all tensors: a model may write into what it is given."""
    return torch_internals.tree_map(lambda value: value.clone() if isinstance(value, torch.Tensor) else value, inputs)


def copied(model: torch.nn.Module, shared: Iterable[torch.Tensor] = (), own: Iterable[str] = ()) -> torch.nn.Module:
    """A deep copy, which shares these tensors. Of what a run has left in the modules (a weight that hooks compute, a
    cache), which PyTorch does not copy, it has the values.

    own: the names of modules that are about to be changed. Raises RuntimeError where one of them would be the model's,
    or something cannot be copied; it names what.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    for module in model.modules():
        for value in (*vars(module).values(), *module.buffers(recurse=False)):
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        for path, module in model.named_modules():
            for name, value in vars(module).items():
                try:
                    copy.deepcopy(value, dict(memo)) if name not in HELD else None
                except Exception as reason:
                    raise RuntimeError(
                        f"the model cannot be copied, and is not changed in place: {f'{path}.{name}'.lstrip('.')!r} is "
                        f"a {type(value).__name__}, of which there is no copy ({reason}); take it off the model, or "
                        "give its class a __deepcopy__"
                    ) from error
        raise
    modes = {path: module.training for path, module in model.named_modules()}
    for path, module in twin.named_modules():  # (the outer ones first, whose train() reaches all within)
        if module.training is not modes.get(path, module.training):
            module.train(modes[path])  # torchvision's feature extractors are always copied in train mode
        if is_parametrized(module):
            module.__class__ = injected(module)
    there, here = dict(model.named_modules()), dict(twin.named_modules())
    if both := [path for path in own if path in there and there[path] is here.get(path)]:
        raise RuntimeError(
            f"the model cannot be copied, and is not changed in place: {both[0]!r} would be a part of both, as the "
            f"__deepcopy__ of {type(there[both[0]]).__name__} returns the module itself"
        )
    return twin


def with_own_state(model: torch.nn.Module) -> torch.nn.Module:
    """A copy that has the model's parameters themselves, and buffers and attributes of its own. Raises RuntimeError, or
    what a copy raises, where there is none."""
    parameters = list(model.parameters())
    twin = copied(model, parameters, own=dict(model.named_modules()))
    if any(there is not here for there, here in zip(twin.parameters(), parameters, strict=True)):
        raise RuntimeError("it would have copies of the parameters")
    return twin


def is_parametrized(module: torch.nn.Module) -> bool:
    """Whether torch.nn.utils.parametrize has put a class ahead of the module's own."""
    return parametrize.is_parametrized(module) and type(module).__module__ == parametrize.__name__


def injected(module: torch.nn.Module, *bases: type) -> type:
    """That class anew, for this module alone, ahead of its own or of `bases`: to take a parametrization off is to
    delete a property of the class, which a deep copy has in common with what it was copied from."""
    kind = type(module)
    members = {name: member for name, member in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    bases = bases or kind.__bases__
    return type(f"Parametrized{bases[0].__name__}", bases, members)


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model that torch.compile, DistributedDataParallel or DataParallel was given: they hide its calls or rename
    its modules, and do nothing that a pass without gradients needs.

    ValueError for FullyShardedDataParallel, which gives a module other parameters than it had.
    """
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            break
    if type(model).__name__ == "FullyShardedDataParallel":
        raise ValueError(
            "FullyShardedDataParallel flattens its modules' parameters: shard with torch.distributed.fsdp.fully_shard, "
            "which leaves them what they are, or calibrate and forge the model before it is wrapped"
        )
    return model


def device_of(model: torch.nn.Module, default: torch.device | None = CPU) -> torch.device | None:
    """Where its first parameter or buffer is; `default` if it has none."""
    return next((tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())), default)


def dtype_of(model: torch.nn.Module, default: torch.dtype) -> torch.dtype:
    """That of its first floating-point parameter; `default` if it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), default)


def has_hooks(module: torch.nn.Module) -> bool:
    of = vars(module).get
    return bool(
        of("_forward_hooks") or of("_forward_pre_hooks") or of("_backward_hooks") or of("_backward_pre_hooks")
    )  # (asked of each module in each call of a fused graph, so without a loop)


def hooks_its_input(module: torch.nn.Module) -> bool:
    """Whether hooks may change what the module is given; in a graph a layer's threshold would come ahead of them. Those
    of torch.nn.utils (pruning, weight_norm) make its weight."""
    hooks = (vars(module).get("_forward_pre_hooks") or {}).values()
    return not all(type(hook).__module__.startswith("torch.nn.utils.") for hook in hooks)


def is_as_its_class(module: torch.nn.Module) -> bool:
    """Whether a call of the module runs its class's forward, and nothing besides."""
    return not has_hooks(module) and "forward" not in vars(module)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether torch.distributed.fsdp.fully_shard has spread the model's parameters over processes."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def has_parts_elsewhere(model: torch.nn.Module) -> bool:
    """Whether other processes hold a part of it: it is sharded, in whichever way, or its tensors are."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    sharded = any(isinstance(module, FullyShardedDataParallel) for module in model.modules()) or is_sharded(model)
    return sharded or any(isinstance(p, DTensor) for p in model.parameters())


def waits_for_others(model: torch.nn.Module) -> bool:
    """Whether a run of it is a run in all processes, since something within is in DistributedDataParallel."""
    from torch.nn.parallel import DistributedDataParallel

    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (
        several
        and torch.distributed.get_world_size() > 1
        and any(isinstance(module, DistributedDataParallel) for module in model.modules())
    )
