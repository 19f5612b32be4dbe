"""The gradient that an attack may ask for: straight through the thresholds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.overrides import TorchFunctionMode

from forged_fx import torch_internals
from forged_fx.ops import THRESHOLD_OPS


class Backward(TorchFunctionMode):
    """A base of the modes that choose which gradient a forged function has."""


class straight_through(Backward):
    """A context manager: within it, every threshold's gradient is the identity. Values stay as they are.

        with forged_fx.straight_through():
            loss = criterion(forged(x), y)
        loss.backward()

    BPDA (Athalye, Carlini, Wagner 2018, arXiv 1802.00420) for any attack, whether or not it knows of this.

    What counts is where the forward runs: a backward has the gradient that its forward was run with. It
    holds for the thread that enters it, and for none that it starts. It nests. Compiled models are compiled
    once for each gradient, when it is first asked for. `evaluate`, `sweep`, `search` and `lipschitz` choose their
    gradients themselves, and name them: called within, they find what they find outside.

    Activation checkpointing with `use_reentrant=True` runs the forward anew in the backward, where no mode
    reaches it: take `use_reentrant=False`. Dynamo heeds no mode in what is checkpointed: compiled with
    `backend="forged"`, it has this gradient where the compiled model is called within the mode; with others, the true.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # A function mode that overrides nothing else, because Dynamo traces such a one, may break its graph
        # within it, and guards what it compiled on the types of those that are active.
        kwargs = kwargs or {}
        if func in THRESHOLD_OPS:
            args, kwargs = let_through(func, args, kwargs)
        return func(*args, **kwargs)


def let_through(func: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call of `THRESHOLD_OPS` that asks for the straight-through gradient."""
    return args[: THRESHOLD_OPS[func]], {**kwargs, "straight_through": True}


@contextmanager
def callers_gradient_off() -> Iterator[None]:
    """Within, forged functions have their own gradient; afterwards what the caller had chosen is back.

    For whatever says of its figures which gradient they were found with. Other function modes stay.
    """
    with torch_internals.without_function_modes(Backward):
        yield


def straight_through_enabled() -> bool:
    """Whether this thread is within `straight_through()`; a backend may ask it too, while it compiles."""
    modes = [*torch_internals.function_modes(), *torch_internals.modes_that_dynamo_took_off()]
    return any(isinstance(mode, straight_through) for mode in modes)
