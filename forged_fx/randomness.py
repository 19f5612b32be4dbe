"""The random generators of PyTorch, Python and numpy: seeded, put back, compared."""

import contextlib
import functools
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def kept_randomness() -> Iterator[Callable[[], bool]]:
    """Afterwards the random generators of PyTorch, Python and numpy are where they were. Yields a function that tells
    whether any has been drawn from."""
    devices = [*range(torch.cuda.device_count())] if torch.cuda.is_initialized() else []

    def state() -> list:
        tensors = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
        numpy = np.random.get_state(legacy=False)["state"]
        own = [random.getstate(), numpy["key"].tobytes(), numpy["pos"]]
        return [*own, *(bytes(tensor.numpy()) for tensor in tensors)]

    before, python, of_numpy = state(), random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        try:
            yield lambda: state() != before
        finally:
            random.setstate(python)
            np.random.set_state(of_numpy)


def generator_state(value: Any) -> Any:
    """Where a random generator of someone's own is, in a form that can be compared; None of anything else."""
    rows: list[tuple[Any, Callable]] = [
        (random.Random, lambda own: own.getstate()),
        (torch.Generator, lambda own: own.get_state().tolist()),
        (np.random.Generator, lambda own: _listed(own.bit_generator.state)),
        (np.random.RandomState, lambda own: _listed(own.get_state(legacy=False))),
    ]
    return next((state(value) for kind, state in rows if isinstance(value, kind)), None)


def _listed(state: dict) -> str:
    return json.dumps(state, default=lambda array: array.tolist())


def seed(value: int) -> None:
    """Seed the random generators of PyTorch, Python and numpy."""
    # PyTorch's own function notes, for each kind of device that is not there, where it was called from: milliseconds.
    seed_torch = torch.manual_seed if _has_accelerator() else torch.default_generator.manual_seed
    seed_torch(value)
    random.seed(value)
    np.random.seed(value % 2**32)  # more it does not take


@functools.cache
def _has_accelerator() -> bool:
    return torch.accelerator.is_available()


@contextlib.contextmanager
def seeded(value: int) -> Iterator[None]:
    """Within it the random generators begin there; afterwards they are where they were."""
    with kept_randomness():
        seed(value)
        yield
