"""The processes that share a calibration or an evaluation: those that torchrun started, or this one alone.

They exchange bytes, on the CPU, over gloo: whatever the models run on, and whatever backend the caller's own process
group has.
"""

import builtins
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = timedelta(minutes=2)  # for the others to make the same call
FOREVER = timedelta(days=30)  # for the others to finish a block: attacks on large models take long


class Processes:
    """One of `size` processes. Every method must be called by all of them, in the same order."""

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank, self.size, self._group = rank, size, group

    def gather(self, data: bytes) -> list[bytes]:
        """What each process passed, by rank; the same list everywhere."""
        if self.size == 1:
            return [data]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with _alive():
            dist.all_gather(lengths, torch.tensor([len(data)]), group=self._group)
        longest = max(map(int, lengths))
        if not longest:
            return [b""] * self.size
        everyone = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        with _alive():
            dist.all_gather(everyone, _tensor(data.ljust(longest, b"\0")), group=self._group)
        return [part[: int(length)].numpy().tobytes() for part, length in zip(everyone, lengths, strict=True)]

    def first(self, act: Callable[[], bytes]) -> bytes:
        """What `act` returns in process 0, which alone runs it; an error of its is raised in every process."""
        if self.size == 1:
            return act()
        error, data = attempt(act) if self.rank == 0 else (None, b"")
        length = torch.tensor([len(data)])
        with _alive():
            dist.broadcast(length, 0, group=self._group)
            buffer = _tensor(data) if self.rank == 0 else torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(buffer, 0, group=self._group)
        if error:
            raise error
        return result(buffer.numpy().tobytes(), "process 0")


@contextmanager
def _alive() -> Iterator[None]:
    """An exchange that fails says why: the others are gone."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            "another process of this evaluation has ended or cannot be reached: its own error, if any, says why"
        ) from error


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def attempt(act: Callable[[], bytes]) -> tuple[Exception | None, bytes]:
    """(the error that `act` raised or None, what `result` turns into its result or such an error elsewhere)"""
    try:
        return None, b"+" + act()
    except Exception as error:
        return error, b"-" + json.dumps([type(error).__name__, str(error)]).encode()


def result(answer: bytes, who: str) -> bytes:
    """What the other process's `attempt` returned; or its error, of the same built-in type if it was of one."""
    if answer[:1] == b"+":
        return answer[1:]
    name, text = json.loads(answer[1:])
    kind = getattr(builtins, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        kind, text = RuntimeError, f"{name}: {text}"
    raise kind(f"{who}: {text}")


def _initialise() -> None:
    """A process group of torchrun's processes.

    torchrun's store outlives the group, and has the addresses of every group that this program has made. Each of ours
    keeps its own under another name, so that it finds no other's, and no later one of the caller's finds ours.
    """
    store, rank, size = next(iter(dist.rendezvous("env://")))
    own = dist.PrefixStore(f"forged_fx {next(_groups)}", store)
    dist.init_process_group("gloo", store=own, rank=rank, world_size=size, timeout=FOREVER)


_groups = count()


@contextmanager
def joined(shard: bool | None, call: str) -> Iterator[Processes]:
    """All processes of the caller's process group or of torchrun's; this one alone if there is but one, or not `shard`.

    RuntimeError if the others do not make the same call within two minutes.
    """
    initialised = dist.is_available() and dist.is_initialized()
    size = dist.get_world_size() if initialised else int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    if shard is False or size == 1:
        yield Processes()
        return
    if not initialised:
        _initialise()
    try:
        group = dist.new_group(backend="gloo", timeout=FOREVER)
        try:
            dist.monitored_barrier(group, PATIENCE)
        except RuntimeError as error:
            raise RuntimeError(
                f"{call} is shared by the {size} processes of this group, and all must make the same call; "
                "shard=False keeps it to one process"
            ) from error
        yield Processes(dist.get_rank(), size, group)
    finally:
        if not initialised:
            dist.destroy_process_group()
