"""The random generators of PyTorch, Python and numpy: seeded, put back, compared."""

import contextlib
import json
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch


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
def seeded(value: int) -> Iterator[None]:
    """Within it the random generators begin there; afterwards they are where they were."""
    with kept_randomness():
        seed(value)
        yield
