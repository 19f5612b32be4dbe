"""Context managers that set a state for a while and put it back."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.nn.modules.module as hooks
from torch.nn.parameter import is_lazy

from forged_fx import torch_internals

F = TypeVar("F", bound=Callable)


@contextlib.contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode within; afterwards every submodule is back in the mode it had."""
    modes = {module: module.training for module in model.modules()}
    _eval(model)
    try:
        yield
    finally:
        for module, training in modes.items():
            if module.training is not training and type(module).train is not torch.nn.Module.train:
                module.train(training)  # it may do more than set the flag: merge weights in eval mode, say
        for module, training in modes.items():
            module.training = training


def _eval(module: torch.nn.Module) -> None:
    try:
        module.eval()
    except NotImplementedError:  # an exported program is in the mode that it was exported in, and refuses by itself
        for child in module.children() if "train" not in vars(module) else ():
            _eval(child)


@contextlib.contextmanager
def kept_buffers(model: torch.nn.Module) -> Iterator[list[str]]:
    """Afterwards every buffer is the tensor that it was, with the values that it had: a model may count its runs, in
    eval mode too. Yields a list, which then names the buffers that were replaced, or written to. (PyTorch counts most
    writes. Those through `.data`, and those of some fused operators, show in the values of plain tensors alone.)"""
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
                if named[name]._version != version or (_is_plain(values) and not same_bits(named[name], values)):
                    named[name].copy_(values)
                    written.append(name)
            for path, buffers, name, buffer in slots:
                if buffers.get(name) is not buffer:
                    buffers[name] = buffer
                    written.append(path)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same, bit for bit. (On the meta device they hold nothing.)"""
    if a.is_nested and b.is_nested:
        return a.size(0) == b.size(0) and all(map(same_bits, a.unbind(), b.unbind()))
    if a.is_nested or b.is_nested or (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    if a.is_quantized:
        return torch.equal(a, b)
    return a.is_meta or torch.equal(_bits(a), _bits(b))


def _bits(x: torch.Tensor) -> torch.Tensor:
    x = (x if x.layout == torch.strided else x.to_dense()).resolve_conj().resolve_neg()
    if not x.is_contiguous() or x.numel() < 2:  # (then any strides are)
        x = x.clone(memory_format=torch.contiguous_format)
    return x.detach().reshape(-1).view(torch.uint8)


def _is_plain(x: torch.Tensor) -> bool:
    """Whether its values lie in memory as they are: it is not sparse, quantized, on the meta device or a subclass's."""
    return type(x) is torch.Tensor and x.layout == torch.strided and not (x.is_meta or x.is_quantized)


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


_eagerly = ContextVar("forged_fx_eagerly", default=False)


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """What is compiled runs as it is written, without what a backend's options would have made of it; on purpose."""
    token = _eagerly.set(True)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        _eagerly.reset(token)


def runs_eagerly() -> bool:
    """Whether this thread is within `eagerly`."""
    return _eagerly.get()


class _Thread(threading.local):
    """Tells one thread from all others. (An identity, Dynamo could not ask for.)"""

    def __init__(self) -> None:
        self.is_this = False  # as in regions.Pass


@contextlib.contextmanager
def module_hooks(enter: Callable, leave: Callable) -> Iterator[None]:
    """`enter(module, args)` and `leave(module, result)` around every module's forward, an exception included.

    The hooks are global, so that no module is touched; what runs in other threads is passed by.
    """
    own = _Thread()
    own.is_this = True

    def entering(module: torch.nn.Module, args: Any) -> None:
        if own.is_this:
            enter(module, args)

    def leaving(module: torch.nn.Module, args: Any, result: Any) -> None:
        if own.is_this:
            leave(module, result)

    handles = [
        hooks.register_module_forward_pre_hook(entering),
        hooks.register_module_forward_hook(leaving, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
