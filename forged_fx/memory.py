"""What is done where memory does not suffice: the work is cut in halves, once, and it is said."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from forged_fx.torch_internals import tree_leaves, tree_map

Function = TypeVar("Function", bound=Callable)


def ran_out(error: BaseException) -> bool:
    """Whether memory did not suffice, on a GPU or the CPU (there torch's allocator raises a RuntimeError)."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    said = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return said or isinstance(error, MemoryError | torch.OutOfMemoryError)


def in_halves(
    run: Callable[[tuple, dict], Any], args: tuple, kwargs: dict, anew: Callable[[], tuple[tuple, dict]], what: str
) -> None:
    """`run` on a batch; if memory does not suffice, on each of its halves.

    anew: gives (args, kwargs) once more, as they were. what: the batch's name, for the warning.
    """
    try:
        run(args, kwargs)
        return
    except Exception as error:
        sizes = {len(leaf) if leaf.dim() else 1 for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if not ran_out(error) or len(sizes) != 1 or min(sizes) < 2:
            raise
    (size,) = sizes
    warnings.warn(
        f"{what}: out of memory, so it was run in halves, of {size // 2} and {size - size // 2}", stacklevel=3
    )
    for half in (slice(None, size // 2), slice(size // 2, None)):
        run(*tree_map(lambda value, half=half: value[half] if isinstance(value, Tensor) else value, anew()))


def at_half_the_batch(function: Function) -> Function:
    """The function; if memory does not suffice, once more at half its `batch_size`."""

    @functools.wraps(function)
    def run(*args: Any, batch_size: int = function.__kwdefaults__["batch_size"], **rest: Any) -> Any:
        try:
            return function(*args, batch_size=batch_size, **rest)
        except Exception as error:
            if not ran_out(error) or batch_size < 2:
                raise
        warnings.warn(f"out of memory at batch_size={batch_size}: it goes on at {batch_size // 2}", stacklevel=2)
        return function(*args, batch_size=batch_size // 2, **rest)

    return cast(Function, run)
