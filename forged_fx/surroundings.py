"""What a forward may begin, or ask for, around its calls: a graph holds the calls alone."""

import contextlib
import inspect
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.attention

from forged_fx import torch_internals
from forged_fx.is_tensor import is_of_torch
from forged_fx.untraceable import Untraceable


@contextlib.contextmanager
def other_autocast() -> Iterator[None]:
    """Autocast where there is none, and none where there is."""
    found = {device: torch.is_autocast_enabled(device) for device in ("cpu", "cuda")}
    try:
        for device, on in found.items():
            torch.set_autocast_enabled(device, not on)
        yield
    finally:
        for device, on in found.items():
            torch.set_autocast_enabled(device, on)


_SEEDS = "sets the state of a random generator"
_FUNCTION = "runs an autograd.Function"
_DTYPES = ("get_autocast_dtype", "get_autocast_cpu_dtype", "get_autocast_gpu_dtype")

# (where, the function that begins it or asks for it, what the forward does by that)
_CONTEXTS: list[tuple[Any, str, str]] = [
    (torch, "set_autocast_enabled", "sets autocast"),
    *((torch, name, "asks for the dtype of autocast") for name in _DTYPES),
    (torch.inference_mode, "__enter__", "sets inference mode"),
    (torch, "is_inference_mode_enabled", "asks for inference mode"),
    (torch.nn.attention, torch_internals.CHOOSE_ATTENTION, "sets the kernels of attention"),
    (torch.enable_grad, "__enter__", "sets the grad mode"),
    (torch.set_grad_enabled, "__init__", "sets the grad mode"),
    (torch.autograd.graph.saved_tensors_hooks, "__enter__", "says how tensors are saved for the backward"),
    *((owner, name, _SEEDS) for owner in (torch, torch.random) for name in ("manual_seed", "seed", "set_rng_state")),
    (torch.cuda, "manual_seed", _SEEDS),
    (torch.cuda, "manual_seed_all", _SEEDS),
    (torch.autograd.Function, "apply", _FUNCTION),  # (of classes that the forward makes; their own forwards, of others)
]


# To trace and to audit, functions of the process's are replaced and its random generators are seeded.
one_at_a_time = threading.RLock()


@contextlib.contextmanager
def contexts_refused() -> Iterator[None]:
    """Within it, a forward that begins a context, or asks for one, is Untraceable: a graph holds the calls in it, and
    not the context. Other threads begin theirs, and trace one after the other."""
    tracing = threading.get_ident()

    def refusing(function: Any, what: str) -> Any:
        if isinstance(function, staticmethod):
            return staticmethod(refusing(function.__func__, what))
        if isinstance(function, classmethod | types.ClassMethodDescriptorType):
            return classmethod(refusing(lambda cls, *args: function.__get__(None, cls)(*args), what))

        def refuse(*args: Any, **kwargs: Any) -> Any:
            of_torch = what == _FUNCTION and isinstance(args[0], type) and args[0].__module__.startswith("torch.")
            by_torch = what.startswith("asks") and is_of_torch(sys._getframe(1))
            if of_torch or by_torch or threading.get_ident() != tracing:
                return function(*args, **kwargs)
            raise Untraceable(f"its forward {what}, which a graph would drop")

        return refuse

    with one_at_a_time:
        rows = [*_CONTEXTS, *((function, "forward", _FUNCTION) for function in torch_internals.functions())]
        plain = [inspect.getattr_static(owner, name) for owner, name, _ in rows]
        inherited = [name not in vars(owner) for owner, name, _ in rows]
        for (owner, name, what), function in zip(rows, plain, strict=True):
            setattr(owner, name, refusing(function, what))
        try:
            yield
        finally:
            for (owner, name, _), function, from_above in zip(rows, plain, inherited, strict=True):
                delattr(owner, name) if from_above else setattr(owner, name, function)
