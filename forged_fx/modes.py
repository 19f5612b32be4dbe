"""Context managers that set a state for a while and put it back; and models: copied, unwrapped, and where they are."""

import contextlib
import copy
import itertools
import json
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.nn.modules.module as hooks
from torch.nn.parameter import is_lazy

from forged_fx import torch_internals

F = TypeVar("F", bound=Callable)
CPU = torch.device("cpu")


@contextlib.contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode within; afterwards every submodule is back in the mode it had."""
    modes = {module: module.training for module in model.modules()}
    _eval(model)
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _eval(module: torch.nn.Module) -> None:
    try:
        module.eval()
    except NotImplementedError:  # an exported program is in the mode that it was exported in, and refuses by itself
        for child in module.children() if "train" not in vars(module) else ():
            _eval(child)


def copies(inputs: Any) -> Any:
    """The same with copies of all tensors: a model may write into what it is given."""
    return torch_internals.tree_map(lambda value: value.clone() if isinstance(value, torch.Tensor) else value, inputs)


@contextlib.contextmanager
def kept_randomness() -> Iterator[Callable[[], bool]]:
    """Afterwards the random generators of PyTorch, Python and numpy are where they were. Yields a function that tells
    whether any has been drawn from."""
    numpy = sys.modules.get("numpy.random")
    devices = [*range(torch.cuda.device_count())] if torch.cuda.is_initialized() else []

    def state() -> list:
        tensors = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
        _, words, used, *_ = numpy.get_state() if numpy else (None, b"", 0)
        return [random.getstate(), bytes(words), used, *(bytes(tensor.numpy()) for tensor in tensors)]

    before, python, of_numpy = state(), random.getstate(), numpy.get_state() if numpy else None
    with torch.random.fork_rng(devices):
        try:
            yield lambda: state() != before
        finally:
            random.setstate(python)
            if numpy:
                numpy.set_state(of_numpy)


def generator_state(value: Any) -> Any:
    """Where a random generator of someone's own is, in a form that can be compared; None of anything else."""
    numpy = sys.modules.get("numpy.random")
    rows: list[tuple[Any, Callable]] = [
        (random.Random, lambda own: own.getstate()),
        (torch.Generator, lambda own: own.get_state().tolist()),
    ]
    if numpy:
        rows += [
            (numpy.Generator, lambda own: _listed(own.bit_generator.state)),
            (numpy.RandomState, lambda own: _listed(own.get_state(legacy=False))),
        ]
    return next((state(value) for kind, state in rows if isinstance(value, kind)), None)


def _listed(state: dict) -> str:
    return json.dumps(state, default=lambda array: array.tolist())


def seed(value: int) -> None:
    """Seed the random generators of PyTorch, Python and numpy."""
    torch.manual_seed(value)
    random.seed(value)
    if numpy := sys.modules.get("numpy.random"):
        numpy.seed(value % 2**32)  # more it does not take


@contextlib.contextmanager
def kept_buffers(model: torch.nn.Module) -> Iterator[list[str]]:
    """Afterwards every buffer is the tensor that it was, with the values that it had: a model may count its runs, in
    eval mode too. Yields a list, which then names the buffers that were replaced, or written to, as far as PyTorch
    counts that."""
    written: list[str] = []
    named = {name: buffer for name, buffer in model.named_buffers() if not (is_lazy(buffer) or buffer.is_inference())}
    before = {name: (buffer.clone(), buffer._version) for name, buffer in named.items()}
    slots = [
        (f"{path}.{name}".lstrip("."), module._buffers, name, buffer)
        for path, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
        for name, buffer in module._buffers.items()
    ]
    try:
        yield written
    finally:
        with torch.no_grad():
            for name, (values, version) in before.items():
                if named[name]._version != version:
                    named[name].copy_(values)
                    written.append(name)
            for path, buffers, name, buffer in slots:
                if buffers.get(name) is not buffer:
                    buffers[name] = buffer
                    written.append(path)


@contextlib.contextmanager
def as_found(*models: torch.nn.Module) -> Iterator[None]:
    """Eval mode within; afterwards modes and buffers are what they were."""
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(eval_mode(model))
            stack.enter_context(kept_buffers(model))
        yield


def of_ordinary_tensors(function: F) -> F:
    """The function, run outside of `torch.inference_mode`, whose tensors can be neither moved nor attacked later."""
    return torch.inference_mode(False)(function)


@contextlib.contextmanager
def fast_path_off() -> Iterator[None]:
    """Attention without PyTorch's fused eval-mode kernel, whose products cannot be reached (it differs by 2e-7)."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


@contextlib.contextmanager
def uncompiled(model: torch.nn.Module) -> Iterator[None]:
    """The parts that torch.compile was given run as they are written: compiled while it is watched, a part would take a
    hundred times as long, and be made anew for each batch."""
    parts = [(vars(m), "_compiled_call_impl", None) for m in model.modules() if torch_internals.compiled_in_place(m)]
    wrappers = [m for m in model.modules() if "_orig_mod" in m._modules and "forward" in vars(m)]
    parts += [(vars(m), "forward", m._orig_mod.__call__) for m in wrappers]
    before = [(own, name, own[name]) for own, name, _ in parts]
    try:
        for own, name, value in parts:
            own[name] = value
        yield
    finally:
        for own, name, value in before:
            own[name] = value


class _Thread(threading.local):
    """Tells one thread from all others. (An identity, Dynamo could not ask for.)"""

    def __init__(self) -> None:
        self.is_this = False  # as in regions.Pass


@contextlib.contextmanager
def module_hooks(enter: Callable, leave: Callable) -> Iterator[None]:
    """`enter(module, args)` and `leave(module, args, result)` around every module's forward, an exception included.

    The hooks are global, so that no module is touched; what runs in other threads is passed by.
    """
    own = _Thread()
    own.is_this = True

    def entering(module: torch.nn.Module, args: Any) -> None:
        if own.is_this:
            enter(module, args)

    def leaving(module: torch.nn.Module, args: Any, result: Any) -> None:
        if own.is_this:
            leave(module, args, result)

    handles = [
        hooks.register_module_forward_pre_hook(entering),
        hooks.register_module_forward_hook(leaving, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def copied(model: torch.nn.Module, shared: Iterable[torch.Tensor] = ()) -> torch.nn.Module:
    """A deep copy, which shares these tensors. Of what a run has left in the modules (a weight that hooks compute, a
    cache), which PyTorch does not copy, it has the values.

    Raises RuntimeError where something else cannot be copied; it names what.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    for module in model.modules():
        for value in (*vars(module).values(), *module.buffers(recurse=False)):
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        for path, module in model.named_modules():
            for name, value in vars(module).items():
                try:
                    copy.deepcopy(value, dict(memo)) if name not in _HELD else None
                except Exception as reason:
                    raise RuntimeError(
                        f"the model cannot be copied, and is not changed in place: {f'{path}.{name}'.lstrip('.')!r} is "
                        f"a {type(value).__name__}, of which there is no copy ({reason}); take it off the model, or "
                        "give its class a __deepcopy__"
                    ) from error
        raise


_HELD = ("_parameters", "_buffers", "_modules")


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


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether torch.distributed.fsdp.fully_shard has spread the model's parameters over processes."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())
